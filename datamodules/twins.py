"""Phantom twins: ``python -m datamodules.twins --dataset acdc --form nifti --output DIR``.

A twin is a small data set of phantoms in the layout, the units and the label values of a real one, so that
readers can be tried where the real one is not at hand.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

from datamodules.sources import acdc, mmwhs, synapse
from datamodules.sources.phantom import phantom
from datamodules.twins_polyps import write_pranet, write_raw
from errors import InputError

Writer = Callable[[Path, int, int, int], None]
"""Writes a twin: folder, number of patients (of images, for polyps), rows of an image in pixels, seed."""

DEPTH = 6
SPACING = {"acdc": (10.0, 1.5, 1.25), "synapse": (3.0, 0.75, 0.8), "mmwhs": (0.5, 0.6, 0.4)}
GROUPS = ("NOR", "DCM", "HCM", "MINF", "RV")
FRAMES = (1, 9)
ORIENTATIONS = ("LPS", "RAS", "LAS")
TRAINING_CASES = ("0005", "0006", "0007", "0009", "0010", *(f"{n:04d}" for n in range(21, 41)))
# Chambers that the cardiac family lacks: class, centre (row, column) and half-axes as shares of the slice.
_CHAMBERS = (
    (2, (0.86, 0.50), (0.09, 0.13)),
    (4, (0.84, 0.16), (0.10, 0.09)),
    (6, (0.12, 0.50), (0.08, 0.08)),
    (7, (0.12, 0.82), (0.09, 0.07)),
)


@dataclass(frozen=True)
class TwinVolume:
    """One phantom volume, slices first, in the orientation in which the sources hold it.

    Attributes:
        image: int16 ``(D, H, W)`` in the units of the data set.
        label: uint8 classes ``(D, H, W)`` of the source, all of them.
        spacing: size of a voxel in mm along (D, H, W).
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    spacing: tuple[float, float, float]


def twin_volume(dataset: str, patient: int, size: int = 64, seed: int = 0, variant: int = 0) -> TwinVolume:
    """Make a volume; it depends on the arguments alone.

    The phantom's scene is scaled about its centre from slice to slice, largest in the middle, with noise of
    its own in each. Slices have ``size`` rows and an eighth less columns.

    Args:
        dataset: ``acdc``, ``synapse`` or ``mmwhs``.
        patient: number of the patient, from 0.
        size: rows in pixels, at least 32.
        seed: of the data set.
        variant: the frame for ACDC (1 is contracted), the modality for MM-WHS (1 is MR).

    Raises:
        InputError: an argument is out of its range.
    """
    if dataset not in SPACING:
        raise InputError(f"dataset is {dataset!r}; volumes are made for {', '.join(SPACING)}")
    heart = dataset != "synapse"
    mode = variant if dataset == "mmwhs" else 0
    number = patient + (1000 if dataset == "mmwhs" and variant else 0)
    image, mask, _ = phantom("cardiac" if heart else "abdomen", seed, number, size, mode=mode)
    grey, classes = image[0], mask
    if dataset == "mmwhs":
        grey, classes = _whole_heart(grey, classes)
    rng = np.random.default_rng((seed, number, variant))
    largest = 0.9 if dataset == "acdc" and variant else 1.0
    scales = largest * (1 - 0.2 * np.abs(np.linspace(-1, 1, DEPTH)))
    columns = slice(size // 16, size // 16 + size - size // 8)
    pixels = np.stack([_scaled(grey, scale, 1) for scale in scales])[..., columns]
    label = np.stack([_scaled(classes, scale, 0) for scale in scales])[..., columns]
    pixels = np.clip((pixels + 1) / 2 + rng.normal(0, 0.01, pixels.shape), 0, 1)
    low, high = {"acdc": (0, 600), "synapse": (-150, 300), "mmwhs": (-200, 500)}[dataset]
    if dataset == "mmwhs" and variant:
        low, high = 0, 900
    values = np.rint(low + pixels * (high - low)).astype(np.int16)
    return TwinVolume(values, label.astype(np.uint8), SPACING[dataset])


def _scaled(plane: NDArray, scale: float, order: int) -> NDArray:
    centre = (np.array(plane.shape) - 1) / 2
    return affine_transform(
        plane, np.full(2, 1 / scale), offset=centre - centre / scale, order=order, mode="nearest"
    )


def _whole_heart(grey: NDArray, mask: NDArray) -> tuple[NDArray, NDArray]:
    """Name the three structures of a cardiac phantom as MM-WHS does, and add the other four."""
    classes = np.array([0, 5, 1, 3])[mask]
    grey = grey.copy()
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]] / mask.shape[0]
    for label, centre, axes in _CHAMBERS:
        inside = ((rows - centre[0]) / axes[0]) ** 2 + ((columns - centre[1]) / axes[1]) ** 2 < 1
        inside &= mask == 0
        classes[inside] = label
        grey[inside] = 0.1 + label / 10
    return grey, classes


# -------------------------------------------------------------------------------------- writers


def write_nifti(path: Path, volume: NDArray, spacing: Sequence[float], orientation: str = "LPS") -> None:
    """Write ``(D, H, W)``, slices to the head, rows to the back and columns to the left, as NIfTI.

    Args:
        path: file to write.
        volume: values.
        spacing: in mm along (D, H, W).
        orientation: in which the file stores it, as nibabel's axis codes.
    """
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = 80.0, 90.0, -40.0
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), affine)
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(orientation))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.as_reoriented(turn), path)


def _write_h5(path: Path, **arrays: NDArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")


def _write_npz(path: Path, *unnamed: NDArray, **arrays: NDArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, *unnamed, **arrays)  # type: ignore[arg-type]


def _pathology(patient: int) -> str:
    return GROUPS[patient % len(GROUPS)]


def _acdc_nifti(root: Path, cases: int, size: int, seed: int) -> None:
    """Two thirds of the patients in training/, the others in testing/."""
    for patient in range(cases):
        name = f"patient{patient + 1:03d}"
        folder = root / ("training" if patient < _first(cases, 2 / 3) else "testing") / name
        for variant, frame in enumerate(FRAMES):
            volume = twin_volume("acdc", patient, size, seed, variant)
            way = ORIENTATIONS[patient % len(ORIENTATIONS)]
            stem = f"{name}_frame{frame:02d}"
            write_nifti(folder / f"{stem}.nii.gz", volume.image, volume.spacing, way)
            write_nifti(folder / f"{stem}_gt.nii.gz", volume.label, volume.spacing, way)
        facts = {"ED": FRAMES[0], "ES": FRAMES[1], "Group": _pathology(patient), "NbFrame": 20}
        (folder / "Info.cfg").write_text("".join(f"{key}: {value}\n" for key, value in facts.items()))


def _acdc_arrays(cases: int, size: int, seed: int) -> list[tuple[str, NDArray, NDArray]]:
    """Names, prepared images and labels of all frames."""
    found = []
    for patient in range(cases):
        for variant, frame in enumerate(FRAMES):
            volume = twin_volume("acdc", patient, size, seed, variant)
            name = f"patient{patient + 1:03d}_frame{frame:02d}"
            found.append((name, _prepared(volume.image, acdc.INTENSITY.upper), volume.label))
    return found


def _prepared(image: NDArray, percentile: float) -> NDArray[np.float32]:
    high, low = np.percentile(image, percentile), image.min()
    return ((np.clip(image, low, high) - low) / (high - low)).astype(np.float32)


def _acdc_ssl4mis(root: Path, cases: int, size: int, seed: int) -> None:
    """Volumes, slices counted from 1, and lists of 7 : 1 : 2."""
    lists: dict[str, list[str]] = {"train_slices": [], "val": [], "test": []}
    tests = max(1, round(0.2 * cases))
    ends = (cases - tests - max(1, round(0.1 * cases)), cases - tests)
    for k, (name, image, label) in enumerate(_acdc_arrays(cases, size, seed)):
        _write_h5(root / "data" / f"{name}.h5", image=image, label=label)
        slices = [f"{name}_slice_{n + 1}" for n in range(len(image))]
        for n, each in enumerate(slices):
            _write_h5(root / "data" / "slices" / f"{each}.h5", image=image[n], label=label[n])
        patient = k // len(FRAMES)
        if patient < ends[0]:
            lists["train_slices"] += slices
        else:
            lists["val" if patient < ends[1] else "test"].append(name)
    for key, lines in lists.items():
        (root / f"{key}.list").write_text("\n".join(lines) + "\n")


def _acdc_wsl4mis(root: Path, cases: int, size: int, seed: int) -> None:
    """Volumes and slices counted from 0, with scribbles of which 4 is unlabelled."""
    for name, image, label in _acdc_arrays(cases, size, seed):
        scribble = np.where(np.arange(label.shape[2]) % 8 == 0, label, 4).astype(np.uint16)
        parts = {"image": image, "label": label, "scribble": scribble}
        _write_h5(root / "ACDC_training_volumes" / f"{name}.h5", **parts)
        for n in range(len(image)):
            file = root / "ACDC_training_slices" / f"{name}_slice_{n}.h5"
            _write_h5(file, **{key: array[n] for key, array in parts.items()})


def _synapse_cases(cases: int) -> tuple[list[str], list[str]]:
    """Names of the cases for training and of those for testing, 3 : 2 as TransUNet has them."""
    split = _first(cases, 0.6)
    learnt = [name for name in TRAINING_CASES if name not in synapse.TEST_CASES]
    train, test = learnt[:split], synapse.TEST_CASES[: cases - split]
    if len(train) + len(test) < cases:
        most = len(learnt) + len(synapse.TEST_CASES)
        raise InputError(f"cases is {cases}; Synapse has {most}: ask for {most} at most")
    return train, list(test)


def _synapse_transunet(root: Path, cases: int, size: int, seed: int) -> None:
    train, test = _synapse_cases(cases)
    lines = []
    for k, number in enumerate([*train, *test]):
        volume = twin_volume("synapse", k, size, seed)
        low, high = synapse.INTENSITY.low, synapse.INTENSITY.high
        image = ((np.clip(volume.image, low, high) - low) / (high - low)).astype(np.float32)
        if number in test:
            _write_h5(root / "test_vol_h5" / f"case{number}.npy.h5", image=image, label=volume.label)
            continue
        for n in range(len(image)):
            lines.append(f"case{number}_slice{n:03d}")
            _write_npz(root / "train_npz" / f"{lines[-1]}.npz", image=image[n], label=volume.label[n])
    folder = root / "lists" / "lists_Synapse"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    (folder / "test_vol.txt").write_text("\n".join(f"case{number}" for number in test) + "\n")


def _synapse_btcv(root: Path, cases: int, size: int, seed: int) -> None:
    values = {each: value for value, each in synapse.BTCV.classes if each}
    table = np.array([values.get(k, 0) for k in range(len(synapse.CLASS_NAMES))], np.uint8)
    train, test = _synapse_cases(cases)
    for k, number in enumerate([*train, *test]):
        volume = twin_volume("synapse", k, size, seed)
        label = table[volume.label]
        label[:, 1:3, 1:3] = 9  # a structure that is no class of Synapse
        way = ("LAS", "LPS", "SRA")[k % 3]
        write_nifti(root / "img" / f"img{number}.nii.gz", volume.image, volume.spacing, way)
        write_nifti(root / "label" / f"label{number}.nii.gz", label, volume.spacing, way)


def _mmwhs_nifti(root: Path, cases: int, size: int, seed: int) -> None:
    table = np.array([0, *mmwhs.STRUCTURES], np.int16)
    for variant, modality in enumerate(("ct", "mr")):
        for patient in range(cases):
            volume = twin_volume("mmwhs", patient, size, seed, variant)
            way = ("LPS", "RAS", "PSR")[patient % 3]
            stem = f"{modality}_train_{1001 + patient}"
            folder = root / f"{modality}_train"
            write_nifti(folder / f"{stem}_image.nii.gz", volume.image, volume.spacing, way)
            write_nifti(folder / f"{stem}_label.nii.gz", table[volume.label], volume.spacing, way)


def _mmwhs_adaptation(root: Path, cases: int, size: int, seed: int) -> None:
    """Slices with their neighbours for training, without patients' names; volumes of the test patients."""
    order = {mmwhs.CLASS_NAMES.index(name): k for k, name in enumerate(mmwhs.ADAPTATION)}
    table = np.array([order.get(k, 0) for k in range(len(mmwhs.CLASS_NAMES))], np.uint8)
    for variant, modality in enumerate(("ct", "mr")):
        count = {"train": 0, "val": 0}
        tests = list(mmwhs.TEST_CASES[modality])[: max(1, cases // 5)]
        for patient in range(cases):
            volume = twin_volume("mmwhs", patient, size, seed, variant)
            values = volume.image.astype(np.float64)
            image = np.moveaxis(((values - values.mean()) / values.std()).astype(np.float32), 0, -1)
            label = np.moveaxis(table[volume.label], 0, -1)
            if patient < len(tests):
                file = root / f"{modality}_test_{tests[patient]}.npz"
                _write_npz(file, image[::-1, ::-1], label[::-1, ::-1])
                continue
            side = "val" if patient == len(tests) else "train"
            for n in range(1, DEPTH - 1):
                file = root / f"{modality}_{side}_slice{count[side]}.npz"
                _write_npz(file, image[..., n - 1 : n + 2], label[..., n - 1 : n + 2])
                count[side] += 1


def _first(cases: int, share: float) -> int:
    """Return how many of the patients the first share is, at least one and not all."""
    return min(max(1, round(cases * share)), cases - 1)


FORMS: dict[tuple[str, str], Writer] = {
    ("acdc", "nifti"): _acdc_nifti,
    ("acdc", "ssl4mis"): _acdc_ssl4mis,
    ("acdc", "wsl4mis"): _acdc_wsl4mis,
    ("synapse", "transunet"): _synapse_transunet,
    ("synapse", "btcv"): _synapse_btcv,
    ("mmwhs", "nifti"): _mmwhs_nifti,
    ("mmwhs", "adaptation"): _mmwhs_adaptation,
    ("polyps", "raw"): write_raw,
    ("polyps", "pranet"): write_pranet,
}
"""The writer of every data set and form."""


def write_twin(
    dataset: str,
    form: str,
    output: str | Path,
    cases: int = 10,
    size: int = 64,
    seed: int = 0,
    forms: Mapping[tuple[str, str], Writer] = FORMS,
) -> Path:
    """Write a twin into an empty folder and return it.

    Args:
        dataset: its name, as in :data:`FORMS`.
        form: its layout on disk.
        output: folder to write; it must not be there, or be empty.
        cases: patients, at least 5; for polyps, images of a set, at least 10.
        size: rows of an image in pixels, at least 32.
        seed: the same seed writes the same files.
        forms: the writers.

    Raises:
        InputError: there is no such form, the folder is not empty, or a number is out of its range.
    """
    if (dataset, form) not in forms:
        raise InputError(
            f"no twin is {dataset}, {form}; there are {'; '.join(', '.join(key) for key in forms)}"
        )
    if cases < 5:
        raise InputError(f"cases is {cases}; a twin needs at least 5, so that every split has a patient")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    forms[dataset, form](folder, cases, size, seed)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Write a twin as the arguments of the command line say."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.twins", description=__doc__)
    parser.add_argument("--dataset", required=True, choices=sorted({dataset for dataset, _ in FORMS}))
    parser.add_argument("--form", required=True, help="; ".join(f"{name}: {form}" for name, form in FORMS))
    parser.add_argument("--output", required=True, help="folder to write, new or empty")
    parser.add_argument("--cases", type=int, default=10, help="patients, or polyps of a set (default 10)")
    parser.add_argument("--size", type=int, default=64, help="rows of an image in pixels (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same files (default 0)")
    given = parser.parse_args(argv)
    folder = write_twin(given.dataset, given.form, given.output, given.cases, given.size, given.seed)
    files = sum(path.is_file() for path in folder.rglob("*"))
    print(f"{folder}: {files} files of {given.cases} phantom cases, {given.dataset} as {given.form}")


if __name__ == "__main__":
    main()
