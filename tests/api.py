"""The API reference of `make docs`: a page a module, read from the source and never imported.

`asap/*.py` names in `__all__` what is public. Each name gets a heading (its anchor is the name),
its signature, its docstring, and a table of arguments with type, default and comment.
"""

import ast
import functools
import html
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
MAX_VALUE_LINES = 12  # of a constant; longer ones are cut
SHOWN_METHODS = ("__init__", "__call__")


@dataclass
class Argument:
    "One argument, field or return value"

    name: str
    type: str = ""
    default: str = ""
    doc: str = ""


def modules() -> dict[str, Path]:
    "Dotted name -> file, of each module with public names, in the order of the notebooks"
    found = {}
    for path in (TOP / "asap").rglob("*.py"):
        if path.name != "_modidx.py" and public_names(ast.parse(path.read_text(encoding="utf8"))):
            dotted = path.relative_to(TOP).with_suffix("").as_posix().replace("/", ".")
            found[dotted.removesuffix(".__init__")] = path
    return dict(sorted(found.items(), key=lambda kv: notebook(kv[1]) or ""))


def notebook(path: Path) -> str | None:
    "The notebook that a module is exported from, as a path in the repository"
    m = re.search(r"File to edit: [./]*(nbs/.+\.ipynb)", path.read_text(encoding="utf8"))
    return m and m[1]


def public_names(tree: ast.Module) -> list[str]:
    "What `__all__` lists"
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    "Name -> the statement that defines it"
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, node)
    return found


@functools.cache
def comments(source: str) -> dict[int, str]:
    "Line -> the comment at its end"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def signature_end(function: ast.FunctionDef, source: str) -> int:
    "Line of the colon that ends a signature"
    text = "\n".join(source.splitlines()[function.lineno - 1 : function.body[0].lineno]) + "\n"
    depth, line = 0, function.lineno
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.OP:
                depth += (token.string in "([{") - (token.string in ")]}")
                if token.string == ":" and depth == 0:
                    return function.lineno + token.start[0] - 1
    except (tokenize.TokenError, IndentationError):
        pass  # the text ends within a block: the signature was whole
    return line


def arguments(function: ast.FunctionDef, source: str) -> list[Argument]:
    "All arguments but `self` and `cls`; a comment belongs to the argument that ends its line"
    a, notes, end = function.args, comments(source), signature_end(function, source)
    positional = [*a.posonlyargs, *a.args]
    defaults: dict[ast.arg, ast.expr | None] = dict(
        zip(reversed(positional), reversed(a.defaults), strict=False)
    )
    defaults |= dict(zip(a.kwonlyargs, a.kw_defaults, strict=True))
    every = [x for x in (*positional, a.vararg, *a.kwonlyargs, a.kwarg) if x is not None]
    out = []
    for i, arg in enumerate(every):
        if arg.arg in ("self", "cls"):
            continue
        default = defaults.get(arg)
        last = (default or arg).end_lineno
        alone = last != end and (i + 1 == len(every) or every[i + 1].lineno > last)
        out.append(
            Argument(
                ("*" if arg is a.vararg else "**" if arg is a.kwarg else "") + arg.arg,
                ast.unparse(arg.annotation) if arg.annotation else "",
                ast.unparse(default) if default else "",
                notes.get(last, "") if alone else "",
            )
        )
    return out


def returned(function: ast.FunctionDef, source: str) -> Argument | None:
    "Type and comment of what a function returns"
    kind = ast.unparse(function.returns) if function.returns else ""
    doc = comments(source).get(signature_end(function, source), "")
    return Argument("returns", kind, "", doc) if doc or kind not in ("", "None") else None


def fields(node: ast.ClassDef, source: str) -> list[Argument]:
    "Annotated names of a class, such as the fields of a dataclass"
    notes = comments(source)
    return [
        Argument(
            ast.unparse(x.target),
            ast.unparse(x.annotation),
            ast.unparse(x.value) if x.value else "",
            notes.get(x.end_lineno or x.lineno, ""),
        )
        for x in node.body
        if isinstance(x, ast.AnnAssign) and not ast.unparse(x.target).startswith("_")
    ]


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    "Public methods, `__init__` and `__call__`"
    for x in node.body:
        if isinstance(x, ast.FunctionDef) and (
            not x.name.startswith("_") or x.name in SHOWN_METHODS
        ):
            yield x


def prose(text: str) -> str:
    "A docstring or comment as HTML: paragraphs, words in backticks as code"
    paragraphs = [
        re.sub(r"`+([^`]+)`+", r"<code>\1</code>", html.escape(p.strip(), quote=False))
        for p in re.split(r"\n\s*\n", text)
    ]
    return "<br>".join(p.replace("\n", " ") for p in paragraphs if p)


def code(text: str) -> str:
    return f"<code>{html.escape(text, quote=False)}</code>" if text else ""


def table(rows: list[Argument], title: str) -> str:
    "Rows as a table without the columns that are empty"
    if not rows:
        return ""
    columns = {
        title: [code(r.name) for r in rows],
        "Type": [code(r.type) for r in rows],
        "Default": [code(r.default) for r in rows],
        "Meaning": [prose(r.doc) for r in rows],
    }
    kept = {head: cells for head, cells in columns.items() if any(cells)}
    head = "".join(f"<th>{h}</th>" for h in kept)
    body = "".join(
        "<tr>" + "".join(f"<td>{cells[i]}</td>" for cells in kept.values()) + "</tr>"
        for i in range(len(rows))
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>\n"


def fenced(text: str) -> str:
    return f"```python\n{text}\n```\n"


def signature(function: ast.FunctionDef, name: str, source: str) -> str:
    "`name(a, b=1) -> type`, an argument a line where it is long"
    args = [
        (f"{a.name}: {a.type}" if a.type else a.name)
        + ((" = " if a.type else "=") + a.default if a.default else "")
        for a in arguments(function, source)
    ]
    kind = ast.unparse(function.returns) if function.returns else ""
    if is_property(function):
        return f"{name}: {kind}" if kind else name
    end = f" -> {kind}" if kind else ""
    line = f"{name}({', '.join(args)}){end}"
    if len(line) <= 88:
        return line
    return f"{name}(\n" + "".join(f"    {a},\n" for a in args) + f"){end}"


def is_property(function: ast.FunctionDef) -> bool:
    names = {getattr(d, "id", getattr(d, "attr", "")) for d in function.decorator_list}
    return bool(names & {"property", "cached_property"})


def function_section(function: ast.FunctionDef, name: str, source: str, level: int) -> str:
    rows = arguments(function, source)
    back = returned(function, source)
    return "\n".join(
        [
            f"{'#' * level} `{name}` {{ #{name.replace('__', '')} }}\n",
            fenced(signature(function, name, source)),
            f"<p>{prose(ast.get_docstring(function) or '')}</p>\n",
            table([*rows, *([back] if back else [])], "Argument"),
        ]
    )


def class_section(node: ast.ClassDef, source: str) -> str:
    bases = ", ".join(map(ast.unparse, (*node.bases, *(k.value for k in node.keywords))))
    parts = [
        f"## `{node.name}` {{ #{node.name} }}\n",
        fenced(f"class {node.name}" + (f"({bases})" if bases else "")),
        f"<p>{prose(ast.get_docstring(node) or '')}</p>\n",
        table(fields(node, source), "Field"),
    ]
    parts += [function_section(m, f"{node.name}.{m.name}", source, 3) for m in methods(node)]
    return "\n".join(parts)


def value_section(name: str, node: ast.stmt | None, source: str) -> str:
    text = ast.get_source_segment(source, node) if node else ""
    lines = (text or "").splitlines()
    if len(lines) > MAX_VALUE_LINES:
        lines = [*lines[:MAX_VALUE_LINES], "..."]
    note = comments(source).get(node.end_lineno or 0, "") if node else ""
    shown = fenced("\n".join(lines)) if lines else ""
    return f"## `{name}` {{ #{name} }}\n\n{shown}\n<p>{prose(note)}</p>\n"


def section(name: str, node: ast.stmt | None, source: str) -> str:
    if isinstance(node, ast.FunctionDef):
        return function_section(node, name, source, 2)
    if isinstance(node, ast.ClassDef):
        return class_section(node, source)
    return value_section(name, node, source)


def page(module: str, path: Path) -> str:
    "The reference of one module, as Markdown"
    source = path.read_text(encoding="utf8")
    tree = ast.parse(source)
    found = definitions(tree)
    return "\n".join(
        [
            f"# {module}\n",
            f"<p>{prose(ast.get_docstring(tree) or '')}</p>\n",
            *(section(name, found.get(name), source) for name in public_names(tree)),
        ]
    )


def index(pages: dict[str, Path]) -> str:
    "All modules with what each is for"
    rows = []
    for module, path in pages.items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or ""
        rows.append(f"- [{module}]({module}.md): {prose(doc)}")
    return "\n".join(["# API reference", "", "One page a module.", "", *rows, ""])
