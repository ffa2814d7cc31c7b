"""Procedural phantoms: three anatomies whose appearance follows a long-tailed mixture of modes.

Every sample is a scene in continuous coordinates, x to the right and y down, both in [−1, 1] over
the image, so the same sample at another size is the same scene. The rare modes are hard for a
segmenter that has seen few of them, and are never ambiguous: an observer who knows the mode sees the
object.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from torch.utils.data import Dataset

from datamodules.sources.source import Sample, Source
from errors import InputError

VERSION = 1
"""Raised whenever an image changes: a figure holds for the version that it was measured on."""

Family = Literal["cardiac", "abdomen", "polyp"]
Mixture = Literal["natural", "uniform"]
Scanner = Literal["a", "b", "c", "any"]
Array = NDArray[np.float32]

# Name and probability of each appearance mode in the natural mixture.
MODES: tuple[tuple[str, float], ...] = (
    ("bright", 0.70),  # brighter than its surroundings
    ("dark", 0.12),  # darker than its surroundings
    ("striped", 0.08),  # stripes whose mean is that of the surroundings
    ("rim", 0.05),  # only the outline differs from the surroundings
    ("speckled", 0.05),  # coarse speckle, beside a smooth and brighter distractor
)
MODE_NAMES = tuple(name for name, _ in MODES)

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cardiac": ("background", "right ventricle", "myocardium", "left ventricle"),
    "abdomen": (
        "background",
        "aorta",
        "gallbladder",
        "left kidney",
        "right kidney",
        "liver",
        "pancreas",
        "spleen",
        "stomach",
    ),
    "polyp": ("background", "polyp"),
}
CHANNELS: dict[str, int] = {"cardiac": 1, "abdomen": 1, "polyp": 3}
MIN_SIZE = 32

STRIPE_PERIOD = 0.25
RIM_WIDTH = 0.08
SPECKLE_NODES = 24
OTHER_SCANNERS = 0.3  # share of images that scanner "any" takes from elsewhere than scanner a
SPLIT_STRIDE = 10_000_000  # indices set aside for each split


@dataclass(frozen=True)
class _Scene:
    """Geometry and surroundings of one sample.

    Attributes:
        distance: signed distances ``(K, H, W)`` of the objects, negative inside, in painting order.
        labels: class of each of the K objects.
        gain: contrast of each object relative to the mode's.
        turned: whether each object's stripes run across instead of along.
        background: ``(H, W)`` grey values of the surroundings.
        tissue: mean grey value of the surroundings of the objects.
        distractor: signed distance ``(H, W)`` of the distractor, painted only in the speckled mode.
    """

    distance: Array
    labels: tuple[int, ...]
    gain: tuple[float, ...]
    turned: tuple[bool, ...]
    background: Array
    tissue: float
    distractor: Array


def phantom(
    family: Family,
    seed: int,
    index: int,
    size: int = 64,
    mode: int | None = None,
    mixture: Mixture = "natural",
    scanner: Scanner = "a",
) -> tuple[Array, NDArray[np.int64], int]:
    """Generate one sample; it depends on the arguments alone.

    The anatomy and the mask depend on ``family``, ``seed`` and ``index``; ``mode``, ``mixture`` and
    ``scanner`` change the appearance only, and ``size`` the sampling grid only. Grey values are
    quantised to 8 bits.

    Args:
        family: anatomy, ``cardiac`` (1 channel), ``abdomen`` (1 channel) or ``polyp`` (3 channels).
        seed: non-negative seed of the whole set.
        index: non-negative index of the sample in the set.
        size: height and width in pixels, at least 32.
        mode: appearance mode as an index into :data:`MODES`; None draws it from ``mixture``.
        mixture: ``natural`` draws modes with the probabilities of :data:`MODES`, ``uniform`` equally.
        scanner: ``a``; ``b`` and ``c`` with another contrast curve, bias field, point spread, noise level
            and, for RGB, colour cast; ``any`` is many centres: mostly a, else a scanner with settings
            of its own for every image.

    Returns:
        Image float32 ``(C, size, size)`` in [−1, 1], mask int64 ``(size, size)`` and the mode.

    Raises:
        InputError: an argument is out of its range.
    """
    _check(family, seed, index, size, mode, mixture, scanner)
    sequence = np.random.SeedSequence((zlib.crc32(family.encode()), seed, index))
    geometry, texture, device = (default_rng(child) for child in sequence.spawn(3))
    drawn = _draw_mode(geometry.random(), mixture)
    mode = drawn if mode is None else mode
    scene = _SCENES[family](geometry, size)
    grey = _paint(scene, MODE_NAMES[mode], texture, size)
    image = _colour(grey, texture, size) if family == "polyp" else grey[None]
    image = _scan(image, scanner, device)
    levels = np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
    return _decode(levels), _mask(scene), mode


class PhantomSource(Source):
    """Phantoms as an image set with three test sets.

    ``train``, ``val`` and ``test`` follow the natural mixture on scanner a; ``test_uniform`` has all
    modes equally often; ``test_shift`` too, on another scanner. The splits are disjoint index ranges of one
    endless set: a smaller split is a prefix of a larger one. Images are float32 ``(C, size, size)`` in
    [−1, 1], masks int64 ``(size, size)``; samples are made when first asked for and kept in memory.

    Args:
        family: anatomy, ``cardiac`` (4 classes), ``abdomen`` (9 classes) or ``polyp`` (2 classes, RGB).
        size: height and width in pixels, at least 32.
        n_train: samples in ``train``.
        n_val: samples in ``val``.
        n_test: samples in each of the three test sets.
        seed: non-negative seed of the set.
        scanner: that of ``train``, ``val`` and the first two test sets. ``any`` makes the pool of many
            centres that a generator with a broad prior is trained on.
        train_scanner: that of ``train`` alone; None is ``scanner``.
        shift: scanner of ``test_shift``. Settings that were chosen on one are reported on the other.

    Raises:
        InputError: an argument is out of its range.
    """

    mode_names = MODE_NAMES

    def __init__(
        self,
        family: Family = "cardiac",
        size: int = 64,
        n_train: int = 32,
        n_val: int = 32,
        n_test: int = 200,
        seed: int = 0,
        scanner: Scanner = "a",
        shift: Scanner = "b",
        train_scanner: Scanner | None = None,
    ) -> None:
        for each in (scanner, shift, train_scanner or scanner):
            _check(family, seed, 0, size, None, "natural", each)
        for argument, count in (("n_train", n_train), ("n_val", n_val), ("n_test", n_test)):
            if count < 1:
                raise InputError(f"{argument} is {count}; a phantom split needs at least 1 sample")
        self.name = f"phantom-{family}"
        self.version = VERSION
        self.class_names = CLASS_NAMES[family]
        self.channels = CHANNELS[family]
        self.size = (size, size)
        splits: dict[str, tuple[int, Mixture, Scanner]] = {
            "train": (n_train, "natural", train_scanner or scanner),
            "val": (n_val, "natural", scanner),
            "test": (n_test, "natural", scanner),
            "test_uniform": (n_test, "uniform", scanner),
            "test_shift": (n_test, "uniform", shift),
        }
        self.splits = tuple(splits)
        self._datasets = {
            name: _PhantomDataset(family, seed, size, name, position * SPLIT_STRIDE, *recipe)
            for position, (name, recipe) in enumerate(splits.items())
        }

    def _dataset(self, split: str) -> Dataset[Sample]:
        return self._datasets[split]


class _PhantomDataset(Dataset[Sample]):
    """One split, made on demand and kept in memory with 8 bits a value."""

    def __init__(
        self,
        family: Family,
        seed: int,
        size: int,
        split: str,
        offset: int,
        count: int,
        mixture: Mixture,
        scanner: Scanner,
    ) -> None:
        self._family: Family = family
        self._seed, self._size, self._split = seed, size, split
        self._offset, self._count = offset, count
        self._mixture: Mixture = mixture
        self._scanner: Scanner = scanner
        self._cache: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8], int]] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._count:
            raise IndexError(index)
        if index not in self._cache:
            self._cache[index] = self._make(index)
        levels, mask, mode = self._cache[index]
        return {
            "image": torch.from_numpy(_decode(levels)),
            "mask": torch.from_numpy(mask.astype(np.int64)),
            "id": f"{self._split}-{index:05d}",
            "mode": mode,
        }

    def _make(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
        image, mask, mode = phantom(
            self._family,
            self._seed,
            self._offset + index,
            self._size,
            mixture=self._mixture,
            scanner=self._scanner,
        )
        return np.rint((image + 1) * 127.5).astype(np.uint8), mask.astype(np.uint8), mode


def _check(
    family: str, seed: int, index: int, size: int, mode: int | None, mixture: str, scanner: str
) -> None:
    choices = (
        ("family", family, get_args(Family)),
        ("mixture", mixture, get_args(Mixture)),
        ("scanner", scanner, get_args(Scanner)),
    )
    for argument, value, known in choices:
        if value not in known:
            raise InputError(f"{argument} is {value!r}; a phantom's is one of {', '.join(known)}")
    for argument, number, least in (("seed", seed, 0), ("index", index, 0), ("size", size, MIN_SIZE)):
        if number < least:
            raise InputError(f"{argument} is {number}; a phantom's is at least {least}")
    if mode is not None and not 0 <= mode < len(MODES):
        raise InputError(f"mode is {mode}; a phantom's is between 0 and {len(MODES) - 1}")


def _draw_mode(uniform: float, mixture: Mixture) -> int:
    if mixture == "uniform":
        return int(uniform * len(MODES))
    edges = np.cumsum([probability for _, probability in MODES])[:-1]
    return int(np.searchsorted(edges, uniform, side="right"))


def _decode(levels: NDArray[np.uint8]) -> Array:
    return levels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _mask(scene: _Scene) -> NDArray[np.int64]:
    mask = np.zeros(scene.background.shape, np.int64)
    for distance, label in zip(scene.distance, scene.labels, strict=True):
        mask[distance < 0] = label
    return mask


# ------------------------------------------------------------------------------------ geometry


@lru_cache(maxsize=16)
def _grid(size: int) -> tuple[Array, Array]:
    """Coordinates x and y of the pixel centres, each ``(size, size)``."""
    axis = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _blobs(parameters: list[tuple[float, ...]], size: int) -> Array:
    """First-order signed distances ``(K, size, size)`` to bent, harmonically deformed ellipses.

    Each row of parameters is centre x, y, half-axes a, b, rotation, bend, and the cosine and sine
    amplitudes of the second and third harmonic of the radius.
    """
    columns = np.asarray(parameters, np.float32).T[..., None, None]
    cx, cy, a, b, rotation, bend, c2, s2, c3, s3 = columns
    x, y = _grid(size)
    cos, sin = np.cos(rotation), np.sin(rotation)
    u = cos * (x - cx) + sin * (y - cy)
    v = cos * (y - cy) - sin * (x - cx) - bend * u * u
    p, q = u / a, v / b
    rho = np.sqrt(p * p + q * q) + np.float32(1e-4)
    c, s = p / rho, q / rho
    cc, ss = c * c, s * s
    radius = 1 + c2 * (cc - ss) + s2 * 2 * c * s + c3 * c * (cc - 3 * ss) + s3 * s * (3 * cc - ss)
    return (rho - radius) / np.sqrt(cc / (a * a) + ss / (b * b))


def _blob(
    rng: Generator,
    centre: tuple[float, float],
    axes: tuple[float, float],
    rotation: float = 0.0,
    bend: float = 0.0,
    wobble: float = 0.06,
) -> tuple[float, ...]:
    """Parameters of one blob with random harmonics of the given amplitude."""
    return (*centre, *axes, rotation, bend, *rng.uniform(-wobble, wobble, 4))


@lru_cache(maxsize=64)
def _interpolation(nodes: int, size: int) -> Array:
    """Linear interpolation ``(size, nodes)`` from nodes on [−1, 1], rows of unit norm."""
    position = (np.arange(size) + 0.5) / size * (nodes - 1)
    weight = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(nodes)))
    return (weight / np.linalg.norm(weight, axis=1, keepdims=True)).astype(np.float32)


def _noise(rng: Generator, nodes: int, size: int) -> Array:
    """Smooth noise ``(size, size)`` of unit variance; the same field at every size."""
    matrix = _interpolation(nodes, size)
    field: Array = rng.standard_normal((nodes, nodes), np.float32)
    half: Array = matrix @ field
    return half @ matrix.T


def _spots(centres: NDArray[np.float64], width: float, size: int) -> Array:
    """Sum ``(size, size)`` of Gaussian spots of height 1 at centres ``(N, 2)``."""
    axis = _grid(size)[0][0]
    columns = np.exp(-(((axis - centres[:, :1]) / width) ** 2) / 2)
    rows = np.exp(-(((axis - centres[:, 1:]) / width) ** 2) / 2)
    return (rows.T @ columns).astype(np.float32)


def _cover(distance: Array) -> Array:
    """Share of each pixel inside an object, from its signed distance; the edge is one pixel wide."""
    return np.clip(0.5 - distance * (distance.shape[-1] / 2), 0, 1)


def _blend(under: Array, over: Array | float, cover: Array) -> Array:
    return under + (over - under) * cover


def _apart(distance: Array, objects: Array, gap: float) -> Array:
    """Cut a structure back so that it keeps a gap to all objects."""
    return np.maximum(distance, gap - objects.min(axis=0))


def _cardiac(rng: Generator, size: int) -> _Scene:
    """Short-axis slice: a crescent right ventricle beside a ring around the left ventricle."""
    cx, cy = 0.12 + rng.uniform(-0.08, 0.08), 0.05 + rng.uniform(-0.08, 0.08)
    endo, wall = rng.uniform(0.20, 0.31), rng.uniform(0.17, 0.22)
    epi = endo + wall
    stretch, turn = rng.uniform(0.9, 1.1), rng.uniform(-0.35, 0.35)
    side = np.pi + 0.25 + turn  # direction from the left to the right ventricle
    reach = epi * rng.uniform(0.72, 0.88)
    centre = (cx + reach * np.cos(side), cy + reach * np.sin(side))
    shape = rng.uniform(-0.05, 0.05, 4)
    ring = [(cx, cy, r * stretch, r / stretch, turn, 0.0, *shape) for r in (epi, endo)]
    right = _blob(
        rng, centre, (epi * rng.uniform(0.62, 0.76), epi * rng.uniform(0.86, 1.05)), side, wobble=0.05
    )
    heart = _blobs([right, *ring], size)
    tissue = rng.uniform(-0.2, 0.0)
    angle = rng.uniform(0, 2 * np.pi)
    surroundings = _blobs(
        [
            _blob(rng, (0, 0.05), (rng.uniform(1.0, 1.1), rng.uniform(0.88, 0.98)), 0, 0, 0.02),
            _blob(rng, (-0.72, -0.12), (0.26, 0.55), 0.25, 0, 0.08),
            _blob(rng, (0.80, 0.00), (0.22, 0.60), -0.15, 0, 0.08),
            _blob(rng, (-0.25, 0.85), (0.6, 0.28), -0.1, 0, 0.08),
            _blob(rng, (cx + 0.72 * np.cos(angle), cy + 0.72 * np.sin(angle)), (0.26, 0.22), angle, 0, 0.1),
        ],
        size,
    )
    body, *lungs, liver, distractor = surroundings
    grey = np.full((size, size), -0.95, np.float32)
    grey = _blend(grey, 0.3, _cover(body))
    grey = _blend(grey, tissue, _cover(body + 0.09))
    grey = _blend(grey, tissue + 0.12, _cover(liver))
    for lung in lungs:
        grey = _blend(grey, -0.85, _cover(_apart(np.maximum(lung, body + 0.15), heart, 0.1)))
    return _Scene(
        heart,
        labels=(1, 2, 3),
        gain=(0.9, -0.55, 1.0),
        turned=(False, True, False),
        background=grey,
        tissue=tissue,
        distractor=_apart(distractor, heart, 0.08),
    )


# Abdominal organs in painting order: label, centre, half-axes, rotation, bend, relative contrast and
# whether the stripes are turned. The patient's right is on the left of the image, the back is below.
_ORGANS: tuple[tuple[int, tuple[float, float], tuple[float, float], float, float, float, bool], ...] = (
    (5, (-0.50, -0.12), (0.34, 0.42), 0.2, 0.0, 0.75, False),
    (8, (0.37, -0.31), (0.32, 0.20), 0.45, 0.5, 0.55, False),
    (7, (0.66, 0.10), (0.15, 0.27), -0.25, 0.0, 0.85, True),
    (3, (0.40, 0.43), (0.14, 0.18), 0.3, 0.0, 1.1, False),
    (4, (-0.38, 0.45), (0.14, 0.18), -0.3, 0.0, 1.1, True),
    (6, (0.17, 0.03), (0.29, 0.095), -0.2, -0.7, 0.65, True),
    (2, (-0.14, -0.06), (0.11, 0.13), 0.3, 0.0, 0.4, True),
    (1, (0.07, 0.27), (0.105, 0.105), 0.0, 0.0, 1.0, False),
)


def _abdomen(rng: Generator, size: int) -> _Scene:
    """Axial slice with eight organs inside a body wall, and the spine."""
    scale, turn = rng.uniform(0.94, 1.06), rng.uniform(-0.1, 0.1)
    shift = rng.uniform(-0.04, 0.04, 2)
    cos, sin = scale * np.cos(turn), scale * np.sin(turn)

    def place(x: float, y: float, jitter: float) -> tuple[float, float]:
        x, y = x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)
        return cos * x - sin * y + shift[0], sin * x + cos * y + shift[1]

    rows = []
    for _, centre, (a, b), rotation, bend, _, _ in _ORGANS:
        grow = scale * rng.uniform(0.9, 1.15, 2)
        tilt = rotation + turn + rng.uniform(-0.15, 0.15)
        rows.append(_blob(rng, place(*centre, 0.03), (a * grow[0], b * grow[1]), tilt, bend, 0.07))
    organs = _blobs(rows, size)
    bowel = place(rng.uniform(-0.15, 0.05), rng.uniform(-0.5, -0.4), 0.0)
    body, spine, distractor = _blobs(
        [
            _blob(rng, place(0, 0, 0), (0.97 * scale, 0.82 * scale), turn, 0, 0.01),
            _blob(rng, place(0, 0.58, 0.02), (0.15, 0.12), turn, 0, 0.08),
            _blob(rng, bowel, (0.20, 0.17), turn, 0, 0.1),
        ],
        size,
    )
    tissue = rng.uniform(-0.25, -0.1)
    angles = rng.uniform(0, 2 * np.pi) + np.arange(7) * (2 * np.pi / 7)
    ribs = np.stack([np.cos(angles) * 0.86, np.sin(angles) * 0.71], axis=1) * scale + shift
    grey = np.full((size, size), -1.0, np.float32)
    grey = _blend(grey, -0.6, _cover(body))
    grey = _blend(grey, tissue + 0.1, _cover(body + 0.07))
    grey = _blend(grey, tissue, _cover(body + 0.13))
    grey = _blend(grey, 0.9, _cover(spine)) + 0.7 * _spots(ribs, 0.03, size)
    return _Scene(
        organs,
        labels=tuple(row[0] for row in _ORGANS),
        gain=tuple(row[5] for row in _ORGANS),
        turned=tuple(row[6] for row in _ORGANS),
        background=grey,
        tissue=tissue,
        distractor=_apart(distractor, organs, 0.05),
    )


def _polyp(rng: Generator, size: int) -> _Scene:
    """Endoscopic view: one polyp, sometimes two, on folded mucosa around a lumen."""
    axes = rng.uniform(0.26, 0.48, 2)
    centre = rng.uniform(-0.38, 0.38, 2)
    rows = [_blob(rng, (centre[0], centre[1]), (axes[0], axes[1]), rng.uniform(0, np.pi), 0, 0.09)]
    small, angle, second = rng.uniform(0.17, 0.24), rng.uniform(0, 2 * np.pi), rng.random() < 0.2
    away = np.clip(centre - np.sign(centre) * rng.uniform(0.65, 0.8, 2), -0.62, 0.62)
    if second:
        rows.append(_blob(rng, (away[0], centre[1]), (small, small * 1.2), angle, 0, 0.09))
    polyps = _blobs(rows, size).min(axis=0, keepdims=True)
    tissue = rng.uniform(-0.2, 0.0)
    x, y = _grid(size)
    lumen = rng.uniform(-0.8, 0.8, 2)
    radius = np.hypot(x - lumen[0], y - lumen[1])
    bearing = np.arctan2(y - lumen[1], x - lumen[0])
    wave = radius * (2 * np.pi / rng.uniform(0.65, 0.9)) + rng.uniform(0.3, 0.8) * np.sin(
        2 * bearing + rng.uniform(0, 2 * np.pi)
    )
    folds = -np.exp(2.5 * (np.cos(wave) - 1)) * np.float32(rng.uniform(0.2, 0.35))
    hole = -0.4 * np.exp(-((radius / 0.28) ** 2))
    distractor = _blobs([_blob(rng, (away[0], away[1]), (0.24, 0.2), angle, 0, 0.1)], size)[0]
    return _Scene(
        polyps,
        labels=(1,),
        gain=(1.0,),
        turned=(False,),
        background=(tissue + folds + hole).astype(np.float32),
        tissue=tissue,
        distractor=_apart(distractor, polyps, 0.1),
    )


_SCENES: dict[str, Callable[[Generator, int], _Scene]] = {
    "cardiac": _cardiac,
    "abdomen": _abdomen,
    "polyp": _polyp,
}


# ---------------------------------------------------------------------------------- appearance


def _paint(scene: _Scene, mode: str, rng: Generator, size: int) -> Array:
    """Grey values ``(size, size)`` of a scene in a mode, before the scanner."""
    contrast = rng.uniform(0.85, 1.1)
    grain, speckle = _noise(rng, 9, size), _noise(rng, SPECKLE_NODES, size)
    stripes = _stripes(rng, size)
    surroundings = scene.background + np.float32(0.05) * grain
    grey = surroundings
    if mode == "speckled":
        grey = _blend(grey, min(scene.tissue + 1.05, 0.97), _cover(scene.distractor))
    for distance, gain, turned in zip(scene.distance, scene.gain, scene.turned, strict=True):
        step = contrast * gain
        inside: Array | float
        if mode == "bright":
            inside = scene.tissue + 0.75 * step
        elif mode == "dark":
            inside = scene.tissue - 0.6 * step
        elif mode == "striped":
            inside = scene.tissue + 0.5 * contrast * stripes[int(turned)]
        elif mode == "rim":
            rim = _cover(np.abs(distance + RIM_WIDTH / 2) - RIM_WIDTH / 2)
            inside = _blend(surroundings, scene.tissue + 0.75 * contrast, rim)
        else:
            inside = scene.tissue + 0.35 * step + 0.4 * contrast * speckle
        grey = _blend(grey, inside, _cover(distance))
    return grey


def _stripes(rng: Generator, size: int) -> tuple[Array, Array]:
    """Two fields of stripes in [−1, 1], each ``(size, size)``, at right angles to each other."""
    x, y = _grid(size)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    turn = np.float32(2 * np.pi / STRIPE_PERIOD)
    shift = np.float32(phase)
    return np.sin(turn * (cos * x + sin * y) + shift), np.sin(turn * (cos * y - sin * x) + shift)


def _colour(grey: Array, rng: Generator, size: int) -> Array:
    """Colour grey values as mucosa, with vignette and specular highlights: ``(3, size, size)``."""
    x, y = _grid(size)
    vignette = 1 - 0.75 * np.clip(np.hypot(x, y) - 0.85, 0, 0.5) / 0.5
    light = np.clip((grey + 1) / 2, 0.01, 1) * vignette
    power = np.array([0.5, 1.2, 1.4]) * rng.uniform(0.9, 1.1, 3)
    rgb = light[None] ** power.astype(np.float32)[:, None, None]
    glints = _spots(rng.uniform(-0.8, 0.8, (rng.integers(3, 9), 2)), 0.03, size)
    return np.maximum(rgb, np.clip(glints, 0, 1)) * 2 - 1


# ------------------------------------------------------------------------------------- scanners


@lru_cache(maxsize=16)
def _point_spread(size: int, width: float) -> Array:
    """Gaussian blur along one axis as a matrix ``(size, size)`` with rows that sum to 1."""
    axis = _grid(size)[0][0]
    kernel = np.exp(-(((axis[:, None] - axis) / width) ** 2) / 2)
    return (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class _Settings:
    """A scanner: Gaussian blur, exponent of each channel's contrast curve, bias field, gain, noise."""

    blur: float
    power: tuple[float, ...]
    bias: float
    gain: float
    noise: float


def _scan(image: Array, scanner: Scanner, rng: Generator) -> Array:
    """What a scanner makes of an image ``(C, H, W)``; scanner a only adds noise."""
    channels, size, _ = image.shape
    angle = rng.uniform(0, 2 * np.pi)
    noise = rng.standard_normal(image.shape, np.float32)
    if scanner == "a" or (scanner == "any" and rng.random() >= OTHER_SCANNERS):
        return image + np.float32(0.05) * noise
    settings = _other(rng, channels) if scanner == "any" else _SCANNERS[scanner][channels]
    blur = _point_spread(size, settings.blur)
    light = blur @ (np.clip(image, -1, 1) + 1) @ blur.T / 2
    light = np.clip(light, 0, 1) ** np.array(settings.power, np.float32)[:, None, None]
    x, y = _grid(size)
    slope = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    bias = np.exp(np.float32(settings.bias) * slope)
    return settings.gain * light * bias * 2 - 1 + np.float32(settings.noise) * noise


_SCANNERS = {
    "b": {
        1: _Settings(blur=0.03, power=(0.7,), bias=0.3, gain=0.92, noise=0.08),
        3: _Settings(blur=0.03, power=(0.9, 0.75, 0.65), bias=0.3, gain=0.92, noise=0.08),
    },
    "c": {
        1: _Settings(blur=0.04, power=(0.8,), bias=0.2, gain=0.88, noise=0.09),
        3: _Settings(blur=0.04, power=(0.65, 0.75, 0.9), bias=0.2, gain=0.88, noise=0.09),
    },
}


def _other(rng: Generator, channels: int) -> _Settings:
    """A scanner drawn at random; scanners b and c lie within the ranges, scanner a at their edge."""
    common = np.log(1.6) * rng.uniform(-1, 0.4)
    tint = rng.uniform(-0.2, 0.2, channels) * (channels > 1)
    return _Settings(
        blur=rng.uniform(0.01, 0.045),
        power=tuple(np.exp(common + tint)),
        bias=rng.uniform(0, 0.4),
        gain=rng.uniform(0.85, 1.05),
        noise=rng.uniform(0.03, 0.1),
    )
