"Every page runs from top to bottom, and its checks hold"
import subprocess, sys

import pytest
from conftest import PAGES, TOP

RUN = "import sys; from pathlib import Path; from nbdev.test import test_nb; sys.exit(0 if test_nb(Path(sys.argv[1]))[0] else 1)"

@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(TOP/"nbs").with_suffix("").as_posix())
def test_page(page):
    done = subprocess.run([sys.executable, "-c", RUN, str(page)], cwd=TOP, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
