"""Images and masks from folders, paired by file stem."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from datamodules.sources.labels import lookup
from datamodules.sources.listing import read_lines, similar
from datamodules.sources.source import Sample, Source
from datamodules.sources.splits import check_content, check_fractions, check_names, ordered, shuffled
from errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
DEFAULT_FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
_GREY_16_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Folder:
    """A folder with images and masks in two sub-folders.

    Attributes:
        root: the folder.
        images: sub-folder of the images.
        masks: sub-folder of the masks.
    """

    root: str
    images: str = "images"
    masks: str = "masks"


@dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Attributes:
        stem: what the two names share; the id of the sample.
        image: file of the image.
        mask: file of the mask.
    """

    stem: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Format:
    """How files become arrays.

    Attributes:
        size: height and width (H, W) of the samples in pixels.
        channels: 1 for grey or 3 for RGB.
        threshold: grey values of a mask above it are class 1; None where values are classes.
        values: pixel value of each class, where there is no threshold.
        needs_object: refuse a mask in which nothing is above the threshold.
    """

    size: tuple[int, int]
    channels: int
    threshold: int | None
    values: tuple[int, ...]
    needs_object: bool = False


class PairSource(Source):
    """A source of pairs of files, decoded split by split when first asked for.

    What derives from it has ``_format``, how its files are read, and calls ``_keep``.
    """

    _format: Format

    def _keep(self, pairs: dict[str, list[Pair]]) -> None:
        """Take the pairs of each split, in the order of the samples."""
        self._pairs = pairs
        self.splits = tuple(pairs)
        self._datasets: dict[str, FolderDataset] = {}

    def files(self) -> dict[str, list[Path]]:
        """See :meth:`Source.files`."""
        return {
            name: [file for pair in pairs for file in (pair.image, pair.mask)]
            for name, pairs in self._pairs.items()
        }

    def _dataset(self, split: str) -> Dataset[Sample]:
        if split not in self._datasets:
            dataset = FolderDataset(self._pairs[split], self._format)
            known = self._datasets | {split: dataset}
            check_content({name: known[name].prints if name in known else [] for name in self.splits})
            self._datasets[split] = dataset
        return self._datasets[split]


class FolderSource(PairSource):
    """An image set from a folder of images and a folder of masks.

    Files are PNG, JPEG, TIFF or BMP; an image and its mask share the stem of their names, whatever
    the suffix. Images are resized bilinearly with antialiasing and scaled by the range of their
    pixel type, 8 or 16 bits, to float32 ``(C, H, W)`` in [−1, 1]. Masks are turned into classes
    first and resized to the nearest neighbour after, int64 ``(H, W)``.

    The constructor only lists, pairs and splits file names. ``dataset(split)`` decodes and checks the
    files of that split and keeps them in memory with 8 bits a value.

    Args:
        root: folder that holds the sub-folders ``images`` and ``masks``; ``~`` and environment variables
            are filled in.
        name: name of the set in reports; None takes the name of ``root``.
        images: sub-folder of the images.
        masks: sub-folder of the masks.
        size: height and width (H, W) of the samples in pixels; one number makes them square.
        channels: 1 for grey or 3 for RGB; files of the other kind are converted.
        class_names: names of the classes, the background first.
        threshold: for masks of two classes, grey values above it are class 1; None where pixel values
            are classes.
        class_values: pixel value of each class, in the order of ``class_names``; None means 0, 1, 2, ….
            Needs ``threshold`` None.
        fractions: share of the images for each split, ``train`` and ``val`` among them, all other
            names being test sets; a sum below 1 leaves images out. None is 0.7 train, 0.1 val, 0.2 test.
        lists: instead of fractions, a text file for each split with one stem a line, its path relative
            to ``root``; stems in no list are left out.
        group: regular expression with one group that finds the patient or video in a stem; the images
            of one never straddle two splits.
        tests: further test sets by name, each a whole folder.
        n_train: keep only the first so many of ``train``, which fractions fill in random order: few
            labelled images, while all other splits stay as they are. None keeps all.
        seed: seed of the random split by fractions; the split does not depend on the order on disk.

    Raises:
        InputError: an argument is out of its range, a folder is absent or empty, images and masks do
            not pair, or the split is impossible.
    """

    def __init__(
        self,
        root: str,
        name: str | None = None,
        images: str = "images",
        masks: str = "masks",
        size: tuple[int, int] | int = 256,
        channels: Literal[1, 3] = 3,
        class_names: Sequence[str] = ("background", "foreground"),
        threshold: int | None = 127,
        class_values: Sequence[int] | None = None,
        fractions: Mapping[str, float] | None = None,
        lists: Mapping[str, str] | None = None,
        group: str | None = None,
        tests: Mapping[str, Folder] | None = None,
        n_train: int | None = None,
        seed: int = 0,
    ) -> None:
        root = str(expand(root))
        self.name = Path(root).resolve().name if name is None else name
        self.class_names = tuple(class_names)
        self.channels = channels
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self._format = make_format(self.size, channels, self.class_names, threshold, class_values)

        pairs = pair_files(Folder(root, images, masks))
        groups = _groups(pairs, group)
        if lists is not None:
            if fractions is not None:
                raise InputError("both fractions and lists are given: set one of the two")
            split = _split_by_lists(pairs, groups, {key: Path(root) / lists[key] for key in lists})
        else:
            split = _split_by_fractions(
                groups, DEFAULT_FRACTIONS if fractions is None else fractions, seed, self.name
            )
        if n_train is not None:
            if not 1 <= n_train <= len(split["train"]):
                raise InputError(
                    f"n_train is {n_train}; train has {len(split['train'])}: choose 1 to that many"
                )
            split["train"] = split["train"][:n_train]
        kept = {key: [pairs[stem] for stem in split[key]] for key in ordered(split)}
        for key, folder in (tests or {}).items():
            if key in kept:
                raise InputError(f"tests: {key!r} is the name of another split; choose another name")
            kept[key] = list(pair_files(folder).values())
        self._keep(kept)


class FolderDataset(Dataset[Sample]):
    """The decoded files of one split, held with 8 bits a value.

    Args:
        pairs: the files, in the order of the samples.
        form: how they become arrays.

    Raises:
        InputError: a file cannot be decoded, or does not fit its partner or the format.
    """

    def __init__(self, pairs: Sequence[Pair], form: Format) -> None:
        self._stems = [pair.stem for pair in pairs]
        with ThreadPoolExecutor() as pool:
            decoded = list(pool.map(lambda pair: _read(pair, form), pairs))
        self._images = [each.image for each in decoded]
        self._masks = [each.mask for each in decoded]
        _check_range(pairs, [each.depth for each in decoded])
        if form.threshold is not None:
            _check_threshold(pairs, [each.levels for each in decoded], form.threshold)

    @cached_property
    def prints(self) -> list[tuple[str, list[str]]]:
        """The stem and a fingerprint of every image."""
        found = (hashlib.sha1(image.tobytes()).hexdigest() for image in self._images)
        return [(stem, [each]) for stem, each in zip(self._stems, found, strict=True)]

    def __len__(self) -> int:
        return len(self._stems)

    def __getitem__(self, index: int) -> Sample:
        image = self._images[index].astype(np.float32) / np.float32(127.5) - np.float32(1)
        return {
            "image": torch.from_numpy(image),
            "mask": torch.from_numpy(self._masks[index].astype(np.int64)),
            "id": self._stems[index],
        }


def make_format(
    size: tuple[int, int],
    channels: int,
    class_names: tuple[str, ...],
    threshold: int | None,
    class_values: Sequence[int] | None,
) -> Format:
    """Check how files are to be read; ``class_values`` None means 0, 1, 2, …, as for the source.

    Raises:
        InputError: an argument is out of its range, or two contradict each other.
    """
    if min(size) < 1:
        raise InputError(f"size is {size}; height and width must be at least 1")
    if channels not in (1, 3):
        raise InputError(f"channels is {channels}; it is 1 for grey or 3 for RGB images")
    if not 2 <= len(class_names) <= 256:
        raise InputError(f"class_names has {len(class_names)} names; between 2 and 256 are possible")
    if threshold is not None and len(class_names) != 2:
        raise InputError(
            f"threshold {threshold} makes masks of 2 classes, but class_names has {len(class_names)}: "
            "set threshold to null where pixel values are classes"
        )
    if threshold is not None and class_values is not None:
        raise InputError("class_values and threshold exclude each other: set threshold to null")
    values = tuple(range(len(class_names)) if class_values is None else class_values)
    if len(values) != len(class_names) or len(set(values)) != len(values):
        raise InputError(
            f"class_values is {list(values)}; it must have one value, different from all others, for "
            f"each of the {len(class_names)} class_names"
        )
    return Format(size, channels, threshold, values)


# ----------------------------------------------------------------------------- pairs and splits


def expand(root: str) -> Path:
    """Fill in ``~`` and environment variables, such as ``${DATA_ROOT}/Kvasir-SEG``.

    Raises:
        InputError: a variable is not set.
    """
    path = os.path.expandvars(os.path.expanduser(root))
    if "$" in path:
        raise InputError(f"{root}: an environment variable in it is not set; set it, or write the path out")
    return Path(path)


def pair_files(folder: Folder) -> dict[str, Pair]:
    """Pair the files of a folder by stem, sorted by stem.

    Raises:
        InputError: a folder is absent or empty, two files share a stem, or a file has no partner.
    """
    root = expand(folder.root)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: check root")
    images = files_by_stem(root / folder.images, "images")
    masks = files_by_stem(root / folder.masks, "masks")
    paired = images.keys() & masks.keys()
    for files, other, kind in ((images, folder.masks, "mask"), (masks, folder.images, "image")):
        for stem in sorted(files.keys() - paired):
            alone = [path.name for path in (root / other).iterdir() if path.stem not in paired]
            near = similar(files[stem].name, alone)
            raise InputError(f"{files[stem]} has no {kind}: add {root / other / stem}.* or remove it{near}")
    return {stem: Pair(stem, images[stem], masks[stem]) for stem in sorted(images)}


def files_by_stem(folder: Path, argument: str) -> dict[str, Path]:
    """Return the image files of a folder by their names without ending.

    Raises:
        InputError: the folder is absent or has no images (``argument`` named it), or two share a stem.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: check the argument {argument}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in files:
            raise InputError(f"{files[path.stem]} and {path.name} have the same stem: rename or remove one")
        files[path.stem] = path
    if not files:
        raise InputError(f"{folder} has no images: files must end in {', '.join(SUFFIXES)}")
    return files


def _groups(pairs: Mapping[str, Pair], pattern: str | None) -> dict[str, str]:
    """Group of each stem; without a pattern every image is its own."""
    if pattern is None:
        return {stem: stem for stem in pairs}
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(f"group {pattern!r} is not a regular expression: {error}") from error
    if regex.groups != 1:
        raise InputError(f"group {pattern!r} has {regex.groups} groups in parentheses; it needs exactly one")
    groups = {}
    for stem, pair in pairs.items():
        found = regex.search(stem)
        if found is None or found[1] is None:
            raise InputError(f"{pair.image}: group {pattern!r} does not match the stem {stem!r}")
        groups[stem] = found[1]
    return groups


def _split_by_fractions(
    groups: Mapping[str, str], fractions: Mapping[str, float], seed: int, source: str
) -> dict[str, list[str]]:
    """Stems of each split; whole groups, in random order, go to the split that is the least full."""
    check_fractions(fractions)
    members: dict[str, list[str]] = {}
    for stem in sorted(groups):
        members.setdefault(groups[stem], []).append(stem)
    order = shuffled(members, seed)

    names = ordered(fractions)
    ends = np.rint(np.cumsum([fractions[name] for name in names]) * len(groups))
    wanted = dict(zip(names, np.diff(ends, prepend=0), strict=True))
    split: dict[str, list[str]] = {name: [] for name in names}
    for key in order:
        open_splits = [name for name in names if len(split[name]) < wanted[name]]
        if not open_splits:
            break
        emptiest = min(open_splits, key=lambda name: len(split[name]) / wanted[name])
        split[emptiest] += members[key]
    for name in names:
        if not split[name]:
            raise InputError(
                f"fractions: no image of {source} falls to {name} ({len(groups)} images in {len(members)} "
                "groups): raise its fraction, change seed, or add images"
            )
    return split


def _split_by_lists(
    pairs: Mapping[str, Pair], groups: Mapping[str, str], lists: Mapping[str, Path]
) -> dict[str, list[str]]:
    check_names(lists, "lists")
    split = {name: _read_list(path, pairs) for name, path in lists.items()}
    listed: dict[str, str] = {}
    owner: dict[str, tuple[str, str]] = {}
    for name, stems in split.items():
        for stem in stems:
            if stem in listed:
                raise InputError(f"{lists[name]}: {stem!r} is in {lists[listed[stem]]} already: keep it once")
            listed[stem] = name
            previous, first = owner.setdefault(groups[stem], (name, stem))
            if previous != name:
                raise InputError(
                    f"{lists[name]}: {stem!r} is of the same group {groups[stem]!r} as {first!r} in "
                    f"{lists[previous]}: keep a group in one list"
                )
    return split


def _read_list(path: Path, pairs: Mapping[str, Pair]) -> list[str]:
    """Stems of a list file; the suffix of an image file is allowed behind a stem."""
    stems = [line[: -len(Path(line).suffix)] if _is_file_name(line) else line for line in read_lines(path)]
    if not stems:
        raise InputError(f"{path} is empty: write one stem a line")
    for stem in stems:
        if stem not in pairs:
            raise InputError(f"{path}: no image has the stem {stem!r}: remove the line or add the image")
    return stems


def _is_file_name(line: str) -> bool:
    return Path(line).suffix.lower() in SUFFIXES


# ------------------------------------------------------------------------------------- decoding


def open_image(path: Path) -> Image.Image:
    """Return a decoded image file, upright as its EXIF tag says and viewers show it.

    Raises:
        InputError: it cannot be decoded, or has several pages.
    """
    with decoding(path), Image.open(path) as file:
        if (pages := getattr(file, "n_frames", 1)) > 1:
            raise InputError(f"{path} has {pages} pages: save each as a file of its own")
        file.load()
        return ImageOps.exif_transpose(file)


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Raise an InputError in place of what Pillow raises while it decodes a file."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be decoded ({error}): replace the file") from error


class _Decoded(NamedTuple):
    """A pair of files.

    Attributes:
        image: uint8 ``(C, H, W)``.
        mask: class map, uint8 ``(H, W)``.
        levels: the largest values of the mask's file, up to three.
        depth: the largest value of an image of 16 bits; None of one of 8.
    """

    image: Bytes
    mask: Bytes
    levels: tuple[int, ...]
    depth: int | None


def _read(pair: Pair, form: Format) -> _Decoded:
    image, mask = open_image(pair.image), open_image(pair.mask)
    if image.size != mask.size:
        raise InputError(
            f"{pair.mask} is {mask.height} × {mask.width} but its image {pair.image.name} is "
            f"{image.height} × {image.width}: they must have the same size"
        )
    levels = _levels(pair.mask, mask, indexed=form.threshold is None)
    if form.threshold is None:
        classes = _classes(pair.mask, levels, form.values)
    else:
        classes = (levels > form.threshold).astype(np.uint8)
        if form.needs_object and not classes.any():
            raise InputError(
                f"{pair.mask} is empty: no pixel is above threshold {form.threshold}, the largest value "
                f"is {levels.max()}: correct the mask, remove the pair, or set allow_empty"
            )
    resized = Image.fromarray(classes).resize(form.size[::-1], Image.Resampling.NEAREST)
    depth = int(np.asarray(image).max()) if image.mode in _GREY_16_BIT else None
    largest = tuple(np.unique(levels)[-3:].tolist())
    return _Decoded(to_levels(pair.image, image, form), np.asarray(resized), largest, depth)


def to_levels(path: Path, image: Image.Image, form: Format) -> Bytes:
    """Convert to 8 bits and the wanted channels, and resize: ``(C, H, W)``."""
    if image.mode in _GREY_16_BIT:
        image = Image.fromarray(_grey_16_bit(path, image).astype(np.float32) / 257)
    elif image.mode == "F":
        raise InputError(f"{path} has floating-point pixels: save it with 8 or 16 bits")
    else:
        image = image.convert("RGB" if form.channels == 3 else "L")
    pixels = np.asarray(image.resize(form.size[::-1], Image.Resampling.BILINEAR))
    levels = np.rint(pixels).astype(np.uint8)
    if levels.ndim == 2:
        levels = np.repeat(levels[..., None], form.channels, axis=2)
    return np.ascontiguousarray(levels.transpose(2, 0, 1))


def _grey_16_bit(path: Path, image: Image.Image) -> NDArray[np.int64]:
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise InputError(f"{path} has values outside 0 to 65535: save it with 8 or 16 bits")
    return levels


def _levels(path: Path, mask: Image.Image, indexed: bool) -> NDArray[np.int64]:
    """Pixel values of a mask ``(H, W)``; ``indexed`` keeps palette indices and refuses colours."""
    if mask.mode in _GREY_16_BIT:
        return _grey_16_bit(path, mask)
    if mask.mode == "F":
        raise InputError(f"{path} has floating-point pixels: save the mask with 8 or 16 bits")
    if not indexed:
        return np.asarray(mask.convert("L")).astype(np.int64)
    if mask.mode in ("1", "L", "P"):
        return np.asarray(mask).astype(np.int64)
    colours = np.asarray(mask.convert("RGB")).astype(np.int64)
    if (colours != colours[..., :1]).any():
        raise InputError(f"{path} is a colour image: save the mask as grey values, one for each class")
    return colours[..., 0]


def _classes(path: Path, levels: NDArray[np.int64], values: tuple[int, ...]) -> Bytes:
    classes, unknown = lookup(levels, {value: k for k, value in enumerate(values)})
    if unknown.size:
        shown = ", ".join(str(value) for value in unknown[:8]) + (", …" if unknown.size > 8 else "")
        raise InputError(
            f"{path} has the label {shown}, which is no class: the classes have the values "
            f"{', '.join(map(str, values))}; set class_names and class_values, or correct the mask"
        )
    return classes


def _check_range(pairs: Sequence[Pair], depths: Sequence[int | None]) -> None:
    """Refuse images of 12 bits, say, in files of 16: they are scaled by the range of the file."""
    deep = [(depth, pair) for depth, pair in zip(depths, pairs, strict=True) if depth is not None]
    highest, pair = max(deep, key=lambda each: each[0], default=(65535, None))
    if pair is not None and highest < 16384:
        raise InputError(
            f"{pair.image} goes up to {highest} of 65535, and no image of 16 bits of the split goes further: "
            "they would be nearly black; save them with the whole range, or with 8 bits"
        )


_FEW_LEVELS = 8
"""Values in all masks of a split together, up to which they are classes rather: soft borders have more."""


def _check_threshold(pairs: Sequence[Pair], values: Sequence[tuple[int, ...]], threshold: int) -> None:
    """Refuse a split without any foreground, and a mask of 0 and 1, say, among others of 0 and 255."""
    brightest = max(range(len(values)), key=lambda i: values[i][-1])
    peak = values[brightest][-1]
    if peak <= threshold:
        raise InputError(
            f"{pairs[brightest].mask}: no pixel is above threshold {threshold}, here or in any other mask "
            f"of the split; the largest value is {peak}: set threshold below it"
        )
    for pair, found in zip(pairs, values, strict=True):
        if len(found) == 2 and found[0] == 0 and found[1] <= threshold:  # noise has more values
            raise InputError(
                f"{pair.mask} is 0 and {found[1]}, {pairs[brightest].mask} goes up to {peak}: above "
                f"threshold {threshold} the first has no object; save both alike, or set threshold below "
                f"{found[1]}"
            )
    levels = sorted({level for found in values for level in found})
    if 2 < len(levels) <= _FEW_LEVELS:
        warnings.warn(
            f"{pairs[brightest].mask} and the other masks have the values {', '.join(map(str, levels))}, and "
            f"threshold {threshold} makes two classes of them; for a class each, set threshold to null and "
            "class_names and class_values to match",
            stacklevel=2,
        )
