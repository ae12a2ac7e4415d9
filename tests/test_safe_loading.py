"What asap/ never does: unpickle a stranger's file, run code of a hub, unpack without a filter"

import ast
import io
import tarfile

import pytest
from conftest import TOP

from asap.core import split_revision
from asap.data.real import SCANS, extract_scans
from asap.params import load_params

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"read_pickle", "to_pickle", "extractall", "unpack_archive", "popen"}
RUNS_CELLS = "launch.py"  # `exec` of the project's own notebooks
FILES = sorted(f for f in (TOP / "asap").rglob("*.py") if f.name != "_modidx.py")


def name_of(call: ast.Call) -> str:
    f = call.func
    return f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")


def owner_of(call: ast.Call) -> str:
    f = call.func
    return f.value.id if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) else ""


def findings(source: str, file: str = "x.py") -> list[str]:
    "Unsafe imports and calls of a module"
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [f"imports {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            found += unsafe_call(node, file)
    return found


def unsafe_call(call: ast.Call, file: str) -> list[str]:
    name, owner = name_of(call), owner_of(call)
    given = {k.arg: k.value for k in call.keywords}
    constant = {k: v.value for k, v in given.items() if isinstance(v, ast.Constant)}
    found = [f"{name}()"] if name in FORBIDDEN_CALLS else []
    if name in ("eval", "exec") and isinstance(call.func, ast.Name) and file != RUNS_CELLS:
        found.append(f"{name}()")
    if (owner, name) == ("torch", "load") and constant.get("weights_only") is not True:
        found.append("torch.load without weights_only=True")
    if (owner, name) == ("os", "system"):
        found.append("os.system")
    if (owner, name) == ("yaml", "load") and "safe" not in ast.unparse(call).lower():
        found.append("yaml.load")
    if (owner, name) == ("joblib", "load"):
        found.append("joblib.load")
    if name in ("from_pretrained", "snapshot_download", "hf_hub_download") and call.args:
        if "revision" not in given and None not in given:
            found.append(f"{name} without a revision")
    for key in ("trust_remote_code", "allow_pickle", "shell"):
        if key in given and constant.get(key) is not False:
            found.append(f"{key} is not False")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.relative_to(TOP).as_posix())
def test_a_module_loads_nothing_unsafe(path):
    assert not findings(path.read_text(encoding="utf8"), path.name)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, revision=r, trust_remote_code=True)",
        "tar.extractall(folder)",
        "subprocess.run(c, shell=True)",
        "eval(text)",
        "pd.read_pickle(p)",
        "yaml.load(text, Loader)",
        "os.system(text)",
    ],
)
def test_the_check_notices(line):
    assert findings(line)


def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path):
    scan = next(s for s in SCANS.values() if s.masks)
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        m = tarfile.TarInfo(f"top/{scan.masks[0]}/../../../../../evil.txt")
        m.size = 4
        tar.addfile(m, io.BytesIO(b"evil"))
    folder = tmp_path / "a/b/c/d"
    folder.mkdir(parents=True)
    with pytest.raises(tarfile.OutsideDestinationError):
        extract_scans(archive, scan.archive, folder)
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("name", ["a; touch x", "$(touch x)", "`x`", "../x", "a b", "A", "", "é"])
@pytest.mark.parametrize("section", ["arms", "encoders"])
def test_names_that_reach_a_shell_have_a_pattern(name, section, tmp_path):
    import yaml

    p = yaml.safe_load((TOP / "params.yaml").read_text())
    if section == "arms":
        p["arms"][name] = dict(p["arms"]["asap"])
        p["study"]["arms"].append(name)
    else:
        p["study"]["encoders"][name] = dict(factory="a:b", code="asap")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(p, allow_unicode=True))
    with pytest.raises(ValueError, match=r"\^\[a-z\]\[a-z0-9_\]\{0,63\}\$") as e:
        load_params(tmp_path / "params.yaml")
    assert section in str(e.value) and (name in str(e.value) or not name)


def test_a_revision_of_the_hub(tmp_path):
    assert split_revision("owner/name") == ("owner/name", None)
    assert split_revision("owner/name@1a2b3c") == ("owner/name", "1a2b3c")
    (tmp_path / "a@b").mkdir()
    assert split_revision(tmp_path / "a@b") == (str(tmp_path / "a@b"), None)
