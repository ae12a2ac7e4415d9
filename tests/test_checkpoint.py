"Files of weights: the paper's format read by hand, any grid, hub methods, and what is refused"

import argparse
import ast
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys

import huggingface_hub.hub_mixin
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOP
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from asap.core import read_json, write_json
from asap.model.asap import build_config
from asap.model.vit import ViT3D, sincos_pos_embed
from asap.params import load_params
from asap.pretrain import checkpoint
from asap.pretrain.checkpoint import (
    CHECKPOINT_FILES,
    ASAPHubModel,
    load,
    load_mae2d_blocks,
    load_model,
    save,
    set_input_size,
)


def table(grid, dim) -> np.ndarray:  # (N,dim), patch by patch
    "Sines and cosines, written out"
    per = dim // 6

    def angle(index):
        return [index * 10000 ** (-i / per) for i in range(per)]

    def row(place):
        return [f(a) for index in place for f in (math.sin, math.cos) for a in angle(index)]

    return np.array(
        [row((h, w, d)) for h in range(grid[0]) for w in range(grid[1]) for d in range(grid[2])]
    )


def weights(dim, depth, patch, grid, seed=0, pos=None) -> dict:
    "What stands under `model`: an encoder, and what is left out of it"
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.05):
        return torch.randn(shape, generator=g) * std

    def layer(k, o, i):
        return {f"{k}.weight": draw(o, i), f"{k}.bias": draw(o)}

    def norm(k, n):
        return {f"{k}.weight": 1 + draw(n), f"{k}.bias": draw(n)}

    pos = torch.tensor(table(grid, dim)).float() if pos is None else pos
    w = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": F.pad(pos, (0, 0, 1, 0))[None],
        "patch_embed.proj.weight": draw(dim, 1, *patch),
        "patch_embed.proj.bias": draw(dim),
    } | norm("norm", dim)
    for b in (f"blocks.{i}" for i in range(depth)):
        w |= (
            norm(f"{b}.norm1", dim)
            | layer(f"{b}.attn.qkv", 3 * dim, dim)
            | layer(f"{b}.attn.proj", dim, dim)
        )
        w |= (
            norm(f"{b}.norm2", dim)
            | layer(f"{b}.mlp.fc1", 4 * dim, dim)
            | layer(f"{b}.mlp.fc2", dim, 4 * dim)
        )
    return (
        w
        | {
            "mask_token": draw(1, 1, 8),
            "decoder_pos_embed": draw(1, 3, 8),
            "regression_head.bias": draw(1),
        }
        | layer("decoder_blocks.0.mlp.fc1", 8, 8)
        | norm("decoder_norm", 8)
        | layer("bert_encoder.pooler", 8, 8)
        | layer("align_text_mlp.dense_to_hidden", 8, 8)
    )


def by_hand(w, x, heads) -> tuple:  # tokens before the last norm, and after it
    "The format, read line by line: convolution, places, class token, blocks"

    def norm(k, h):
        return F.layer_norm(h, h.shape[-1:], w[f"{k}.weight"], w[f"{k}.bias"], eps=1e-6)

    def layer(k, h):
        return F.linear(h, w[f"{k}.weight"], w[f"{k}.bias"])

    p = w["patch_embed.proj.weight"]
    h = (
        F.conv3d(x, p, w["patch_embed.proj.bias"], stride=p.shape[2:]).flatten(2).transpose(1, 2)
        + w["pos_embed"][:, 1:]
    )
    h = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), h], 1)
    c, b = h.shape[-1] // heads, 0
    while f"blocks.{b}.norm1.weight" in w:
        q, k, v = layer(f"blocks.{b}.attn.qkv", norm(f"blocks.{b}.norm1", h)).chunk(3, -1)
        parts = [
            torch.softmax(q[..., i : i + c] @ k[..., i : i + c].transpose(1, 2) / math.sqrt(c), -1)
            @ v[..., i : i + c]
            for i in range(0, h.shape[-1], c)
        ]
        h = h + layer(f"blocks.{b}.attn.proj", torch.cat(parts, -1))
        m = layer(f"blocks.{b}.mlp.fc1", norm(f"blocks.{b}.norm2", h))
        h = h + layer(f"blocks.{b}.mlp.fc2", m * 0.5 * (1 + torch.erf(m / math.sqrt(2))))
        b += 1
    return h, norm("norm", h)


SMALL = dict(dim=48, depth=2, patch=(4, 6, 2), grid=(2, 3, 4))
SIZE = (8, 18, 8)


def write(path, w, **more):
    "A file as the paper's training leaves it"
    torch.save(
        dict(
            model=w,
            epoch=199,
            scaler=dict(scale=65536.0),
            args=argparse.Namespace(batch_size=14, mask_ratio=0.75, resume=""),
            **more,
        ),
        path,
    )
    return path


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small.pth", weights(**SMALL))


# the paper's format


@torch.no_grad()
def test_the_papers_size_gives_the_tokens_of_a_reading_by_hand(tmp_path, capsys):
    w = weights(768, 12, (16, 16, 8), (14, 14, 14))
    file = write(tmp_path / "released.pth", w)
    encoder = load(file)
    said = capsys.readouterr().err
    assert (
        "12 blocks of width 768, 12 heads, volumes of 224x224x112; 11 tensors left out" in said
        and "not sines" not in said
    )
    assert not encoder.training and (encoder.img_size, encoder.spacing, encoder.hu_range) == (
        (224, 224, 112),
        (1.5, 1.5, 3),
        (-1000, 1000),
    )
    x = torch.rand(1, 1, 224, 224, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert (encoder.forward_features(x) - by_hand(w, x, 12)[1]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("heads", [3, 8])
def test_a_small_file_gives_the_tokens_of_a_reading_by_hand(tmp_path, capsys, learnt, heads):
    w = weights(**SMALL)
    if learnt:
        w["pos_embed"] = torch.randn(
            1, 25, 48, generator=torch.Generator().manual_seed(2)
        )  # its first row is the class token's
    encoder = load(write(tmp_path / "small.pth", w), size=SIZE, heads=heads)
    x = torch.rand(2, 1, *SIZE) * 2 - 1
    before, after = by_hand(w, x, heads)
    assert (encoder.forward_features(x) - after).abs().max() < 1e-4 and (
        encoder.forward_features(x, norm=False) - before
    ).abs().max() < 1e-4
    assert torch.equal(encoder.pos_embed, w["pos_embed"][0, 1:])
    assert ("its position table is not sines and cosines" in capsys.readouterr().err) == learnt


def test_the_grid_is_read_off_sines_and_cosines(small):
    for grid in ((2, 3, 4), (1, 1, 24), (24, 1, 1), (5, 1, 2)):
        assert checkpoint._sincos_grid(sincos_pos_embed(grid, 48)) == grid
    assert (
        checkpoint._sincos_grid(torch.randn(24, 48)) is None
        and checkpoint._sincos_grid(sincos_pos_embed((2, 3, 4), 48)[:23]) is None
    )
    assert load(small, heads=3).img_size == SIZE


def test_what_is_left_out_is_said(small, capsys):
    load(small, heads=3)
    assert capsys.readouterr().err == (
        "small.pth: 2 blocks of width 48, 3 heads, volumes of 8x18x8; 11 tensors left out: "
        "2 of align_text_mlp, 2 of bert_encoder, 2 of decoder_blocks, 2 of decoder_norm, "
        "1 of decoder_pos_embed, 1 of mask_token, "
        "1 of regression_head\n"
    )


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_optimiser_and_arguments_in_the_file_do_no_harm(tmp_path, old):
    w = weights(**SMALL)
    opt = torch.optim.AdamW([torch.nn.Parameter(w["norm.weight"].clone())])
    whole = dict(
        model=w,
        optimizer=opt.state_dict(),
        epoch=3,
        scaler={},
        args=argparse.Namespace(lr=1.5e-4, betas=(0.9, 0.95)),
    )
    torch.save(whole, tmp_path / "f.pth", _use_new_zipfile_serialization=not old)
    assert torch.equal(load(tmp_path / "f.pth", heads=3).norm.weight, w["norm.weight"])


def test_the_file_may_go_once_it_is_read(small):
    encoder = load(small, heads=3)
    before = encoder.forward_features(torch.zeros(1, 1, *SIZE))
    small.write_bytes(b"\0" * small.stat().st_size)
    small.unlink()
    assert torch.equal(encoder.forward_features(torch.zeros(1, 1, *SIZE)), before)


WRONG = {
    "missing": (
        lambda w: w.pop("blocks.1.attn.qkv.bias"),
        "missing ['blocks.1.attn.qkv.bias'], unexpected []",
    ),
    "missing class token": (lambda w: w.pop("cls_token"), "missing ['cls_token']"),
    "missing patches": (
        lambda w: w.pop("patch_embed.proj.weight"),
        "missing ['patch_embed.proj.weight']",
    ),
    "missing table": (lambda w: w.pop("pos_embed"), "missing ['pos_embed']"),
    "no block": (
        lambda w: [w.pop(k) for k in list(w) if k.startswith("blocks.")],
        "missing ['blocks.0.attn.proj.bias'",
    ),
    "a block left out between": (
        lambda w: w.update({"blocks.3.norm1.weight": torch.ones(48)}),
        "unexpected ['blocks.3.norm1.weight']",
    ),
    "unknown in a block": (
        lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(48)}),
        "unexpected ['blocks.0.ls1.gamma']",
    ),
    "unknown": (
        lambda w: w.update({"fc_norm.weight": torch.ones(48)}),
        "unexpected ['fc_norm.weight']: fetch it again",
    ),
    "shape": (
        lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.ones(96, 48)}),
        "`blocks.0.mlp.fc1.weight` has shape (96, 48), expected (192, 48)",
    ),
    "shape of a norm": (
        lambda w: w.update({"norm.weight": torch.ones(47)}),
        "`norm.weight` has shape (47,), expected (48,)",
    ),
    "shape of the class token": (
        lambda w: w.update(cls_token=torch.ones(1, 48)),
        "`cls_token` has shape (1, 48), expected (1, 1, 48)",
    ),
    "shape of the table": (
        lambda w: w.update(pos_embed=torch.ones(1, 25, 47)),
        "`pos_embed` has shape (1, 25, 47), expected (1, 25, 48)",
    ),
    "an image's patches": (
        lambda w: w.update({"patch_embed.proj.weight": torch.ones(48, 3, 16, 16)}),
        "has shape (48, 3, 16, 16), expected (48, 1, 16, 16, 8)",
    ),
    "colours": (
        lambda w: w.update({"patch_embed.proj.weight": torch.ones(48, 3, 4, 6, 2)}),
        "has shape (48, 3, 4, 6, 2), expected (48, 1, 4, 6, 2)",
    ),
    "half": (
        lambda w: w.update({"norm.weight": torch.ones(48).half()}),
        "`norm.weight` is torch.float16, expected torch.float32",
    ),
    "integers": (
        lambda w: w.update({"norm.weight": torch.ones(48, dtype=torch.long)}),
        "`norm.weight` is torch.int64, expected torch.float32",
    ),
    "no tensor": (
        lambda w: w.update({"norm.weight": 1.0}),
        "`norm.weight` is float, expected torch.float32",
    ),
    "NaN": (
        lambda w: w["blocks.1.norm2.bias"][3:5].fill_(math.nan),
        "`blocks.1.norm2.bias` holds 2 of 48 numbers that are NaN or infinite, expected none",
    ),
    "infinite": (lambda w: w["cls_token"].fill_(math.inf), "`cls_token` holds 48 of 48 numbers"),
    "half a table": (
        lambda w: w.update(pos_embed=w["pos_embed"][:, :24]),
        "`pos_embed` has 23 patches of 4x6x2 voxels, expected 24 in 8x18x8",
    ),
    "no patch": (lambda w: w.update(pos_embed=w["pos_embed"][:, :1]), "`pos_embed` has 0 patches"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit_are_refused(tmp_path, case):
    spoil, expected = WRONG[case]
    w = weights(**SMALL)
    spoil(w)
    with pytest.raises(ValueError) as e:
        load(write(tmp_path / "spoilt.pth", w), size=SIZE, heads=3)
    assert "spoilt.pth" in str(e.value) and expected in str(e.value)


def test_a_learnt_table_of_another_grid_asks_for_its_size(tmp_path, capsys):
    w = weights(**SMALL, pos=torch.randn(24, 48))
    with pytest.raises(
        ValueError,
        match="`pos_embed` has 24 patches of 4x6x2 voxels, "
        "expected a whole number in 224x224x112: say in `size`",
    ):
        load(write(tmp_path / "a.pth", w), heads=3)
    w = weights(48, 1, (16, 16, 8), (14, 14, 14), pos=torch.randn(2744, 48))
    assert load(write(tmp_path / "b.pth", w), heads=3, size=(64, 64, 32)).pos_embed.shape == (
        64,
        48,
    )
    assert (
        "224x224x112 voxels stretched by trilinear interpolation for 64x64x32"
        in capsys.readouterr().err
    )


def test_heads_that_do_not_divide_are_refused(small):
    for heads, found in ((None, 0), (7, 7)):
        with pytest.raises(
            ValueError,
            match=f"48 channels are not a whole number of heads \\({found}\\): "
            "say how many in `heads`",
        ):
            load(small, heads=heads)


def test_more_may_be_left_out_by_name(tmp_path, capsys):
    file = write(
        tmp_path / "f.pth",
        weights(**SMALL) | {"head.weight": torch.ones(2, 48), "head.bias": torch.ones(2)},
    )
    for names in ("head", ("head.",)):
        load(file, heads=3, leave_out=names)
        assert "2 of head" in capsys.readouterr().err
    with pytest.raises(ValueError, match="missing .'norm.bias', 'norm.weight'"):
        load(file, heads=3, leave_out=("head", "norm"))


class Trap:
    "Writes a file when it is unpickled"

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_file_is_run(tmp_path):
    w, mark = weights(**SMALL), tmp_path / "ran"
    torch.save(dict(model=w, args=Trap(mark)), tmp_path / "zip.pth")
    torch.save(
        dict(model=w | {"norm.weight": Trap(mark)}),
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Trap(mark), 2))
    torch.save(dict(model=torch.nn.Linear(2, 2)), tmp_path / "module.pth")
    for name in ("zip", "old", "bare", "module"):
        with pytest.raises(
            ValueError, match=f"{name}.pth is truncated, or holds more than weights"
        ):
            load(tmp_path / f"{name}.pth", heads=3)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_a_truncated_file_is_refused(tmp_path, share, old):
    torch.save(
        dict(model=weights(**SMALL)), tmp_path / "f.pth", _use_new_zipfile_serialization=not old
    )
    whole = (tmp_path / "f.pth").read_bytes()
    (tmp_path / "f.pth").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="f.pth is truncated, or holds more than weights"):
        load(tmp_path / "f.pth", heads=3)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("<html>404</html>")
    (tmp_path / "zeros").write_bytes(b"\0" * 1000)
    shutil.make_archive(tmp_path / "archive", "zip", TOP / "params")
    for name in ("text", "zeros", "archive.zip"):
        with pytest.raises(ValueError, match=f"{name} is truncated, or holds more"):
            load(tmp_path / name)
    for found, what in (
        (weights(**SMALL), "holds \\['cls_token'"),
        ([1], "holds list"),
        (dict(model=[1]), "holds \\['model'\\]"),
        (dict(model={1: torch.ones(1)}), "holds"),
        (ViT3D(SIZE, (4, 6, 2), 48, 1, 3).state_dict(), "holds \\['cls_token'"),
    ):
        torch.save(found, tmp_path / "other.pth")
        with pytest.raises(
            ValueError, match=f"other.pth {what}.*expected a dict with weights under `model`"
        ):
            load(tmp_path / "other.pth")
    for name in ("absent.pth", "absent"):
        with pytest.raises(
            FileNotFoundError, match=f"{name} is missing: expected a checkpoint folder, or a file"
        ):
            load(tmp_path / name)


# other grids


@torch.no_grad()
def test_another_grid_is_as_if_it_had_been_made_for_it(small, capsys):
    other = (16, 6, 12)
    encoder = load(small, heads=3, size=other)
    assert (
        "of 8x18x8 voxels recomputed from sines and cosines for 16x6x12" in capsys.readouterr().err
    )
    fresh = ViT3D(other, (4, 6, 2), 48, 2, 3).eval()
    fresh.load_state_dict(
        {k: v for k, v in encoder.state_dict().items() if k != "pos_embed"}
        | ({"pos_embed": fresh.pos_embed} if "pos_embed" in fresh.state_dict() else {})
    )
    x = torch.rand(1, 1, *other)
    assert torch.equal(encoder.forward_features(x), fresh.forward_features(x)) and (
        encoder.img_size,
        encoder.grid_size,
    ) == (
        other,
        (4, 1, 6),
    )
    before = load(small, heads=3)
    assert torch.allclose(
        set_input_size(encoder, SIZE).forward_features(torch.ones(1, 1, *SIZE)),
        before.forward_features(torch.ones(1, 1, *SIZE)),
        atol=1e-5,
    ), "there and back"


def test_a_learnt_table_is_stretched_along_each_axis(capsys):
    vit = ViT3D((8, 18, 8), (4, 6, 2), 48, 1, 3)
    h, w, d = torch.meshgrid(*(torch.arange(n).float() + 0.5 for n in vit.grid_size), indexing="ij")
    vit.pos_embed = (
        torch.stack([h / 2, w / 3, d / 4], -1).reshape(-1, 3).repeat(1, 16)
    )  # place as a share of each side
    set_input_size(vit, (16, 36, 24))
    assert (
        vit.pos_embed.shape == (4 * 6 * 12, 48)
        and "stretched by trilinear interpolation" in capsys.readouterr().err
    )
    out = vit.pos_embed.reshape(4, 6, 12, 48)
    for axis, (n, old) in enumerate(((4, 2), (6, 3), (12, 4))):
        line = out.movedim(axis, 0)[:, 0, 0, axis]
        assert torch.allclose(
            line, ((torch.arange(n) + 0.5) / n).clamp(0.5 / old, 1 - 0.5 / old), atol=1e-6
        )
    assert (
        torch.allclose(out[..., 0], out[..., 3]) and out.movedim(0, -1).std(-1)[..., 1].max() < 1e-6
    )


def test_a_resized_encoder_keeps_its_precision_and_says_nothing_where_nothing_changes(capsys):
    vit = ViT3D((8, 18, 8), (4, 6, 2), 48, 1, 3).bfloat16()
    set_input_size(vit, (8, 18, 8))
    assert capsys.readouterr().err == ""
    set_input_size(vit, [8, 18, 16])
    assert (
        vit.pos_embed.dtype == torch.bfloat16
        and "recomputed" in capsys.readouterr().err
        and vit.img_size == (8, 18, 16)
    )


@pytest.mark.parametrize("size", [(9, 18, 8), (8, 18), (8, 18, 8, 1), (0, 18, 8), (-4, 18, 8)])
def test_a_size_that_is_no_whole_number_of_patches_is_refused(small, size):
    encoder = load(small, heads=3)
    with pytest.raises(ValueError, match="is not a whole number of patches \\(4, 6, 2\\)"):
        set_input_size(encoder, size)
    assert encoder.img_size == SIZE


# from an image MAE


def test_blocks_of_an_image_model(tmp_path, capsys):
    w = weights(**SMALL) | {
        "patch_embed.proj.weight": torch.randn(48, 3, 16, 16),
        "pos_embed": torch.randn(1, 197, 48),
    }
    file = write(tmp_path / "mae.pth", w)
    vit = ViT3D(SIZE, (4, 6, 2), 48, 2, 3)
    kept = {
        k: v.clone() for k, v in vit.state_dict().items() if not k.startswith(("blocks", "norm"))
    }
    assert load_mae2d_blocks(vit, file) is vit
    said = capsys.readouterr().err
    assert (
        "1 of cls_token" in said
        and "2 of patch_embed" in said
        and "1 of pos_embed" in said
        and "1 of mask_token" in said
    )
    assert all(torch.equal(vit.state_dict()[k], v) for k, v in kept.items())
    x = torch.randn(1, 5, 48)
    h = x
    for b in vit.blocks:
        h = b(h)
    fake = w | {
        "patch_embed.proj.weight": torch.zeros(48, 1, 1, 1, 1),
        "patch_embed.proj.bias": torch.zeros(48),
        "cls_token": x[:, :1],
        "pos_embed": F.pad(x[:, 1:], (0, 0, 1, 0)),
    }
    assert (vit.norm(h) - by_hand(fake, torch.zeros(1, 1, 4, 1, 1), 3)[1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "dim,depth,expected",
    [
        (48, 3, "missing ['blocks.2.attn.proj.bias'"),
        (48, 1, "unexpected ['blocks.1.attn.proj.bias'"),
        (96, 2, "expected (192, 96)"),
    ],
)
def test_an_image_model_of_another_size_is_refused(small, dim, depth, expected):
    vit = ViT3D(SIZE, (4, 6, 2), dim, depth, 3)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    with pytest.raises(ValueError) as e:
        load_mae2d_blocks(vit, small)
    assert f"take a ViT's file of {depth} blocks of width {dim}" in str(e.value) and (
        expected in str(e.value) or dim == 96
    )
    assert all(torch.equal(vit.state_dict()[k], v) for k, v in before.items())


def test_an_image_models_head_is_no_part_of_the_blocks(tmp_path):
    file = write(tmp_path / "mae.pth", weights(**SMALL) | {"head.weight": torch.ones(9, 48)})
    vit = ViT3D(SIZE, (4, 6, 2), 48, 2, 3)
    with pytest.raises(ValueError, match="unexpected .'head.weight'"):
        load_mae2d_blocks(vit, file)
    load_mae2d_blocks(vit, file, leave_out="head")


# from a BERT


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_any_bert_is_a_text_encoder(tmp_path, kind):
    import transformers

    from asap.text.encoder import load as load_text

    (tmp_path / "vocab.txt").write_text(
        "\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] there is no nodule the heart large .".split())
    )
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    bert = getattr(transformers, kind)(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
    ).eval()
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    text = load_text(tmp_path / "bert")
    ids = torch.tensor(tokenizer("There is no nodule.")["input_ids"])[None]
    assert torch.allclose(
        text.tokens(ids), getattr(bert, "bert", bert)(ids).last_hidden_state, atol=1e-6
    )
    f = text.sentences(["There is no nodule.", "The heart is large."])
    assert (
        f.shape == (2, 32)
        and torch.allclose(f.norm(dim=-1), torch.ones(2))
        and not text.bert.training
    )


# our folder


@pytest.fixture(scope="module")
def model():
    p = load_params(TOP / "params/smoke.yaml")
    torch.manual_seed(0)
    return ASAPHubModel(build_config(p, p.arms["asap"], 20, 50)).eval()


@pytest.fixture
def folder(model, tmp_path):
    save(model, tmp_path / "checkpoint", "# A card\n")
    return tmp_path / "checkpoint"


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_there_and_back_to_the_bit(model, folder, tmp_path):
    again = ASAPHubModel.from_pretrained(folder)
    assert (
        all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
        and not again.training
        and again.config == model.config
    )
    again.save_pretrained(tmp_path / "copy")
    assert content(tmp_path / "copy") == content(folder) and set(content(folder)) == set(
        CHECKPOINT_FILES
    )
    ASAPHubModel(model.config).save_pretrained(tmp_path / "copy", card="# Another\n")
    assert ASAPHubModel.from_pretrained(str(tmp_path / "copy")).card == "# Another\n"
    x = torch.rand(1, 1, *model.config["img_size"])
    assert torch.equal(load(folder).forward_features(x), model.vit.forward_features(x))
    assert load(folder, size=(48, 24, 24)).img_size == (48, 24, 24)


def test_a_hubs_id_is_found_in_its_cache(folder, tmp_path):
    cache = tmp_path / "hub/models--someone--asap"
    shutil.copytree(folder, cache / "snapshots/0123")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123")
    assert (
        ASAPHubModel.from_pretrained(
            "someone/asap", cache_dir=tmp_path / "hub", local_files_only=True
        ).card
        == "# A card\n"
    )
    with pytest.raises(LocalEntryNotFoundError):
        ASAPHubModel.from_pretrained(
            "someone/else", cache_dir=tmp_path / "hub", local_files_only=True
        )
    with pytest.raises(FileNotFoundError, match="neither a folder nor an id of the hub"):
        ASAPHubModel.from_pretrained("runs/pretrain/none/checkpoint")


def test_what_is_pushed_is_the_folder(folder, tmp_path, monkeypatch):
    pushed = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kw):
            return argparse.Namespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **kw):
            pushed[repo_id] = content(folder_path)
            return "url"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    assert (
        ASAPHubModel.from_pretrained(folder).save_pretrained(
            tmp_path / "mine", push_to_hub=True, repo_id="someone/asap"
        )
        == "url"
    )
    assert pushed == {"someone/asap": content(folder)}


def respoil(folder, f):
    w = load_file(folder / "model.safetensors")
    f(w)
    save_file(w, folder / "model.safetensors")


@pytest.mark.parametrize(
    "spoil,expected",
    [
        (lambda w: w.pop("vit.norm.bias"), "missing ['vit.norm.bias'], unexpected []"),
        (lambda w: w.update({"vit.extra": torch.ones(1)}), "missing [], unexpected ['vit.extra']"),
        (
            lambda w: w.update({"vit.norm.bias": torch.ones(31)}),
            "`vit.norm.bias` has shape (31,), expected (32,)",
        ),
        (
            lambda w: w.update({"vit.norm.bias": torch.ones(32).half()}),
            "`vit.norm.bias` is torch.float16, expected torch.float32",
        ),
        (
            lambda w: w.update({"vit.norm.bias": torch.full((32,), math.nan)}),
            "`vit.norm.bias` holds 32 of 32 numbers",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(folder, spoil, expected):
    respoil(folder, spoil)
    for f in (load, load_model, ASAPHubModel.from_pretrained):
        with pytest.raises(ValueError) as e:
            f(folder)
        assert (
            expected in str(e.value)
            and "model.safetensors" in str(e.value)
            and "make or fetch the folder again" in str(e.value)
        )


def test_a_broken_folder_is_refused(folder, tmp_path):
    whole, c = content(folder), read_json(folder / "config.json")
    for share in (0, 0.001, 0.5, 0.999):
        (folder / "model.safetensors").write_bytes(
            whole["model.safetensors"][: int(share * len(whole["model.safetensors"]))]
        )
        with pytest.raises(ValueError, match="model.safetensors is truncated or broken"):
            load(folder)
    (folder / "config.json").write_bytes(whole["config.json"][:100])
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load(folder)
    for wrong in (
        {k: v for k, v in c.items() if k != "arm"},
        dict(c, img_size=[50, 48, 24]),
        dict(c, patch_size=None),
        [1],
    ):
        write_json(wrong, folder / "config.json")
        with pytest.raises(ValueError, match="config.json does not describe a model"):
            ASAPHubModel.from_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        for f, b in whole.items():
            (folder / f).write_bytes(b)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
            ASAPHubModel.from_pretrained(folder)


def test_a_model_whose_encoder_was_resized_is_not_saved(model, folder, tmp_path):
    again = load_model(folder)
    set_input_size(again.vit, (48, 24, 24))
    with pytest.raises(ValueError, match="the encoder was resized to"):
        again.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


KILLED = """
import os, signal, sys
from asap.pretrain import checkpoint as c
def die(*a): os.kill(os.getpid(), signal.SIGKILL)
m = c.load_model(sys.argv[1])
def half(w, path):
    open(path, "wb").write(open(sys.argv[1]+"/model.safetensors", "rb").read()[:5000])
    die()
setattr(c, sys.argv[3], half if sys.argv[3] == "save_file" else die)
c.save(m, sys.argv[2], "# Never whole")
"""


@pytest.mark.parametrize("moment", ["save_file", "write_text"])
def test_a_killed_save_leaves_the_old_folder_or_none(folder, tmp_path, moment, forks):
    before = content(folder)
    for to in (folder, tmp_path / "new"):
        done = subprocess.run(
            [sys.executable, "tests/stand_in.py", "-c", KILLED, folder, to, moment],
            cwd=TOP,
            env=forks,
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert content(folder) == before and not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "new")
    left = [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    assert len(left) == 2
    for f in left:
        if moment == "save_file":
            with pytest.raises(FileNotFoundError):
                load(f)
    save(load_model(folder), tmp_path / "new", "# A card\n")
    assert content(tmp_path / "new") == before


def test_an_error_while_saving_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_json", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(model, tmp_path / "c", "")
    assert not list(tmp_path.iterdir())


# the card

STUDY = dict(
    spacing=[7, 7, 14],
    hu_range=[-1000, 1000],
    train=dict(ct_rate=600, inspect=40),
    cohorts=["ct_rate", "inspect"],
    seed=3,
    phantom=2,
)


def test_the_card_says_what_it_is(model):
    text = checkpoint.model_card("asap", model.config, dict(steps=700), STUDY)
    for s in (
        "Arm `asap`",
        "600 volumes of ct_rate, 40 volumes of inspect",
        "Trained for 700 steps on",
        "seed 3",
        "mask_ratio 0.75",
        "Apache-2.0",
        "phantoms, version 2",
        "no patient data",
        "48x48x24 voxels at 7x7x14 mm, HU -1000 to 1000",
        "Not for clinical use",
    ):
        assert s in text, s
    assert "revision" not in text and "hash" not in text and " s on" not in text
    more = dict(
        STUDY,
        data="5d1f0c0e",
        revision="abc-dirty",
        license="of the house",
        pretrain=dict(lr=0.001),
        phantom="none: real scans",
        train=640,
    )
    text = checkpoint.model_card(
        "asap",
        model.config,
        dict(steps=700, seconds=3212.4, num_encoder_parameters=1234567, num_parameters=7654321),
        more,
    )
    for s in (
        "in 3212 s on",
        "640 volumes of ct_rate, inspect",
        "`5d1f0c0e`",
        "`abc-dirty`",
        "of the house",
        "lr 0.001",
        "1,234,567",
        "7,654,321",
        "counts only",
        "terms of their owners",
    ):
        assert s in text, s
    assert "phantom" not in text and "Not trained" in checkpoint.model_card(
        "scratch", model.config, dict(steps=0), STUDY
    )


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_license_and_revision(tmp_path, monkeypatch):
    assert checkpoint.code_license() == "Apache-2.0"

    def git(*a):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *a],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    monkeypatch.setenv("ASAP_ROOT", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert checkpoint.git_revision() is None and checkpoint.code_license() == "not stated"
    (tmp_path / "f").write_text("1")
    git("init", "-q")
    git("add", "f")
    git("commit", "-qm", "one")
    git("tag", "v1")
    assert checkpoint.git_revision() == git("rev-parse", "HEAD")
    (tmp_path / "f").write_text("2")
    assert checkpoint.git_revision() == git("rev-parse", "HEAD") + "-dirty"


# everywhere


def test_no_file_of_weights_may_run_code():
    "Each torch.load of the tree says weights_only=True, and nothing unpickles"
    for f in (TOP / "asap").rglob("*.py"):
        text = f.read_text(encoding="utf8")
        assert "weights_only=False" not in text.replace(" ", ""), f
        for n in ast.walk(ast.parse(text)):
            if not isinstance(n, ast.Call) or not isinstance(n.func, ast.Attribute):
                continue
            name, given = ast.unparse(n.func), {k.arg: ast.unparse(k.value) for k in n.keywords}
            assert name != "torch.load" or given.get("weights_only") == "True", f"{f}:{n.lineno}"
            assert (
                name not in ("pickle.load", "pickle.loads", "joblib.load")
                and given.get("allow_pickle") != "True"
            ), f"{f}:{n.lineno}"
