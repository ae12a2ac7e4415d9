"""Models of the dress rehearsal, and the table of what its stages need.

`make rehearsal` calls both in build/rehearsal, a copy of this tree with params/rehearsal.yaml:
`python benchmarks/rehearsal.py models` writes files and folders as they are published, with random
weights, to build/models; `python benchmarks/rehearsal.py save FOLDER` writes what the stages in
FOLDER needed to benchmarks/rehearsal.csv, which nbs/96_cost.ipynb extrapolates.

text: CXR-BERT, whose config.json and tokenizer_config.json name code of their own. language: a
Qwen3 of 4 layers with 1024 channels, the smallest of its shapes that the published sizes have; the
language model of params/paper.yaml has 36 layers with 2560. mae_pretrain_vit_base.pth: a 2-D MAE
ViT-B. released.pth: a file as the paper's training leaves it.
"""

import argparse
import json
import sys
from pathlib import Path

SEED = 0
VOCABULARY = 30_522  # word pieces of BERT
IMAGE_PATCHES = 14 * 14  # of a 2-D MAE
PEAK_GB = 16  # that a stage of the rehearsal may need


def write_file(path: Path, write) -> None:  # write: takes a path
    "Write a file or folder unless it exists; one that exists is whole"
    if path.exists():
        return
    half = path.with_name(f"half-{path.name}")
    write(half)
    half.rename(path)
    print(f"random weights in {path}", flush=True)


def phantom_words() -> list[str]:  # word pieces of the phantoms' reports
    return list(json.loads(Path("weights/text/tokenizer.json").read_text())["model"]["vocab"])


def write_text_encoder(folder: Path) -> None:
    "A BERT base under the names of CXR-BERT, whose code is not there"
    import torch
    import transformers

    words = phantom_words()
    words += [f"[unused{i}]" for i in range(VOCABULARY - len(words))]
    torch.manual_seed(SEED)
    config = transformers.BertConfig(vocab_size=VOCABULARY, hidden_dropout_prob=0.25)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    code, entries = "configuration_cxrbert", json.loads((folder / "config.json").read_text())
    entries |= dict(
        architectures=["CXRBertModel"],
        auto_map=dict(
            AutoConfig=f"{code}.CXRBertConfig", AutoModel="modeling_cxrbert.CXRBertModel"
        ),
        model_type="cxr-bert",
        projection_size=128,
    )
    (folder / "config.json").write_text(json.dumps(entries))
    names = dict(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
    tokenizer = {f"{k}_token": v for k, v in names.items()} | dict(
        do_lower_case=True,
        tokenize_chinese_chars=True,
        strip_accents=None,
        model_max_length=512,
        tokenizer_class="CXRBertTokenizer",
        auto_map=dict(AutoTokenizer=[f"{code}.CXRBertTokenizer", None]),
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def write_language_model(folder: Path) -> None:
    "A Qwen3 with few layers and the byte pairs of the phantoms' words"
    import torch
    import transformers

    from asap.text.language import train_bpe_tokenizer

    tokenizer = train_bpe_tokenizer(phantom_words(), 2000)
    torch.manual_seed(SEED)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw(shapes: dict) -> dict:  # name -> shape or tensor; -> tensor
    "Random weights; norms are scaled by about 1"
    import torch

    g = torch.Generator().manual_seed(SEED)
    return {
        k: torch.randn(tuple(v.shape), generator=g) * 0.02
        + float("norm" in k and k.endswith("weight"))
        for k, v in shapes.items()
    }


def write_image_mae(path: Path) -> None:
    import torch

    from asap.pretrain.checkpoint import _expected_block_tensors

    places = dict(
        cls_token=torch.empty(1, 1, 768), pos_embed=torch.empty(1, 1 + IMAGE_PATCHES, 768)
    )
    kernel = {"patch_embed.proj.weight": torch.empty(768, 3, 16, 16)}
    torch.save(dict(model=draw(_expected_block_tensors(768, 12) | places | kernel)), path)


def write_released_checkpoint(path: Path) -> None:
    "Encoder, a part of what is left out of it, and what else the paper's file holds"
    import torch

    from asap.model.vit import sincos_pos_embed
    from asap.pretrain.checkpoint import _expected_encoder_tensors

    weights = draw(_expected_encoder_tensors(768, 12, (16, 16, 8), 14**3))
    places = sincos_pos_embed((14, 14, 14), 768)
    weights["pos_embed"] = torch.cat([torch.zeros(1, 768), places])[None]
    weights |= dict(mask_token=torch.zeros(1, 1, 768), decoder_pos_embed=torch.zeros(1, 2745, 768))
    more = argparse.Namespace(batch_size=14, mask_ratio=0.75, resume="")
    torch.save(dict(model=weights, epoch=199, scaler=dict(scale=65536.0), args=more), path)


def write_models(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "text", write_text_encoder)
    write_file(folder / "language", write_language_model)
    write_file(folder / "mae_pretrain_vit_base.pth", write_image_mae)
    write_file(folder / "released.pth", write_released_checkpoint)


def working_share(notebook: Path, minutes: float) -> float:  # of an executed stage
    "Part of a stage's time that is not its kernel's start and not its imports"
    cells = json.loads(notebook.read_text())["cells"]
    cells = [c for c in cells if c["cell_type"] == "code"]
    imports = [i for i, c in enumerate(cells) if "from asap." in "".join(c["source"])]
    work = sum(c["metadata"]["papermill"]["duration"] or 0 for c in cells[imports[0] + 1 :])
    return min(1.0, work / (60 * max(minutes, 0.01)))


def stage_record(folder: Path):  # DataFrame: stage, minutes, cpu_seconds, work_seconds, GB
    "What each stage of a study needed, in the order of its graph; work: without its start"
    import pandas as pd
    import yaml

    rows = []
    for f in sorted((folder / "runs/minutes").glob("*.json")):
        row = json.loads(f.read_text())
        share = working_share(folder / f"runs/notebooks/{f.stem}.ipynb", row["minutes"])
        rows.append(row | dict(work_seconds=round(share * row["cpu_seconds"], 2)))
    order = list(yaml.safe_load((folder / "dvc.yaml").read_text())["stages"])
    t = pd.DataFrame(rows)
    t["place"] = t.stage.map(lambda s: order.index(s.split("@")[0]))
    t = t.sort_values(["place", "stage"])
    return t[["stage", "minutes", "cpu_seconds", "work_seconds", "peak_gb", "total_gb"]]


def case_record(folder: Path):  # DataFrame: cohort, train, val, test, questions of test cases
    "Cases of each cohort by split"
    import pandas as pd

    rows = []
    for path in sorted((folder / "build/cohorts").glob("*/*.parquet")):
        if path.stem != path.parent.name:
            continue
        table = pd.read_parquet(path)
        asked = path.with_suffix(".questions.parquet")
        case = pd.read_parquet(asked).case if asked.exists() else pd.Series(dtype=str)
        counts = {s: int((table.split == s).sum()) for s in ("train", "val", "test")}
        test = table.case[table.split == "test"]
        rows.append(dict(cohort=path.stem, **counts, questions=int(case.isin(test).sum())))
    return pd.DataFrame(rows)


def tasks_without_predictions(folder: Path) -> list[str]:  # of study.tasks
    "Tasks that a study left out, for instance because its few cases are of one class"
    import pandas as pd
    import yaml

    from asap.registry import all_tasks

    tasks = yaml.safe_load((folder / "params.yaml").read_text())["study"]["tasks"]
    wanted = [name for task in tasks for name in all_tasks()[task].scored]
    found: set[str] = set()
    for path in (folder / "runs").rglob("predictions.parquet"):
        found |= set(pd.read_parquet(path, columns=["task"]).task.astype(str))
    return [name for name in wanted if name not in found]


def save(folder: Path) -> int:  # exit code
    "Write the records; tell where the bars are not met"
    stages, cases = stage_record(folder), case_record(folder)
    here = Path(__file__).parent
    stages.to_csv(here / "rehearsal.csv", index=False)
    cases.to_csv(here / "rehearsal_cases.csv", index=False)
    minutes, peak = stages.minutes.sum(), stages.total_gb.max()
    print(f"{len(stages)} stages, {minutes:.0f} min one after the other, {peak:.1f} GB at most")
    if peak > PEAK_GB:
        print(f"expected at most {PEAK_GB} GB: {stages.stage[stages.total_gb.idxmax()]}")
    if missing := tasks_without_predictions(folder):
        print(f"no predictions of {', '.join(missing)}: more cases in params/rehearsal.yaml")
    return int(peak > PEAK_GB or bool(missing))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["models", "save"])
    parser.add_argument("folder", nargs="?", type=Path)
    a = parser.parse_args()
    if a.command == "save":
        return save(a.folder or Path("build/rehearsal"))
    write_models(a.folder or Path("build/models"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
