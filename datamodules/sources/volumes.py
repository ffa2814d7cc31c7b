"""Data sets of volumes as sources of their slices."""

import re
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from datamodules.sources.folder import DEFAULT_FRACTIONS, expand
from datamodules.sources.intensity import Intensity
from datamodules.sources.labels import LabelMap
from datamodules.sources.listing import shown, similar
from datamodules.sources.source import Sample, Source, Volume
from datamodules.sources.splits import (
    LEARNT,
    Case,
    Part,
    Split,
    check_cases,
    check_content,
    check_copies,
    check_files,
    check_numbers,
    check_patients,
    ordered,
    shuffled,
    split_by_fractions,
    split_by_lists,
    split_off,
)
from datamodules.sources.volume_cache import LEVELS, Slices, cached, default_folder, resize
from datamodules.sources.volume_files import (
    Keys,
    Plane,
    Raw,
    Spacing,
    check_image,
    check_label,
    check_shapes,
    check_slices_first,
    check_spacing,
    read_h5,
    read_nifti,
    read_npz,
    read_slices,
)
from errors import InputError

READERS = 2
"""Volumes that are read at once; a large CT takes about 1 GB while it is read."""


@dataclass(frozen=True)
class Form:
    """One way in which a data set lies on disk.

    Attributes:
        name: of the form.
        layout: what its folder looks like, for messages.
        find: the cases below a folder; none where the folder is not of this form.
        read: reads a case.
        labels: the classes of its label values.
        intensity: the rule for its grey values.
        options: all else that the result of ``read`` depends on.
    """

    name: str
    layout: str
    find: Callable[[Path], list[Case]]
    read: Callable[[Case], Raw]
    labels: LabelMap
    intensity: Intensity
    options: str = ""


@dataclass(frozen=True)
class VolumeTest:
    """A further test set.

    Attributes:
        root: its folder; None takes the patients of the set itself that are in neither train nor val.
        form: its form on disk; None detects it.
        cases: names of the patients or cases to take; None takes all.
        spacing: as in :class:`VolumeSource`, for this set.
        other_patients: its patients are none of the set's, although they have the same names.
    """

    root: str | None = None
    form: str | None = None
    cases: Sequence[str] | None = None
    spacing: tuple[float, float, float] | None = None
    other_patients: bool = False


@dataclass(frozen=True)
class _Item:
    """A part of a case, its form, and the spacing that was given for it."""

    part: Part
    form: Form
    spacing: Spacing | None


class VolumeSource(Source):
    """The slices of a data set of volumes, in splits by patient.

    Images are float32 ``(C, H, W)`` in [−1, 1], masks int64 ``(H, W)``. Every volume is read once, scaled by
    the rule of its data set, resized (images bilinearly with antialiasing, masks to the nearest neighbour)
    and kept on disk with 16 bits a value, from where slices are memory-mapped. The constructor only lists
    files and splits them. The first ``dataset(split)`` reads and checks the files of all splits, and raises
    if an image of train or val, or nearly such a volume, is in another split too.

    Args:
        root: folder of the data set; ``~`` and environment variables are filled in.
        name: name of the set in reports.
        form: form on disk; None detects it from what lies in ``root``.
        size: height and width (H, W) of the slices in pixels; one number makes them square.
        channels: 1, or 3 to repeat the grey values.
        split: ``random`` deals patients to splits by ``fractions``; ``published`` takes the split that the
            set was published with, and where that has no val, the share ``fractions`` has for it of the
            patients for training.
        fractions: share of the patients of each split, ``train`` and ``val`` among them, all other
            names being test sets. None is 0.7 train, 0.1 val, 0.2 test.
        lists: instead of both, a text file for each split, its path relative to ``root``; a line names a
            patient, a case or a slice.
        tests: further test sets by name.
        n_train: keep only so many patients of ``train``, drawn at random; larger numbers keep the same ones
            and add to them. None keeps all.
        drop_empty: leave slices without any labelled pixel out of ``train``.
        plane: plane of the slices of NIfTI files, ``stored`` being their third axis; None is that of the set.
        spacing: size of a voxel in mm along (slices, rows, columns) for forms that do not tell it; None
            leaves it unknown there.
        check_affines: refuse NIfTI labels whose header places them elsewhere than the image; False trusts the
            header of the image.
        rescale: apply the rule for raw files to the values of prepared forms too.
        cache: folder for the resized slices; None is ``native-adversarial-synthesis`` in ``$XDG_CACHE_HOME``
            or ``~/.cache``. It may be deleted at any time when no run uses it.
        seed: of the random splits.

    Raises:
        InputError: an argument is out of its range, the folder fits no form or several, files are missing, or
            the split is impossible or puts a patient into two splits.
    """

    default_plane: Plane = "axial"
    title: str = "this data set"

    def __init__(
        self,
        root: str,
        name: str | None = None,
        form: str | None = None,
        size: tuple[int, int] | int = 256,
        channels: Literal[1, 3] = 1,
        split: Literal["random", "published"] = "random",
        fractions: Mapping[str, float] | None = None,
        lists: Mapping[str, str] | None = None,
        tests: Mapping[str, VolumeTest] | None = None,
        n_train: int | None = None,
        drop_empty: bool = False,
        plane: Plane | None = None,
        spacing: tuple[float, float, float] | None = None,
        check_affines: bool = True,
        rescale: bool = False,
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        self.root = expand(root)
        self.name = self.root.resolve().name if name is None else name
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.channels = channels
        self.plane: Plane = self.default_plane if plane is None else plane
        self.check_affines = check_affines
        self.rescale = rescale
        self.seed = seed
        self.fractions = dict(DEFAULT_FRACTIONS if fractions is None else fractions)
        self._cache = default_folder() if cache is None else expand(cache)
        self._drop_empty = drop_empty
        self._check_arguments(split, lists, n_train)

        self.form, found = self._locate(self.root, self._forms(None), form)
        cases = self._usable(found)
        if lists is not None:
            parts = split_by_lists(cases, {key: self.root / lists[key] for key in lists})
        elif split == "published":
            parts = self._published(cases)
        else:
            parts = split_by_fractions(cases, self.fractions, seed, self.name)
        check_patients(parts)
        learnt = {key: parts[key] for key in LEARNT}
        if n_train is not None:
            parts["train"] = _few(parts["train"], n_train, seed)
        given = None if spacing is None else check_spacing(spacing, "spacing")
        self._items = {key: [_Item(part, self.form, given) for part in parts[key]] for key in ordered(parts)}
        owners = {_owner(part.case) for each in learnt.values() for part in each}
        left = [case for case in found if _owner(case) not in owners]
        for key, test in (tests or {}).items():
            if key in self._items:
                raise InputError(f"tests: {key!r} is the name of another split; choose another name")
            self._items[key] = self._test(key, test, left, given)
            if not test.other_patients:
                hint = ", or set other_patients for the test set if these are others of the same names"
                check_patients(learnt | {key: [item.part for item in self._items[key]]}, hint)
        self.splits = tuple(self._items)
        self._datasets: dict[str, _SliceDataset] = {}

    @abstractmethod
    def _forms(self, test: VolumeTest | None) -> Sequence[Form]:
        """Return the forms that the set itself (None) or a test set may have on disk."""

    def _elsewhere(self, test: VolumeTest) -> Path | None:
        """Return the folder of a test set; None where it is made of the patients that are left."""
        return None if test.root is None else expand(test.root)

    def _usable(self, cases: Sequence[Case]) -> list[Case]:
        """Return the cases that the splits are made of; the others are left to ``tests``."""
        return list(cases)

    def _published(self, cases: Sequence[Case]) -> Split:
        """Return the published split; by default that of the sides on which the cases were found."""
        sides: dict[str, list[Case]] = {}
        for case in cases:
            sides.setdefault(case.side or "", []).append(case)
        return self._with_val(sides)

    def _with_val(self, sides: Mapping[str, list[Case]]) -> Split:
        """Return a split of which val, where there is none, is taken from train."""
        if not sides.get("train") or not sides.get("test"):
            raise InputError(
                f"{self.root}: no published split can be told from this form ({self.form.name}): set split "
                "to random, or give lists"
            )
        named = dict(sides)
        if not named.get("val"):
            share = self.fractions.get("val", DEFAULT_FRACTIONS["val"])
            named["train"], named["val"] = split_off(named["train"], share, self.seed, self.name)
        return {key: [Part(case) for case in named[key]] for key in ordered(named)}

    def _select(self, test: VolumeTest, cases: Sequence[Case], where: str) -> list[Case]:
        """Return the cases of a test set; every name in ``test.cases`` must be found."""
        if test.cases is None:
            return list(cases)
        known = {case.id for case in cases} | {case.patient for case in cases}
        for name in test.cases:
            if name not in known:
                raise InputError(f"{where}: no case or patient is named {name!r}, or it is in train or val")
        return [case for case in cases if case.id in test.cases or case.patient in test.cases]

    def _test(self, key: str, test: VolumeTest, left: Sequence[Case], spacing: Spacing | None) -> list[_Item]:
        form, cases, where = self.form, list(left), f"tests: {key}"
        root = self._elsewhere(test)
        if root is not None:
            form, cases = self._locate(root, self._forms(test), test.form, f"{where}: ")
            spacing = None
        elif test.form is not None:
            raise InputError(f"{where}: form is given without root; give both")
        if test.spacing is not None:
            spacing = check_spacing(test.spacing, where)
        chosen = self._select(test, cases, where)
        if not chosen:
            raise InputError(f"{where}: no case is left for it; it takes those in neither train nor val")
        return [_Item(Part(case), form, spacing) for case in chosen]

    def _remedy(self, root: Path) -> str:
        """Return what to do about a folder that fits no form, where that can be told; else nothing."""
        return ""

    def _locate(
        self, root: Path, forms: Sequence[Form], wanted: str | None, where: str = ""
    ) -> tuple[Form, list[Case]]:
        """Return the form of a folder and its cases, or raise an InputError that shows what lies there."""
        if not root.is_dir():
            raise InputError(f"{root} is not a folder: check root")
        if wanted is not None and wanted not in [form.name for form in forms]:
            raise InputError(
                f"form is {wanted!r}; those of {self.title} are {', '.join(f.name for f in forms)}"
            )
        found = {form.name: form.find(root) for form in forms if wanted in (None, form.name)}
        fitting = [form for form in forms if found.get(form.name)]
        if not fitting:
            known = "; ".join(f"{form.name}: {form.layout}" for form in forms if wanted in (None, form.name))
            raise InputError(
                f"{where}{root} fits no form of {self.title}. Known forms: {known}. It holds "
                f"{shown(root)}{self._remedy(root)}"
            )
        if len(fitting) > 1:
            raise InputError(
                f"{root} holds several forms of {self.title}, {' and '.join(form.name for form in fitting)}: "
                "set form to one of them"
            )
        cases = sorted(found[fitting[0].name], key=lambda case: case.id)
        check_files(cases)
        check_cases(cases)
        check_numbers(cases)
        return fitting[0], cases

    def _check_arguments(self, split: str, lists: Mapping[str, str] | None, n_train: int | None) -> None:
        if min(self.size) < 1:
            raise InputError(f"size is {self.size}; height and width must be at least 1")
        if self.channels not in (1, 3):
            raise InputError(f"channels is {self.channels}; it is 1, or 3 to repeat the grey values")
        if lists is not None and split == "published":
            raise InputError("split is published and lists are given: set one of the two")
        if n_train is not None and n_train < 1:
            raise InputError(f"n_train is {n_train}; it is a number of patients, at least 1")

    # ------------------------------------------------------------------------------- reading

    def files(self) -> dict[str, list[Path]]:
        """See :meth:`Source.files`."""
        return {
            name: [file for item in items for file in (*item.part.case.images, *item.part.case.labels)]
            for name, items in self._items.items()
        }

    def _dataset(self, split: str) -> Dataset[Sample]:
        return self._slices(split)

    def _slices(self, split: str) -> "_SliceDataset":
        if not self._datasets:
            self._datasets = self._read()
        return self._datasets[split]

    def _read(self) -> dict[str, "_SliceDataset"]:
        items = [item for each in self._items.values() for item in each]
        jobs = {_key(item): item for item in items}
        with ThreadPoolExecutor(READERS) as pool:
            work = pool.map(self._load, jobs.values())
            done = tqdm(work, f"reading {self.name}", len(jobs), disable=None, leave=False)
            loaded = dict(zip(jobs, done, strict=True))
        content = {
            key: [(item.part.case.id, loaded[_key(item)].prints) for item in each]
            for key, each in self._items.items()
        }
        check_content(content)
        looks = {
            key: [(item.part.case.id, loaded[_key(item)].looks) for item in each if item.part.case.ordered]
            for key, each in self._items.items()
        }
        check_copies(looks)
        return {
            key: _SliceDataset(
                [(item.part, loaded[_key(item)]) for item in each],
                self.channels,
                drop_empty=self._drop_empty and key == "train",
            )
            for key, each in self._items.items()
        }

    def _load(self, item: _Item) -> Slices:
        case, form = item.part.case, item.form
        options = (
            self.size,
            form.name,
            form.options,
            form.labels,
            form.intensity,
            item.spacing,
            case.numbers,
            self.check_affines,
        )
        files = [*case.images, *case.labels]
        return cached(self._cache, files, repr(options), partial(_make, item, self.size))

    def volume(self, split: str, index: int) -> Volume | None:
        """Return where sample ``index`` of a split lies in its case, or None for a pile without order."""
        self.dataset(split)
        return self._slices(split).volume(index)


class _SliceDataset(Dataset[Sample]):
    """The slices of one split, case by case."""

    def __init__(self, parts: Sequence[tuple[Part, Slices]], channels: int, drop_empty: bool) -> None:
        self._parts = list(parts)
        self._channels = channels
        self._positions = [_positions(part, slices, drop_empty) for part, slices in parts]
        self._index = [(k, n) for k, positions in enumerate(self._positions) for n in range(len(positions))]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        k, n = self._index[index]
        part, slices = self._parts[k]
        position = self._positions[k][n]
        image = slices.image[position].astype(np.float32) / np.float32(LEVELS / 2) - np.float32(1)
        number = position if part.case.numbers is None else part.case.numbers[position]
        return {
            "image": torch.from_numpy(np.repeat(image[None], self._channels, axis=0)),
            "mask": torch.from_numpy(slices.mask[position].astype(np.int64)),
            "id": f"{part.case.id}_slice_{number:03d}",
        }

    def volume(self, index: int) -> Volume | None:
        k, n = self._index[index]
        part, slices = self._parts[k]
        if not part.case.ordered:
            return None
        return Volume(part.case.id, n, len(self._positions[k]), slices.spacing)


def _key(item: _Item) -> tuple[Hashable, ...]:
    """Return what tells apart what is read: the same images may have the labels of two readers."""
    case, form = item.part.case, item.form
    return case.images, case.labels, case.numbers, form.name, form.labels, item.spacing


def _make(item: _Item, size: tuple[int, int]) -> Slices:
    case, form = item.part.case, item.form
    raw = form.read(case)
    if case.numbers is not None and len(case.numbers) != len(raw.image):
        raise InputError(
            f"{case.images[0]} has {len(raw.image)} slices, but there are {len(case.numbers)} files of "
            f"single slices for {case.id}: a slice is missing"
        )
    image = form.intensity.apply(raw.image, case.images[0])
    classes = form.labels.apply(raw.label, (case.labels or case.images)[0])
    return resize(image, classes, item.spacing if raw.spacing is None else raw.spacing, size)


def _positions(part: Part, slices: Slices, drop_empty: bool) -> list[int]:
    count = len(slices.image)
    positions = list(range(count))
    if part.numbers is not None:
        numbers = part.case.numbers or tuple(range(count))
        for number in part.numbers:
            if number not in numbers:
                raise InputError(
                    f"{part.case.images[0]}: a list names slice {number} of {part.case.id}, which has the "
                    f"slices {min(numbers)} to {max(numbers)}: correct the list"
                )
        positions = sorted(numbers.index(number) for number in part.numbers)
    return [k for k in positions if slices.mask[k].any()] if drop_empty else positions


def _few(parts: Sequence[Part], count: int, seed: int) -> list[Part]:
    patients = {_owner(part.case) for part in parts}
    if count > len(patients):
        raise InputError(f"n_train is {count}; train has {len(patients)} patients: choose 1 to that many")
    kept = set(shuffled(patients, seed)[:count])
    return [part for part in parts if _owner(part.case) in kept]


def _owner(case: Case) -> str:
    return case.patient or case.id


# ------------------------------------------------------------------------- what forms are made of


def match_files(folder: Path, pattern: str, suffixes: tuple[str, ...]) -> list[tuple[re.Match[str], Path]]:
    """Return the files of a folder whose names end in one of the suffixes, each with its match.

    A folder that is not there has none. Hidden files are left out.

    Raises:
        InputError: the name of such a file does not match.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(suffixes):
            continue
        match = re.fullmatch(pattern, path.name)
        if match is None:
            raise InputError(f"{path}: the name is not of the form {pattern!r}: rename or move the file")
        found.append((match, path))
    return found


def check_unknown(path: Path, begin: str, form: str) -> None:
    """Raise an InputError if a NIfTI file begins like those of a set, but its name is not of the form."""
    name = path.name.lower()
    if name.startswith(begin) and name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: the name is not of the form {form}: rename or move the file")


def read_nifti_case(case: Case, plane: Plane, check_affines: bool, slices_first: bool = False) -> Raw:
    """Read a case of two NIfTI files; ``slices_first`` refuses swapped axes."""
    raw = read_nifti(case.images[0], case.labels[0], plane, check_affines)
    if slices_first:
        check_slices_first(raw.image.shape, case.images[0])
    return raw


def read_array_case(case: Case, keys: Sequence[Keys]) -> Raw:
    """Read a case of one HDF5 or npz file with axes (D, H, W), or of one file for each slice."""

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        return (read_npz if path.suffix == ".npz" else read_h5)(path, keys)

    first = case.images[0]
    image, label = read(first)
    if image.ndim == 2:
        image, label = read_slices(case.images, read)
    check_shapes(image.shape, label.shape, first, first)
    pixels = check_image(image, first)
    check_slices_first(pixels.shape, first)
    return Raw(pixels, check_label(label, first), None)


def array_cases(
    volumes: Sequence[tuple[re.Match[str], Path]],
    slices: Sequence[tuple[re.Match[str], Path]],
    patient: Callable[[str], str],
    sides: tuple[str | None, str | None] = (None, None),
) -> list[Case]:
    """Return the cases of files of whole volumes and of slices; where there are both, volumes are read.

    Args:
        volumes: matches with the case as group 1.
        slices: matches with the case as group 1 and the number of the slice as group 2.
        patient: of the name of a case.
        sides: that volumes and slices were published in; where they differ, a case may not be in both.
    """
    piles: dict[str, list[tuple[int, Path]]] = {}
    for match, path in slices:
        piles.setdefault(match[1], []).append((int(match[2]), path))
    whole = {match[1]: path for match, path in volumes}
    cases = []
    for name in sorted(whole.keys() | piles.keys()):
        pile = sorted(piles.get(name, []))
        numbers = tuple(number for number, _ in pile) or None
        if name in whole and pile and sides[0] != sides[1]:
            raise InputError(
                f"{whole[name]} and {pile[0][1]} have one id, {name}, in two published parts: rename or "
                "remove one"
            )
        files = (whole[name],) if name in whole else tuple(path for _, path in pile)
        side = sides[0] if name in whole else sides[1]
        cases.append(Case(name, patient(name), files, numbers=numbers, side=side))
    return cases


def pair_cases(
    files: Sequence[tuple[str, str, Path]], patient: Callable[[str], str], side: str | None = None
) -> list[Case]:
    """Pair files, each given as (case, ``image`` or ``label``, path).

    Raises:
        InputError: an image has no label or the reverse, or two files are the same part of one case.
    """
    found: dict[str, dict[str, Path]] = {}
    for case, kind, path in files:
        other = found.setdefault(case, {}).setdefault(kind, path)
        if other != path:
            raise InputError(f"{path} and {other} have one id, {case}: rename or remove one of them")
    alone = [
        (case, kind, path) for case, both in found.items() if len(both) == 1 for kind, path in both.items()
    ]
    for case, kind, path in sorted(alone):
        wanted = "label" if kind == "image" else "image"
        others = [other.name for name, _, other in alone if name != case]
        raise InputError(
            f"{path} has no {wanted}: add its {wanted} file, or remove it{similar(path.name, others)}"
        )
    return [
        Case(case, patient(case), (found[case]["image"],), (found[case]["label"],), side=side)
        for case in sorted(found)
    ]
