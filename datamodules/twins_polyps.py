"""Phantom polyps on disk, in the two forms of the published sets that ``PolypsSource`` reads.

Names, folders, file types and the faults of the originals are kept: Kvasir-SEG has JPEG masks, CVC-ClinicDB
anti-aliased RGB masks and numbered frames of 29 sequences, PraNet packs everything as PNG.
"""

import string
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datamodules.sources.phantom import Scanner, phantom
from datamodules.sources.polyps import SEQUENCE_ENDS
from errors import InputError

SIZE = 64
MARGIN = 0.25  # share of a frame's size that the camera of a sequence may move by
FEWEST = 10  # below, a tenth of a set is nothing
_SCANNERS: dict[str, Scanner] = {
    "kvasir": "a",
    "clinicdb": "b",
    "endoscene": "c",
    "colondb": "c",
    "etis": "any",
}
_STRIDE = 1_000_000  # indices set aside for each set


class _Case(NamedTuple):
    stem: str
    image: Image.Image  # RGB
    mask: Image.Image  # grey, anti-aliased


def write_raw(folder: str | Path, cases: int, size: int = SIZE, seed: int = 0) -> None:
    """Write ``Kvasir-SEG``, ``CVC-ClinicDB``, ``CVC-300``, ``CVC-ColonDB`` and ``ETIS-LaribPolypDB``.

    Args:
        folder: where to, made if it is absent.
        cases: images of each of the first two; the other three have a quarter of it each.
        size: height and width of an image in pixels.
        seed: seed of the phantoms; the files depend on the arguments alone.

    Raises:
        InputError: fewer than 10 cases, or more than CVC-ClinicDB has frames.
    """
    root = Path(folder)
    sets = _sets(cases, size, seed)
    for case in sets["kvasir"]:
        _save(case, root / "Kvasir-SEG" / "images", root / "Kvasir-SEG" / "masks", ".jpg")
    for case in sets["clinicdb"]:
        coloured = case._replace(mask=case.mask.convert("RGB"))
        _save(coloured, root / "CVC-ClinicDB" / "Original", root / "CVC-ClinicDB" / "Ground Truth", ".png")
    for key, name in (("endoscene", "CVC-300"), ("colondb", "CVC-ColonDB"), ("etis", "ETIS-LaribPolypDB")):
        for case in sets[key]:
            _save(case, root / name / "images", root / name / "masks", ".tif" if key == "etis" else ".png")


def write_pranet(folder: str | Path, cases: int, size: int = SIZE, seed: int = 0) -> None:
    """Write ``TrainDataset`` and ``TestDataset`` with the five test sets.

    Nine tenths of Kvasir-SEG and of CVC-ClinicDB are in ``TrainDataset``, as in PraNet's 1,450.

    Args:
        folder: where to, made if it is absent.
        cases: images of each of these two, over both folders; the other three have a quarter of it each.
        size: height and width of an image in pixels.
        seed: seed of the phantoms; the files depend on the arguments alone.

    Raises:
        InputError: fewer than 10 cases, or more than CVC-ClinicDB has frames.
    """
    training, tests = Path(folder) / "TrainDataset", Path(folder) / "TestDataset"
    names = {
        "kvasir": "Kvasir",
        "clinicdb": "CVC-ClinicDB",
        "endoscene": "CVC-300",
        "colondb": "CVC-ColonDB",
        "etis": "ETIS-LaribPolypDB",
    }
    for key, each in _sets(cases, size, seed).items():
        for index, case in enumerate(each):
            held_out = key not in ("kvasir", "clinicdb") or index % 10 == 9
            home = tests / names[key] if held_out else training
            _save(case, home / "images", home / "masks", ".png")


def _sets(cases: int, size: int, seed: int) -> dict[str, Iterator[_Case]]:
    if not FEWEST <= cases <= SEQUENCE_ENDS[-1]:
        raise InputError(f"cases is {cases}; polyps have {FEWEST} to {SEQUENCE_ENDS[-1]}")
    rng = np.random.default_rng(0)  # names are alike for all seeds
    letters = np.array(list(string.ascii_lowercase + string.digits))
    kvasir = ["cju" + "".join(letters[rng.integers(0, 36, 22)]) for _ in range(cases)]
    few = [str(number + 1) for number in range(max(cases // 4, 1))]
    return {
        "kvasir": _stills("kvasir", sorted(kvasir), size, seed),
        "clinicdb": _frames(cases, size, seed),
        **{key: _stills(key, few, size, seed) for key in ("endoscene", "colondb", "etis")},
    }


def _stills(key: str, stems: list[str], size: int, seed: int) -> Iterator[_Case]:
    """Images of one polyp each."""
    for index, stem in enumerate(stems):
        yield _case(stem, _draw(key, index, size, seed))


def _frames(cases: int, size: int, seed: int) -> Iterator[_Case]:
    """About four frames of each sequence: one polyp, from a camera that moves."""
    starts = (1, *(end + 1 for end in SEQUENCE_ENDS[:-1]))
    lengths = [end - start + 1 for start, end in zip(starts, SEQUENCE_ENDS, strict=True)]
    used = lengths[: -(-cases // 4)]
    margin = round(MARGIN * size)
    turns = [(turn, sequence) for sequence, length in enumerate(used) for turn in range(length)]
    for turn, sequence in sorted(sorted(turns)[:cases], key=lambda frame: frame[::-1]):
        image, mask = _draw("clinicdb", sequence, size + margin, seed)
        left, top = (7 * turn) % margin, (5 * turn) % margin
        box = (2 * left, 2 * top, 2 * (left + size), 2 * (top + size))
        yield _case(str(starts[sequence] + turn), (image.crop(box), mask.crop(box)))


def _draw(key: str, index: int, size: int, seed: int) -> tuple[Image.Image, Image.Image]:
    """Image and mask of a phantom at twice the size."""
    place = list(_SCANNERS).index(key) * _STRIDE + index
    image, mask, _ = phantom("polyp", seed, place, 2 * size, scanner=_SCANNERS[key])
    pixels = np.rint((image + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels), Image.fromarray((255 * mask).astype(np.uint8))


def _case(stem: str, drawn: tuple[Image.Image, Image.Image]) -> _Case:
    """Halve image and mask, which makes the edges of the mask soft."""
    image, mask = (each.reduce(2) for each in drawn)
    return _Case(stem, image, mask)


def _save(case: _Case, images: Path, masks: Path, suffix: str) -> None:
    for folder, picture in ((images, case.image), (masks, case.mask)):
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{case.stem}{suffix}")
