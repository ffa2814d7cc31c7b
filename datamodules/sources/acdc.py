"""ACDC (Bernard et al., TMI 2018): short-axis cardiac MR, end-diastole and end-systole of each patient."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.sources.intensity import PercentileMinMax, Prepared
from datamodules.sources.labels import identity
from datamodules.sources.splits import Case, Split, split_by_lists
from datamodules.sources.volume_files import Plane
from datamodules.sources.volumes import (
    Form,
    VolumeSource,
    VolumeTest,
    array_cases,
    check_unknown,
    match_files,
    pair_cases,
    read_array_case,
    read_nifti_case,
)
from errors import InputError

CLASS_NAMES = ("background", "right ventricle", "myocardium", "left ventricle")
LABELS = identity("ACDC", len(CLASS_NAMES))
INTENSITY = PercentileMinMax(99.0)
KEYS = (("image", "label"),)
# Folder of volumes and folder of slices.
_FOLDERS = {"ssl4mis": ("data", "data/slices"), "wsl4mis": ("ACDC_training_volumes", "ACDC_training_slices")}
_LISTS = {"train": "train_slices.list", "val": "val.list", "test": "test.list"}
_SIDES = {"training": "train", "testing": "test"}
_FRAME = re.compile(r"(patient\d+)_frame(\d+)(_gt)?\.nii(\.gz)?")


@dataclass(frozen=True)
class ACDCTest(VolumeTest):
    """A further test set of ACDC.

    Attributes:
        where: take only patients whose ``Info.cfg`` has one of these values for a key, as
            ``{Group: [HCM, RV]}`` does by pathology (NOR, DCM, HCM, MINF, RV).
    """

    where: Mapping[str, Sequence[str]] = field(default_factory=dict)


class ACDCSource(VolumeSource):
    """ACDC from its NIfTI files, or as SSL4MIS or WSL4MIS prepared it.

    Classes are 1 right ventricle, 2 myocardium, 3 left ventricle. Raw volumes are clipped at their 99th
    percentile and scaled from their minimum to it; prepared ones have values in [0, 1] already. Slices are
    those of the acquisition, the third axis of the files. ``published`` takes ``training/`` and ``testing/``,
    or the lists ``train_slices.list``, ``val.list`` and ``test.list`` of SSL4MIS.

    Args:
        root: folder that holds ``training/``, ``data/`` or ``ACDC_training_volumes/``.
        name: name of the set in reports.
        tests: further test sets by name.
        where: keep only patients whose ``Info.cfg`` has one of these values for a key, for all splits but
            ``tests``; the others are free to be tested on.
        options: those of :class:`~datamodules.sources.volumes.VolumeSource`.

    Raises:
        InputError: as in :class:`~datamodules.sources.volumes.VolumeSource`, or ``Info.cfg`` does not tell.
    """

    default_plane: Plane = "stored"
    title = "ACDC"
    class_names = CLASS_NAMES

    def __init__(
        self,
        root: str,
        name: str | None = "acdc",
        tests: Mapping[str, ACDCTest] | None = None,
        where: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> None:
        self.where = dict(where or {})
        super().__init__(root, name=name, tests=tests, **options)

    def _forms(self, test: VolumeTest | None) -> Sequence[Form]:
        read = partial(
            read_nifti_case,
            plane=self.plane,
            check_affines=self.check_affines,
            slices_first=self.plane == "stored",
        )
        layout = "[training/ or testing/]patient001/patient001_frame01.nii.gz with …_gt.nii.gz and Info.cfg"
        forms = [Form("nifti", layout, _find_nifti, read, LABELS, INTENSITY, self.plane)]
        for name, folders in _FOLDERS.items():
            layout = f"{folders[0]}/patient001_frame01.h5 or {folders[1]}/patient001_frame01_slice_0.h5"
            intensity = INTENSITY if self.rescale else Prepared()
            read = partial(read_array_case, keys=KEYS)
            forms.append(Form(name, layout, partial(_find_h5, folders=folders), read, LABELS, intensity))
        return forms

    def _published(self, cases: Sequence[Case]) -> Split:
        if self.form.name == "ssl4mis":
            return split_by_lists(cases, {key: self.root / file for key, file in _LISTS.items()})
        return super()._published(cases)

    def _usable(self, cases: Sequence[Case]) -> list[Case]:
        return _by_info(cases, self.where, "where")

    def _select(self, test: VolumeTest, cases: Sequence[Case], where: str) -> list[Case]:
        asked = test.where if isinstance(test, ACDCTest) else {}
        return _by_info(super()._select(test, cases, where), asked, where)


def _by_info(cases: Sequence[Case], asked: Mapping[str, Sequence[str]], where: str) -> list[Case]:
    """Keep the cases of which ``Info.cfg`` has one of the values asked for."""
    kept = list(cases)
    for key, values in asked.items():
        for case in cases:
            if key not in case.info:
                raise InputError(
                    f"{where}: no Info.cfg beside {case.images[0]} tells {key}: it cannot be selected by"
                )
        known = sorted({case.info[key] for case in cases})
        for value in values:
            if value not in known:
                raise InputError(
                    f"{where}: no patient left for it has {key} {value!r}; they have {', '.join(known)}"
                )
        kept = [case for case in kept if case.info[key] in values]
    return kept


def _find_nifti(root: Path) -> list[Case]:
    folders: list[tuple[Path, str | None]] = []
    strays = []
    for start in filter(Path.is_dir, (root, root / "database")):
        folders += [(folder, None) for folder in _patients(start)]
        for inside in sorted(path for path in start.iterdir() if path.is_dir()):
            side, found = _SIDES.get(inside.name.lower()), _patients(inside)
            if side is not None:
                folders += [(folder, side) for folder in found]
            elif found and inside != root / "database":
                strays.append(inside)
    if folders and strays:
        raise InputError(
            f"{strays[0]} holds patients, and its name is neither training nor testing: rename or move it"
        )
    frames = [_frames(folder) for folder, _ in folders]
    cases = []
    for (folder, side), files in zip(folders, frames, strict=True):
        info = _info(folder / "Info.cfg")
        cases += [replace(case, info=info) for case in pair_cases(files, _patient, side)]
    return cases


def _patients(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("patient*/") if path.name.removeprefix("patient").isdecimal())


def _patient(case: str) -> str:
    return case.split("_")[0]


def _frames(folder: Path) -> list[tuple[str, str, Path]]:
    """Return case, kind and path of every frame of a patient; the 4-D file is left out."""
    files = []
    for path in sorted(folder.iterdir()):
        match = _FRAME.fullmatch(path.name)
        if match is None:
            check_unknown(path, f"{folder.name}_frame", "patient001_frame01.nii.gz or …_frame01_gt.nii.gz")
            continue
        if match[1] != folder.name:
            raise InputError(
                f"{path} is a file of {match[1]} in the folder of {folder.name}: move or rename it"
            )
        files.append((f"{match[1]}_frame{match[2]}", "label" if match[3] else "image", path))
    if not files:
        raise InputError(f"{folder} has no patientXXX_frameYY.nii.gz: add the frames, or remove the folder")
    return files


def _info(path: Path) -> dict[str, str]:
    """Read the lines ``key: value`` of an ``Info.cfg``; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a text file: {error}") from error
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in lines)
        if value.strip()
    }


def _find_h5(root: Path, folders: tuple[str, str]) -> list[Case]:
    volumes = match_files(root / folders[0], r"(patient\d+_frame\d+)\.h5", (".h5",))
    slices = match_files(root / folders[1], r"(patient\d+_frame\d+)_slice_(\d+)\.h5", (".h5",))
    return array_cases(volumes, slices, _patient)
