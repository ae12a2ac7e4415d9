"""What is usable of a data set: each fault is named, each sound case is listed, nothing is
written beside the data"""

import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TOP
from files import nifti

from asap.cli import main
from asap.data import review
from asap.data.adapter import available_cohort_names, get_cohort
from asap.data.volumes import open_nifti

SMALL = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))


def again(path, change):  # a NIfTI with other voxels
    img = open_nifti(path)
    data = np.asarray(img.dataobj).copy()
    path.unlink()
    nifti(change(data), img.affine, path)


def spoil(x):
    x = x.astype(np.float32)
    x[20, 20, 10] = np.nan
    return x


def scout(folder):  # a second series in a folder
    import pydicom

    for k, f in enumerate(sorted(folder.glob("*.dcm"))[:3]):
        d = pydicom.dcmread(f)
        d.SeriesInstanceUID, d.SeriesNumber, d.ImageType = (
            "1.2.3",
            9,
            ["ORIGINAL", "PRIMARY", "LOCALIZER"],
        )
        d.save_as(folder / f"scout{k}.dcm", enforce_file_format=True)


def break_(root) -> dict:  # case -> kind of its refusal
    t = pd.read_csv(root / "cases.csv", dtype=str, keep_default_na=False)

    def of(n):
        return t.index[t.patient == f"p{n:04d}"][0]

    image, organs = (lambda n: root / t.image[of(n)]), (lambda n: root / t.organ_map[of(n)])
    f = image(1)
    f.write_bytes(f.read_bytes()[:20000])
    (image(2) / "0011.dcm").unlink()
    t.loc[of(3), "report"], t.loc[of(4), "split"] = "", "later"
    again(organs(5), lambda x: np.pad(x, 6))
    f = organs(6)
    f.write_bytes(f.read_bytes()[: len(f.read_bytes()) // 2])
    again(image(7), spoil)
    t.loc[of(8), "image"] = "images/p0008/lost"
    scout(image(10))  # a warning
    again(image(11), lambda x: x[:, :, :12])
    t.loc[of(11), "organ_map"] = ""  # a warning
    named = {
        of(n): k
        for n, k in {
            1: "file broken",
            2: "slices missing or repeated",
            3: "no report",
            4: "unknown split",
            5: "organ map",
            6: "organ map",
            7: "values that are no numbers",
            8: "file missing",
        }.items()
    }
    kinds = {t.case[i]: k for i, k in named.items()}
    shutil.copy(image(9), root / "images/copied.nii.gz")
    more = [
        dict(t.loc[of(12)]),
        dict(t.loc[of(13)], case="p0013_b", split="train"),
        dict(
            t.loc[of(9)],
            case="copied",
            patient="p0099",
            scan="copied",
            image="images/copied.nii.gz",
            organ_map="",
            split="test",
        ),
        dict(t.loc[of(14)], case="a name"),
        dict(t.loc[of(14)], case="p0014_c", Emphysema="maybe"),
        dict(t.loc[of(14)], case="p0014_d", image="../elsewhere.nii.gz"),
    ]
    pd.concat([t, pd.DataFrame(more)]).to_csv(root / "cases.csv", index=False)
    both = {c: "patient in two splits" for c in [*t.case[t.patient == "p0013"], "p0013_b"]}
    return (
        kinds
        | both
        | {
            t.case[of(12)]: "name there twice",
            "a name": "name with other signs",
            "p0014_c": "label or time",
            "p0014_d": "path out of the folder",
        }
    )


def listing(root):
    return {
        f.relative_to(root).as_posix(): (f.stat().st_mtime_ns, f.stat().st_size)
        for f in sorted(root.rglob("*"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "hospital"
    get_cohort("own").write(root, 3, 10, 4, **SMALL)
    return root


@pytest.fixture(scope="module")
def broken(whole, tmp_path_factory):
    """The miniature with its faults, and what the command made of it: root, kinds, printed
    lines, page, exit code"""
    here = tmp_path_factory.mktemp("broken")
    root = here / "hospital"
    shutil.copytree(whole, root)
    kinds = break_(root)
    before, folders = listing(root), [root, *(d for d in root.rglob("*") if d.is_dir())]
    for d in folders:
        d.chmod(stat.S_IRUSR | stat.S_IXUSR)  # read-only
    try:
        r = review.review_cohort(root)
        code = main(["check", str(root), "--page", str(here / "out/page.html"), "--jobs", "1"])
    finally:
        for d in folders:
            d.chmod(stat.S_IRWXU)
    assert listing(root) == before, "nothing is written beside the data"
    return dict(
        root=root,
        kinds=kinds,
        r=r,
        page=(here / "out/page.html").read_text(),
        code=code,
        every=pd.read_csv(root / "cases.csv", dtype=str).case,
    )


def test_each_fault_by_its_name(broken):
    r = broken["r"]
    assert dict(zip(r.refused.case, r.refused.kind)) == broken["kinds"]
    assert not r.refused.case.duplicated().any() and (r.refused.do.str.len() > 10).all()
    words = {
        "file broken": "truncated or broken",
        "slices missing or repeated": "1 slices are missing",
        "no report": "no report",
        "unknown split": "`later`",
        "values that are no numbers": " values are NaN",
        "file missing": "`images/p0008/lost` is missing",
        "patient in two splits": "`p0013` is in test and train",
        "name there twice": "is there 2 times",
        "name with other signs": "`a name`",
        "label or time": "`Emphysema` is 'maybe'",
        "path out of the folder": "leads out of",
    }
    for kind, said in words.items():
        assert r.refused.reason[r.refused.kind == kind].str.contains(said, regex=False).all(), (
            kind,
            r.refused,
        )
    said = r.refused[r.refused.kind == "organ map"].reason
    assert (
        said.str.contains("sticks out of the image by").sum() == 1
        and said.str.contains("truncated or broken").sum() == 1
    )


def test_every_sound_case_is_usable(broken):
    r = broken["r"]
    assert set(r.table.case) == set(broken["every"]) - set(broken["kinds"])
    assert set(r.table.format) == {"NIfTI", "DICOM"} and len(r.pictures) == len(r.table)
    assert review.review_totals(r) == dict(
        usable=len(r.table),
        refused=len(broken["kinds"]),
        patients=r.table.patient.nunique(),
        scans=r.table.scan.nunique(),
        report=len(r.table),
        organs=len(r.table) - 2,
        targets=0,
        outcomes=len(r.table),
        warnings=2,
    )
    assert review.count_splits(r).patients.sum() == r.table.patient.nunique()
    assert (
        review.count_labels(r)[["positive", "negative", "unknown"]].sum(axis=1) == len(r.table)
    ).all()


def test_warnings(broken):
    w = broken["r"].warnings
    assert sorted(w.rule) == ["field of view", "series"] and set(w.case.str[:5]) == {
        "p0010",
        "p0011",
    }
    series = w.warning[w.rule == "series"].iloc[0]
    assert series.startswith("2 series; read series 1 (CT, ")
    assert "left series 9 (CT localizer or rendering, 3 slices)" in series


def test_what_is_there_twice(broken):
    t = review.duplicate_groups(broken["r"])
    same = t[[("copied" in c) for c in t.cases]]
    assert (
        sorted(same.what) == ["the same report", "the same volume"]
        and all(s == ["train", "test"] for s in same.splits)
        and all(p >= 2 for p in same.patients)
    )


def test_the_page(broken):
    text, root = broken["page"], broken["root"]
    for case in broken["every"]:
        assert f">{case}<" in text, case
    for kind in set(broken["kinds"].values()):
        assert f"{kind} (" in text
    assert text.count("data:image/jpeg;base64,") == len(broken["r"].table)
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "<script" not in text, (
        "one file, nothing is fetched"
    )
    assert (
        str(root) not in text
        and str(root.parent) not in text
        and "Nobody" not in text
        and "may hold patients" in text
    )
    assert not [f for f in broken["r"].table.findings if f in text], "no report's words"


def test_pictures_are_limited_and_the_page_is_escaped(whole):
    r = review.review_cohort(whole, pictures=3)
    assert len(r.pictures) == 3 and all(
        p[:3] == b"\xff\xd8\xff" and len(p) < 20_000 for p in r.pictures.values()
    )
    r.refused.loc[0] = ["<b>x</b>", "other", "<script>alert(1)</script>", "see"]
    assert "<script>alert" not in review.render_review(
        r
    ) and "&lt;script&gt;" in review.render_review(r)


def test_exit_codes_and_lines(whole, broken, tmp_path, capsys):
    assert broken["code"] == 1
    capsys.readouterr()
    assert main(["check", str(whole)]) == 0
    out = capsys.readouterr().out
    assert (
        "REFUSED" not in out
        and re.search(r"^usable   (\d+) of \1 cases", out, re.M)
        and out.endswith("refused  0 cases\n")
    )
    assert main(["check", str(broken["root"]), "--cohort", "own"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert {line.split()[1].rstrip(":") for line in out if line.startswith("REFUSED  p")} == {
        c for c in broken["kinds"] if c.startswith("p")
    }
    assert (
        out[-1].startswith(f"refused  {len(broken['kinds'])} cases: ") and "2 organ map" in out[-1]
    )


def project(folder, **row):  # a project's folder with the row of `own`
    p = yaml.safe_load((TOP / "params.yaml").read_text())
    p["cohorts"]["own"].update(row)
    (folder / "params.yaml").write_text(yaml.safe_dump(p, sort_keys=False))
    (folder / "dvc.yaml").write_text("stages: {}\n")
    return folder


def test_columns_of_other_names(whole, tmp_path, monkeypatch, capsys):
    root = tmp_path / "hospital"
    shutil.copytree(whole, root)
    t = pd.read_csv(root / "cases.csv", dtype=str).rename(
        columns=dict(
            case="Accession", image="File", patient="Pseudonym", report="Text", Emphysema="COPD"
        )
    )
    (root / "cases.csv").unlink()
    t.to_csv(root / "export.csv", index=False)
    columns = dict(
        case="Accession", image="File", patient="Pseudonym", report="Text", labels=["COPD"]
    )
    monkeypatch.setenv("ASAP_ROOT", str(project(tmp_path, csv="export.csv", columns=columns)))
    assert main(["check", str(root)]) == 0
    assert re.search(r"^labels   COPD \d+ of \d+$", capsys.readouterr().out, re.M)
    project(tmp_path, csv="export.csv", columns=dict(columns, patient="Patient"))
    assert main(["check", str(root)]) == 1
    assert (
        "export.csv: no column `Patient`; there are ['Accession'"
        in (err := capsys.readouterr().err)
        and "params.yaml: cohorts.own.columns" in err
    )
    project(tmp_path)
    assert main(["check", str(root)]) in (0, 1)  # loose scans, with a hint
    said = capsys.readouterr()
    assert (
        "holds export.csv: to check it as a data set, "
        "name the table in params.yaml, cohorts.own.csv (now cases.csv)"
        in said.err
        and "usable   " not in said.out
    )


def test_another_cohort(tmp_path, capsys):
    root = tmp_path / "stoic"
    get_cohort("stoic").write(root, 3, 3, 2, **SMALL)
    assert main(["check", str(root), "--cohort", "stoic", "--page", str(tmp_path / "p.html")]) == 0
    out = capsys.readouterr().out
    assert (
        "usable   5 of 5 cases: 5 scans of 5 patients" in out
        and "0 with a report, 0 with an organ map" in out
        and "COVID-19 " in out
        and "severe " in out
    )
    assert "data set <i>stoic</i>" in (tmp_path / "p.html").read_text()
    (root / "data/mha/2.mha").write_bytes((root / "data/mha/2.mha").read_bytes()[:900])
    (root / "data/mha/3.mha").unlink()
    assert main(["check", str(root), "--cohort", "stoic"]) == 1
    out = capsys.readouterr().out
    assert (
        "REFUSED  2: data/mha/2.mha is truncated or broken" in out
        and "REFUSED  3: data/mha/3.mha is missing" in out
        and "refused  2 cases: 1 file broken, 1 file missing" in out
        or "refused  2 cases: 1 file missing, 1 file broken" in out
    )


@pytest.mark.parametrize(
    "name", [n for n in available_cohort_names() if n not in ("own", "stoic", "radgenome")]
)
def test_every_adapter(name, tmp_path):
    "What the adapter writes is usable, targets and all, and a broken target is refused"
    adapter = get_cohort(name)
    adapter.write(tmp_path / name, 3, 3, 2, **SMALL)
    r = review.review_cohort(tmp_path / name, name, jobs=1, pictures=1)
    assert (
        len(r.table)
        and len(r.pictures) == 1
        and set(r.refused.case) == {x["case"] for x in adapter.read(tmp_path / name)[1].rows}
    ), r.refused
    assert "other" not in set(r.refused.kind)
    assert review.review_totals(r)["targets"] == (len(r.table) if adapter.targets else 0)
    if adapter.targets:
        f = Path(r.table.target_map[0])
        f.write_bytes(f.read_bytes()[: len(f.read_bytes()) // 2])
        bad = review.review_cohort(tmp_path / name, name, jobs=1, pictures=0).refused
        bad = bad[~bad.case.isin(r.refused.case)]
        assert bad.case.tolist() == [r.table.case[0]] and bad.kind.tolist() == ["target map"], bad


def test_first_release_of_ct_rate(tmp_path):
    "Slope and intercept come out of its table, also under RadGenome's questions"
    get_cohort("radgenome").write(tmp_path / "radgenome", 3, 3, 2, **SMALL)
    shutil.rmtree(tmp_path / "ct_rate")
    get_cohort("ct_rate").write(tmp_path / "ct_rate", 3, 3, 2, **SMALL, release="first")
    for name in ("ct_rate", "radgenome"):
        r = review.review_cohort(tmp_path / name, name, pictures=1)
        assert "slope" in r.table and len(r.table) and not len(r.refused), r.refused


# case: (arguments after the folder, contents of the folder, part of the message)
BAD = {
    "empty folder": ([], {}, "no scan in "),
    "no table": (["--cohort", "own"], {}, "cases.csv is missing: expected a line a volume"),
    "unknown cohort": (["--cohort", "hospital"], {}, "no cohort `hospital`: there are acdc, btcv"),
    "not UTF-8": (
        [],
        {"cases.csv": "case,image,patient,report\na,b,c,\u015e\u00fcphe\n".encode("cp1254")},
        "cp1254 reads 'a,b,c,\u015e\u00fcphe'",
    ),
    "cut off": ([], {"cases.csv": b"case,image,patient,report\na,b,c"}, "the file is cut off"),
    "workbook": ([], {"cases.csv": b"PK\3\4"}, "is a workbook of Excel, expected text"),
    "nothing in it": ([], {"cases.csv": b""}, "cases.csv is broken or no CSV"),
    "no row": ([], {"cases.csv": b"case,image,patient,report\n"}, "none of 0 cases is whole"),
    "page in the data": (
        ["--page", "FOLDER/p.html"],
        {"cases.csv": b"case,image,patient,report\n"},
        "lies in the data's folder",
    ),
    "page is no HTML": (
        ["--page", "FOLDER"],
        {"cases.csv": b"case,image,patient,report\n"},
        "expected a file that ends in .html",
    ),
    "page of loose scans": (["--page", "p.html"], {}, "--page needs a data set"),
    "declared": (["--mr", "--cohort", "own"], {}, "--mr is for loose scans"),
}


@pytest.mark.parametrize("what", BAD)
def test_clear_errors(what, tmp_path, capsys):
    words, there, message = BAD[what]
    for name, data in there.items():
        (tmp_path / name).write_bytes(data)
    assert main(["check", str(tmp_path), *(w.replace("FOLDER", str(tmp_path)) for w in words)]) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1, err
    assert sorted(os.listdir(tmp_path)) == sorted(there)


def test_no_case_is_whole(whole, tmp_path, capsys):
    "The commonest first try: every path is wrong; each case is named all the same"
    root = tmp_path / "hospital"
    root.mkdir()
    t = pd.read_csv(whole / "cases.csv", dtype=str)
    t.assign(image="C:/scans/" + t.case).to_csv(root / "cases.csv", index=False)
    assert main(["check", str(root), "--page", str(tmp_path / "p.html")]) == 1
    assert (
        f"0 of {len(t)} cases" in capsys.readouterr().out
        and "None." in (tmp_path / "p.html").read_text()
    )
