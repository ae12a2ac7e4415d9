"Damaged copies in one batch: a part of benchmarks/fuzz.py"

from conftest import TOP, load_script


def test_damaged_copies():
    out = load_script(TOP / "benchmarks/fuzz.py").fuzz(300)
    assert out["exit_code"] == 1 and not out["tracebacks"] and not out["said_twice"]
    assert "lost" not in out["total"] and "differs, check sum" not in out["total"], out
    assert out["total"]["refused"] > 150
