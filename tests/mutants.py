"""Would the checks notice? Small changes of asap/, one at a time, against its pages and tests

cosmic-ray makes the changes (a comparison turned round, a number moved by one, a loop that runs
never, ...). For each one the module's page and then the tests that import the module run in a copy
of the tree; the first failure kills it. What page and tests need without a change is measured
first; a test file that takes longer than --patience is left out, and named. Rows are appended to
benchmarks/mutants.csv, and what is there is not run again, so that a campaign can be stopped.

`make mutants` installs cosmic-ray (extra `mutation`) and judges 600 changes; a few of one module:

    python tests/mutants.py --sample 20 --modules asap/model/align.py"""

import argparse
import ast
import contextlib
import difflib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import pandas as pd
from preloaded import INSTRUCTIONS, LOADED

TOP = Path(__file__).resolve().parent.parent
SWAPS = (
    "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitOr_BitAnd BitAnd_BitOr"
)
COMPARED = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot"
OTHERS = (
    "ReplaceUnaryOperator_Delete_USub ReplaceUnaryOperator_Delete_Invert "
    "ReplaceUnaryOperator_Delete_Not ReplaceComparisonOperator_IsNot_Is AddNot "
    "ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd "
    "ReplaceBreakWithContinue ReplaceContinueWithBreak ExceptionReplacer NumberReplacer "
    "RemoveDecorator ZeroIterationForLoop"
)
OPERATORS = [  # those whose result still runs; a string times a list says nothing about a test
    *[f"core/ReplaceBinaryOperator_{k}" for k in SWAPS.split()],
    *[f"core/ReplaceComparisonOperator_{k}" for k in COMPARED.split()],
    *[f"core/{k}" for k in OTHERS.split()],
]
KEY = ["module", "operator", "occurrence"]


# What is changed


def untested(source):
    "Spans of types and of `__all__`, which no test can notice"
    tree = ast.parse(source)
    nodes = [n.annotation for n in ast.walk(tree) if getattr(n, "annotation", None)]
    nodes += [n.returns for n in ast.walk(tree) if getattr(n, "returns", None)]
    nodes += [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
    ]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]


def places(path):
    "Every change of a module: (line, column) -> operators with their occurrence"
    from cosmic_ray.ast import get_ast
    from cosmic_ray.plugins import get_operator

    source, found = path.read_text(), {}
    nodes, walk = [], [get_ast(source)]
    while walk:  # in cosmic-ray's order, by which occurrences are counted
        node = walk.pop(0)
        nodes.append(node)
        walk = list(getattr(node, "children", [])) + walk
    for name in OPERATORS:
        operator, n = get_operator(name)(), 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                found.setdefault(tuple(start), []).append((name, n))
                n += 1
    spans = untested(source)
    return {at: k for at, k in found.items() if not any(a <= at < b for a, b in spans)}


def changed(path, operator, occurrence):
    "The source with one change; None where there is none"
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code(path.read_text(), get_operator(operator)(), occurrence)


def sample(paths, n, seed):
    "Changes of all modules, by their number of places; at least two of each"
    draw, rows = random.Random(seed), []
    all_places = {path: places(path) for path in paths}
    total = sum(map(len, all_places.values()))
    for path, found in all_places.items():
        share = min(len(found), max(2, round(n * len(found) / total)))
        for at in draw.sample(sorted(found), share):
            operator, occurrence = draw.choice(found[at])
            module = path.relative_to(TOP).as_posix()
            rows.append(dict(module=module, operator=operator, occurrence=occurrence, line=at[0]))
    draw.shuffle(rows)
    return rows


def words(path, operator, occurrence):
    "What a change replaces, and by what"
    old, new = path.read_text().splitlines(), changed(path, operator, occurrence).splitlines()
    diff = [
        d for d in difflib.unified_diff(old, new, n=0, lineterm="") if d[:3] not in ("---", "+++")
    ]
    before, after = ([d[1:].strip() for d in diff if d[0] == k] for k in "-+")
    return dict(before=" ".join(before), after=" ".join(after))


# What looks at it


def page_of(path):
    "The page that a module is exported from"
    return (
        path.parent / re.search(r"File to edit: (\S+?)\.?$", path.read_text(), re.M)[1]
    ).resolve()


def tests_of(module):
    "The files of tests that import a module"
    name = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    package, _, leaf = name.rpartition(".")
    direct, parent = re.escape(name), re.escape(package)
    pattern = rf"^\s*((from|import) {direct}\b|from {parent} import [^\n]*\b{leaf}\b)"
    files = sorted((TOP / "tests").glob("test_*.py"))
    return [f.name for f in files if re.search(pattern, f.read_text(), re.M)]


def read_page(path, module):
    "Run the cells of a page that export nothing, with the module's names"
    import pages

    spec = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    shell = pages.shell(path)
    shell.user_ns.update(
        {k: v for k, v in vars(importlib.import_module(spec)).items() if k[:2] != "__"}
    )
    with contextlib.chdir(path.parent):
        for cell in json.loads(path.read_text())["cells"]:
            source = pages.joined(cell["source"])
            mark = re.search(r"^#\|\s*(export|eval:\s*false|default_exp)", source, re.M)
            if cell["cell_type"] == "code" and not mark:
                shell.outputs(source)


def look(tree, what, module, log):
    "In a process of its own: a page, or a file of tests"
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.setsid()
    os.chdir(tree)
    os.environ.update(ASAP_ROOT=str(tree), PYTHONPATH=str(tree), IN_TEST="1")
    sys.path[:0] = [str(tree), str(tree / "tests")]
    multiprocessing.set_start_method("fork", force=True)
    if what.suffix == ".ipynb":
        read_page(tree / what, module)
        os._exit(0)
    import pytest

    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", str(tree / what)])))


class Tree:
    "A copy of the tree in which one module at a time is changed"

    def __init__(self, folder):
        self.folder = Path(folder)
        subprocess.run(["git", "clone", "-q", "--shared", TOP, folder], check=True)
        self.log = self.folder / "look.log"

    def write(self, module, source):
        path = self.folder / module
        path.write_text(source)
        for old in path.parent.glob(f"__pycache__/{path.stem}.*"):
            old.unlink()  # of the same second and size, it would pass for new

    def run(self, what, module, limit):
        "Exit code and seconds of a look; None where it took longer than the limit"
        work = multiprocessing.get_context("forkserver").Process(
            target=look, args=(self.folder, what, module, self.log)
        )
        began = time.monotonic()
        work.start()
        work.join(limit)
        code = None if work.is_alive() else work.exitcode
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(work.pid, 9)
        work.join()
        return code, time.monotonic() - began


def known_times(trees, looks, path, patience):
    "Seconds of every look without a change; those that fail or take too long are left out"
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [k for k in looks if str(k[0]) not in known]

    def measure(item):
        tree = trees.get()
        code, seconds = tree.run(*item, patience)
        trees.put(tree)
        known[str(item[0])] = seconds if code == 0 else None
        said = {None: f"longer than {patience} s, left out", 0: f"{seconds:.0f} s"}
        print(f"{item[0]}: {said.get(code, 'fails, left out')}", flush=True)
        path.write_text(json.dumps(known, indent=1))

    with ThreadPoolExecutor(trees.qsize()) as pool:
        list(pool.map(measure, missing))
    return known


def judge(tree, row, looks, times):
    "The row with its outcome: killed, and by what, or survived"
    path = TOP / row["module"]
    source, began = changed(path, row["operator"], row["occurrence"]), time.monotonic()
    row = row | words(path, row["operator"], row["occurrence"]) | dict(outcome="survived", by="")
    tree.write(row["module"], source)
    for what in looks:
        code, _ = tree.run(what, row["module"], 3 * times[str(what)] + 10)
        if code != 0:
            outcome = "no end" if code is None else "killed"
            row |= dict(outcome=outcome, by=what.name)
            break
    tree.write(row["module"], path.read_text())
    return row | dict(seconds=round(time.monotonic() - began, 1))


def arguments():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--sample", type=int, default=600, help="changes over all modules")
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--modules", nargs="+", help="of these alone, such as asap/model/align.py")
    a.add_argument("--patience", type=float, default=45, help="seconds for a page or a test file")
    a.add_argument("--copies", type=int, default=1, help="copies of the tree that work at a time")
    a.add_argument("--work", type=Path, default=TOP / "build/mutants")
    a.add_argument("--out", type=Path, default=TOP / "benchmarks/mutants.csv")
    return a.parse_args()


def looks_of(paths):
    "The page and the tests of each module"
    names = [p.relative_to(TOP).as_posix() for p in paths]
    return {
        name: [page_of(p).relative_to(TOP), *[Path("tests") / t for t in tests_of(name)]]
        for name, p in zip(names, paths)
    }


def copies(n, folder):
    "Fresh copies of the last commit"
    folder.mkdir(parents=True, exist_ok=True)
    trees: Queue = Queue()
    for i in range(n):
        shutil.rmtree(folder / f"tree{i}", ignore_errors=True)
        trees.put(Tree(folder / f"tree{i}"))
    return trees


def campaign(rows, trees, looks, times, out):
    "Judge every row; the table is written after each"
    results = pd.read_csv(out).to_dict("records") if out.exists() else []
    lock = threading.Lock()

    def work(row):
        tree = trees.get()
        try:
            found = judge(tree, row, looks[row["module"]], times)
        finally:
            trees.put(tree)
        with lock:
            results.append(found)
            pd.DataFrame(results).to_csv(out, index=False)
            place = f"{found['module']}:{found['line']}"
            print(f"{len(results)}: {place} {found['outcome']} {found['by']}", flush=True)

    with ThreadPoolExecutor(trees.qsize()) as pool:
        list(pool.map(work, rows))
    return pd.DataFrame(results)


def main():
    a = arguments()
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")
    os.environ.update(INSTRUCTIONS)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded", *LOADED])
    paths = sorted(p for p in (TOP / "asap").rglob("*.py") if "File to edit" in p.read_text())
    if a.modules:
        paths = [p for p in paths if p.relative_to(TOP).as_posix() in a.modules]
    rows = sample(paths, a.sample, a.seed)
    if a.out.exists():
        seen = {tuple(r) for r in pd.read_csv(a.out)[KEY].itertuples(index=False)}
        rows = [r for r in rows if tuple(r[k] for k in KEY) not in seen]
    trees, looks = copies(a.copies, a.work), looks_of(paths)
    wanted = {what: m for m in {r["module"]: 0 for r in rows} for what in looks[m]}
    times = known_times(trees, list(wanted.items()), a.work / "times.json", a.patience)
    usable = {m: [w for w in k if times.get(str(w))] for m, k in looks.items()}
    for k in usable.values():
        k.sort(key=lambda w: times[str(w)])
    found = campaign(rows, trees, usable, times, a.out)
    print(found.outcome.value_counts().to_string())


if __name__ == "__main__":
    main()
