"""Volumes as they lie in files: NIfTI, HDF5 and npz, read to (D, H, W) and checked."""

import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from errors import InputError

Plane = Literal["axial", "coronal", "sagittal", "stored"]
Spacing = tuple[float, float, float]
Keys = tuple[str, str]

_NORMALS = {"sagittal": 0, "coronal": 1, "axial": 2}
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, ImageFileError, HeaderDataError)
_MM = {"meter": 1e3, "micron": 1e-3}
"""Millimetres of the units that headers may tell; where they tell none, it is mm."""
AFFINE_TOLERANCE = 0.1
"""Share of a voxel by which the affines of an image and its label may differ at the corners."""


@dataclass(frozen=True)
class Raw:
    """A case as its files have it, slices first.

    Attributes:
        image: float32 ``(D, H, W)`` in the units of the file.
        label: int64 ``(D, H, W)`` in the values of the file.
        spacing: size of a voxel in mm along (D, H, W); None where the files do not tell.
    """

    image: NDArray[np.float32]
    label: NDArray[np.int64]
    spacing: Spacing | None


def read_nifti(image: Path, label: Path, plane: Plane, check_affines: bool = True) -> Raw:
    """Read an image and its label, turned to the orientation in which radiologists look at slices.

    Whatever the orientation on disk, rows run to the back (to the feet in coronal and sagittal slices) and
    columns to the patient's left (to the back in sagittal slices); slices run to the head, to the back, or to
    the left. Oblique volumes are not resampled: the nearest axes count.

    Args:
        image: NIfTI file of the image.
        label: NIfTI file of the label.
        plane: plane of the slices; ``stored`` stacks them along the third axis of the file.
        check_affines: the affine of the label must be that of the image; False takes the image's for both.

    Raises:
        InputError: a file cannot be read, a header or the voxels make no sense, or the two do not fit.
    """
    pixels, affine = _load_nifti(image)
    classes, label_affine = _load_nifti(label)
    check_shapes(pixels.shape, classes.shape, image, label)
    if check_affines:
        _check_affines(affine, label_affine, pixels.shape, label, image)
    axes, flips = _orientation(affine, plane)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)[list(axes)]
    turned, turned_label = (np.flip(each.transpose(axes), flips) for each in (pixels, classes))
    spacing = (float(sizes[0]), float(sizes[1]), float(sizes[2]))
    return Raw(check_image(turned, image), check_label(turned_label, label), spacing)


def read_h5(path: Path, keys: Sequence[Keys]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read an image and its label from one HDF5 file.

    Args:
        path: the file.
        keys: names that image and label may have, in the order of preference.

    Raises:
        InputError: the file cannot be read, or has none of the keys.
    """
    try:
        with h5py.File(path, "r") as file:
            names = _pick(path, list(file), keys)
            datasets = [file[name] for name in names]
            for name, dataset in zip(names, datasets, strict=True):
                if not isinstance(dataset, h5py.Dataset):
                    raise InputError(f"{path}: {name!r} is a group, not an array: prepare the file again")
            return datasets[0][()], datasets[1][()]
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be read as HDF5 ({_reason(error)}): replace the file") from error


ONE_READER = threading.Lock()
"""Held where NumPy reads a file: it parses headers with ``ast``, which in Python 3.11 fails now and then, by
a SystemError, where two threads do so at once (python/cpython#106905)."""


def read_npz(path: Path, keys: Sequence[Keys]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read an image and its label from one npz file; arguments and errors are those of :func:`read_h5`."""
    try:
        with ONE_READER, np.load(path, allow_pickle=False) as file:
            if not isinstance(file, Mapping):
                raise InputError(f"{path} is a single array, not an npz archive: replace the file")
            image, label = (file[name] for name in _pick(path, list(file), keys))
            return image, label
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be read as npz ({_reason(error)}): replace the file") from error


def read_slices(
    paths: Sequence[Path], read: Callable[[Path], tuple[NDArray[Any], NDArray[Any]]]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Stack the images and labels of 2-D files to ``(D, H, W)``.

    Raises:
        InputError: a file cannot be read, or the slices have different shapes.
    """
    images: list[NDArray[Any]] = []
    labels: list[NDArray[Any]] = []
    for path in paths:
        image, label = read(path)
        check_shapes(image.shape, label.shape, path, path)
        if image.ndim != 2:
            raise InputError(f"{path} has the shape {_shape(image.shape)}; a slice has two axes")
        if images and image.shape != images[0].shape:
            raise InputError(
                f"{path} is {_shape(image.shape)} but {paths[0].name} is {_shape(images[0].shape)}: slices "
                "of one volume must have the same size"
            )
        images.append(image)
        labels.append(label)
    return np.stack(images), np.stack(labels)


# --------------------------------------------------------------------------------------- checks


def check_shapes(image: tuple[int, ...], label: tuple[int, ...], image_file: Path, label_file: Path) -> None:
    """Raise an InputError unless image and label have the same shape with no empty axis."""
    for shape, path in ((image, image_file), (label, label_file)):
        if 0 in shape or not shape:
            raise InputError(f"{path} is empty, its shape is {_shape(shape)}: replace the file")
    if image == label:
        return
    what = "the label" if image_file == label_file else f"but its image {image_file.name}"
    who = f"{label_file}: the image" if image_file == label_file else f"{label_file}"
    first, second = (image, label) if image_file == label_file else (label, image)
    hint = "axes are swapped: save both in one order" if sorted(image) == sorted(label) else "they must agree"
    raise InputError(f"{who} is {_shape(first)} and {what} {_shape(second)}: {hint}")


def check_slices_first(shape: tuple[int, ...], path: Path) -> None:
    """Raise an InputError when the slices do not lie along the first of the axes (D, H, W).

    Slices of the sets that are checked are far fewer than their rows and columns.
    """
    depth, height, width = shape
    if min(height, width) * 2 < min(depth, max(height, width)):
        raise InputError(
            f"{path}: axes are swapped, the volume has {depth} slices of {height} × {width} pixels: save it "
            "with the slices along the axis that the form names"
        )


def check_image(image: NDArray[Any], path: Path) -> NDArray[np.float32]:
    """Return an image ``(D, H, W)`` as contiguous float32, or raise an InputError that names the file."""
    if image.ndim != 3:
        raise InputError(f"{path} has {image.ndim} axes, shape {_shape(image.shape)}; a volume has three")
    if image.dtype.kind not in "biuf":
        raise InputError(f"{path} holds values of type {image.dtype}, not grey values: convert it")
    pixels = np.ascontiguousarray(image, np.float32)
    broken = pixels.size - int(np.isfinite(pixels).sum())
    if broken:
        raise InputError(f"{path} has {broken} voxels that are NaN or infinite: repair or leave out the case")
    if pixels.min() == pixels.max():
        raise InputError(f"{path}: all voxels are {pixels.flat[0]:g}: the image is empty, replace the file")
    return pixels


def check_label(label: NDArray[Any], path: Path) -> NDArray[np.int64]:
    """Return a label ``(D, H, W)`` as contiguous int64, or raise an InputError that names the file.

    Floating-point files are welcome as long as all their values are whole numbers.
    """
    if label.ndim != 3:
        raise InputError(
            f"{path} has {label.ndim} axes, shape {_shape(label.shape)}; a label volume has three"
        )
    if label.dtype.kind not in "biuf":
        raise InputError(f"{path} holds values of type {label.dtype}, not labels: convert it")
    if label.dtype.kind == "f":
        if not np.isfinite(label).all():
            raise InputError(f"{path} has labels that are NaN or infinite: repair the mask")
        wrong = label[label != np.rint(label)]
        if wrong.size:
            raise InputError(
                f"{path} has {wrong.size} labels that are no whole numbers, such as {wrong[0]:g}: the mask "
                "was interpolated or is a probability; save classes"
            )
    classes = np.ascontiguousarray(label).astype(np.int64)
    if classes.min() < 0:
        raise InputError(f"{path} has the negative label {classes.min()}: correct the mask")
    if classes.max() == 0:
        raise InputError(f"{path} has no labelled voxel: the mask is empty, correct it or leave out the case")
    return classes


def check_spacing(spacing: Sequence[float], where: str) -> Spacing:
    """Return three positive, finite numbers of mm, or raise an InputError."""
    if len(spacing) != 3 or not all(np.isfinite(each) and each > 0 for each in spacing):
        shown = ", ".join(f"{each:g}" for each in spacing)
        raise InputError(f"{where}: the spacing is ({shown}) mm; it must be three numbers above 0")
    return float(spacing[0]), float(spacing[1]), float(spacing[2])


# --------------------------------------------------------------------------------------- NIfTI


def _load_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels and affine of a file with three axes."""
    try:
        file: Any = nibabel.load(path)
        if not isinstance(file, nibabel.spatialimages.SpatialImage):
            raise InputError(f"{path} is no volume but {type(file).__name__}: replace the file")
        dtype = file.get_data_dtype()
        if dtype.kind not in "biuf":
            raise InputError(
                f"{path} holds values of type {dtype}, neither grey values nor labels: convert it"
            )
        voxels = np.asanyarray(file.dataobj)
        zooms, affine = _zooms(path, file), np.asarray(file.affine, np.float64)
        if isinstance(file, nibabel.Nifti1Image):
            scale = _MM.get(file.header.get_xyzt_units()[0], 1.0)
            zooms, affine = [scale * each for each in zooms], np.diag([scale, scale, scale, 1]) @ affine
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be read as NIfTI ({_reason(error)}): replace the file") from error
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3:
        raise InputError(f"{path} has {voxels.ndim} axes, shape {_shape(voxels.shape)}; a volume has three")
    check_spacing(zooms, str(path))
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: the affine of the header cannot be inverted: repair the header")
    return voxels, affine


def _zooms(path: Path, file: Any) -> list[float]:
    """Size of a voxel as the file has it: nibabel's own header has 1 mm in place of 0."""
    header = file.header
    if isinstance(file, nibabel.Nifti1Image):
        with ImageOpener(str(path)) as opened:
            header = type(file).header_class.from_fileobj(opened, check=False)
        return [abs(float(each)) for each in header["pixdim"][1:4]]
    return [float(each) for each in header.get_zooms()[:3]]


def _check_affines(
    affine: NDArray[np.float64],
    other: NDArray[np.float64],
    shape: tuple[int, ...],
    label: Path,
    image: Path,
) -> None:
    corners = np.array(np.meshgrid(*[(0, edge - 1) for edge in shape])).reshape(3, -1)
    positions = [each[:3, :3] @ corners + each[:3, 3:] for each in (affine, other)]
    apart = float(np.abs(positions[0] - positions[1]).max())
    if apart > AFFINE_TOLERANCE * float(np.linalg.norm(affine[:3, :3], axis=0).min()):
        raise InputError(
            f"{label} lies up to {apart:.3g} mm away from its image {image.name}, as their affines say: axes "
            "are swapped or a header is wrong; correct it, or set check_affines to false if only the header "
            "is"
        )


def _orientation(affine: NDArray[np.float64], plane: Plane) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """Axes of the file in the order (slices, rows, columns), and which of these three to flip."""
    found = io_orientation(affine)
    world = [int(axis) for axis in found[:, 0]]  # of each axis of the file: 0 to the right, 1 front, 2 head
    normal = world[2] if plane == "stored" else _NORMALS[plane]
    rows, columns = sorted({0, 1, 2} - {normal}, reverse=True)
    axes = (world.index(normal), world.index(rows), world.index(columns))
    wanted = (1 if normal == 2 else -1, -1, -1)
    flips = tuple(k for k in range(3) if found[axes[k], 1] != wanted[k])
    return axes, flips


# ------------------------------------------------------------------------------------- wording


def _pick(path: Path, found: Sequence[str], keys: Sequence[Keys]) -> Keys:
    for names in keys:
        if all(name in found for name in names):
            return names
    wanted = " or ".join("/".join(names) for names in keys)
    raise InputError(
        f"{path} has the keys {', '.join(found) or 'none'}; {wanted} are needed: prepare it again"
    )


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "that of a single number"
