"""The command `asap` as a person starts it: what it prints and when, exit codes, Ctrl-C, closed
pipes, JSON, endings, words that it does not know"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import takewhile

import numpy as np
import pandas as pd
import pytest
from conftest import TOP

from asap import __version__, cli
from asap.anatomy import segmenter
from asap.anatomy.segment import MapSource, OrganPrediction
from asap.cli import _build_parser, main
from asap.core import parallel_map
from asap.data.volumes import write
from asap.inference.words import find_unknown_words
from asap.phantom.abnormalities import synthesize_chest
from asap.text.encoder import load

ASAP = [sys.executable, "-m", "asap"]
SAID = "There is pleural effusion."
STOPPED = "asap: stopped; the results so far are written"


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    c = synthesize_chest(("command", 0), (48, 48, 24), (7.0, 7.0, 14.0), only="Consolidation")
    path = tmp_path_factory.mktemp("command") / "scan.nii.gz"
    write(c.hu, c.affine, path)
    return path


@pytest.fixture(scope="module")
def many(scan, tmp_path_factory):
    "A batch that takes longer than a test needs to stop it"
    folder = tmp_path_factory.mktemp("many")
    for i in range(200):
        os.link(scan, folder / f"s{i:03}.nii.gz")
    return folder


@pytest.fixture(autouse=True)
def interrupts():
    "What a test starts hears SIGINT, also where the tests do not (a shell's `&`)"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*args, **options):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*ASAP, *map(str, args)], cwd=TOP, **(pipes | options))


def ended(process):
    "Exit code, rest of standard output, standard error"
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


# Start


@pytest.mark.parametrize("module", ["asap", "asap.cli"])
def test_version(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, cwd=TOP
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"asap {__version__}\n", "")


def test_import_is_light():
    "`import asap` loads no library, and takes less than two seconds of a core"
    code = (
        "import os, sys, asap; asap.__version__; print(dir(asap)); "
        "heavy = {'numpy', 'torch', 'pandas', 'pydantic', 'asap.core'} & {*sys.modules}; "
        "assert not heavy, heavy; assert sum(os.times()[:2]) < 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP)
    assert done.returncode == 0, done.stderr
    for name in ("Model", "Source", "embed", "ground", "organs", "view", "zero_shot"):
        assert f"'{name}'" in done.stdout


# Ctrl-C and closed pipes


@pytest.mark.parametrize("command", ["zero-shot", "check"])
def test_ctrl_c_ends_with_one_line(command, many, tmp_path):
    "The first result is printed while the others are computed; it is kept"
    out = ["-o", tmp_path / "all.csv"] if command == "zero-shot" else []
    process = start(command, many, *out)
    assert "s000" in process.stdout.readline() and process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130 and err.splitlines()[-1] == STOPPED and "Traceback" not in err
    if out:
        kept = pd.read_csv(tmp_path / "all.csv").scan.unique().tolist()
        assert kept[0] == "s000" and len(kept) < 200


def test_ctrl_c_while_libraries_are_loaded(tmp_path):
    slow = "import signal\nprint('loading', flush=True)\nsignal.pause()\n"
    (tmp_path / "numpy.py").write_text(slow)
    env = os.environ | dict(PYTHONPATH=f"{tmp_path}{os.pathsep}{TOP}")
    process = start("--help", env=env)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "asap: stopped\n")


def test_a_closed_pipe_ends_the_batch_silently(many):
    process = start("check", many)
    assert "s000" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(500) == 141 and process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("args", [["--help"], ["params", "--merged"]])
def test_a_pipe_that_nobody_reads(args):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*args, stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=500)
    assert err == ""


# Outputs of `embed`


def test_embed_writes_what_the_name_says(scan, tmp_path):
    for ending in ("npz", "csv", "parquet"):
        assert main(["embed", str(scan), "-o", str(tmp_path / f"x.{ending}")]) == 0
    with np.load(tmp_path / "x.npz") as z:
        features = z["features"]
    tables = pd.read_csv(tmp_path / "x.csv"), pd.read_parquet(tmp_path / "x.parquet")
    for table in tables:
        assert list(table)[:2] == ["case", "f0"] and table.case.tolist() == ["scan"]
        np.testing.assert_allclose(table.drop(columns="case"), features, rtol=1e-6)


@pytest.mark.parametrize(
    "name, more, why",
    [
        ("x.tsv", [], "ends in .npz, .csv or .parquet"),
        ("x", [], "ends in .npz, .csv or .parquet"),
        ("x.csv", ["--tokens"], "a table has no place for --tokens; write an .npz"),
    ],
)
def test_an_ending_that_is_none(name, more, why, scan, tmp_path):
    code, out, err = ended(start("embed", scan, "-o", tmp_path / name, *more))
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(f"asap: -o {tmp_path / name}: ") and why in err
    assert not list(tmp_path.iterdir())


def test_device(scan, tmp_path):
    args = ["embed", scan, "-o", tmp_path / "x.npz", "--device"]
    code, out, err = ended(start(*args, "quantum"))
    assert (code, out) == (1, "")
    assert err.startswith("asap: device 'quantum': this machine has cpu")
    assert ended(start(*args, "cpu"))[0] == 0 and (tmp_path / "x.npz").exists()


# JSON


def documented() -> dict[str, set[str]]:
    "Command -> its keys, as the page's table has them"
    cells = json.loads((TOP / "nbs/98_cli.ipynb").read_text(encoding="utf8"))["cells"]
    text = next(t for c in cells if "| key | value |" in (t := "".join(c["source"])))
    found = {}
    for row in takewhile(
        lambda line: line.startswith("|"), text.split("|---|---|\n")[1].splitlines()
    ):
        command, _, keys = row.split("|")[1].rpartition(":")
        found.setdefault(command.strip(" `"), set()).update(re.findall(r"`(\w+)`", keys))
    return found


def printed(capsys, *args) -> list[dict]:
    "Lines of JSON of a command that refuses `broken` and takes `scan`"
    assert main([*map(str, args), "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["scan"], r["status"]) for r in rows] == [("broken", "refused"), ("scan", "ok")]
    return rows


def air(v):
    return OrganPrediction((v.hu < -500).astype(np.uint8), "air")


@pytest.mark.parametrize(
    "command, more",
    [
        ("check", []),
        ("standardize", ["-o", "{}"]),
        ("organs", ["-o", "{}"]),
        ("embed", ["-o", "{}/x.csv"]),
        ("zero-shot", ["-o", "{}/x.csv", "--labels", "Pleural effusion", "Rib fracture"]),
        ("ground", ["-o", "{}", "--sentence", SAID, "--sentence", "There is a mass."]),
        ("view", ["-o", "{}"]),
    ],
)
def test_json(command, more, scan, tmp_path, capsys, monkeypatch):
    "One line per scan with the keys that the page documents; the files exist"
    monkeypatch.setattr(segmenter, "choose_source", lambda *a: MapSource("air", air, {}))
    (tmp_path / "in").mkdir()
    shutil.copy(scan, tmp_path / "in/scan.nii.gz")
    (tmp_path / "in/broken.nii.gz").write_text("The heart is normal.\n" * 99)
    more = [x.format(tmp_path / "out") for x in more]
    broken, good = printed(capsys, command, tmp_path / "in", *more)
    keys, common = documented(), {"command", "scan", "path", "status", "warnings"}
    assert keys[""] == common | {"reason", "files"}
    assert {*broken} == common | {"reason"} and "cannot be read" in broken["reason"]
    files = set() if command == "check" else {"files"}
    assert {*good} == common | files | keys.get(command, set())
    assert good["command"] == command and good["path"] == str(tmp_path / "in/scan.nii.gz")
    assert all(os.path.isfile(f) for f in good.get("files", []))
    if command in ("zero-shot", "ground"):
        words = ["Rib", "fracture"] if command == "zero-shot" else ["mass"]
        assert good["unknown_words"] == words
        assert [all(f"`{w}`" in s for w in words) for s in good["warnings"]] == [True]


def test_json_of_nested_rows(scan, tmp_path, capsys):
    "Keys of labels, sentences and pieces are those of the page; numbers are those of the CSV"
    args = [str(scan), "--json", "-o"]
    assert main(["zero-shot", *args, str(tmp_path / "z.csv")]) == 0
    assert main(["ground", *args, str(tmp_path), "--sentence", SAID]) == 0
    z, g = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    keys, (sentence,) = documented(), g["sentences"]
    text = (TOP / "nbs/98_cli.ipynb").read_text(encoding="utf8")
    for row in (*z["labels"], sentence, *sentence["pieces"]):
        assert not [k for k in row if f"`{k}`" not in text]
    assert keys["ground"] == {"sentences", "unknown_words"}
    table = pd.read_csv(tmp_path / "scan.csv")
    assert len(table) == len(sentence["pieces"]) and sentence["num_patches"] == sum(
        p["piece_patches"] for p in sentence["pieces"]
    )
    assert [p["x_mm"] for p in sentence["pieces"]] == table.x_mm.tolist()
    probability = pd.read_csv(tmp_path / "z.csv").probability
    np.testing.assert_allclose([r["probability"] for r in z["labels"]], probability, atol=1e-5)


def test_json_of_a_data_set_is_refused(tmp_path, capsys):
    (tmp_path / "cases.csv").write_text("case,image\n")
    assert main(["check", str(tmp_path), "--cohort", "own", "--json"]) == 1
    assert "--json is for loose scans" in capsys.readouterr().err


# Several processes


def broken_and_good(scan, folder, n=6):
    folder.mkdir()
    for i in range(n):
        os.link(scan, folder / f"s{i}.nii.gz")
    (folder / "broken.nii.gz").write_text("The heart is normal.\n" * 99)
    return folder


@pytest.mark.parametrize(
    "command, more, files",
    [
        ("check", [], []),
        ("embed", ["-o", "{}/x.csv"], ["x.csv", "x.quarantine.csv"]),
        ("zero-shot", ["-o", "{}/x.csv"], ["x.csv", "x.quarantine.csv"]),
        ("ground", ["-o", "{}", "--sentence", SAID], ["s0.csv", "s5_1_region.nii.gz"]),
        ("standardize", ["-o", "{}"], ["s0.nii", "s5.nii", "quarantine.csv"]),
        ("organs", ["-o", "{}"], ["s0_organs.nii.gz", "s5_organs.json", "quarantine.csv"]),
        ("view", ["-o", "{}"], ["s0.html", "s5.html"]),
    ],
)
def test_several_processes_give_what_one_gives(
    command, more, files, scan, tmp_path, capsys, monkeypatch
):
    "The same lines in the same order, each whole, and the same files"
    monkeypatch.setattr(segmenter, "choose_source", lambda *a: MapSource("air", air, {}))
    monkeypatch.setattr(cli, "parallel_map", partial(parallel_map, soon=0))
    paths, printed = broken_and_good(scan, tmp_path / "in"), []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        args = [command, str(paths), *(x.format(out) for x in more), "--jobs", jobs, "--json"]
        assert main(args) == 1
        lines = capsys.readouterr().out.replace(str(out), "OUT").splitlines()
        printed.append([json.loads(line) for line in lines])
    assert printed[0] == printed[1]
    assert [r["scan"] for r in printed[1]] == ["broken", *(f"s{i}" for i in range(6))]
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_ctrl_c_with_several_processes(many, tmp_path):
    "As a terminal does it: every process hears it"
    out = ["-o", tmp_path / "all.csv", "--jobs", "2"]
    process = start("zero-shot", many, *out, start_new_session=True)
    for _ in range(3):
        assert "s00" in process.stdout.readline() and process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130 and err.splitlines()[-1] == STOPPED and "Traceback" not in err
    assert 3 <= pd.read_csv(tmp_path / "all.csv").scan.nunique() < 200


# Words that the text encoder does not know, and what `ground` prints


def test_unknown_words_are_named_everywhere(scan, tmp_path):
    labels = ["--labels", "Pleural effusion", "Rib fracture"]
    code, _, err = ended(start("zero-shot", scan, "-o", tmp_path / "z.csv", *labels))
    assert code == 0 and err.count("does not know `Rib`, `fracture`") == 1
    table = pd.read_csv(tmp_path / "z.csv", keep_default_na=False)
    assert table.unknown_words.tolist() == ["", "Rib fracture"]
    said = ["--sentence", "There is a mass."]
    code, out, err = ended(start("ground", scan, "-o", tmp_path, *said))
    assert code == 0 and err.count("does not know `mass`") == 1
    assert (pd.read_csv(tmp_path / "scan.csv").unknown_words == "mass").all()


def test_ground_prints_the_peak_and_each_piece(scan, tmp_path):
    code, out, _ = ended(start("ground", scan, "-o", tmp_path, "--sentence", SAID))
    table = pd.read_csv(tmp_path / "scan.csv")
    first, *pieces = out.splitlines()
    peak = ", ".join(f"{table[f'peak_{x}_mm'][0]:.0f}" for x in "xyz")
    assert code == 0 and f'scan: "{SAID}" peak at {peak} mm (RAS)' in first
    assert len(pieces) == len(table) == table.piece.max()
    for line, row in zip(pieces, table.itertuples()):
        place = f"{row.x_mm:.0f}, {row.y_mm:.0f}, {row.z_mm:.0f} mm (RAS)"
        patches = "1 patch" if row.piece_patches == 1 else f"{row.piece_patches} patches"
        assert f"piece {row.piece} of {len(table)}: {patches} at {place}" in line


def examples() -> list[str]:
    "Texts in quotes after --labels and --sentence, in the help and on the pages"
    commands = ["zero-shot", "ground", "view"]
    helps = []
    for command in commands:
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit):
            _build_parser().parse_args([command, "--help"])
        helps.append(" ".join(out.getvalue().split()))
    pages = [TOP / "README.md", *(TOP / "nbs").glob("tutorials/*.ipynb"), TOP / "nbs/index.ipynb"]
    texts = [*helps, *(p.read_text(encoding="utf8").replace('\\"', '"') for p in pages)]
    quoted = r'(?:--labels|--sentence)((?: "[^"\n]+")+)'
    return [x for t in texts for m in re.findall(quoted, t) for x in re.findall('"([^"]+)"', m)]


def test_examples_use_known_words():
    found = examples()
    assert len(found) >= 6
    assert find_unknown_words(load(TOP / "weights/text"), found) == []
