"A companion's volumes are those of another cohort: embedded once, its tokens rows among theirs"

import numpy as np
import pandas as pd
import pytest

from asap.core import write_json
from asap.data.table import save
from asap.pretrain import embed
from asap.store import write_manifest
from asap.tasks.vqa import load_tokens

CASES = list("abcdef")


def prepare(root, name: str, cases: list[str], voxels: dict, **status) -> pd.DataFrame:
    "What the stage `prepare` writes of a cohort, without volumes"
    text = dict.fromkeys(("organ_map", "target_map", "findings", "impression"), "")
    t = pd.DataFrame(dict(case=cases, scan=cases, patient=cases, split="train", **text))
    t = t.assign(time_days=np.nan, event=np.nan)
    t["image"] = [str(root / f"build/volumes/{name}/{c}.nii") for c in cases]
    folder = root / "build/cohorts" / name
    save(t, None, folder, name, root)
    write_json(dict(there=True, **status), folder / "status.json")
    rows = [dict(name=f"{c}.nii", case=c, voxels=voxels[c]) for c in cases]
    write_manifest(rows, root / "build/volumes" / name)
    return t


@pytest.fixture
def root(tmp_path):
    prepare(tmp_path, "ct_rate", CASES, dict(zip(CASES, CASES)))
    return tmp_path


def holders(root, *cohorts):
    return embed.token_cohorts(cohorts, root)


def test_a_companion_is_not_embedded_again(root):
    prepare(root, "radgenome", ["e", "b"], dict(e="e", b="b"), parent="ct_rate")
    both = dict(ct_rate="ct_rate", radgenome="ct_rate")
    assert holders(root, "ct_rate", "radgenome") == both
    assert holders(root, "radgenome", "ct_rate") == both
    own = dict(radgenome="radgenome")
    assert holders(root, "radgenome") == own, "tokens of all of CT-RATE would be stored for it"
    assert holders(root, "ct_rate") == dict(ct_rate="ct_rate")


@pytest.mark.parametrize(
    ("voxels", "status"),
    [
        (dict(e="other", b="b"), dict(parent="ct_rate")),  # made with other options
        (dict(e="e", z="z"), dict(parent="ct_rate")),  # a case that the cohort leaves out
        (dict(e="e", b="b"), {}),  # no companion
    ],
)
def test_other_volumes_are_embedded(root, voxels, status):
    prepare(root, "radgenome", list(voxels), voxels, **status)
    assert holders(root, "ct_rate", "radgenome")["radgenome"] == "radgenome"


def test_its_tokens_are_rows_of_the_cohort(root, tmp_path):
    asked = prepare(root, "radgenome", ["e", "b"], dict(e="e", b="b"), parent="ct_rate")
    table, folder = (
        embed.tables.load(root / "build/cohorts/ct_rate/ct_rate.parquet", root),
        tmp_path / "build/tokens/asap",
    )
    tokens = np.arange(6 * 2 * 3, dtype=np.float16).reshape(6, 2, 3)
    embed.save_tokens(tokens, table, folder, "ct_rate", dict(encoder="x"))
    embed.link_tokens(holders(root, "ct_rate", "radgenome"), folder)
    assert sorted(f.name for f in folder.glob("*radgenome*")) == ["radgenome.json"]
    t, rows, made = load_tokens(folder, "radgenome", asked)
    assert rows.tolist() == [4, 1] and made == dict(encoder="x")
    assert np.array_equal(t[rows], tokens[[4, 1]])
    more = asked.assign(case=["e", "q"])
    with pytest.raises(ValueError, match="other cases than cohort radgenome"):
        load_tokens(folder, "radgenome", more)
