"""Hostile copies of params.yaml, from a seed."""

import contextlib
import copy
import shutil
from pathlib import Path

import yaml

from asap.core import project_root, rng

VALUES = (
    *(None, True, -1, 0, 1, 0.5, 10**30, -(10**30), 1e308, float("nan"), float("inf")),
    *("", "a", "1e-3", "../..", "$(touch x)", "`x`", "a b; c", "\u202e", "x" * 100_000),
    *([], {}, [[]], [1, "a", None], {"a": 1}, {1: 2}, [{}] * 3, [0, 0, 0], [-1.0, 1.0]),
)
TAGS = ("!!python/object/apply:os.system ['true']", "!!binary |\n  AAAA", "!!set {a}", "!unknown x")


def _paths(tree, at=()) -> list[tuple]:
    "Every key of a tree"
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for k, v in items:
        found.append((*at, k))
        if isinstance(v, (dict, list)):
            found += _paths(v, (*at, k))
    return found


def _parent(tree, path):
    for k in path[:-1]:
        tree = tree[k]
    return tree


def change_value(tree, r) -> None:
    path = _pick(_paths(tree), r)
    _parent(tree, path)[path[-1]] = copy.deepcopy(_pick(VALUES, r))


def remove_key(tree, r) -> None:
    path = _pick(_paths(tree), r)
    del _parent(tree, path)[path[-1]]


def rename_key(tree, r) -> None:
    paths = [p for p in _paths(tree) if isinstance(_parent(tree, p), dict)]
    path = _pick(paths, r)
    parent = _parent(tree, path)
    parent[_pick(("a", "", "x" * 5000, 3, None, "a;b", "a/../b", "é\u4e2d"), r)] = parent.pop(
        path[-1]
    )


def swap_values(tree, r) -> None:
    a, b = _pick(_paths(tree), r), _pick(_paths(tree), r)
    if a[: len(b)] == b or b[: len(a)] == a:
        return
    pa, pb = _parent(tree, a), _parent(tree, b)
    pa[a[-1]], pb[b[-1]] = pb[b[-1]], pa[a[-1]]


def _pick(values, r):
    return values[int(r.integers(len(values)))]


TREE = [change_value, change_value, change_value, remove_key, rename_key, swap_values]


def break_bytes(text: bytes, r) -> bytes:
    b = bytearray(text)
    for _ in range(int(r.integers(1, 6))):
        b[int(r.integers(len(b)))] = int(r.integers(256))
    return bytes(b)


def cut_text(text: bytes, r) -> bytes:
    return text[: int(r.integers(len(text)))]


def nest(text: bytes, r) -> bytes:
    n = int(r.choice([20, 900, 30_000]))
    return text + b"\nextra: " + b"[" * n + (b"]" * n if r.random() < 0.5 else b"") + b"\n"


def aliases(text: bytes, r) -> bytes:
    "Each line is the former one nine times"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for k in range(1, int(r.choice([3, 9, 12]))):
        lines.append(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]")
    where = b"\n" + "\n".join(lines).encode() + b"\n"
    return where + text if r.random() < 0.5 else text + where


def loop(text: bytes, r) -> bytes:
    return text + b"\nloop: &a {a: *a}\n"


def tag(text: bytes, r) -> bytes:
    return text + f"\nextra: {_pick(TAGS, r)}\n".encode()


def base(text: bytes, r) -> bytes:
    "An overlay of something else"
    name = _pick(("/etc/passwd", "..", "now.yaml", "[]", "null", "'a\\0b'", "params.yaml"), r)
    return f"base: {name}\nstudy: {{seed: 1}}\n".encode()


def replace_all(text: bytes, r) -> bytes:
    return _pick((b"", b"\0", b"\xff\xfe\0", b"- 1", b"a", b"\t", b"?", b"{", b"---\n---\n"), r)


TEXT = [break_bytes, break_bytes, cut_text, nest, aliases, loop, tag, base, replace_all]


@contextlib.contextmanager
def mutate_params(i: int, seed: int, _: dict, folder: Path):
    "Hostile copy number `i`: its damage and path"
    r = rng("hostile params", seed, i)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = (project_root() / "params.yaml").read_bytes()
    own = i % 4 > 0
    change = _pick(TREE if own else TEXT, r)
    if own:
        tree = yaml.safe_load(text)
        change(tree, r)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()
    else:
        text = change(text, r)
    path = folder / "now.yaml"
    path.write_bytes(text)
    yield dict(form="params", damage=change.__name__, path=str(path), words=[])
    shutil.rmtree(folder)
