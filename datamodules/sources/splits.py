"""Cases and how they fall to splits: by patient, or by lists; and what must not happen."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.sources.listing import read_lines
from errors import InputError

LEARNT = ("train", "val")
"""Splits that something is learnt or chosen on; nothing in them may be in another split."""
COPY = 0.999
"""Correlation of two slices above which one is a copy; slices of different patients stay far below."""

_SUFFIXES = re.compile(r"\.(npy\.h5|h5|hdf5|npz|npy|nii\.gz|nii)$")
_SLICE = re.compile(r"^(.+?)_?slice_?(\d+)$")


@dataclass(frozen=True)
class Case:
    """One volume, or one pile of slices, as it lies on disk.

    Attributes:
        id: name, unique within a set.
        patient: whose it is; None where the files do not tell.
        images: its files: one volume, or a file a slice in order.
        labels: files of the labels; empty where they are in the image files.
        numbers: number of each slice in the names of the files; None counts from 0.
        side: split that it was published in, where there is one.
        info: what the files tell about the patient.
        ordered: whether the slices make up a volume.
    """

    id: str
    patient: str | None
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    numbers: tuple[int, ...] | None = None
    side: str | None = None
    info: Mapping[str, str] = field(default_factory=dict, hash=False)
    ordered: bool = True


@dataclass(frozen=True)
class Part:
    """A case in a split; ``numbers`` are the slices taken, None all of them."""

    case: Case
    numbers: tuple[int, ...] | None = None


Split = dict[str, list[Part]]


def ordered(names: Iterable[str]) -> list[str]:
    """Return train, val, and then the test sets as given."""
    return [*LEARNT, *(name for name in names if name not in LEARNT)]


def check_names(names: Iterable[str], argument: str) -> None:
    """Raise an InputError unless both train and val are there."""
    given = list(names)
    missing = [name for name in LEARNT if name not in given]
    if missing:
        raise InputError(f"{argument} has no {' and no '.join(missing)}: both train and val must be given")


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raise an InputError unless train and val are there, every share is one, and the sum is at most 1."""
    check_names(fractions, "fractions")
    for name, share in fractions.items():
        if not 0 < share <= 1:
            raise InputError(f"fractions: {name} is {share}; it must be above 0 and at most 1")
    if sum(fractions.values()) > 1 + 1e-9:
        raise InputError(f"fractions sum to {sum(fractions.values()):g}; the sum must be at most 1")


def check_files(cases: Sequence[Case]) -> None:
    """Raise an InputError if what has the name of a file is a folder, or a link to nothing."""
    for case in cases:
        for path in (*case.images, *case.labels):
            if not path.is_file():
                what = "a link to nothing" if path.is_symlink() else "no file"
                raise InputError(f"{path} is {what}: put the file there, or remove it with its case")


def check_cases(cases: Sequence[Case]) -> None:
    """Raise an InputError if two cases have one id, or one patient was published on two sides."""
    by_id: dict[str, Case] = {}
    by_patient: dict[str, Case] = {}
    for case in cases:
        other = by_id.setdefault(case.id, case)
        if other is not case:
            raise InputError(
                f"{case.images[0]} and {other.images[0]} have one id, {case.id}: rename or remove one of them"
            )
        if case.patient is None:
            continue
        other = by_patient.setdefault(case.patient, case)
        if other.side != case.side:
            raise InputError(
                f"{case.images[0]} and {other.images[0]} are of one patient, {case.patient}, in two "
                "published parts: rename or remove one of them"
            )


def check_numbers(cases: Sequence[Case]) -> None:
    """Raise an InputError if a slice is missing between the first and the last of a case."""
    numbered = [case for case in cases if case.ordered and case.numbers]
    start = min((min(case.numbers or ()) for case in numbered), default=0)
    for case in numbered:
        numbers = case.numbers or ()
        missing = sorted(set(range(start, max(numbers) + 1)) - set(numbers))
        if missing:
            raise InputError(
                f"{case.images[0].parent}: {case.id} has {len(numbers)} slices up to number {max(numbers)}, "
                f"but none with the number {missing[0]}: add the missing slice, or remove the case"
            )


def patients_of(cases: Iterable[Case], why: str) -> dict[str, list[Case]]:
    """Return the cases of each patient; an InputError where the files do not name the patients."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        if case.patient is None:
            raise InputError(f"{case.images[0]}: its name tells no patient, so {why} would mix patients")
        found.setdefault(case.patient, []).append(case)
    return found


def split_by_fractions(
    cases: Sequence[Case], fractions: Mapping[str, float], seed: int, source: str
) -> Split:
    """Deal whole patients, in random order, to splits; it does not depend on the order of the cases.

    Args:
        cases: all cases.
        fractions: share of the patients of each split; a sum below 1 leaves patients out.
        seed: of the order.
        source: name of the set, for messages.

    Raises:
        InputError: the fractions make no sense, leave a split without a patient, or patients are unknown.
    """
    check_fractions(fractions)
    members = patients_of(cases, "a split by fractions")
    order = shuffled(members, seed)
    names = ordered(fractions)
    ends = np.rint(np.cumsum([0, *(fractions[name] for name in names)]) * len(order)).astype(int)
    split: Split = {}
    for name, start, end in zip(names, ends[:-1], ends[1:], strict=True):
        if start == end:
            raise InputError(
                f"fractions: no patient of {source} falls to {name} ({len(order)} patients): raise its "
                "fraction, or add patients"
            )
        split[name] = [Part(case) for patient in order[start:end] for case in members[patient]]
    return split


def split_off(cases: Sequence[Case], share: float, seed: int, source: str) -> tuple[list[Case], list[Case]]:
    """Return (the rest, about ``share`` of the patients but at least one), drawn at random."""
    members = patients_of(cases, "a validation split")
    if len(members) < 2:
        raise InputError(f"{source}: {len(members)} patients are too few for both train and val")
    order = shuffled(members, seed)
    taken = set(order[: max(1, round(share * len(order)))])
    rest = [case for patient in order if patient not in taken for case in members[patient]]
    return rest, [case for patient in order if patient in taken for case in members[patient]]


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Return the names in an order that depends on the seed alone."""
    if seed < 0:
        raise InputError(f"seed is {seed}; it must be at least 0")
    keys = sorted(names)
    return [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]


def split_by_lists(cases: Sequence[Case], lists: Mapping[str, Path]) -> Split:
    """Read a text file for each split; a line names a patient, a case, or a slice of a case.

    Suffixes of files and folders before the name are allowed. Cases in no list are left out.

    Raises:
        InputError: a list is missing or empty, a line is unknown or given twice.
    """
    check_names(lists, "lists")
    known: dict[str, list[Case]] = {}
    for case in cases:
        for key in {case.id, case.patient} - {None}:
            known.setdefault(str(key), []).append(case)
    return {name: _read_list(lists[name], known) for name in ordered(lists)}


def _read_list(path: Path, known: Mapping[str, list[Case]]) -> list[Part]:
    taken: dict[str, tuple[Case, list[int] | None]] = {}
    for line in read_lines(path):
        name = _SUFFIXES.sub("", line.replace("\\", "/").rsplit("/", 1)[-1])
        found = _SLICE.match(name)
        if name in known:
            for case in known[name]:
                if case.id in taken:
                    raise InputError(f"{path}: {line!r} is in the list already: keep it once")
                taken[case.id] = (case, None)
        elif found and found[1].rstrip("_") in known:
            case = known[found[1].rstrip("_")][0]
            numbers = taken.setdefault(case.id, (case, []))[1]
            if numbers is None or int(found[2]) in numbers:
                raise InputError(f"{path}: {line!r} is in the list already: keep it once")
            numbers.append(int(found[2]))
        else:
            raise InputError(f"{path}: no case is named {line!r}: remove the line or add the files")
    if not taken:
        raise InputError(f"{path} is empty: write one case a line")
    return [Part(case, None if numbers is None else tuple(numbers)) for case, numbers in taken.values()]


def check_patients(split: Mapping[str, Sequence[Part]], hint: str = "") -> None:
    """Raise an InputError that ends in a hint if a patient is in train or val and in another split too."""
    owners: dict[str, tuple[str, str]] = {}
    for name in ordered(split):
        for part in split[name]:
            patient = part.case.patient
            if patient is None:
                continue
            owner, first = owners.setdefault(patient, (name, part.case.id))
            if owner != name and owner in LEARNT:
                raise InputError(
                    f"leakage: patient {patient} is in {owner} ({first}) and in {name} ({part.case.id}): "
                    f"keep a patient in one split{hint}"
                )


def check_content(content: Mapping[str, Sequence[tuple[str, Sequence[str]]]]) -> None:
    """Raise an InputError if an image of train or val is in another split too, whatever its name.

    Args:
        content: for each split the ids of its cases and the fingerprints of their slices.
    """
    owners: dict[str, tuple[str, str]] = {}
    for name in ordered(content):
        for case, prints in content[name]:
            for each in prints:
                owner, first = owners.setdefault(each, (name, case))
                if owner != name and owner in LEARNT:
                    raise InputError(
                        f"leakage: an image of {case} in {name} is the same as one of {first} in {owner}: "
                        "remove one of the two"
                    )


def check_copies(content: Mapping[str, Sequence[tuple[str, NDArray[np.float32]]]]) -> None:
    """Raise an InputError if a case is nearly one of train or val in another split, turned, mirrored or not.

    It is where most of its slices correlate with some slice of the other by more than ``COPY``.

    Args:
        content: for each split the ids of its cases and the looks ``(slices, N, N)`` of their slices, each of
            mean 0 and norm 1.
    """
    names = ordered(content)
    for place, name in enumerate(LEARNT):
        later = [(key, *each) for key in names[place + 1 :] for each in content[key] if len(each[1])]
        if not later:
            continue
        looks = np.concatenate([each for *_, each in later])
        turned = [np.rot90(side, k, (1, 2)) for side in (looks, looks[..., ::-1]) for k in range(4)]
        views = [view.reshape(len(looks), -1) for view in turned]
        starts = np.cumsum([0, *(len(each) for *_, each in later[:-1])])
        for case, own in content[name]:
            if not len(own):
                continue
            flat = own.reshape(len(own), -1).T
            alike = np.max([(view @ flat).max(1) for view in views], axis=0) > COPY
            for (key, other, each), count in zip(
                later, np.add.reduceat(alike, starts, dtype=int), strict=True
            ):
                if count > len(each) / 2:
                    raise InputError(
                        f"leakage: {other} in {key} is nearly the same as {case} in {name}, {count} of "
                        f"{len(each)} slices: remove one of the two"
                    )
