"How the code is written: linters, types, line length, documented arguments, one name for one thing"

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PAGES, STAGES, TOP

COLUMNS = 100
MODULES = sorted(
    p
    for p in (TOP / "asap").rglob("*.py")
    if p.name != "_modidx.py" and "__pycache__" not in p.parts
)
PYPROJECT = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf8"))
STRING_TABLES = [  # files whose lines may be longer: named in pyproject.toml
    pattern
    for pattern, rules in PYPROJECT["tool"]["ruff"]["lint"]["per-file-ignores"].items()
    if "E501" in rules and pattern != "asap/**"
]
MAX_SHARED_NAMES = 12
SHARED_NAMES = {  # names that their module completes: `checkpoint.load`
    "COLUMNS",
    "TASKS",
    "TEMPLATES",
    "evaluate",
    "fit_predict",
    "load",
    "metrics",
    "per_label",
    "run",
    "run_all",
    "save",
}


@pytest.mark.parametrize(
    "command",
    [
        "ruff check",
        "ruff format --check nbs tests benchmarks",
        "codespell",
        "mypy asap",
    ],
)
def test_tool(command):
    name, *options = command.split()
    tool = Path(sys.executable).with_name(name)
    done = subprocess.run([tool, *options], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def long_lines(text: str) -> list[str]:
    "Lines over 100 columns; `__all__` is written by nbdev, at 120"
    text = re.sub(r"^__all__ = \[.*?\]$", "", text, flags=re.M | re.S)
    return [line for line in text.splitlines() if len(line) > COLUMNS]


def is_string_table(path: Path) -> bool:
    return any(path.relative_to(TOP).match(pattern) for pattern in STRING_TABLES)


@pytest.mark.parametrize("folder", ["asap", "tests", "benchmarks"])
def test_no_long_line(folder):
    files = [p for p in (TOP / folder).rglob("*.py") if p.name != "_modidx.py"]
    bad = {
        p.relative_to(TOP).as_posix(): len(found)
        for p in sorted(files)
        if not is_string_table(p) and (found := long_lines(p.read_text(encoding="utf8")))
    }
    assert not bad, f"lines over {COLUMNS} columns: {bad}"


def test_no_long_line_in_a_code_cell():
    bad = {}
    for page in (*PAGES, *STAGES):
        cells = json.loads(page.read_text(encoding="utf8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        if not is_string_table(page) and (found := sum(len(long_lines(c)) for c in code)):
            bad[page.relative_to(TOP).as_posix()] = found
    assert not bad, f"lines over {COLUMNS} columns: {bad}"


def public_names(tree: ast.Module) -> list[str]:
    "What `__all__` lists"
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    "Public functions and public methods of public classes, `__init__` and `__call__` too"
    names = set(public_names(tree))
    for node in tree.body:
        if getattr(node, "name", None) not in names:
            continue
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (
                    not method.name.startswith("_") or method.name in ("__init__", "__call__")
                ):
                    yield f"{node.name}.{method.name}", method


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    "All arguments but `self` and `cls`, in order"
    a = function.args
    every = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    found = [x for x in every if x is not None and x.arg not in ("self", "cls")]
    return sorted(found, key=lambda x: (x.lineno, x.col_offset))


def undocumented(source: str) -> list[str]:
    "`function(argument)` of each argument without annotation and without a comment of its own"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    bad = []
    for name, function in public_functions(ast.parse(source)):
        args = arguments(function)
        defaults = [d for d in (*function.args.defaults, *function.args.kw_defaults) if d]
        for i, arg in enumerate(args):
            following = args[i + 1].lineno if i + 1 < len(args) else None
            ends = [d.end_lineno for d in defaults if arg.lineno <= d.lineno]
            ends = [e for e in ends if following is None or e < following]
            last_on_line = following is None or following > arg.lineno
            alone = last_on_line and commented & {arg.lineno, *ends}
            if arg.annotation is None and not alone:
                bad.append(f"{name}({arg.arg})")
    return bad


def test_public_arguments_are_documented():
    bad = {
        p.relative_to(TOP).as_posix(): found
        for p in MODULES
        if (found := undocumented(p.read_text(encoding="utf8")))
    }
    assert not bad, f"arguments without a type or comment: {bad}"


def test_undocumented_arguments_are_found():
    source = """
__all__ = ["f"]
def f(
    a,  # documented
    b: int,
    c, d=3,  # of d alone
    e=(1,
       2),  # said
    *, g,
): pass
def _hidden(x): pass
"""
    assert undocumented(source) == ["f(c)", "f(g)"]


def test_public_names_are_not_defined_twice():
    where = defaultdict(list)
    for path in MODULES:
        module = path.relative_to(TOP).with_suffix("").as_posix().replace("/", ".")
        if module.startswith("asap.data.cohorts."):
            continue  # each cohort page has the same few functions, of its own layout
        for name in public_names(ast.parse(path.read_text(encoding="utf8"))):
            where[name].append(module)
    shared = {name: modules for name, modules in where.items() if len(modules) > 1}
    assert len(SHARED_NAMES) <= MAX_SHARED_NAMES
    unlisted = {name: modules for name, modules in shared.items() if name not in SHARED_NAMES}
    assert not unlisted, f"public names defined in several modules: {unlisted}"
    unused = SHARED_NAMES - {*shared}
    assert not unused, f"no longer shared, take them off the list: {sorted(unused)}"
