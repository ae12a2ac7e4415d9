"Every page runs from top to bottom, and its checks hold"

import pages
import pytest
from conftest import PAGES, TOP


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda p: p.relative_to(TOP / "nbs").with_suffix("").as_posix()
)
def test_page(page, tmp_path):
    run = pages.process(page, TOP, tmp_path / "log")
    run.start()
    run.join(600)
    late = run.is_alive()
    if late:
        run.kill()
        run.join()
    assert run.exitcode == 0, (
        f"{'stopped after ten minutes' if late else f'exit code {run.exitcode}'}: {(tmp_path / 'log').read_text(errors='replace')[-12000:]}"
    )
