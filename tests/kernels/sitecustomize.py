"""Where this folder is in PYTHONPATH, a notebook's kernel, DVC and the command line of asap are
forks of the process that tests/preloaded.py starts

Python imports this file before it runs a program."""

import os
import sys
from pathlib import Path

KINDS = {"ipykernel_launcher": "kernel", "dvc": "module", "asap.cli": "module"}  # of python -m


def program(words: list[str]) -> tuple[str, list[str], str] | None:
    "Kind, arguments and first folder of the path of a program that is to be a fork"
    match words:
        case ["-m", name, *_] if name in KINDS:
            return KINDS[name], words[1:], os.getcwd()
        case ["-c", code, *_] if "dvc.cli" in code:
            return "code", words, ""
        case [script, *_] if Path(script).name == "dvc":
            return "script", words, os.path.dirname(script)
    return None


if found := program(sys.orig_argv[1:]):
    sys.path.append(str(Path(__file__).parents[1]))
    from stand_in import NAME, stand_in

    sys.path.pop()
    if NAME in os.environ:
        kind, arguments, folder = found
        sys.path.insert(0, folder)
        stand_in(kind, arguments)
