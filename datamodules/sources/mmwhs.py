"""MM-WHS (Zhuang & Shen, MedIA 2016): the whole heart in CT and in MR, of different patients."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.sources.intensity import StandardisedWindow, StandardWindow
from datamodules.sources.labels import LabelMap
from datamodules.sources.splits import Case, Split
from datamodules.sources.volume_files import (
    Raw,
    check_image,
    check_label,
    check_shapes,
    check_slices_first,
    read_npz,
    read_slices,
)
from datamodules.sources.volumes import (
    Form,
    VolumeSource,
    VolumeTest,
    check_unknown,
    match_files,
    pair_cases,
    read_nifti_case,
)
from errors import InputError

Modality = Literal["ct", "mr"]

STRUCTURES = {
    205: "myocardium",
    420: "left atrium",
    500: "left ventricle",
    550: "right atrium",
    600: "right ventricle",
    820: "ascending aorta",
    850: "pulmonary artery",
}
"""Structure of every value that the label files have, as the organisers define them."""
CLASS_NAMES = ("background", *STRUCTURES.values())
ADAPTATION = ("background", "myocardium", "left atrium", "left ventricle", "ascending aorta")
"""The classes 0 to 4 of the files prepared for domain adaptation (Dou et al., 2018; Chen et al., 2020)."""
STRAY = 421
WINDOWS = {"ct": (-2.8, 3.2), "mr": (-1.8, 4.4)}
"""Range of the standardised grey values that is kept (Chen et al., TMI 2020)."""
TEST_CASES = {"ct": ("1003", "1008", "1014", "1019"), "mr": ("1007", "1009", "1018", "1019")}
"""Test patients of the work on domain adaptation."""
KEYS = (("arr_0", "arr_1"),)


@dataclass(frozen=True)
class MMWHSTest(VolumeTest):
    """A further test set of MM-WHS.

    Attributes:
        modality: ``ct`` or ``mr``; None is that of the set. The other one is looked for in the folder of the
            set unless ``root`` names another.
    """

    modality: Modality | None = None


class MMWHSSource(VolumeSource):
    """One modality of MM-WHS from its NIfTI files, or from npz files prepared for domain adaptation.

    Classes are 1 myocardium, 2 left atrium, 3 left ventricle, 4 right atrium, 5 right ventricle, 6 ascending
    aorta, 7 pulmonary artery, or as ``structures`` says. Raw volumes are standardised and clipped to [−2.8,
    3.2] (CT) or [−1.8, 4.4] (MR); prepared ones are standardised already. The other modality is a test set:
    ``tests: {mr: {modality: mr}}``. ``published`` tests on the four patients of the work on domain
    adaptation.

    Args:
        root: folder that holds ``ct_train_1001_image.nii.gz`` …, or the npz files, there or one folder below.
        modality: ``ct`` or ``mr``.
        name: name of the set in reports; None is ``mmwhs-ct`` or ``mmwhs-mr``.
        tests: further test sets by name.
        structures: names of the classes after the background, of those above; the others are background. None
            is all seven. Prepared files have myocardium, left atrium, left ventricle and ascending aorta
            alone.
        stray: take the label 421, which a published file has by mistake, for the left atrium (420) instead of
            raising an error.
        turn_volumes: turn prepared volumes by half a turn, so that they lie as the prepared slices do.
        options: those of :class:`~datamodules.sources.volumes.VolumeSource`.

    Raises:
        InputError: as in :class:`~datamodules.sources.volumes.VolumeSource`, or a structure is unknown.
    """

    title = "MM-WHS"

    def __init__(
        self,
        root: str,
        modality: Modality = "ct",
        name: str | None = None,
        tests: Mapping[str, MMWHSTest] | None = None,
        structures: Sequence[str] | None = None,
        stray: bool = False,
        turn_volumes: bool = True,
        **options: Any,
    ) -> None:
        if modality not in WINDOWS:
            raise InputError(f"modality is {modality!r}; it is ct or mr")
        self.modality: Modality = modality
        self.stray = stray
        self.turn_volumes = turn_volumes
        self.class_names = CLASS_NAMES if structures is None else ("background", *structures)
        for structure in self.class_names[1:]:
            if structure not in CLASS_NAMES[1:]:
                raise InputError(f"structures: {structure!r} is none of {', '.join(CLASS_NAMES[1:])}")
        if len(set(self.class_names)) != len(self.class_names) or len(self.class_names) < 2:
            raise InputError("structures: name at least one, and each once")
        super().__init__(root, name=name or f"mmwhs-{modality}", tests=tests, **options)

    def _forms(self, test: VolumeTest | None) -> Sequence[Form]:
        modality = self.modality
        if isinstance(test, MMWHSTest) and test.modality is not None:
            modality = test.modality
        low, high = WINDOWS[modality]
        raw = StandardWindow(low, high)
        nifti = partial(read_nifti_case, plane=self.plane, check_affines=self.check_affines)
        layout = f"[ct_train/ or mr_train/]{modality}_train_1001_image.nii.gz with …_label.nii.gz"
        prepared = (
            f"{modality}_train_slice0.npz, {modality}_train_1001_slice0.npz or {modality}_test_1003.npz"
        )
        return [
            Form(
                "nifti",
                layout,
                partial(_find_nifti, modality=modality),
                nifti,
                self._labels(),
                raw,
                self.plane,
            ),
            Form(
                "adaptation",
                prepared,
                partial(_find_adaptation, modality=modality, check=self._check_adaptation),
                partial(_read_adaptation, turn=self.turn_volumes),
                LabelMap.of_names("the prepared files", dict(enumerate(ADAPTATION)), self.class_names),
                raw if self.rescale else StandardisedWindow(low, high),
                f"turn={self.turn_volumes}",
            ),
        ]

    def _elsewhere(self, test: VolumeTest) -> Path | None:
        if test.root is None and isinstance(test, MMWHSTest) and test.modality not in (None, self.modality):
            return self.root
        return super()._elsewhere(test)

    def _remedy(self, root: Path) -> str:
        if not any(path for folder in _folders(root) for path in folder.glob("*.tfrecord*")):
            return ""
        return (
            ". TensorFlow's records are not read: save each as npz, the image as arr_0 and the label as "
            "arr_1, under the same name"
        )

    def _labels(self) -> LabelMap:
        values = {0: "background"} | STRUCTURES
        if self.stray:
            values[STRAY] = STRUCTURES[420]
        hints = {STRAY: "one published file has it by mistake for 420; set stray to true to take it for that"}
        return LabelMap.of_names("MM-WHS", values, self.class_names, hints)

    def _check_adaptation(self) -> None:
        missing = [name for name in self.class_names if name not in ADAPTATION]
        if missing:
            raise InputError(
                f"{self.root}: files prepared for domain adaptation have no {', '.join(missing)}: set "
                f"structures to {', '.join(ADAPTATION[1:])}"
            )

    def _published(self, cases: Sequence[Case]) -> Split:
        if any(case.side for case in cases):
            return super()._published(cases)
        known = {f"{self.modality}_{number}" for number in TEST_CASES[self.modality]}
        sides: dict[str, list[Case]] = {"train": [], "test": []}
        for case in cases:
            sides["test" if case.patient in known else "train"].append(case)
        return self._with_val(sides)


def _folders(root: Path) -> list[Path]:
    return [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]


def _find_nifti(root: Path, modality: str) -> list[Case]:
    pattern = re.compile(rf"({modality})_train_(\d{{4}})_(image|label)\.nii(\.gz)?")
    form = f"{modality}_train_1001_image.nii.gz or …_label.nii.gz"
    files = []
    for folder in _folders(root):
        for path in sorted(folder.iterdir()):
            match = pattern.fullmatch(path.name)
            if match:
                files.append((f"{match[1]}_{match[2]}", match[3], path))
            else:
                check_unknown(path, f"{modality}_train_", form)
    return pair_cases(files, lambda case: case)


# ct_train_slice12.npz, ct_train_1001_slice12.npz, ct_1003.npz, ct_test_1003.npz
_PREPARED = r"(?:image_)?(ct|mr)(?:_(train|val|test))?(?:_(\d{4}))?(?:_?slice_?(\d+))?\.npz"


def _find_adaptation(root: Path, modality: str, check: Any) -> list[Case]:
    """Cases of volumes and of slices; slices whose names tell no patient make one pile a side."""
    piles: dict[tuple[str | None, str | None], list[tuple[int, Path]]] = {}
    cases = []
    for folder in _folders(root):
        for match, path in match_files(folder, _PREPARED, (".npz",)):
            if match[1] != modality:
                continue
            side, number, position = match[2], match[3], match[4]
            if position is not None:
                piles.setdefault((side, number), []).append((int(position), path))
            elif number is not None:
                name = f"{modality}_{number}"
                cases.append(Case(name, name, (path,), side=side or "test"))
            else:
                raise InputError(f"{path}: its name tells neither a patient nor a slice: rename or move it")
    for (side, number), pile in piles.items():
        pile.sort()
        name = f"{modality}_{number or side or 'slices'}"
        numbers, files = tuple(n for n, _ in pile), tuple(path for _, path in pile)
        if len(set(numbers)) != len(numbers):
            twice = next(k for k in range(1, len(numbers)) if numbers[k] == numbers[k - 1])
            raise InputError(
                f"{files[twice]} and {files[twice - 1]} have one id: rename or remove one of them"
            )
        if number is None:
            _warn_of_gaps(numbers, files)
        patient = name if number else None
        cases.append(Case(name, patient, files, numbers=numbers, side=side, ordered=patient is not None))
    if cases:
        check()
    return cases


def _warn_of_gaps(numbers: tuple[int, ...], files: tuple[Path, ...]) -> None:
    """A pile without order can do without some of its slices, but its reader should know."""
    gaps = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
    if gaps:
        warnings.warn(
            f"{files[0].parent}: {len(gaps)} slices are missing between {files[0].name} and "
            f"{files[-1].name}, the first of them number {gaps[0]}",
            stacklevel=2,
        )


def _read_adaptation(case: Case, turn: bool) -> Raw:
    """Read a volume (H, W, D), or slices (H, W), or triples of neighbours (H, W, 3) for the middle one."""

    def middle(path: Path) -> tuple[np.ndarray, np.ndarray]:
        image, label = read_npz(path, KEYS)
        if image.ndim == 3 and image.shape[2] == 3:
            image = image[..., 1]
        if label.ndim == 3 and label.shape[2] in (1, 3):
            label = label[..., label.shape[2] // 2]
        return image, label

    first = case.images[0]
    if case.numbers is not None:
        image, label = read_slices(case.images, middle)
    else:
        image, label = read_npz(first, KEYS)
        check_shapes(image.shape, label.shape, first, first)
        if image.ndim == 3:
            image, label = (np.moveaxis(each, -1, 0) for each in (image, label))
            depth, height, width = image.shape
            if depth == width != height:  # (D, H, W) of square slices
                raise InputError(
                    f"{first}: axes are swapped, its slices would have {height} × {width} pixels: save the "
                    "volume as (H, W, D)"
                )
            check_slices_first(image.shape, first)
            if turn:
                image, label = image[:, ::-1, ::-1], label[:, ::-1, ::-1]
    return Raw(check_image(image, first), check_label(label, first), None)
