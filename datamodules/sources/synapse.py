"""Synapse: the abdominal CT of BTCV (Landman et al., 2015) with the eight organs of TransUNet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datamodules.sources.intensity import Prepared, Window
from datamodules.sources.labels import LabelMap, identity
from datamodules.sources.splits import Case, Split
from datamodules.sources.volumes import (
    Form,
    VolumeSource,
    VolumeTest,
    array_cases,
    match_files,
    pair_cases,
    read_array_case,
    read_nifti_case,
)
from errors import InputError

CLASS_NAMES = (
    "background",
    "aorta",
    "gallbladder",
    "left kidney",
    "right kidney",
    "liver",
    "pancreas",
    "spleen",
    "stomach",
)
INTENSITY = Window(-125.0, 275.0)
PREPARED = identity("Synapse", len(CLASS_NAMES))
BTCV = LabelMap.of_names(
    "BTCV",
    {
        0: "background",
        1: "spleen",
        2: "right kidney",
        3: "left kidney",
        4: "gallbladder",
        5: "esophagus",
        6: "liver",
        7: "stomach",
        8: "aorta",
        9: "inferior vena cava",
        10: "portal and splenic vein",
        11: "pancreas",
        12: "right adrenal gland",
        13: "left adrenal gland",
    },
    CLASS_NAMES,
)
_TOTAL_ORGANS = {
    1: "spleen",
    2: "right kidney",
    3: "left kidney",
    4: "gallbladder",
    5: "liver",
    6: "stomach",
    7: "pancreas",
    52: "aorta",
}
_TOTAL_ORGANS_V1 = {**{k: _TOTAL_ORGANS[k] for k in range(1, 7)}, 7: "aorta", 10: "pancreas"}


def _total(name: str, organs: dict[int, str], values: int) -> LabelMap:
    known = {k: organs.get(k, "another structure") for k in range(values)}
    return LabelMap.of_names(name, known, CLASS_NAMES)


TOTALSEGMENTATOR = _total("TotalSegmentator 2", _TOTAL_ORGANS, 118)
TOTALSEGMENTATOR_V1 = _total("TotalSegmentator 1", _TOTAL_ORGANS_V1, 105)
KnownLabels = Literal["synapse", "btcv", "totalsegmentator", "totalsegmentator_v1"]
LABEL_MAPS = {
    "synapse": PREPARED,
    "btcv": BTCV,
    "totalsegmentator": TOTALSEGMENTATOR,
    "totalsegmentator_v1": TOTALSEGMENTATOR_V1,
}
TEST_CASES = ("0001", "0002", "0003", "0004", "0008", "0022", "0025", "0029", "0032", "0035", "0036", "0038")
"""The 12 test cases of TransUNet (Chen et al., 2021); its other 18 are for training."""
KEYS = (("image", "label"), ("data", "seg"))


@dataclass(frozen=True)
class Pair:
    """A NIfTI image and its label, paths relative to the folder of the set."""

    image: str
    label: str


@dataclass(frozen=True)
class SynapseTest(VolumeTest):
    """A further test set of abdominal CT.

    Attributes:
        pairs: NIfTI files of each case, for files that are named in no form; without ``root`` they lie in the
            folder of the set.
        label_map: of the pairs: ``synapse``, ``btcv``, ``totalsegmentator`` (the numbers of its version 2),
            ``totalsegmentator_v1``, or a structure for each value on file; structures that are no class are
            background.
    """

    pairs: Mapping[str, Pair] | None = None
    label_map: str | Mapping[int, str] = "synapse"


class SynapseSource(VolumeSource):
    """Synapse as TransUNet prepared it, from BTCV's NIfTI files, or from pairs of NIfTI files.

    Classes are 1 aorta, 2 gallbladder, 3 left kidney, 4 right kidney, 5 liver, 6 pancreas, 7 spleen, 8
    stomach. Raw volumes are clipped to [−125, 275] HU; prepared ones have values in [0, 1] already.
    ``published`` tests on TransUNet's 12 cases.

    Args:
        root: folder that holds ``train_npz/`` and ``test_vol_h5/``, or ``img/`` and ``label/``, or the pairs.
        name: name of the set in reports.
        tests: further test sets by name.
        pairs: NIfTI files of each case, for files that are named in no form.
        label_map: of the pairs: ``synapse``, ``btcv``, ``totalsegmentator`` (the numbers of its version 2),
            ``totalsegmentator_v1``, or a structure for each value on file; structures that are no class are
            background.
        options: those of :class:`~datamodules.sources.volumes.VolumeSource`.

    Raises:
        InputError: as in :class:`~datamodules.sources.volumes.VolumeSource`, or the label map is unknown.
    """

    title = "Synapse"
    class_names = CLASS_NAMES

    def __init__(
        self,
        root: str,
        name: str | None = "synapse",
        tests: Mapping[str, SynapseTest] | None = None,
        pairs: Mapping[str, Pair] | None = None,
        label_map: KnownLabels | Mapping[int, str] = "synapse",
        **options: Any,
    ) -> None:
        self._own = SynapseTest(pairs=pairs, label_map=label_map)
        super().__init__(root, name=name, tests=tests, **options)

    def _forms(self, test: VolumeTest | None) -> Sequence[Form]:
        kind = test if isinstance(test, SynapseTest) else self._own
        nifti = partial(read_nifti_case, plane=self.plane, check_affines=self.check_affines)
        if kind.pairs is not None:
            find = partial(_find_pairs, pairs=kind.pairs)
            labels = _label_map(kind.label_map)
            return [
                Form("pairs", "the NIfTI files that pairs names", find, nifti, labels, INTENSITY, self.plane)
            ]
        prepared = INTENSITY if self.rescale else Prepared()
        arrays = partial(read_array_case, keys=KEYS)
        layout = "train_npz/case0005_slice000.npz and test_vol_h5/case0001.npy.h5"
        btcv = "[Training/]img/img0001.nii.gz with label/label0001.nii.gz"
        return [
            Form("transunet", layout, _find_transunet, arrays, PREPARED, prepared),
            Form("btcv", btcv, _find_btcv, nifti, BTCV, INTENSITY, self.plane),
        ]

    def _elsewhere(self, test: VolumeTest) -> Path | None:
        if test.root is None and isinstance(test, SynapseTest) and test.pairs is not None:
            return self.root
        return super()._elsewhere(test)

    def _published(self, cases: Sequence[Case]) -> Split:
        if self.form.name == "transunet":
            return super()._published(cases)
        known = {f"case{number}" for number in TEST_CASES}
        sides: dict[str, list[Case]] = {"train": [], "test": []}
        for case in cases:
            sides["test" if case.id in known else "train"].append(case)
        return self._with_val(sides)


def _label_map(given: str | Mapping[int, str]) -> LabelMap:
    if isinstance(given, str):
        if given not in LABEL_MAPS:
            raise InputError(f"label_map is {given!r}; the names are {', '.join(LABEL_MAPS)}")
        return LABEL_MAPS[given]
    missing = [name for name in CLASS_NAMES if name not in given.values()]
    if missing:
        raise InputError(
            f"label_map names no value for {', '.join(missing)}: give every class a value on file"
        )
    return LabelMap.of_names("label_map", given, CLASS_NAMES)


def _find_transunet(root: Path) -> list[Case]:
    slices = match_files(root / "train_npz", r"(case\d{4})_slice(\d+)\.npz", (".npz",))
    volumes = match_files(root / "test_vol_h5", r"(case\d{4})\.npy\.h5", (".h5",))
    return array_cases(volumes, slices, lambda case: case, sides=("test", "train"))


def _find_btcv(root: Path) -> list[Case]:
    files = []
    for folder in (root, root / "Training", root / "RawData" / "Training"):
        for name, kind, stem in (("img", "image", "img"), ("label", "label", "label")):
            found = match_files(folder / name, rf"{stem}(\d{{4}})\.nii(\.gz)?", (".nii", ".nii.gz"))
            files += [(f"case{match[1]}", kind, path) for match, path in found]
    return pair_cases(files, lambda case: case)


def _find_pairs(root: Path, pairs: Mapping[str, Pair]) -> list[Case]:
    files = []
    for case, pair in pairs.items():
        for kind, name in (("image", pair.image), ("label", pair.label)):
            if not (root / name).is_file():
                raise InputError(f"{root / name} does not exist: correct the {kind} of {case} in pairs")
            files.append((case, kind, root / name))
    return pair_cases(files, lambda case: case)
