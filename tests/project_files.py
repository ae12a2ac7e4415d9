"""Files of the project: what git tracks and what is new; without git, what .gitignore leaves.
As a program it prints the names of this tree's files, each ended by a NUL."""

import os
import subprocess
import sys
from pathlib import Path

from pathspec import GitIgnoreSpec

TOP = Path(__file__).resolve().parent.parent


def _by_git(top: Path) -> list[str]:  # empty outside git, and where git does not trust the folder
    call = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(call, cwd=top, capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return [os.fsdecode(n) for n in done.stdout.split(b"\0") if n]


def _without_git(top: Path) -> list[str]:
    names, rules = [], {}  # folder -> its .gitignore
    for folder, folders, files in os.walk(top):
        here = Path(folder)
        if (here / ".gitignore").exists():
            rules[here] = GitIgnoreSpec.from_lines((here / ".gitignore").read_text().splitlines())

        def kept(name: str, end: str = "", here: Path = here) -> bool:
            path = here / name
            return name != ".git" and not any(
                rule.match_file(path.relative_to(at).as_posix() + end)
                for at, rule in rules.items()
                if at in path.parents
            )

        folders[:] = sorted(n for n in folders if kept(n, "/"))
        names += [(here / n).relative_to(top).as_posix() for n in sorted(files) if kept(n)]
    return names


def project_files(top: Path = TOP) -> list[str]:  # relative to `top`
    "Names of the files that exist"
    return [n for n in _by_git(top) or _without_git(top) if (top / n).is_file()]


if __name__ == "__main__":
    sys.stdout.buffer.write(b"".join(os.fsencode(n) + b"\0" for n in project_files()))
