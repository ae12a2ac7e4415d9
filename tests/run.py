"Run every check and end with one line: `N passed, N failed`"

import os
import sys
from pathlib import Path

import pytest
from preloaded import INSTRUCTIONS, MEMORY, preloaded

os.chdir(Path(__file__).resolve().parent.parent)
os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")
os.environ.update(**INSTRUCTIONS, **MEMORY)


class Count:
    "Outcomes, one a test"

    passed = failed = skipped = 0

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed += 1


class Share:
    "What one worker runs in a row: a file of tests, or one page"

    def pytest_xdist_make_scheduler(self, config, log):
        from xdist.scheduler import LoadScopeScheduling

        class Units(LoadScopeScheduling):
            def _split_scope(self, nodeid):
                file, name = nodeid.split("::", 1)
                return nodeid if name.startswith("test_page[") else file

        return Units(config, log)


count = Count()
with preloaded() as env:
    os.environ.update(env)
    code = pytest.main(
        [
            "-q",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "--no-loadscope-reorder",
            "--durations",
            "15",
            *sys.argv[1:],
        ],
        plugins=[count, Share()],
    )
if code and not count.failed:
    count.failed = 1
print(
    f"{count.passed} passed, {count.failed} failed"
    + (f", {count.skipped} skipped" if count.skipped else "")
)
sys.exit(int(code))
