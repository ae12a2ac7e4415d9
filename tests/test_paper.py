"The paper's scale: its params make a graph that DVC reads, and what it costs follows from them"

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TOP

from asap.cost import (
    CostAssumptions,
    block_flops,
    count_steps,
    disk_usage,
    forward_flops,
    gpu_hours_table,
    train_flops,
)
from asap.params import load_params, read_params
from asap.registry import family_of

PAPER = load_params(TOP / "params/paper.yaml")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "This tree as a repository of its own, at the paper's scale, with nothing made"
    to = tmp_path_factory.mktemp("paper") / "asap"
    subprocess.run(
        ["bash", TOP / "tests/smoke.sh", to],
        check=True,
        capture_output=True,
        env=os.environ | dict(PYTHON=sys.executable),
    )
    paper = read_params(TOP / "params/paper.yaml")
    (to / "params.yaml").write_text(yaml.safe_dump(paper, sort_keys=False))
    return to


def dvc(clone, *words) -> str:
    done = subprocess.run(
        [Path(sys.executable).with_name("dvc"), *words],
        cwd=clone,
        capture_output=True,
        text=True,
        env=os.environ | dict(DVC_NO_ANALYTICS="1", PYTHONPATH=str(clone)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected(p) -> set:  # names of the stages that the params ask for, of those that repeat
    study, graph = p.study.model_dump(), yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
    lists = {
        "${study.cohorts}": study["cohorts"],
        "${study.arms}": study["arms"],
        "${study.tasks}": study["tasks"],
    }
    return {
        f"{n}@{i}"
        for n, s in graph.items()
        for i in lists.get(s.get("foreach") if isinstance(s.get("foreach"), str) else "", [])
    }


def test_its_graph_is_read(clone):
    dag = dvc(clone, "dag", "--mermaid")
    named = set(re.findall(r'\["([^"]+)"\]', dag))
    assert (
        expected(PAPER) <= named
        and {"synthesize", "real_scans", "real", "text", "tables", "figures", "grounding", "page"}
        <= named
    )
    assert len(named) <= 77 and not {
        n for n in named if n.endswith(("@asap_no_organs", "@clip"))
    }, "arms that do not run have no stage"


def test_its_state_is_read(clone):
    "Nothing is made yet, and DVC can say so of every stage"
    said = dvc(clone, "status", "--json")
    changed = yaml.safe_load(said)
    assert {f"pretrain@{a}" for a in PAPER.study.arms} <= set(
        changed
    ) and "prepare@ct_rate" in changed


def test_a_batch_more_costs_so_much_more():
    more = PAPER.model_copy(
        update=dict(pretrain=PAPER.pretrain.model_copy(update=dict(steps=2 * PAPER.pretrain.steps)))
    )
    a, b = (gpu_hours_table(p).set_index("what") for p in (PAPER, more))
    assert (
        b.exaflop["pretrain asap"] == pytest.approx(2 * a.exaflop["pretrain asap"])
        and b.exaflop["embed asap"] == a.exaflop["embed asap"]
    )
    four, eight = count_steps(PAPER), count_steps(PAPER, CostAssumptions(num_gpus=8))
    assert eight["volumes_seen"] == four["volumes_seen"], "the batch is shared"
    assert (four["pairs_a_gpu"], eight["pairs_a_gpu"]) == (14, 7)


def test_an_arm_costs_what_it_uses():
    cost = {n: train_flops(PAPER, a) for n, a in PAPER.arms.items()}
    assert (
        cost["scratch"] == 0 < cost["mae"] < cost["asap"]
        and cost["clip"] < cost["asap"]
        and cost["asap_no_organs"] == cost["asap"]
    )
    assert "text, frozen" not in forward_flops(PAPER, PAPER.arms["mae"])


def test_a_block_is_what_pytorch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from asap.model.vit import Block

    with FlopCounterMode(display=False) as f:
        Block(64, 4, 2.0).bfloat16()(
            torch.randn(1, 37, 64).bfloat16()
        )  # in fp32 attention is one operation, which is not counted
    assert f.get_total_flops() == block_flops(37, 64, 2)


def test_volumes_of_a_companion_are_kept_once():
    def disk(*left_out):
        cohorts = [c for c in PAPER.study.cohorts if c not in left_out]
        study = PAPER.study.model_copy(update=dict(cohorts=cohorts))
        return disk_usage(PAPER.model_copy(update=dict(study=study)), 10**8)["standard volumes"]

    assert disk() == disk("radgenome") > disk("ct_rate", "radgenome")
    assert disk("ct_rate") > disk("ct_rate", "radgenome"), "alone, they are its own"


def test_without_tokens_the_disk_is_small():
    tasks = [t for t in PAPER.study.tasks if family_of(t).inputs != "tokens"]
    d = disk_usage(
        PAPER.model_copy(update=dict(study=PAPER.study.model_copy(update=dict(tasks=tasks)))), 10**8
    )
    assert (
        d["all tokens"] == 0
        and d["standard volumes"] == disk_usage(PAPER, 10**8)["standard volumes"]
    )
