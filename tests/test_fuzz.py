"Damaged copies in one batch: a part of benchmarks/fuzz.py"

import importlib.util

from conftest import TOP


def test_damaged_copies():
    spec = importlib.util.spec_from_file_location("fuzz", TOP / "benchmarks/fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = module.fuzz(300)
    assert out["exit_code"] == 1 and not out["tracebacks"] and not out["said_twice"]
    assert "lost" not in out["total"] and "differs, check sum" not in out["total"], out
    assert out["total"]["refused"] > 150
