"""The viewer in a headless Chromium: from disk, without a network, and another sentence is
another picture"""

import hashlib

import numpy as np
import pytest
from browser import CHROMIUM, tab

from asap.core import write_json
from asap.data.volumes import write
from asap.inference import viewer
from asap.phantom.abnormalities import synthesize_chest

needs = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium was found on this machine (Debian: `apt-get install chromium`; "
    "or set CHROMIUM to its path)",
)
SIZE, PATCH, GRID = [48, 48, 24], [12, 12, 6], [4, 4, 4]


def sentence(text, region, point, **more):
    heat = np.linspace(0, 1, 64)
    heat[point] = 2
    return (
        dict(
            text=text,
            kind="tried",
            k=len(region),
            point=point,
            heat=heat.tolist(),
            region=region,
            outside=0,
        )
        | more
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Two phantoms in one viewer; the first has a lesion mask, the second a region of one corner"
    root = tmp_path_factory.mktemp("viewer")
    scans = []
    for name, y in (("first", 48), ("second", 40)):
        c = synthesize_chest((0, name, 0), (48, y, 24), (7, 7, 14), only="Consolidation")
        write(c.hu, c.affine, root / f"{name}.nii")
        write(c.findings[0].mask.astype(np.uint8), c.affine, root / f"{name}_lesion.nii.gz")
        affine = viewer.crop_affine(c.affine, c.hu.shape, SIZE)
        says = [
            sentence("<b>There</b> is one.", [0], 0, hit=True, chance=0.02, dice=0.5),
            sentence("There are two.", [20, 42], 42),
            sentence("All.", list(range(64)), 63, outside=3),
        ]
        files = dict(image=f"{name}.nii") | (
            dict(lesion=f"{name}_lesion.nii.gz") if name == "first" else {}
        )
        scans.append(
            dict(
                name=name,
                what=f"A phantom, {name}",
                files=files,
                affine=affine.tolist(),
                size=SIZE,
                patch=PATCH,
                grid=GRID,
                sentences=says,
            )
        )
    write_json(dict(arm="asap", patch_mm="84 x 84 x 84", scans=scans), root / "viewer.json")
    assert viewer.write_viewer(root / "viewer.json", root, "Phantoms", root / "viewer.html")
    return root


@pytest.fixture(scope="module")
def opened(made):
    with tab() as t:
        t.open((made / "viewer.html").as_uri())
        t.until("document.body && document.body.dataset.state === 'first/0'")
        yield t


def look(t) -> str:
    t.run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    return hashlib.sha256(t.picture("#gl")).hexdigest()


@needs
def test_it_opens_from_disk_without_a_network(opened, made):
    assert opened.requests[0] == (made / "viewer.html").as_uri()
    assert [
        u for u in opened.requests[1:] if not u.startswith(("data:", "blob:"))
    ] == [] and opened.complaints == []
    assert opened.run("document.querySelector('#problem').offsetHeight") == 0


@needs
def test_another_sentence_is_another_picture(opened):
    seen = []
    for j in (0, 1, 2, 0):
        opened.run(f"document.querySelectorAll('#list button')[{j}].click()")
        opened.until(
            f"document.body.dataset.state === 'first/{j}' && "
            f"document.querySelectorAll('#list button')[{j}].ariaPressed === 'true'"
        )
        seen.append(look(opened))
    assert len(set(seen[:3])) == 3 and seen[0] == seen[3], "the same sentence is the same picture"
    assert opened.complaints == []


@needs
def test_what_is_painted_is_the_region(opened):
    opened.run("pick(1)")
    painted = (
        np.array(opened.run("Array.from(at.region.img)")).reshape(SIZE[::-1]).T
    )  # the first axis runs fastest
    want = np.zeros(GRID, bool)
    want.ravel()[[20, 42]] = True
    np.testing.assert_array_equal(painted, np.kron(want, np.ones(PATCH)))
    where, point = (
        opened.run("Array.from(nv.frac2mm(nv.scene.crosshairPos)).slice(0, 3)"),
        opened.run("[data.scans[0].affine, scan.sentences[1].point]"),
    )
    ijk = (np.array(np.unravel_index(point[1], GRID)) + 0.5) * PATCH - 0.5
    np.testing.assert_allclose(where, (np.array(point[0]) @ [*ijk, 1])[:3], atol=0.2)


@needs
def test_a_slider_changes_the_picture_and_the_lines_go(opened):
    opened.run("pick(2)")
    before = look(opened)
    for change in (
        "$('region').value = 0; $('region').oninput()",
        "$('heat').value = 0.8; $('heat').oninput()",
        "$('lines').checked = false; $('lines').oninput()",
        "$('window').value = '-160,240'; $('window').oninput()",
    ):
        opened.run(change)
        now = look(opened)
        assert now != before, change
        before = now


@needs
def test_text_is_text_and_a_hit_is_said(opened):
    opened.run("pick(0)")
    said = opened.run("$('said').innerText")
    assert "<b>There</b> is one." in said and "into the lesion" in said and "2.0 %" in said
    opened.run("pick(2)")
    assert "3 beyond the edge" in opened.run("$('said').innerText")


@needs
def test_the_address_chooses(made):
    with tab() as t:
        t.open((made / "viewer.html").as_uri() + "#second/1")
        t.until("document.body && document.body.dataset.state === 'second/1'")
        assert t.run("$('marked').offsetHeight") == 0, "no lesion mask, no slider for it"
        one = look(t)
        t.run("location.hash = '#first/1'")
        t.until("document.body.dataset.state === 'first/1'")
        assert look(t) != one
        t.run("location.hash = '#nobody/99'")
        t.until("document.body.dataset.state === 'first/0'")
        assert t.complaints == []


@needs
def test_without_webgl_it_says_so(made):
    with tab("--disable-gpu", "--disable-3d-apis") as t:
        t.open((made / "viewer.html").as_uri())
        t.until("document.body && document.body.dataset.state === 'failed'")
        assert "no WebGL2" in t.run("$('problem').innerText") and t.complaints == []


def test_no_address_of_a_network_in_what_we_wrote(made):
    "The policy lets nothing out, and our own part names no other place"
    text = (made / "viewer.html").read_text().replace(viewer.load_niivue(), "")
    assert "default-src 'none'" in text and "http://" not in text and "https://" not in text


def test_nothing_grounded_leaves_no_viewer(tmp_path):
    (tmp_path / "old.html").write_text("of an earlier study")
    assert (
        not viewer.write_viewer(tmp_path / "none.json", tmp_path, "", tmp_path / "old.html")
        and not (tmp_path / "old.html").exists()
    )


@pytest.mark.parametrize("shape", [(40, 52, 30), (48, 48, 24), (33, 20, 9)])
def test_the_box_lies_where_the_crop_is(shape, tmp_path):
    "A marked voxel keeps its place in the world"
    from asap.data.crops import apply_crop, center_crop

    affine, v = np.diag([-3.0, 3, 5, 1]), np.zeros(shape, np.uint8)
    affine[:3, 3] = 10, -20, 30
    ijk = np.array(shape) // 2 + 1
    v[tuple(ijk)] = 1
    at = np.argwhere(apply_crop(v, center_crop(shape, SIZE), SIZE, 0))[0]
    np.testing.assert_allclose(
        viewer.crop_affine(affine, shape, SIZE) @ [*at, 1], affine @ [*ijk, 1]
    )
