"""The table of departures on page 54: its params exist, take the stated values and build, and no
difference from the paper is missing"""

import types
import typing

import pytest
import torch
import yaml
from conftest import TOP
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from asap.model.asap import build_asap, build_config
from asap.params import load_params, params_model
from asap.pretrain.recipe import recipe_table
from asap.study.protocols import protocol_table, value_at

FILES = ("params.yaml", "params/paper.yaml")
PARAMS = {f: load_params(TOP / f) for f in FILES}
PAPER = PARAMS["params/paper.yaml"]
SMOKE = load_params(TOP / "params/smoke.yaml")
PARTS = yaml.safe_load((TOP / "nbs/5_model/departures.yaml").read_text(encoding="utf8"))
ROWS = [row for rows in PARTS.values() for row in rows]
SWITCHED = [r for r in ROWS if "switch" in r]
SCHEMA = params_model()
SECTIONS_OF_MODEL = ("volumes", "anatomy", "text", "model", "pretrain", "arms")
KEYS = [k for r in ROWS for k in [*r.get("switch", ()), *r.get("params", ())]]


def value(p, key):
    try:
        return value_at(p, key)
    except KeyError:
        return None


def unwrapped(kind):  # members of a union, without Annotated
    if typing.get_origin(kind) is typing.Annotated:
        return unwrapped(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [k for a in typing.get_args(kind) for k in unwrapped(a)]
    return [kind]


def schema_has(kind, keys: list) -> bool:
    "Whether a dotted key is one of the schema, whatever values a file gives"
    if not keys:
        return True
    for k in unwrapped(kind):
        if isinstance(k, type) and issubclass(k, BaseModel):
            fields = k.model_fields
            names = {f.alias or name: f.annotation for name, f in fields.items()}
            if keys[0] in names and schema_has(names[keys[0]], keys[1:]):
                return True
        elif typing.get_origin(k) is dict and schema_has(typing.get_args(k)[1], keys[1:]):
            return True
    return False


def exists(key: str) -> bool:
    "Whether a dotted key is in the schema of params.yaml; each cohort has options of its own"
    section, *rest = key.split(".")
    if section == "cohorts":
        return schema_has(type(PAPER.cohorts[rest[0]]), rest[1:])
    return schema_has(SCHEMA, [section, *rest])


def with_values(p, changes: dict, path, also=("study", "model")):
    "Sections of the params in which some keys are replaced, read from a file"
    needed = {k.split(".")[0] for k in changes} | {*also}
    tree = {k: to_jsonable_python(getattr(p, k), by_alias=True) for k in needed}
    for key, new in changes.items():
        *above, last = key.split(".")
        at = tree
        for k in above:
            if at.get(k) is None:
                at[k] = {}
            at = at[k]
        at[last] = to_jsonable_python(new, by_alias=True)
    path.write_text(yaml.safe_dump(tree))
    return load_params(path, list(tree))


def wanted(row) -> dict:  # key -> the released code's value
    return {k: value(PAPER, k) for k in row.get("params", ())} | row.get("switch", {})


def test_a_row_states_all_of_a_departure():
    for part, rows in PARTS.items():
        for row in rows:
            said = {"point", "released", "ours", "why"}
            assert said <= row.keys(), (part, row)
            rest = row.keys() - said - {"paper", "note", "rows"}
            assert rest in ({"no_param"}, {"switch"}, {"params"}, {"switch", "params"}), row
            texts = [v for k, v in row.items() if k not in ("switch", "params", "rows")]
            assert all(isinstance(v, str) and v and "|" not in v for v in texts), row
    points = [r["point"] for r in ROWS]
    assert len({*points}) == len(points)


def test_each_param_of_the_table_is_in_the_schema():
    assert not [k for k in KEYS if not exists(k)]


@pytest.mark.parametrize(
    "key", ["pretrain.crop", "arms.asap.region", "model.stem.size", "cohorts.acdc.spaces"]
)
def test_an_unknown_param_is_found(key):
    assert not exists(key)


def batches() -> list[dict]:
    "The values of all rows, in as few files as rows with the same key allow"
    out: list[dict] = []
    for row in SWITCHED:
        changes = wanted(row)
        fits = next((b for b in out if not b.keys() & changes.keys()), None)
        if fits is None:
            out.append(fits := {})
        fits |= changes
    return out


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("number", range(len(batches())))
def test_the_values_that_switch_back_build(number, file, tmp_path):
    changes = batches()[number]
    new = with_values(PARAMS[file], changes, tmp_path / "params.yaml")
    for k, v in changes.items():
        assert to_jsonable_python(value(new, k)) == to_jsonable_python(v), k


def test_a_row_that_is_switched_departs_in_some_file():
    for row in SWITCHED:
        found = [value(p, k) != v for p in PARAMS.values() for k, v in wanted(row).items()]
        assert any(found), f"{row['point']}: no params file departs, the row is out of date"


@pytest.mark.parametrize("number", range(len(batches())))
def test_a_model_is_built_with_the_values(number, tmp_path):
    chosen = {k: v for k, v in batches()[number].items() if k.split(".")[0] in SECTIONS_OF_MODEL}
    p = with_values(SMOKE, chosen, tmp_path / "params.yaml", SECTIONS_OF_MODEL)
    with torch.device("meta"):
        model = build_asap(build_config(p, p.arms["asap"], p.text.embed_dim, p.text.vocab_size))
    for k, v in chosen.items():
        if k.startswith("arms.asap."):
            assert model.arm[k.rpartition(".")[2]] == v


def test_params_of_paper_yaml_depart_in_params_yaml():
    for row in ROWS:
        if "params" in row:
            same = [k for k in row["params"] if value(PARAMS["params.yaml"], k) == value(PAPER, k)]
            assert not same, f"{row['point']}: {same} do not depart"


def flat(tree, prefix="") -> dict:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}{name}.").items()}


def test_every_key_that_paper_yaml_changes_has_a_row():
    a, b = (flat(p.model_dump(by_alias=True)) for p in PARAMS.values())
    changed = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    named = ("phantom.", "study.budget")  # counts of phantoms, and the name of those counts
    changed = [k for k in changed if not k.startswith(named)]
    lacking = [k for k in changed if not any(f"{k}.".startswith(f"{key}.") for key in KEYS)]
    assert not lacking, f"differ from params/paper.yaml without a row: {lacking}"


def named(table: str) -> set:
    return {f for r in ROWS for f in r.get("rows", {}).get(table, ())}


@pytest.mark.parametrize("arm", ["paper", "asap", "released"])
def test_every_difference_of_the_recipe_has_a_row(arm):
    t = recipe_table(PAPER, arm)
    differs = {*t[~t.equal.astype(bool)].setting}
    assert differs <= named("recipe")
    assert named("recipe") <= {*t.setting}


def test_every_difference_of_the_protocols_has_a_row():
    t = protocol_table(PAPER)
    family = t.task.str.split("_").str[0]
    for name, rows in t.groupby(family):
        differs = {*rows[rows.equal != "yes"].field}
        assert differs == named(name), (name, differs ^ named(name))
