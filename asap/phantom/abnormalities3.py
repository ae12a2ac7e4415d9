"""x"""
#| export
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation, label, map_coordinates
from scipy.spatial import cKDTree

from asap.abnormalities import ABNORMALITIES, NO_SHIFT, DomainShift
from asap.core import rng
from asap.phantom.abnormalities import Chest, Finding, describe_lobe, sample_abnormalities
from asap.phantom.canvas import (
    TISSUE_IDS,
    Canvas,
    Pose,
    ellipsoid,
    make_canvas,
    smooth_path,
    tube_distance,
    tube_share,
    tube_width,
)
from asap.phantom.patient import PHASES, Patient, sample_patient
from asap.phantom.scanner import ScannerSettings, sample_settings, scan_body
from asap.phantom.skeleton import STERNUM_Z, BodyWall, on_wall, spine_point, wall_radius
from asap.phantom.thorax import (
    LOBES,
    TRACHEA,
    aorta,
    central_vessels,
    coronary_paths,
    esophagus_path,
    heart_field,
    lobe_of,
    settle,
    surface_height,
)
from asap.phantom.trees import Tree, lobe_points, lung_trees, tree_share
from asap.phantom.whole_body import View, WholeBody, paint_body
from asap.phantom.words import (
    LOG_HAZARDS,
    PhantomCase,
    Reconstruction,
    sample_spacing,
    synthesize_questions,
    synthesize_report,
)

#| export
LESION_HU = {  # lesion: HU without medium, and what each phase adds (pulmonary, arterial, venous)
    "consolidation": (34, 8, 35, 50),
    "atelectasis": (40, 15, 55, 75),
    "nodule": (34, 5, 20, 38),
    "node": (36, 5, 22, 42),
    "scar": (10, 2, 8, 15),
    "septum": (20, 2, 6, 10),
    "bronchus": (24, 4, 12, 20),
    "clot": (58, -10, -10, -8),
    "effusion": (7, 0, 1, 3),
    "pericardium": (11, 0, 1, 3),
    "ground_glass": (300, 0, 0, 0),  # HU added where a voxel was air
    "calcium": (900, 0, 0, 0),
    "metal": (3600, 0, 0, 0),
}


def lesion_values(
    phase: str,  # one of `PHASES`
    seed: Any,  # key of a patient for `asap.core.rng`
    dose: float = 1.0,  # factor of the enhancement
) -> dict[str, float]:  # HU of each lesion
    "Sample the HU of all lesions of one patient"
    r = rng("lesion values", seed)
    column = PHASES.index(phase)
    out = {}
    for name, row in LESION_HU.items():
        plain = row[0] * r.uniform(0.75, 1.3) if row[0] >= 300 else row[0] + r.normal(0, 4)
        mixed = dose * r.uniform(0.8, 1.2)
        out[name] = float(plain + (mixed * row[column] if column else 0.0))
    return out

#| export
@dataclass
class Scene:
    "A painted body, and what the painters of abnormalities need to know of it"

    canvas: Canvas
    wall: BodyWall
    p: Patient
    trees: dict[str, Tree]
    heart: float  # factor of the heart's size
    hu: Mapping[str, float]  # of `lesion_values`
    seed: Any  # key of the patient
    diseases: tuple = ()  # names of `DISEASES`
    severities: dict = field(default_factory=dict)  # abnormality -> 0..1

    @cached_property
    def scale(self) -> np.ndarray:  # (3,)
        "Real mm per canonical mm along x, y, z of the body"
        return np.asarray(self.canvas.pose.stretch) * self.canvas.pose.scale

    @cached_property
    def k(self) -> float:
        "Mean of `scale`"
        return float(self.scale.mean())

    @cached_property
    def width(self) -> float:
        "Mean width of a voxel, canonical mm"
        return float(np.prod(self.canvas.reach) ** (1 / 3))

    @cached_property
    def lung(self) -> np.ndarray:  # bool, (W,H,D)
        "Voxels of the five lobes of the healthy body"
        return np.isin(self.canvas.labels, list(LOBES.values()))

    @cached_property
    def region(self) -> np.ndarray:  # (n,), flat positions
        "Voxels of both lungs and of their border"
        c = self.canvas
        lung = self.lung
        rim = binary_dilation(lung) & (c.labels == 0) & (c.hu < -150) & (self.wall.cavity < 2)
        lumen = c.tissues == TISSUE_IDS["airway"]
        return np.flatnonzero((lung | rim) & ~lumen)

    @cached_property
    def q(self) -> np.ndarray:  # (3,n), canonical mm
        "Points of the region"
        return self.canvas.points.reshape(3, -1)[:, self.region]

    @cached_property
    def side(self) -> np.ndarray:  # (n,), 1: right, -1: left
        "Side of each point of the region"
        return np.where(self.q[0] > 0, 1, -1)

    @cached_property
    def lobe(self) -> np.ndarray:  # (n,), TotalSegmentator's classes
        "Lobe of each point of the region"
        right, left = (lobe_of(self.q, self.p, s) for s in (1, -1))
        own = np.where(self.side == 1, right, left)
        found = self.canvas.labels.ravel()[self.region]
        return np.where(found > 0, found, own)

    @cached_property
    def depth(self) -> np.ndarray:  # (n,), canonical mm
        "Distance from the chest wall"
        return -self.wall.cavity.ravel()[self.region]

    @cached_property
    def low(self) -> np.ndarray:  # (n,), 0 at the top of the lungs, 1 at the base
        "Relative height"
        return np.clip((70 - self.q[2]) / 190, 0, 1)

    @cached_property
    def points(self) -> dict[int, np.ndarray]:  # lobe -> (n,3), canonical mm
        "Random points of each lobe, the same in every view"
        return lobe_points(self.p, 6000, self.heart)

    def air(self) -> np.ndarray:  # (n,), 0..1
        "How much of each voxel of the region is aerated lung now"
        return np.clip((-150 - self.canvas.hu.ravel()[self.region]) / 500, 0, 1)

    def full(
        self,
        share: np.ndarray,  # (n,), of the region
    ) -> np.ndarray:  # (W,H,D)
        "An image of values of the region"
        out = np.zeros(self.canvas.hu.shape, np.float32)
        out.ravel()[self.region] = share
        return out

    def mask(
        self,
        share: np.ndarray,  # (n,), of the region
    ) -> np.ndarray:  # bool, (W,H,D)
        "Voxels of the lung that a lesion holds"
        return lesion_mask(self.full(share)) & self.lung

#| export
def ramp(
    f: np.ndarray,  # mm, negative inside
    width: float,  # mm over which the edge falls
) -> np.ndarray:  # 0..1
    "Share of a voxel inside a shape"
    return np.clip(0.5 - f / np.float32(width), 0, 1)


def sheet(
    distance: np.ndarray,  # mm from the middle of the plate
    thick: float,  # mm
    width: float,  # mm of a voxel
) -> np.ndarray:  # 0..1
    "Share of a voxel inside a plate"
    half = np.float32(width / 2)
    upper = np.clip(distance + thick / 2, -half, half)
    return (upper - np.clip(distance - thick / 2, -half, half)) / np.float32(width)


def box_share(
    canvas: Canvas,
    low: np.ndarray,  # (3,), canonical mm
    high: np.ndarray,  # (3,), canonical mm
    shape: Callable,  # (3,...) points -> negative inside
    n: int = 3,  # points per axis and voxel
) -> tuple:  # box or None; 0..1 in the box
    "Share of each voxel inside a small shape"
    where = canvas.box(np.asarray(low) - canvas.reach / 2, np.asarray(high) + canvas.reach / 2)
    if where is None:
        return None, None
    columns = np.linalg.inv(canvas.to_index) * canvas.step
    steps = (np.arange(n) + 0.5) / n - 0.5
    points = canvas.points[(slice(None), *where)]
    total = np.zeros(points.shape[1:], np.float32)
    for i, j, k in np.ndindex(n, n, n):
        move = (columns @ (steps[i], steps[j], steps[k])).astype(np.float32)
        total += shape(points + move[:, None, None, None]) < 0
    return where, total / np.float32(n**3)


def add_tubes(
    canvas: Canvas,
    share: np.ndarray,  # (W,H,D), changed in place
    path: np.ndarray,  # (n,3), canonical mm
    radius: np.ndarray | float,  # canonical mm, one or (n,)
) -> None:
    "Add a chain of cylinders to a share"
    path = np.asarray(path, float)
    radius = np.broadcast_to(np.asarray(radius, float), len(path))
    widths = tube_width(canvas, np.diff(path, axis=0))
    for a, b, r0, r1, w in zip(path[:-1], path[1:], radius[:-1], radius[1:], widths):
        reach = max(r0, r1) + canvas.reach
        where = canvas.box(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
        if where is not None:
            one, _ = tube_share(canvas, where, a, b, (float(r0), float(r1)), float(w))
            np.maximum(share[where], one, out=share[where])


def lesion_mask(
    share: np.ndarray,  # 0..1
) -> np.ndarray:  # bool
    "Voxels of a lesion: more than half inside, or than half of the best voxel"
    top = float(share.max()) if share.size else 0.0
    return share > min(0.5, 0.5 * top) if top > 0.05 else np.zeros(share.shape, bool)

#| export
_TURN = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]], np.float32)


def value_noise(
    q: np.ndarray,  # (3,n), canonical mm
    mm: float,  # size of the structures
    *key: Any,  # of `asap.core.rng`
) -> np.ndarray:  # (n,), about zero mean and unit variance
    "Smooth noise at points"
    lattice = rng("value noise", *key).standard_normal((32, 32, 32)).astype(np.float32)
    at = np.tensordot(_TURN, q, 1) * np.float32(1 / mm)
    return 1.6 * map_coordinates(lattice, at, order=1, mode="grid-wrap")


def lobules(
    q: np.ndarray,  # (3,n), canonical mm
    mm: float,  # mean distance of the centers
    *key: Any,  # of `asap.core.rng`
) -> tuple:  # (n,) number of the cell, mm from its center, mm from its border
    "The cell of each point, among cells of random centers"
    r = rng("lobules", *key)
    axes = [np.arange(a, b, mm) for a, b in ((-145, 145), (-110, 105), (-235, 120))]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    centers = grid + r.uniform(-0.42, 0.42, grid.shape) * mm
    far, cell = cKDTree(centers).query(q.T, k=2)
    apart = np.linalg.norm(centers[cell[:, 0]] - centers[cell[:, 1]], axis=1)
    border = (far[:, 1] ** 2 - far[:, 0] ** 2) / (2 * apart)
    return cell[:, 0], far[:, 0].astype(np.float32), border.astype(np.float32)

#| export
def axial_diameter(
    mask: np.ndarray,  # bool, (W,H,D)
    spacing: Sequence[float],  # mm
) -> float:  # mm
    "Longest diameter of the largest piece of a mask in any axial slice"
    pieces, n = label(mask)
    if n == 0:
        return 0.0
    at = np.argwhere(pieces == 1 + np.bincount(pieces.ravel())[1:].argmax())
    k = np.bincount(at[:, 2]).argmax()
    xy = at[at[:, 2] == k][:, :2] * np.asarray(spacing[:2])
    turns = np.deg2rad(np.arange(0, 180, 10))
    along = xy @ np.stack([np.cos(turns), np.sin(turns)])
    return float((along.max(0) - along.min(0)).max() + 0.8 * spacing[0])


def volume_diameter(
    share: np.ndarray,  # 0..1, of one lesion
    spacing: Sequence[float],  # mm
) -> float:  # mm
    "Diameter of a ball of the same volume"
    return float((6 * share.sum() * np.prod(spacing) / np.pi) ** (1 / 3))


LOBE_NAMES = {v: k for k, v in LOBES.items()}


def _join(words: Iterable[str]) -> str:  # "a", "a and b", "a, b and c"; each once
    w = list(dict.fromkeys(words))
    return w[0] if len(w) == 1 else ", ".join(w[:-1]) + " and " + w[-1]


def describe_lobes(
    lobes: Iterable[int],  # TotalSegmentator's classes
) -> tuple[str, str]:  # side and place
    "Side and place of several lobes, in the words of page 11"
    both = [describe_lobe(LOBE_NAMES[int(i)]) for i in lobes]
    sides = {side for side, _ in both}
    return "both sides" if len(sides) > 1 else sides.pop(), _join(place for _, place in both)

#| export
PAINTERS: dict[str, Callable] = {}  # abnormality -> painter
_WHERE = {"both": "both sides", 1: "right", -1: "left"}


def _painter(name: str) -> Callable:
    def keep(f):
        PAINTERS[name] = f
        return f

    return keep


def _blend(s: Scene, share: np.ndarray, hu: float | np.ndarray) -> None:
    "Mix HU into the image, in place"
    s.canvas.hu += np.clip(share, 0, 1) * (hu - s.canvas.hu)


def _mixed(s: Scene, share: np.ndarray, hu: float | np.ndarray) -> None:
    "Raise the HU of the region toward a value, in place; what is denser stays"
    flat = s.canvas.hu.reshape(-1)
    old = flat[s.region]
    flat[s.region] = old + share * np.maximum(hu - old, 0)


def _tissue(s: Scene, *names: str) -> np.ndarray:
    "Mask of some tissues"
    table = np.zeros(256, bool)
    table[[TISSUE_IDS[n] for n in names]] = True
    return table[s.canvas.tissues]


def heart_factor(
    severity: float,  # 0..1
) -> float:  # 1.18 to 1.42
    "Size of an enlarged heart relative to a normal one"
    return 1.18 + 0.24 * severity


@_painter("Cardiomegaly")
def _cardiomegaly(s, r, sev):
    mask = s.canvas.labels == 51
    if mask.sum() * np.prod(s.canvas.spacing) < 2e5:
        return None
    x = np.flatnonzero(mask.any((1, 2)))
    return dict(side="", place="heart", size_mm=np.ptp(x) * s.canvas.spacing[0] + 1, mask=mask)


@_painter("Pericardial effusion")
def _pericardial(s, r, sev):
    where, f = heart_field(s.canvas, s.p, s.heart)
    if where is None:
        return None
    thick = (6 + 20 * sev) / s.k
    y, z = s.canvas.points[1][where], s.canvas.points[2][where]
    down = np.clip(0.55 - 0.006 * (y - 10) - 0.004 * (z + 70), 0.25, 1)
    fade = np.clip((-18 - z) / 20, 0, 1)
    inner = 1.5 + 2 * s.p.visceral
    f = np.maximum(inner - f, f - inner - thick * down * fade)
    share = np.zeros(s.canvas.hu.shape, np.float32)
    free = _tissue(s, "mediastinal_fat", "lung", "fissure", "diaphragm", "abdominal_fat")
    share[where] = ramp(f, s.width) * (fade > 0)
    share *= free | (s.canvas.labels == 0) & (s.canvas.hu < -20)
    _blend(s, share, s.hu["pericardium"])
    mask = share > 0.5
    s.canvas.labels[mask] = 0
    s.canvas.tissues[mask] = TISSUE_IDS["fluid"]
    return dict(side="", place="pericardial sac", size_mm=thick * s.k, mask=mask)

#| export
def _frame(path: np.ndarray, i: int) -> tuple:  # two unit vectors across a path
    d = path[min(i + 1, len(path) - 1)] - path[max(i - 1, 0)]
    d /= np.linalg.norm(d)
    u = np.cross(d, (1.0, 0.3, 0.2))
    u /= np.linalg.norm(u)
    return u, np.cross(d, u)


def _dense(points: np.ndarray, values: np.ndarray, mm: float = 2.0) -> tuple:
    "A path with points every few mm, and values along it"
    far = np.r_[0, np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum()]
    at = np.arange(0, far[-1], mm)
    path = np.stack([np.interp(at, far, c) for c in points.T], -1)
    return path, np.interp(at, far, values)


def _plaque(s: Scene, r, share, path, radius, start: int, length: float, wide: float) -> None:
    "Add one plaque on the wall of a vessel to a share"
    angle, thick = r.uniform(0, 2 * np.pi), r.uniform(0.8, 1.8) / s.k
    rows = max(int(wide / 1.7), 1)
    n = max(int(length / 2.0), 1)
    for row in range(rows):
        a = angle + (row - (rows - 1) / 2) * 1.7 / radius[start]
        part = range(start, min(start + n + 1, len(path)))
        line = []
        for i in part:
            u, v = _frame(path, i)
            line.append(path[i] + (radius[i] - 0.4) * (np.cos(a) * u + np.sin(a) * v))
        if len(line) > 1:
            add_tubes(s.canvas, share, line, thick * r.uniform(0.6, 1.1, len(line)))


def _calcify(s: Scene, r, vessels: list, n: int, longest: float, widest: float) -> tuple:
    "Paint plaques on vessels; their share and the length of the longest, real mm"
    share, size, count = np.zeros(s.canvas.hu.shape, np.float32), 0.0, 0
    weights = np.array([len(path) for path, _ in vessels], float)
    for i in range(n):
        path, radius = vessels[r.choice(len(vessels), p=weights / weights.sum())]
        length = min(longest, 4.5 * np.exp(r.exponential(0.7))) / s.k
        start = int(r.integers(max(len(path) - int(length / 2) - 1, 1)))
        one = np.zeros_like(share)
        _plaque(s, r, one, path, radius, start, length, min(widest, length) / s.k)
        if one.max() > 0.08:
            size, count = max(size, length * s.k), count + 1
            np.maximum(share, one, out=share)
    _blend(s, share, s.hu["calcium"] * r.uniform(0.6, 1.3))
    return share, size, count


@_painter("Arterial wall calcification")
def _arterial(s, r, sev):
    path, radius = _dense(aorta(s.p).path, aorta(s.p).radius)
    keep = path[:, 2] > -220
    path, radius = path[keep], radius[keep]
    arch = len(path) // 7
    vessels = [(path[arch:], radius[arch:]), (path[2 * arch : 4 * arch], radius[2 * arch :])]
    share, size, n = _calcify(s, r, vessels, int(5 + 24 * sev), 26, 14)
    if not n:
        return None
    return dict(side="", place="aorta", size_mm=size, count=n, mask=lesion_mask(share))


@_painter("Coronary artery wall calcification")
def _coronary(s, r, sev):
    vessels = [_dense(c, np.full(len(c), 1.0)) for c in coronary_paths(s.p, s.heart)]
    share, size, n = _calcify(s, r, vessels, int(3 + 11 * sev), 22, 2.4)
    if not n:
        return None
    return dict(side="", place="coronary arteries", size_mm=size, count=n, mask=lesion_mask(share))

#| export
def _clot_paths(s: Scene, r, sev: float) -> list:  # (path, radius)
    "Axes of the clots of one patient, with the radius of the vessel"
    t = s.trees["artery"]
    wide = np.flatnonzero((t.generation >= 2) & (t.radius[:, 1] > 1.9) & (t.parent >= 0))
    rows = r.choice(wide, min(2 + int(6 * sev), len(wide)), replace=False)
    out = []
    for i in rows:
        up = t.parent[i]
        a = t.start[up] + r.uniform(0.2, 0.6) * (t.end[up] - t.start[up])
        path = np.stack([a, t.end[up], t.start[i] + 0.8 * (t.end[i] - t.start[i])])
        out.append((path, np.array([t.radius[up, 1], t.radius[up, 1], t.radius[i, 1]])))
    main = [v for v in central_vessels(s.p) if v.name.endswith("pulmonary artery")]
    main = [v for v in main if "right" in v.name or "left" in v.name]
    for v in main[: int(r.integers(1, 3))] if sev > 0.45 else []:
        out.append((v.path[2:], v.radius[2:] * 0.9))
    return out


def paint_emboli(
    s: Scene,
    r: np.random.Generator,
    severity: float,  # 0..1
) -> dict | None:  # fields of a `Finding`
    "Paint clots into the pulmonary arteries"
    blood = _tissue(s, "artery", "pulmonary_artery").astype(np.float32)
    share, size = np.zeros(s.canvas.hu.shape, np.float32), 0.0
    count = 0
    for path, radius in _clot_paths(s, r, severity):
        fill = r.uniform(0.5, 0.8) if radius.mean() > 3.2 else 1.0
        u, v = _frame(path, 1)
        a, off = r.uniform(0, 2 * np.pi), (1 - fill) * radius.mean() * 0.8
        one = np.zeros_like(share)
        path = smooth_path(path + off * (np.cos(a) * u + np.sin(a) * v), 3)
        sizes = np.interp(np.linspace(0, 1, len(path)), np.linspace(0, 1, len(radius)), radius)
        add_tubes(s.canvas, one, path, fill * sizes * r.uniform(0.85, 1.0, len(path)))
        one *= blood
        if one.max() > 0.3:
            length = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
            count, size = count + 1, max(size, float(length) * s.k)
            np.maximum(share, one, out=share)
    if not count:
        return None
    _blend(s, share, s.hu["clot"])
    mask = lesion_mask(share) & (blood > 0)
    x = s.canvas.points[0][mask]
    side = "both sides" if x.min() < -8 and x.max() > 8 else "right" if x.mean() > 0 else "left"
    place = "pulmonary arteries"
    return dict(side=side, place=place, size_mm=size, count=count, mask=mask)

#| export
@_painter("Hiatal hernia")
def _hernia(s, r, sev):
    mm = (28 + 45 * sev * r.uniform(0.7, 1)) / s.k
    hiatus = esophagus_path(s.p)[-3]
    low = surface_height("dome", hiatus[:1], hiatus[1:2], s.p)[0]
    at = np.array([hiatus[0] + r.uniform(-6, 4), hiatus[1] + 7, max(low, hiatus[2]) + 0.35 * mm])
    radii = np.array([0.55, 0.42, 0.55]) * mm
    where = s.canvas.box(at - radii - 12, at + radii + 12)
    if where is None:
        return None
    points = [q[where] for q in s.canvas.points]
    f = ellipsoid(points, at, radii)
    flat = np.stack([q.ravel() for q in points])
    f += 0.05 * mm * value_noise(flat, 16, s.seed, "hernia").reshape(f.shape)
    box, heart = heart_field(s.canvas, s.p, s.heart)
    if box is not None:
        whole = np.full(s.canvas.hu.shape, 99, np.float32)
        whole[box] = heart
        f = np.maximum(f, 3 - whole[where])
    names = ("mediastinal_fat", "lung", "fissure", "diaphragm", "esophagus", "fluid")
    free = _tissue(s, *names, "abdominal_fat", "bowel_wall", "gas")[where]
    free |= (s.canvas.labels[where] == 0) & (s.canvas.hu[where] < 0)
    share = ramp(f, s.width) * free
    inner = ramp(f + 4, s.width) * free
    gas = inner * ramp(at[1] + radii[1] * (0.5 - 1.2 * r.random()) - points[1], s.width)
    for part, hu in ((share, s.canvas.values["bowel_wall"]), (inner, 22.0), (gas, -950.0)):
        s.canvas.hu[where] += part * (hu - s.canvas.hu[where])
    mask = np.zeros(s.canvas.hu.shape, bool)
    mask[where] = lesion_mask(share)
    s.canvas.labels[mask] = 6
    s.canvas.tissues[mask] = TISSUE_IDS["bowel_wall"]
    size = axial_diameter(mask, s.canvas.spacing)
    return dict(side="", place="behind the heart", size_mm=size, mask=mask)


STATIONS = {  # name: point, canonical mm
    "right paratracheal": (15, 0, 34),
    "left paratracheal": (-15, -10, 18),
    "prevascular": (-13, 44, 16),
    "subcarinal": (3, -16, -25),
    "right hilar": (46, -9, -33),
    "left hilar": (-58, -14, -36),
}
_SOFT = ("mediastinal_fat", "lung", "fissure", "diaphragm", "airway_wall")


def _node(s: Scene, r, at, mm: float) -> tuple:  # share and its real diameter
    "Share of one lymph node of a short axis, real mm"
    radii = np.array([1.0, 1.0, r.uniform(1.2, 1.7)]) * mm / 2 / s.scale
    turn = np.linalg.qr(np.eye(3) + 0.5 * r.standard_normal((3, 3)))[0]

    def shape(points):
        return ellipsoid(points, at, radii, turn)

    reach = radii.max()
    where, one = box_share(s.canvas, np.subtract(at, reach), np.add(at, reach), shape)
    share = np.zeros(s.canvas.hu.shape, np.float32)
    if where is not None:
        free = _tissue(s, *_SOFT)[where] & (s.canvas.labels[where] != 16)
        share[where] = one * free
    return share


@_painter("Lymphadenopathy")
def _nodes(s, r, sev):
    share, places, size = np.zeros(s.canvas.hu.shape, np.float32), [], 0.0
    names = r.permutation(list(STATIONS))[: 1 + int(1 + 4.5 * sev)]
    for name in names:
        at = settle([STATIONS[name]], s.p)[0]
        for _ in range(int(r.integers(1, 4))):
            mm = (11 + 16 * sev * r.uniform(0.3, 1)) * r.uniform(0.85, 1.1)
            one = _node(s, r, at + r.uniform(-7, 7, 3), mm)
            one *= 1 - share
            ball = 0.6 * np.pi / 6 * mm**3
            if one.sum() * np.prod(s.canvas.spacing) > 0.35 * ball:
                places.append(str(name))
                size = max(size, mm)
                np.maximum(share, one, out=share)
    if not places:
        return None
    _blend(s, share, s.hu["node"])
    n = len(places)
    place = f"{_join(places)} stations"
    return dict(side="", place=place, size_mm=size, count=n, mask=lesion_mask(share))

#| export
def _bumpy(at: np.ndarray, radii: np.ndarray, turn: np.ndarray, waves: np.ndarray, high: float):
    "Function of an ellipsoid with waves of a relative height"

    def shape(points):
        m = [(p - np.float32(a)) for p, a in zip(points, at)]
        u = [sum(np.float32(e) * x for e, x in zip(row, m)) for row in turn]
        u = [x / np.float32(r) for x, r in zip(u, radii)]
        far = np.sqrt(sum(x * x for x in u)) + np.float32(1e-6)
        bump = sum(np.cos(w[0] * u[0] / far + w[1] * u[1] / far + w[2] * u[2] / far) for w in waves)
        return (far - 1 - np.float32(high) * bump / len(waves)) * np.float32(min(radii))

    return shape


def _nodule_share(s: Scene, r, at: np.ndarray, mm: float) -> tuple:  # share of body, of cavity
    "Share of one nodule of a longest diameter, real mm"
    spiky = mm > 10 and r.random() < 0.4
    high = r.choice([0.03, 0.18]) if mm > 7 else 0.03
    ratio = np.array([1.0, r.uniform(0.8, 1), r.uniform(0.75, 1)])
    radii = ratio * mm / 2 / (1 + 0.5 * high) / s.k
    turn = np.linalg.qr(r.standard_normal((3, 3)))[0]
    shape = _bumpy(at, radii, turn, r.uniform(-4, 4, (5, 3)), high)
    share = np.zeros(s.canvas.hu.shape, np.float32)
    hole = np.zeros_like(share)
    reach = 1.25 * radii.max()
    n = 4 if mm < 3 * s.canvas.spacing[2] else 2
    where, one = box_share(s.canvas, at - reach, at + reach, shape, n)
    if where is None:
        return share, hole
    share[where] = one
    if mm > 18 and r.random() < 0.12:
        thick = radii.min() * r.uniform(0.25, 0.5)
        hole[where] = box_share(s.canvas, at - reach, at + reach, lambda q: shape(q) + thick, n)[1]
    for _ in range(int(r.integers(9, 16)) if spiky else 0):
        d = r.standard_normal(3)
        d /= np.linalg.norm(d)
        ends = at + np.outer((0.8 * radii.min(), radii.max() * r.uniform(1.3, 1.9)), d)
        add_tubes(s.canvas, share, ends, np.array([0.9, 0.3]) / s.k)
    return share, hole


def _nodule_sizes(r, sev: float) -> np.ndarray:  # real mm, largest first
    n = 1 + int(r.exponential(1.2) + 3 * (r.random() < 0.12))
    top = 6 + 26 * sev + (r.uniform(0, 28) if sev > 0.8 else 0)
    return np.r_[top, np.exp(r.uniform(np.log(4), np.log(max(0.7 * top, 4.5)), n - 1))]


@_painter("Lung nodule")
def _nodule(s, r, sev):
    share, hole = (np.zeros(s.canvas.hu.shape, np.float32) for _ in range(2))
    mask, lobes, size = np.zeros(share.shape, bool), [], 0.0
    weights = np.array([len(v) for v in s.points.values()], float)
    inside = s.full(np.ones(len(s.region), np.float32))
    hu = np.full(share.shape, s.hu["nodule"], np.float32)
    for mm in _nodule_sizes(r, sev):
        lobe = int(r.choice(list(s.points), p=weights / weights.sum()))
        at = s.points[lobe][r.integers(len(s.points[lobe]))]
        dense = r.random() < 0.17 and mm < 14
        one, cavity = _nodule_share(s, r, at, float(mm))
        one *= inside
        near = binary_dilation(one > 0.02, iterations=2)
        if one.max() < 0.12 or (near & mask).any():
            continue
        hu[near] = r.uniform(250, 800) if dense else s.hu["nodule"] + r.normal(0, 8)
        mask |= lesion_mask(one) & s.lung
        lobes.append(lobe)
        size = max(size, float(mm))
        share, hole = np.maximum(share, one), np.maximum(hole, cavity * inside)
    if not lobes:
        return None
    _blend(s, share, np.maximum(hu, s.canvas.hu))
    _blend(s, hole, -940.0)
    side, place = describe_lobes(lobes)
    return dict(side=side, place=place, size_mm=size, count=len(lobes), mask=mask)

#| export
def _children(t: Tree, root: int) -> np.ndarray:  # bool, (n,)
    "A branch and all that grow from it"
    out = np.zeros(len(t), bool)
    out[root] = True
    for i in range(root + 1, len(t)):
        out[i] = t.parent[i] >= 0 and out[t.parent[i]]
    return out


def segment_field(
    s: Scene,
    lobe: int,  # TotalSegmentator's class
    root: int,  # row of the airway that supplies the segment
) -> np.ndarray:  # (n,), canonical mm, negative inside
    "Distance from the border of a segment, at the points of the region"
    t = s.trees["airway"]
    own = _children(t, root)
    rest = (t.lobe == lobe) & ~own & (t.generation > 4)
    f = np.full(len(s.region), 99, np.float32)
    here = np.flatnonzero(s.lobe == lobe)
    if own.any() and rest.any() and len(here):
        q = s.q[:, here].T
        near = [cKDTree(t.end[m]).query(q)[0] for m in (own & (t.generation > 4), rest)]
        f[here] = (near[0] - near[1]) / 2
    return f


def _branch(s: Scene, r, lobe: int, generation: int) -> int:
    t = s.trees["airway"]
    rows = np.flatnonzero((t.lobe == lobe) & (t.generation == generation))
    return int(r.choice(rows))


def _reopen(s: Scene, mask: np.ndarray) -> None:
    "Paint the lumen of the bronchi in dense lung, with those below the limit of page 17"
    share = np.zeros(s.canvas.hu.shape, np.float32)
    t = s.trees["airway"]
    for i in np.flatnonzero((t.radius[:, 1] > 0.9) & (t.generation < 8)):
        add_tubes(s.canvas, share, np.stack([t.start[i], t.end[i]]), 1.15 * t.radius[i])
    _blend(s, share * mask, -960.0)


def _lobe_choice(s: Scene, r, low: float = 0.5) -> int:
    "A lobe, more often a lower one"
    lobes = list(LOBES.values())
    weights = np.array([1 + 2 * low * (i in (11, 14)) for i in lobes])
    return int(r.choice(lobes, p=weights / weights.sum()))


def _patches(s: Scene, r, sev: float) -> tuple:  # field (n,) and lobes
    "Segments or subsegments of one to three lobes"
    f, lobes = np.full(len(s.region), 99, np.float32), []
    for _ in range(1 + int(r.random() < 0.3) + int(r.random() < 0.6 * sev)):
        lobe = _lobe_choice(s, r)
        depth = 7 - int(2.99 * sev) if r.random() < 0.75 else 7
        one = segment_field(s, lobe, _branch(s, r, lobe, depth))
        if (one < 0).any():
            lobes.append(lobe)
            np.minimum(f, one, out=f)
    return f, lobes


def _foci(s: Scene, r, sev: float, n: int) -> tuple:  # field (n,) and lobes
    "Round foci below the pleura, more behind and below"
    f, lobes = np.full(len(s.region), 99, np.float32), []
    for _ in range(n):
        lobe = _lobe_choice(s, r, 1.0)
        cloud = s.points[lobe]
        deep = wall_depth(cloud)
        weight = np.exp(-deep / 10) * np.exp(-cloud[:, 1] / 45) + 1e-9
        at = cloud[r.choice(len(cloud), p=weight / weight.sum())]
        mm = r.uniform(9, 17 + 15 * sev) / s.k
        far = np.sqrt((((s.q - at[:, None].astype(np.float32)) / [[1.25], [0.85], [1.1]]) ** 2).sum(0))
        one = far - np.float32(mm)
        if (one[s.lobe == lobe] < 0).any():
            lobes.append(lobe)
            np.minimum(f, one, out=f)
    return f + 3 * value_noise(s.q, 9, s.seed, "foci"), lobes


def wall_depth(
    points: np.ndarray,  # (n,3), canonical mm
) -> np.ndarray:  # mm
    "Depth of points below the chest wall"
    angle = np.arctan2(points[:, 1], np.abs(points[:, 0]))
    return wall_radius(angle, points[:, 2]) - np.hypot(points[:, 0], points[:, 1])


@_painter("Consolidation")
def _consolidation(s, r, sev):
    if "COVID-19" in s.diseases:
        f, lobes = _foci(s, r, 0.4 * sev, 2 + int(4 * sev))
    else:
        f, lobes = _patches(s, r, sev)
    if not lobes:
        return None
    f = f + 2.5 * value_noise(s.q, 8, s.seed, "consolidation")
    halo = s.air() * ramp(f - 5, 14) * 0.6
    flat = s.canvas.hu.reshape(-1)
    flat[s.region] += halo * s.hu["ground_glass"]
    grain = 1 - 0.12 * np.maximum(value_noise(s.q, 4, s.seed, "grain"), 0)
    share = ramp(f, s.width + 3)
    _mixed(s, share * grain, s.hu["consolidation"])
    mask = s.mask(share)
    _reopen(s, mask)
    side, place = describe_lobes(lobes)
    size, n = axial_diameter(mask, s.canvas.spacing), len(lobes)
    return dict(side=side, place=place, size_mm=size, count=n, mask=mask)


def _haze(s: Scene, r, sev: float) -> tuple:  # field (n,), lobes, softness in mm
    "Where the ground glass of one patient lies"
    if "COVID-19" in s.diseases:
        return *_foci(s, r, sev, 5 + int(9 * sev)), 7.0
    if r.random() < 0.45:  # perihilar
        hilum = settle([(40, -10, -30), (-46, -12, -30)], s.p).astype(np.float32)
        far = [np.sqrt(((s.q - h[:, None]) ** 2).sum(0)) for h in hilum]
        f = np.minimum(*far) - (38 + 34 * sev) / s.k + 7 * value_noise(s.q, 16, s.seed, "haze")
        share = [(i, (f[s.lobe == i] < 0).mean()) for i in LOBES.values() if (s.lobe == i).any()]
        return f, [i for i, m in share if m > 0.08], 16.0
    f, lobes = _patches(s, r, sev)
    return f + 4 * value_noise(s.q, 12, s.seed, "haze"), lobes, 12.0


@_painter("Lung opacity")
def _opacity(s, r, sev):
    f, lobes, soft = _haze(s, r, sev)
    share = ramp(f, s.width + soft)
    if not lobes or share.max() < 0.5:
        return None
    grain = 1 + 0.15 * value_noise(s.q, 6, s.seed, "glass")
    added = share * grain * s.hu["ground_glass"]
    if "COVID-19" in s.diseases or r.random() < 0.25:
        border = lobules(s.q, 11, s.seed, "paving")[2]
        added += share * 420 * sheet(border, 1.6, s.width)
    flat = s.canvas.hu.reshape(-1)
    flat[s.region] += s.air() * np.minimum(added, 560)
    mask = s.mask(share)
    side, place = describe_lobes(lobes)
    size, n = axial_diameter(mask, s.canvas.spacing), len(lobes)
    return dict(side=side, place=place, size_mm=size, count=n, mask=mask)

#| export
@_painter("Atelectasis")
def _atelectasis(s, r, sev):
    share, lobes, thickest = np.zeros(len(s.region), np.float32), [], 0.0
    for _ in range(1 + int(r.random() < 0.6) + int(2 * sev)):
        lobe = int(r.choice([11, 14, 14, 11, 13, 10]))
        cloud = s.points[lobe]
        low = cloud[cloud[:, 2] < np.quantile(cloud[:, 2], 0.45)]
        at = low[r.integers(len(low))]
        n = np.array([*r.normal(0, 0.28, 2), 1.0])
        n /= np.linalg.norm(n)
        m = s.q - at[:, None].astype(np.float32)
        across = np.tensordot(n.astype(np.float32), m, 1)
        away = np.sqrt(np.maximum((m**2).sum(0) - across**2, 0))
        curve = across - 0.003 * away**2 + 1.2 * value_noise(s.q, 14, s.seed, "plate")
        thick, wide = (2.5 + 10 * sev * r.uniform(0.5, 1)) / s.k, r.uniform(18, 30 + 16 * sev) / s.k
        taper = np.clip(1.3 - away / wide, 0, 1)
        one = sheet(curve, thick, s.width) * np.clip(2 * taper, 0, 1) * (s.lobe == lobe)
        if one.max() > 0.15:
            lobes.append(lobe)
            thickest = max(thickest, thick * s.k)
            np.maximum(share, one, out=share)
    if not lobes:
        return None
    _mixed(s, share, s.hu["atelectasis"])
    side, place = describe_lobes(lobes)
    mask = s.mask(share)
    return dict(side=side, place=place, size_mm=thickest, count=len(lobes), mask=mask)

#| export
@_painter("Emphysema")
def _emphysema(s, r, sev):
    _, center, _ = lobules(s.q, 9.5, s.seed, "emphysema")
    patch = value_noise(s.q, 28, s.seed, "emphysema")
    high = np.clip(1.15 - 1.25 * s.low, 0.05, 1)
    size = (1.2 + 5.2 * sev + 1.4 * patch) * high
    f = center - size
    rim = s.depth + 2 * patch < 12 * sev - 4  # paraseptal
    spaced, _, border = lobules(s.q, 14, s.seed, "bullae")
    bulla = rim & (s.low < 0.45) & (spaced % 3 == 0)
    f = np.where(bulla & (border > 1), -5, f)
    share = ramp(f, s.width) * s.air()
    if share.max() < 0.3:
        return None
    flat = s.canvas.hu.reshape(-1)
    flat[s.region] += share * (-985 - flat[s.region]) - 25 * sev * high * s.air()
    mask = s.mask(share)
    size_mm = 2 * float(np.quantile(np.maximum(size, 0), 0.9)) * s.k
    return dict(side="both sides", place="upper lobes", size_mm=max(size_mm, 3.0), mask=mask)


@_painter("Mosaic attenuation pattern")
def _mosaic(s, r, sev):
    cell, _, border = lobules(s.q, 15, s.seed, "mosaic")
    patch = value_noise(s.q, 40, s.seed, "mosaic") + 0.5 * np.sin(cell * 12.9898)
    bright = patch > 0.15
    soft = np.where(bright, 1, -1) * np.clip(border / (s.width / 2), 0, 1)
    half = (50 + 80 * sev) / 2
    flat = s.canvas.hu.reshape(-1)
    change = half * soft
    flat[s.region] += s.air() * np.where(change < 0, 0.8 * change, 1.5 * change)
    mask = s.full(bright & (s.air() > 0.4)) > 0
    if not mask.any():
        return None
    return dict(side="both sides", place="both lungs", size_mm=40 * s.k, mask=mask)


@_painter("Interlobular septal thickening")
def _septa(s, r, sev):
    _, _, border = lobules(s.q, 17, s.seed, "septa")
    near = np.clip((34 - s.depth) / 14, 0, 1) * np.clip(2.4 * s.low - 0.35, 0.06, 1)
    near = near * np.clip(0.8 + 0.7 * value_noise(s.q, 22, s.seed, "septa"), 0.1, 1)
    thick = (0.9 + 1.5 * sev) / s.k
    share = sheet(border, thick, s.width) * near
    if share.max() < 0.1:
        return None
    _mixed(s, share, s.hu["septum"])
    flat = s.canvas.hu.reshape(-1)
    flat[s.region] += s.air() * near * (15 + 45 * sev)  # fluid around
    mask = s.mask(share)
    return dict(side="both sides", place="both lower zones", size_mm=17 * s.k, mask=mask)


@_painter("Pulmonary fibrotic sequela")
def _fibrosis(s, r, sev):
    side = r.choice([1, -1, 0], p=[0.35, 0.3, 0.35])
    share = np.zeros(s.canvas.hu.shape, np.float32)
    cap = np.zeros(len(s.region), np.float32)
    wave = value_noise(s.q, 9, s.seed, "scar")
    for one in (1, -1) if side == 0 else (side,):
        cloud = s.points[12 if one == 1 else 10]
        top = cloud[cloud[:, 2] > np.quantile(cloud[:, 2], 0.75)]
        hilum = np.array([one * 44.0, -10, -20])
        for _ in range(5 + int(8 * sev)):
            a = top[r.integers(len(top))]
            d = hilum - a + r.normal(0, 16, 3)
            b = a + d / np.linalg.norm(d) * r.uniform(18, 34 + 26 * sev)
            mid = (a + b) / 2 + r.normal(0, 4, 3)
            size = np.array([1.6, 1.2, 0.9, 0.6, 0.4]) * r.uniform(0.8, 1 + 0.9 * sev) / s.k
            add_tubes(s.canvas, share, smooth_path([a, mid, b], 2), size)
        apex = np.float32(np.quantile(cloud[:, 2], 0.99) - 4)
        near = np.minimum(s.depth, (apex + 2 - s.q[2]) * 1.3)
        f = near - (0.5 + 4 * sev) - 2.4 * wave
        here = (s.side == one) & (s.q[2] > apex - 16 - 26 * sev)
        np.maximum(cap, ramp(f, s.width) * here, out=cap)
    inside = s.full(np.ones(len(s.region), np.float32))
    share *= inside
    whole = np.maximum(share.ravel()[s.region], cap * np.clip(0.85 + 0.2 * wave, 0.4, 1))
    if whole.max() < 0.15:
        return None
    _mixed(s, whole, s.hu["scar"])
    mask = s.mask(whole)
    place = "both upper lobes" if side == 0 else f"{_WHERE[int(side)]} upper lobe"
    name = "both sides" if side == 0 else _WHERE[int(side)]
    size = axial_diameter(mask, s.canvas.spacing)
    return dict(side=name, place=place, size_mm=size, mask=mask)

#| export
def _wide_tree(t: Tree, keep: np.ndarray, factor: float | np.ndarray, add: float = 0.0) -> Tree:
    radius = t.radius[keep] * np.reshape(factor, (-1, 1)) + add
    parent = np.full(keep.sum(), -1)
    rows = (t.start[keep], t.end[keep], radius, parent, t.generation[keep], t.lobe[keep])
    return Tree(t.kind, *rows)


def _bronchi(s: Scene, keep: np.ndarray, factor, wall: float, fill: float = -975.0) -> tuple:
    "Paint branches of another caliber; share of wall with lumen, and of the lumen"
    t = s.trees["airway"]
    free = _tissue(s, "lung", "fissure", "airway", "airway_wall", "artery", "vein")
    free |= (s.canvas.hu < -200) & (s.canvas.labels == 0) & (s.wall.cavity < 0)
    whole = tree_share(s.canvas, _wide_tree(t, keep, factor, wall)) * free
    lumen = tree_share(s.canvas, _wide_tree(t, keep, factor)) * free
    _blend(s, whole, np.maximum(s.hu["bronchus"], np.minimum(s.canvas.hu, 300)))
    _blend(s, lumen, fill)
    return whole, lumen


@_painter("Bronchiectasis")
def _bronchiectasis(s, r, sev):
    t = s.trees["airway"]
    lobes = [int(i) for i in r.permutation([11, 14, 13, 10, 12])[: 1 + int(2.4 * sev)]]
    if r.random() < 0.6:
        lobes = sorted({*lobes, int(r.choice([11, 14]))})
    keep = np.isin(t.lobe, lobes) & (t.generation >= 5) & (t.generation <= 8)
    keep &= r.random(len(t)) < 0.85
    factor = (1.7 + 1.1 * sev) * r.uniform(0.85, 1.2, keep.sum())
    whole, lumen = _bronchi(s, keep, np.maximum(factor, 1.5), (0.9 + 0.5 * sev) / s.k)
    mask = lesion_mask(whole) & s.lung
    seen = [i for i in lobes if (mask & (s.canvas.labels == i)).any()]
    if not seen:
        return None
    side, place = describe_lobes(seen)
    size = 2 * float((t.radius[keep].mean(1) * factor).max()) * s.k
    return dict(side=side, place=place, size_mm=size, count=len(seen), mask=mask)


@_painter("Peribronchial thickening")
def _peribronchial(s, r, sev):
    t = s.trees["airway"]
    keep = (t.generation >= 3) & (t.generation <= 6)
    wall = (1.9 + 2.4 * sev) / s.k
    whole, lumen = _bronchi(s, keep, 0.92, wall)
    mask = lesion_mask(whole) & s.lung
    if not mask.any():
        return None
    size = (2 * wall + 2 * float(t.radius[keep].max())) * s.k
    place = "central airways of both lungs"
    return dict(side="both sides", place=place, size_mm=size, mask=mask)

#| export
@_painter("Pleural effusion")
def _pleural(s, r, sev):
    side = r.choice([1, -1, 0], p=[0.33, 0.27, 0.4])
    share = np.zeros(len(s.region), np.float32)
    thickest = 0.0
    x, y, z = s.q
    dome = surface_height("dome", x, y, s.p)
    behind = np.clip((22 - y) / 92, 0, 1)
    for one in (1, -1) if side == 0 else (side,):
        mm = (6 + 62 * sev**1.3 * (r.uniform(0.5, 1) if side == 0 else 1)) / s.k
        rise = np.clip(1.05 - (z - np.minimum(dome, -95)) / (70 + 210 * sev), 0, 1)
        f = s.depth - mm * behind**1.2 * rise**0.6
        level = y + 88 - 1.25 * mm  # the surface of fluid that moves freely
        f = np.maximum(f, level - 18)
        here = s.side == one
        np.maximum(share, ramp(f, s.width) * here, out=share)
        if (here & (f < 0)).any():
            thickest = max(thickest, float(s.depth[here & (f < 0)].max()) * s.k)
        squeezed = ramp(f - 5, 16) * here * s.air()
        s.canvas.hu.reshape(-1)[s.region] += 0.6 * squeezed * s.hu["ground_glass"]
    if share.max() < 0.5:
        return None
    flat = s.canvas.hu.reshape(-1)
    flat[s.region] += share * (s.hu["effusion"] - flat[s.region])
    mask = s.full(share) > 0.5
    s.canvas.labels[mask] = 0
    s.canvas.tissues[mask] = TISSUE_IDS["fluid"]
    name = "both sides" if side == 0 else _WHERE[int(side)]
    place = "pleural space on " + (name if side == 0 else f"the {name}")
    return dict(side=name, place=place, size_mm=thickest, mask=mask)

#| export
def _on_skin(s: Scene, degrees: float, z: float, side: int, out: float) -> np.ndarray:
    "A point at a distance from the skin, canonical mm"
    angle = np.deg2rad(degrees)
    thick = wall_radius(angle, z, "muscle") + wall_radius(angle, z, "fat") * s.p.fat + 2 + out
    return np.array([side * thick * np.cos(angle), thick * np.sin(angle), z])


def _metal(s: Scene, share: np.ndarray, hu: float) -> np.ndarray:  # bool
    _blend(s, share, np.maximum(s.canvas.hu, hu))
    return lesion_mask(share)


def _outward(at: np.ndarray) -> np.ndarray:  # (3,3), in rows: outward, along the wall, up
    flat = np.array([at[0], at[1], 0.0]) / np.hypot(at[0], at[1])
    return np.stack([flat, np.cross((0, 0, 1.0), flat), (0, 0, 1.0)])


def _pocket(s: Scene, at: np.ndarray) -> None:
    "Raise the skin over a device"
    where = s.canvas.box(at - 50, at + 50)
    if where is None:
        return
    points = [q[where] for q in s.canvas.points]
    f = ellipsoid(points, at, (13, 34, 32), _outward(at))
    outside = ramp(1 - s.wall.skin[where], s.width)
    for inset, name in ((0, "skin"), (2.2, "fat")):
        s.canvas.paint(where, ramp(f + inset, s.width) * outside, name)


def _device(s: Scene, at: np.ndarray) -> tuple:  # box, share
    "A rounded box that lies on the chest wall"
    axes = _outward(at)
    half = np.array([4.0, 23.0, 20.0]) / s.k

    def shape(points):
        m = [p - np.float32(a) for p, a in zip(points, at)]
        u = [sum(np.float32(e) * x for e, x in zip(row, m)) for row in axes]
        away = sum(np.maximum(np.abs(x) - np.float32(h - 3), 0) ** 2 for x, h in zip(u, half))
        return np.sqrt(away) - 3

    return box_share(s.canvas, at - 34, at + 34, shape)


def _leads(s: Scene, r, share: np.ndarray, side: int, start: np.ndarray, coil: bool) -> None:
    "Leads from a device through the veins into the right heart"
    vein = [(52, 8, 86), (40, 17, 64), (27, 20, 42)]
    if side < 0:
        vein = [(-52, 8, 86), (-36, 24, 60), (-6, 37, 48), (25, 21, 42)]
    way = [start, (side * 92, 14, 82), *vein, (28, 15, 12), (27, 12, -18), (24, 14, -52)]
    apex, ear = [(16, 30, -92), (-20, 42, -98), (-40, 50, -98)], [(14, 34, -58), (20, 40, -50)]
    for tail in (apex, ear) if r.random() < 0.6 else (apex,):
        path = smooth_path(settle([*way, *tail], s.p), 4)
        radius = np.full(len(path), 1.0)
        if coil and tail is apex:
            radius[-10:-2] = 1.9
        radius[-1] = 1.8
        add_tubes(s.canvas, share, path, radius / s.k)


def _sternal_wires(s: Scene, r, share: np.ndarray) -> None:
    for z in (*STERNUM_Z[:5], 12.0):
        angle = np.linspace(0, 2 * np.pi, 13)
        at = on_wall(90, z, 1, 7)
        ring = at + np.stack([17 * np.cos(angle), 7.5 * np.sin(angle), 0 * angle + r.normal(0, 1)], -1)
        add_tubes(s.canvas, share, ring, 0.6 / s.k)


def _valve(s: Scene, share: np.ndarray) -> None:
    angle = np.linspace(0, 2 * np.pi, 17)
    at = settle([(-10, 15, -57)], s.p)[0]
    n = np.array([0.75, 0.15, 0.65]) / np.linalg.norm([0.75, 0.15, 0.65])
    u = np.cross(n, (0, 1, 0))
    u /= np.linalg.norm(u)
    ring = at + 11 * (np.outer(np.cos(angle), u) + np.outer(np.sin(angle), np.cross(n, u)))
    add_tubes(s.canvas, share, ring, 1.3 / s.k)


@_painter("Medical material")
def _material(s, r, sev):
    side = int(r.choice([1, -1], p=[0.35, 0.65]))
    share = np.zeros(s.canvas.hu.shape, np.float32)
    angle, z = np.deg2rad(r.uniform(46, 56)), r.uniform(24, 44)
    far = wall_radius(angle, z, "muscle") - 2 + min(0.25 * s.p.fat, 5)
    at = np.array([side * far * np.cos(angle), far * np.sin(angle), z])
    _pocket(s, at)
    where, one = _device(s, at)
    if where is not None:
        share[where] = one
    _leads(s, r, share, side, at + (0, 0, 18), coil=r.random() < 0.35)
    mask = _metal(s, share, s.hu["metal"])
    more = np.zeros_like(share)
    if r.random() < 0.3:
        _sternal_wires(s, r, more)
    if r.random() < 0.15:
        _valve(s, more)
    mask |= _metal(s, more, 2600.0)
    if not mask.any():
        return None
    name = _WHERE[side]
    return dict(side=name, place=f"{name} chest wall", size_mm=46.0, mask=mask)

#| export
DISTRACTORS: dict[str, tuple] = {}  # name: (probability, painter)


def _distractor(name: str, chance: float) -> Callable:
    def keep(f):
        DISTRACTORS[name] = (chance, f)
        return f

    return keep


@_distractor("electrodes", 0.45)
def _electrodes(s, r):
    share = np.zeros(s.canvas.hu.shape, np.float32)
    end = _on_skin(s, 20, -190, 1, 20)
    for _ in range(int(r.integers(3, 7))):
        side, degrees = int(r.choice([-1, 1])), r.uniform(15, 75)
        z = r.uniform(20, 60) if s.p.breast else r.uniform(-110, 60)
        at = _on_skin(s, degrees, z, side, 1)
        out = _on_skin(s, degrees, z, side, 7)
        add_tubes(s.canvas, share, [at, out], r.uniform(4, 6.5) / s.k)
        path = [out, _on_skin(s, 60, z - 50, side, 18), end]
        add_tubes(s.canvas, share, smooth_path(path, 3), 1.0 / s.k)
    _metal(s, share * (s.wall.skin > -6), r.uniform(1800, 3400))


@_distractor("buttons", 0.3)
def _buttons(s, r):
    share = np.zeros(s.canvas.hu.shape, np.float32)
    for z in np.arange(40, -200, -r.uniform(50, 90)):
        at = [_on_skin(s, 88, z, 1, d) for d in (4, 10)]
        add_tubes(s.canvas, share, at, r.uniform(4, 9) / s.k)
    _metal(s, share * (s.wall.skin > 0), r.uniform(1200, 3400))


@_distractor("oral contrast", 0.22)
def _oral(s, r):
    inside = (s.canvas.labels == 6) & _tissue(s, "fluid")
    level = r.uniform(-40, 40)
    share = inside * ramp(s.canvas.points[1] - level, s.width)
    _blend(s, share, np.exp(r.uniform(np.log(180), np.log(3200))))


@_distractor("calcified cartilage", 0.5)
def _cartilage(s, r):
    inside = np.flatnonzero(_tissue(s, "cartilage"))
    if len(inside):
        q = s.canvas.points.reshape(3, -1)[:, inside]
        flat = s.canvas.hu.reshape(-1)
        lump = np.clip(value_noise(q, 5, s.seed, "cartilage") - r.uniform(0, 1), 0, 1)
        flat[inside] += lump * r.uniform(150, 900)


@_distractor("granulomas", 0.4)
def _granulomas(s, r):
    share = np.zeros(s.canvas.hu.shape, np.float32)
    spots = np.flatnonzero(np.isin(s.canvas.labels, (1, 5)) & _tissue(s, "liver", "spleen"))
    for i in r.choice(spots, int(r.integers(1, 7))) if len(spots) else []:
        at = s.canvas.points.reshape(3, -1)[:, i]
        mm = r.uniform(1.5, 4) / s.k
        add_tubes(s.canvas, share, [at, at + r.uniform(0.5, 2, 3)], mm)
    _metal(s, share, r.uniform(400, 1300))


@_distractor("stones", 0.2)
def _stones(s, r):
    share = np.zeros(s.canvas.hu.shape, np.float32)
    spots = np.flatnonzero(_tissue(s, "gallbladder"))
    for i in r.choice(spots, int(r.integers(1, 6))) if len(spots) else []:
        at = s.canvas.points.reshape(3, -1)[:, i]
        add_tubes(s.canvas, share, [at, at + (0.5, 0.5, 0.5)], r.uniform(2, 6) / s.k)
    _metal(s, share, r.uniform(100, 900))


@_distractor("calcified nodes", 0.3)
def _calcified_nodes(s, r):
    share = np.zeros(s.canvas.hu.shape, np.float32)
    for name in r.permutation(list(STATIONS))[: r.integers(1, 4)]:
        at = settle([STATIONS[str(name)]], s.p)[0] + r.uniform(-5, 5, 3)
        np.maximum(share, _node(s, r, at, r.uniform(3, 8)), out=share)
    _metal(s, share, r.uniform(300, 1400))


@_distractor("small nodes", 0.8)
def _small_nodes(s, r):
    share = np.zeros(s.canvas.hu.shape, np.float32)
    for name in r.permutation(list(STATIONS))[: r.integers(1, 6)]:
        at = settle([STATIONS[str(name)]], s.p)[0] + r.uniform(-7, 7, 3)
        np.maximum(share, _node(s, r, at, r.uniform(3, 8.5)), out=share)
    _blend(s, share, s.hu["node"])


@_distractor("thymus", 0.35)
def _thymus(s, r):
    at = np.array([-4, 52, 12.0]) + r.uniform(-4, 4, 3)
    radii = (r.uniform(10, 18), r.uniform(4, 8), r.uniform(14, 26))
    where, one = box_share(
        s.canvas, at - 30, at + 30, lambda q: ellipsoid(q, at, radii)
    )
    if where is not None:
        share = one * (s.canvas.tissues[where] == TISSUE_IDS["mediastinal_fat"])
        part = s.canvas.hu[where]
        part += share * (r.uniform(-70, 45) - part)


@_distractor("dependent density", 0.5)
def _dependent(s, r):
    back = np.clip(1 - (s.depth - 2) / r.uniform(8, 22), 0, 1) * np.clip((-25 - s.q[1]) / 45, 0, 1)
    flat = s.canvas.hu.reshape(-1)
    grain = 1 + 0.2 * value_noise(s.q, 10, s.seed, "dependent")
    flat[s.region] += s.air() * back * grain * r.uniform(60, 260)


@_distractor("calcified airways", 0.25)
def _calcified_airways(s, r):
    share = np.zeros(s.canvas.hu.shape, np.float32)
    path = smooth_path(settle(TRACHEA, s.p), 6)
    for i in range(2, len(path) - 1):
        if r.random() < 0.6:
            angle = np.linspace(-0.6, np.pi + 0.6, 9)
            ring = path[i] + 10.2 * np.stack([np.cos(angle), np.sin(angle), 0 * angle], -1)
            add_tubes(s.canvas, share, ring, 0.7 / s.k)
    _metal(s, share * _tissue(s, "airway_wall", "mediastinal_fat"), r.uniform(250, 800))


def paint_distractors(
    s: Scene,
) -> list[str]:  # names
    "Paint what looks like a finding and is none"
    out = []
    for name, (chance, painter) in DISTRACTORS.items():
        r = rng("distractor", s.seed, name)
        if r.random() < chance:
            painter(s, r)
            out.append(name)
    return out

#| export
DISEASES = {  # name: (probability, factor with pleural effusion, abnormality that it brings)
    "COVID-19": (0.15, 1.0, "Lung opacity"),
    "common pneumonia": (0.15, 1.0, "Consolidation"),
    "pulmonary embolism": (0.12, 2.5, None),
}


def sample_diseases(
    seed: Any,  # key of a patient for `asap.core.rng`
    have: Iterable[str],  # abnormalities
    chances: Mapping[str, float] | None = None,  # disease -> probability; others as in `DISEASES`
) -> tuple[list, tuple]:  # abnormalities and diseases
    "Sample the diseases of a patient, and add the abnormalities that show them"
    r, out, names = rng("diseases", seed), [], list(have)
    for name, (chance, factor, brings) in DISEASES.items():
        chance = (chances or {}).get(name, chance)
        if "Pleural effusion" in names:
            chance = min(chance * factor, 1.0) if chance < 1 else chance
        hit = r.random() < chance and not (name == "common pneumonia" and "COVID-19" in out)
        if hit:
            out.append(name)
            if brings and brings not in names:
                names.append(brings)
    return [n for n in ABNORMALITIES if n in names], tuple(out)

#| export
PAINT_ORDER = (
    "Mosaic attenuation pattern",
    "Emphysema",
    "Lung opacity",
    "Interlobular septal thickening",
    "Pulmonary fibrotic sequela",
    "Consolidation",
    "Atelectasis",
    "Bronchiectasis",
    "Peribronchial thickening",
    "Lung nodule",
    "Cardiomegaly",
    "Pericardial effusion",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Pleural effusion",
    "Arterial wall calcification",
    "Coronary artery wall calcification",
    "Medical material",
)
_IN_LUNG = set(PAINT_ORDER[:10])


@dataclass
class BodyChest(Chest):
    "A `Chest` of page 11 in a body of generation 3"

    body: WholeBody | None = field(default=None, repr=False)
    diseases: dict = field(default_factory=dict)  # name -> `Finding` or None
    distractors: list = field(default_factory=list)  # names


def paint_findings(
    s: Scene,
    names: Iterable[str],  # abnormalities
) -> list[Finding]:  # in CT-RATE's order; those that can be seen
    "Paint the abnormalities of a patient"
    out = []
    for name in [n for n in PAINT_ORDER if n in set(names)]:
        sev = s.severities[name]
        if not len(s.region) and name in (*_IN_LUNG, "Pleural effusion"):
            continue
        shape = PAINTERS[name](s, rng("paint", s.seed, name), sev)
        if shape is None or not shape["mask"].any():
            continue
        shape["size_mm"] = float(shape["size_mm"])
        if name == "Pleural effusion":
            for f in out:
                if f.name in _IN_LUNG and (f.mask & ~shape["mask"]).any():
                    f.mask &= ~shape["mask"]
        out.append(Finding(name=name, severity=sev, **shape))
    return sorted(out, key=lambda f: ABNORMALITIES.index(f.name))


def chest_view(
    seed: Any,  # key of a patient for `asap.core.rng`
    p: Patient,
) -> View:
    "A view of the whole chest, in the pose of a careful technician"
    r = rng("chest view", seed)
    turn = (*r.uniform(-3, 3, 2), r.uniform(-6, 6))
    shift = (*r.uniform(-10, 10, 2), r.uniform(-14, 14))
    pose = Pose(float(r.uniform(0.92, 1.06)), p.stretch, tuple(turn), tuple(shift))
    return View(pose, (0.0, 0.0, -55.0), round_field=bool(r.random() < 0.5))


def sample_phase(
    seed: Any,  # key of a patient for `asap.core.rng`
    shift: DomainShift = NO_SHIFT,  # of the hospital
) -> str:  # one of `PHASES`
    "Sample a contrast phase; where every scan has contrast medium, it is an angiography"
    r = rng("phase", seed)
    if r.random() >= shift.contrast:
        return "none"
    odds = [0.8, 0.15, 0.05] if shift.contrast >= 1 else [0.25, 0.35, 0.4]
    return str(r.choice(PHASES[1:], p=odds))

#| export
def _check_names(names: Iterable[str], diseases: Iterable[str]) -> None:
    for name in names:
        if name not in ABNORMALITIES:
            raise ValueError(
                f"`{name}` is none of the 18 abnormalities: {', '.join(ABNORMALITIES)}"
            )
    for name in diseases:
        if name not in DISEASES:
            raise ValueError(f"`{name}` is none of the diseases: {', '.join(DISEASES)}")


def _shifted(s: ScannerSettings, shift: DomainShift) -> ScannerSettings:
    return replace(s, noise=s.noise * shift.noise, blur=s.blur + 0.5 * shift.blur)


def _draw(seed, p: Patient, view: View, grid, spacing, settings, values, factor, table) -> Scene:
    "Paint the healthy body"
    hu = dict(values or p.values)
    canvas = make_canvas(grid, spacing, hu, view.pose, view.center, settings.thickness)
    trees = lung_trees(p, size=factor)
    wall = paint_body(canvas, p, trees, factor, view.table)
    return Scene(canvas, wall, p, trees, factor, table, seed)


def synthesize_body_chest(
    seed: Any,  # key of a patient for `asap.core.rng`
    size: Sequence[int] | None = (96, 96, 48),  # voxels; None: what the view needs
    spacing: Sequence[float] = (3.5, 3.5, 7.0),  # mm
    present: Iterable[str] | None = None,  # exactly these; None: as `sample_abnormalities`
    without: Iterable[str] = (),  # abnormalities to leave out, for a twin
    only: str | None = None,  # shorthand for present=[only]
    shift: DomainShift = NO_SHIFT,  # of the hospital
    diseases: Iterable[str] | None = None,  # of `DISEASES`; None: sampled, or none with `present`
    phase: str | None = None,  # one of `PHASES`; None: sampled
    view: View | None = None,  # None: of `chest_view`
    settings: ScannerSettings | None = None,  # None: sampled
    values: Mapping[str, float] | None = None,  # HU of each tissue; None: the patient's
    lesions: Mapping[str, float] | None = None,  # HU of each lesion; None: `lesion_values`
    distractors: bool = True,
) -> BodyChest:
    "Synthesize a patient of generation 3 with findings and scan it"
    wanted = [only] if only else present
    have, sick = list(wanted or []), tuple(diseases or ())
    _check_names([*have, *without], sick)
    p = sample_patient(seed, phase=phase or sample_phase(seed, shift))
    if wanted is None:
        have = sample_abnormalities(seed, p.age, shift)
        chances = None if diseases is None else {n: float(n in sick) for n in DISEASES}
        have, sick = sample_diseases(seed, have, chances)
    have = [n for n in have if n not in without]
    severity = {n: float(rng("severity", seed, n).beta(1.6, 1.4)) for n in ABNORMALITIES}
    factor = heart_factor(severity["Cardiomegaly"]) if "Cardiomegaly" in have else 1.0
    v = view or chest_view(seed, p)
    st = settings or _shifted(sample_settings(seed, spacing[2]), shift)
    grid = tuple(size) if size is not None else v.size(spacing)
    table = dict(lesions or lesion_values(p.phase, seed, p.dose))
    s = _draw(seed, p, v, grid, spacing, st, values, factor, table)
    s.diseases, s.severities = sick, severity
    extra = paint_distractors(s) if distractors else []
    return _scan(s, v, st, paint_findings(s, have), extra)


def _scan(s: Scene, v: View, st: ScannerSettings, findings: list, extra: list) -> BodyChest:
    "Add emboli, scan, and collect"
    seen = {None, *(f.name for f in findings)}
    found: dict[str, Finding | None] = {n: None for n in s.diseases if DISEASES[n][2] in seen}
    if "pulmonary embolism" in found:
        r = rng("paint", s.seed, "emboli")
        sev = float(r.beta(1.6, 1.4))
        clots = paint_emboli(s, r, sev)
        found["pulmonary embolism"] = clots and Finding("pulmonary embolism", severity=sev, **clots)
        if clots is None:
            del found["pulmonary embolism"]
    c, p = s.canvas, s.p
    hu = scan_body(c, st, v.padding, v.field, v.round_field)
    affine = np.diag([*map(float, c.spacing), 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * d for n, d in zip(c.hu.shape, c.spacing)]
    body = WholeBody(
        hu, c.labels, c.tissues, affine, c.spacing, p, v, st, c, s.wall, s.trees
    )
    traits = dict(age=p.age, sex=p.sex, contrast=p.phase != "none", phase=p.phase, scale=s.k)
    return BodyChest(hu, c.labels, findings, affine, c.spacing, traits, c.hu, body, found, extra)

#| export
def lung_involvement(
    c: BodyChest,
) -> float:  # 0..1
    "Share of the lungs in which air is replaced: opacity, consolidation"
    lung = np.isin(c.labels, list(LOBES.values()))
    masks = [f.mask for f in c.findings if f.name in ("Lung opacity", "Consolidation")]
    if not masks or not lung.any():
        return 0.0
    return float((np.any(masks, 0) & lung).sum() / lung.sum())


def visible_outcome(
    c: BodyChest,
    seed: Any,  # any key of `asap.core.rng`
) -> dict:  # severity 0..1, time_days, event
    "Severity, survival time and whether it was observed, from what the image shows"
    r = rng("visible outcome", seed)
    risk = sum(LOG_HAZARDS.get(f.name, 0.1) * (0.5 + f.severity) for f in c.findings)
    risk += 4 * lung_involvement(c) + 0.012 * (c.traits["age"] - 60)
    clot = c.diseases.get("pulmonary embolism")
    risk += 0.6 * (0.5 + clot.severity) if clot else 0.0
    time, end = 1500 * np.exp(-risk) * r.weibull(2.5), r.uniform(120, 1500)
    return dict(
        severity=float(1 / (1 + np.exp(1.6 - risk))),
        time_days=int(np.ceil(min(time, end))),
        event=int(time <= end),
    )

#| export
def _chest_on(key, n: int, size, spacing, shift: DomainShift, **kw) -> BodyChest:
    "One reconstruction on its own grid"
    own = sample_spacing(key, n, np.multiply(spacing, shift.spacing))
    grid = tuple(int(round(a * b / c)) for a, b, c in zip(size, spacing, own))
    settings = _shifted(sample_settings((key, n), own[2]), shift)
    if n:
        settings = replace(settings, sharp=max(settings.sharp, 0.7), blur=0.25)
    return synthesize_body_chest(key, grid, own, shift=shift, settings=settings, **kw)


def synthesize_body_case(
    seed: int | str,  # of the study; an adapter prepends its name
    split: str,  # "train" or "valid"
    index: int,  # of the patient, from 1
    size: Sequence[int] = (96, 96, 48),  # voxels of the study's grid
    spacing: Sequence[float] = (3.5, 3.5, 7.0),  # mm
    second_recon_prob: float = 0.2,  # probability of a second reconstruction
    shift: DomainShift = NO_SHIFT,  # of the hospital
    masks: Iterable[str] = (),  # abnormalities and diseases whose masks are stored
    **kw: Any,  # of `synthesize_body_chest`, such as `diseases`
) -> PhantomCase:
    "Synthesize one patient of a cohort"
    key = (seed, split, index)
    count = 1 + int(rng("recons", key).random() < second_recon_prob)
    chests = [_chest_on(key, n, size, spacing, shift, **kw) for n in range(count)]
    c = chests[0]
    kernels = ["sharp" if x.body.settings.sharp > 0.4 else "standard" for x in chests]
    recons = [Reconstruction(x.hu, x.labels, x.affine, k) for x, k in zip(chests, kernels)]
    every = [*c.findings, *(f for f in c.diseases.values() if f)]
    return PhantomCase(
        f"{split}_{index}",
        c.traits["age"],
        c.traits["sex"],
        c.traits["contrast"],
        recons,
        synthesize_report(c, key),
        {n: int(c.has(n)) for n in ABNORMALITIES},
        c.findings,
        synthesize_questions(c, key),
        visible_outcome(c, key),
        {f.name: f.mask for f in every if f.name in masks},
        c,
    )
