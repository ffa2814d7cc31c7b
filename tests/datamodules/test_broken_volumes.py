"""What is wrong with a data set is one line that names the file and the fix, before anything is trained."""

import re
import shutil

import h5py
import nibabel
import numpy as np
import pytest

from datamodules.sources import ACDCSource, ACDCTest, MMWHSSource, MMWHSTest, SynapseSource, SynapseTest
from datamodules.sources.mmwhs import ADAPTATION
from datamodules.sources.synapse import Pair
from datamodules.twins import write_twin
from errors import InputError

SIZE = 32
SOURCES = {"acdc": ACDCSource, "synapse": SynapseSource, "mmwhs": MMWHSSource}
FRAME = "training/patient001/patient001_frame01"
H5 = "ACDC_training_volumes/patient001_frame01.h5"
CT = "ct_train/ct_train_1002"
SLICE = "train_npz/case0005_slice002.npz"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Folders of twins, each written once."""
    root = tmp_path_factory.mktemp("intact")

    def folder(key):
        path = root / key
        return path if path.exists() else write_twin(*key.split("-"), path, 5, SIZE)

    return folder


def load(path):
    file = nibabel.load(path)
    return np.asarray(file.dataobj).copy(), file.affine


def change(suffix, edit):
    """Edit the voxels of a NIfTI file."""

    def apply(root, stem):
        path = root / f"{stem}{suffix}"
        voxels, affine = load(path)
        nibabel.save(nibabel.Nifti1Image(edit(voxels), affine), path)

    return apply


def put(value, dtype=None):
    def edit(voxels):
        voxels = voxels if dtype is None else voxels.astype(dtype)
        voxels[3, 4, 2] = value
        return voxels

    return edit


def cut(name):
    def apply(root, stem):
        path = root / f"{stem}{name}"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return apply


def remove(name):
    return lambda root, stem: (root / f"{stem}{name}").unlink()


def link_to_nothing(name):
    def apply(root, stem):
        remove(name)(root, stem)
        (root / f"{stem}{name}").symlink_to(root / "nowhere")

    return apply


def folder_for_file(root, stem):
    remove("")(root, stem)
    (root / stem).mkdir()


def rename(old, new):
    return lambda root, stem: (root / f"{stem}{old}").rename(root / f"{stem}{new}")


def misnamed_pair(root, stem):
    for old, new in (("_image", "_img"), ("_label", "_lbl")):
        rename(f"{old}.nii.gz", f"{new}.nii.gz")(root, stem)


def folder_of_another_name(root, stem):
    (root / "training").rename(root / "train")


def records(root, stem):
    emptied(root, stem)
    (root / "ct_train_slice0.tfrecords").write_bytes(b"1")


def rewrite(**arrays):
    """Write an HDF5 or npz file anew, its arrays as functions of the old ones; None leaves one out."""

    def apply(root, stem):
        path = root / stem
        if path.suffix == ".npz":
            with np.load(path) as file:
                old = dict(file)
        else:
            with h5py.File(path) as file:
                old = {key: file[key][()] for key in file}
        new = {key: edit(old[key]) if key in old else edit(old) for key, edit in arrays.items() if edit}
        kept = {key: array for key, array in old.items() if key not in arrays} | new
        if path.suffix == ".npz":
            np.savez(path, **kept)
            return
        with h5py.File(path, "w") as file:
            for key, array in kept.items():
                file[key] = array

    return apply


def header(field, value, edit_affine=None):
    """Change a field of a NIfTI header, byte for byte."""

    def apply(root, stem):
        path = root / f"{stem}.nii.gz"
        file = nibabel.load(path)
        voxels = np.asarray(file.dataobj).copy()
        new = nibabel.Nifti1Image(voxels, file.affine)
        path.unlink()
        path = path.with_suffix("")
        nibabel.save(new, path)
        raw = bytearray(path.read_bytes())
        start, kind = {"pixdim3": (88, "<f4"), "sform3": (312, "<f4")}[field]
        raw[start : start + 4] = np.array(value, kind).tobytes()
        path.write_bytes(bytes(raw))

    return apply


def both_axes_swapped(root, stem):
    for suffix in (".nii.gz", "_gt.nii.gz"):
        change(suffix, lambda voxels: voxels.transpose(2, 1, 0))(root, stem)


def second_patient(root, stem):
    source = sorted((root / "testing").iterdir())[0]
    target = root / "testing" / "patient001"
    source.rename(target)
    for path in list(target.glob("patient*")):
        path.rename(target / path.name.replace(source.name, "patient001"))


def in_foreign_folder(root, stem):
    (root / f"{stem}.nii.gz").rename(root / "training" / "patient002" / "patient001_frame01.nii.gz")


def same_id_twice(root, stem):
    (root / "more").mkdir()
    shutil.copy(root / f"{stem}_image.nii.gz", root / "more" / "ct_train_1002_image.nii.gz")


def case_on_both_sides(root, stem):
    shutil.copy(next((root / "test_vol_h5").iterdir()), root / "test_vol_h5" / "case0005.npy.h5")


def mixed(root, stem):
    (root / "data").mkdir()
    for path in (root / "ACDC_training_volumes").iterdir():
        shutil.copy(path, root / "data" / path.name)


def emptied(root, stem):
    shutil.rmtree(root)
    root.mkdir()


def unknown_name(root, stem):
    shutil.copy(root / stem, (root / stem).with_name("patient001-frame1.h5"))


def group_for_array(root, stem):
    with h5py.File(root / stem, "w") as file:
        file.create_group("image")
        file["label"] = np.ones((2, 4, 4), np.uint8)


def four_axes(root, stem):
    change(".nii.gz", lambda voxels: np.stack([voxels, voxels], axis=-1))(root, stem)


def moved_label(root, stem):
    path = root / f"{stem}_gt.nii.gz"
    voxels, affine = load(path)
    affine[0, 3] += 7
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def text(line):
    return lambda root, stem: (root / stem).write_text(line)


def lists(**lines):
    def apply(root, stem):
        for name, each in lines.items():
            (root / f"{name}.txt").write_text(each)

    return apply


LISTS = {"lists": {"train": "train.txt", "val": "val.txt"}}
PUBLISHED = {"split": "published"}
FOUR = {"structures": list(ADAPTATION[1:])} | PUBLISHED

BROKEN = {
    "truncated NIfTI": ("acdc-nifti", FRAME, cut(".nii.gz"), ("patient001_frame01.nii.gz cannot be read",)),
    "truncated label": (
        "acdc-nifti",
        FRAME,
        cut("_gt.nii.gz"),
        ("frame01_gt.nii.gz cannot be read", "replace"),
    ),
    "text for NIfTI": ("mmwhs-nifti", f"{CT}_label.nii.gz", text("?"), ("1002_label.nii.gz cannot be read",)),
    "label 421": (
        "mmwhs-nifti",
        CT,
        change("_label.nii.gz", put(421)),
        ("1002_label.nii.gz has the label 421", "205, 420, 500, 550, 600, 820, 850", "set stray"),
    ),
    "unknown label": (
        "acdc-nifti",
        FRAME,
        change("_gt.nii.gz", put(7)),
        ("_gt.nii.gz has the label 7", "0, 1, 2, 3"),
    ),
    "swapped axes of the label": (
        "acdc-nifti",
        FRAME,
        change("_gt.nii.gz", lambda voxels: voxels.swapaxes(0, 1)),
        ("_gt.nii.gz is 32 × 28 × 6", "patient001_frame01.nii.gz 28 × 32 × 6", "axes are swapped"),
    ),
    "swapped axes of both": ("acdc-nifti", FRAME, both_axes_swapped, ("axes are swapped", "28 slices")),
    "swapped axes of HDF5": (
        "acdc-wsl4mis",
        H5,
        rewrite(image=lambda a: a.transpose(1, 2, 0), label=lambda a: a.transpose(1, 2, 0)),
        (H5, "axes are swapped", "32 slices of 28 × 6"),
    ),
    "missing slice": (
        "acdc-wsl4mis",
        "ACDC_training_slices/patient001_frame01_slice_2.h5",
        remove(""),
        ("patient001_frame01 has 5 slices", "number 2", "missing slice"),
    ),
    "missing last slice": (
        "acdc-wsl4mis",
        "ACDC_training_slices/patient001_frame01_slice_5.h5",
        remove(""),
        (H5, "has 6 slices", "5 files of single slices", "a slice is missing"),
    ),
    "missing slice of npz": ("synapse-transunet", SLICE, remove(""), ("case0005 has 5 slices", "number 2")),
    "NaN voxels": (
        "acdc-nifti",
        FRAME,
        change(".nii.gz", put(np.nan, np.float32)),
        ("1 voxels that are NaN",),
    ),
    "infinite voxels": (
        "acdc-wsl4mis",
        H5,
        rewrite(image=lambda a: np.where(a == a.max(), np.inf, a)),
        (H5, "NaN or infinite"),
    ),
    "float masks": (
        "acdc-nifti",
        FRAME,
        change("_gt.nii.gz", put(0.5, np.float32)),
        ("_gt.nii.gz has 1 labels that are no whole numbers, such as 0.5", "interpolated"),
    ),
    "negative label": (
        "mmwhs-nifti",
        CT,
        change("_label.nii.gz", put(-3)),
        ("1002_label.nii.gz has the negative label -3",),
    ),
    "empty mask": (
        "acdc-nifti",
        FRAME,
        change("_gt.nii.gz", lambda v: v * 0),
        ("_gt.nii.gz has no labelled voxel",),
    ),
    "empty image": ("acdc-nifti", FRAME, change(".nii.gz", lambda v: v * 0), ("all voxels are 0", "empty")),
    "empty volume": (
        "acdc-wsl4mis",
        H5,
        rewrite(image=lambda a: a[:0], label=lambda a: a[:0]),
        (H5, "is empty, its shape is 0 × 32 × 28"),
    ),
    "other shape": (
        "acdc-nifti",
        FRAME,
        change("_gt.nii.gz", lambda voxels: voxels[:, :, :5]),
        ("_gt.nii.gz is 28 × 32 × 5", "28 × 32 × 6", "must agree"),
    ),
    "other shape in one file": (
        "acdc-wsl4mis",
        H5,
        rewrite(label=lambda a: a[:, :30]),
        (H5, "image is 6 × 32 × 28", "label 6 × 30 × 28"),
    ),
    "slice of another size": (
        "synapse-transunet",
        SLICE,
        rewrite(image=lambda a: a[:20], label=lambda a: a[:20]),
        (SLICE, "is 20 × 28", "case0005_slice000.npz is 32 × 28"),
    ),
    "four axes": (
        "acdc-nifti",
        FRAME,
        four_axes,
        ("patient001_frame01.nii.gz has 4 axes", "28 × 32 × 6 × 2"),
    ),
    "missing label file": ("acdc-nifti", FRAME, remove("_gt.nii.gz"), ("frame01.nii.gz has no label",)),
    "missing image file": ("mmwhs-nifti", CT, remove("_image.nii.gz"), ("1002_label.nii.gz has no image",)),
    "link to nothing": (
        "acdc-nifti",
        FRAME,
        link_to_nothing("_gt.nii.gz"),
        ("_gt.nii.gz is a link to nothing",),
    ),
    "HDF5 link to nothing": ("acdc-wsl4mis", H5, link_to_nothing(""), (H5, "is a link to nothing")),
    "folder for a file": ("acdc-wsl4mis", H5, folder_for_file, (H5, "is no file", "put the file there")),
    "misnamed pair": ("mmwhs-nifti", CT, misnamed_pair, ("1002_img.nii.gz: the name is not of the form",)),
    "misnamed label": (
        "acdc-nifti",
        FRAME,
        rename("_gt.nii.gz", "_label.nii.gz"),
        ("frame01_label.nii.gz: the name is not of the form",),
    ),
    "suffix in capitals": (
        "acdc-nifti",
        FRAME,
        rename(".nii.gz", ".NII.GZ"),
        ("frame01.NII.GZ: the name is not of the form",),
    ),
    "number of fewer digits": (
        "acdc-nifti",
        "training/patient001/patient001_",
        rename("frame01.nii.gz", "frame1.nii.gz"),
        ("frame01_gt.nii.gz has no image", "is patient001_frame1.nii.gz it?"),
    ),
    "folder of another name": (
        "acdc-nifti",
        FRAME,
        folder_of_another_name,
        ("train holds patients, and its name is neither training nor testing",),
    ),
    "label elsewhere": (
        "acdc-nifti",
        FRAME,
        moved_label,
        ("_gt.nii.gz lies up to 7 mm away", "check_affines"),
    ),
    "zero spacing": (
        "acdc-nifti",
        FRAME,
        header("pixdim3", 0),
        ("patient001_frame01.nii", "spacing is", "above 0"),
    ),
    "NaN in the header": (
        "acdc-nifti",
        FRAME,
        header("sform3", np.nan),
        ("patient001_frame01.nii", "affine", "repair the header"),
    ),
    "two patients with one id": (
        "acdc-nifti",
        FRAME,
        second_patient,
        ("have one id, patient001_frame01", "rename"),
    ),
    "one id twice": ("mmwhs-nifti", CT, same_id_twice, ("have one id, ct_1002", "rename or remove")),
    "case on both sides": ("synapse-transunet", SLICE, case_on_both_sides, ("have one id, case0005",)),
    "patient in another's folder": (
        "acdc-nifti",
        FRAME,
        in_foreign_folder,
        ("is a file of patient001 in the folder of patient002",),
    ),
    "empty folder": (
        "acdc-nifti",
        FRAME,
        emptied,
        ("fits no form", "nifti:", "ssl4mis:", "wsl4mis:", "holds nothing"),
    ),
    "mixed forms": ("acdc-wsl4mis", H5, mixed, ("several forms of ACDC, ssl4mis and wsl4mis", "set form")),
    "unknown file name": (
        "acdc-wsl4mis",
        H5,
        unknown_name,
        ("patient001-frame1.h5: the name is not of the form",),
    ),
    "wrong key": (
        "acdc-wsl4mis",
        H5,
        rewrite(label=None, gt=lambda old: old["label"]),
        (H5, "has the keys gt, image, scribble", "image/label"),
    ),
    "group for an array": ("acdc-wsl4mis", H5, group_for_array, (H5, "'image' is a group, not an array")),
    "unreadable HDF5": ("acdc-wsl4mis", H5, text("no HDF5"), (H5, "cannot be read as HDF5")),
    "truncated HDF5": ("acdc-wsl4mis", H5, cut(""), (H5, "cannot be read as HDF5", "replace the file")),
    "truncated npz": ("synapse-transunet", SLICE, cut(""), (SLICE, "cannot be read as npz")),
    "npz without arr_1": (
        "mmwhs-adaptation",
        "ct_train_slice1.npz",
        rewrite(arr_1=None),
        ("ct_train_slice1.npz has the keys arr_0", "arr_0/arr_1"),
    ),
    "values that are not prepared": (
        "acdc-wsl4mis",
        H5,
        rewrite(image=lambda a: a * 255),
        (H5, "values from 0 to 255", "set rescale"),
    ),
    "values that are not standardised": (
        "mmwhs-adaptation",
        "ct_test_1003.npz",
        rewrite(arr_0=lambda a: a * 500),
        ("ct_test_1003.npz has values from", "outside -2.8 to 3.2", "set rescale"),
    ),
    "swapped axes of npz": (
        "mmwhs-adaptation",
        "ct_test_1003.npz",
        rewrite(arr_0=lambda a: a.transpose(2, 0, 1), arr_1=lambda a: a.transpose(2, 0, 1)),
        ("ct_test_1003.npz: axes are swapped, the volume has 28 slices of 6 × 32",),
    ),
    "swapped axes of square npz": (
        "mmwhs-adaptation",
        "ct_test_1003.npz",
        rewrite(**{f"arr_{k}": lambda a: np.repeat(a[:28], 4, 2).transpose(2, 0, 1) for k in (0, 1)}),
        ("ct_test_1003.npz: axes are swapped, its slices would have 24 × 28",),
    ),
    "TensorFlow's records": (
        "mmwhs-adaptation",
        "",
        records,
        (
            "fits no form of MM-WHS",
            "It holds ct_train_slice0.tfrecords. TensorFlow's records are not read",
            "npz",
        ),
    ),
    "unknown case in a list": (
        "acdc-wsl4mis",
        H5,
        lists(train="patient001\npatient099_frame01\n", val="patient002"),
        ("train.txt", "'patient099_frame01'"),
    ),
    "unknown slice in a list": (
        "acdc-wsl4mis",
        H5,
        lists(train="patient001_frame01_slice_9\n", val="patient002"),
        (H5, "slice 9 of patient001_frame01", "0 to 5"),
    ),
    "line twice in a list": (
        "acdc-wsl4mis",
        H5,
        lists(train="patient001\npatient001_frame01\n", val="patient002"),
        ("train.txt", "'patient001_frame01' is in the list already"),
    ),
    "empty list": ("acdc-wsl4mis", H5, lists(train="\n", val="patient002"), ("train.txt is empty",)),
    "missing list": ("acdc-wsl4mis", H5, lists(train="patient001"), ("val.txt does not exist",)),
    "no published list": ("acdc-ssl4mis", "val.list", remove(""), ("val.list does not exist",)),
}
OPTIONS = {
    "acdc-ssl4mis": PUBLISHED,
    "synapse-transunet": PUBLISHED,
    "mmwhs-adaptation": FOUR,
}
EVEN = {"fractions": {"train": 0.6, "val": 0.2, "test": 0.2}}


def read(root, key, name, cache):
    options = OPTIONS.get(key, {})
    if "list" in name and not options:
        options = LISTS
    elif not options:
        options = EVEN
    source = SOURCES[key.split("-")[0]](str(root), size=SIZE, cache=str(cache), **options)
    return source.dataset("train")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_sets_are_refused(intact, tmp_path, name):
    key, stem, damage, fragments = BROKEN[name]
    root = tmp_path / "set"
    shutil.copytree(intact(key), root)
    damage(root, stem)
    pattern = "(?s)" + ".*".join(re.escape(each) for each in fragments)
    with pytest.raises(InputError, match=pattern) as refused:
        read(root, key, name, tmp_path / "cache")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", sorted({key for key, *_ in BROKEN.values()}))
def test_the_same_sets_are_read_when_they_are_whole(intact, tmp_path, key):
    assert len(read(intact(key), key, "", tmp_path)) > 0


def test_missing_slices_of_a_pile_are_said(intact, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(intact("mmwhs-adaptation"), root)
    (root / "ct_train_slice2.npz").unlink()
    with pytest.warns(UserWarning, match=r"1 slices are missing between ct_train_slice0.npz .* number 2"):
        read(root, "mmwhs-adaptation", "", tmp_path / "cache")


def test_every_kind_has_its_own_message(intact, tmp_path):
    assert len(BROKEN) >= 20
    assert len({fragments for *_, fragments in BROKEN.values()}) == len(BROKEN)


PAIRS = {"a": Pair("img/img0005.nii.gz", "label/label0005.nii.gz")}


@pytest.mark.parametrize(
    ("dataset", "form", "options", "message"),
    [
        ("acdc", "nifti", {"form": "dicom"}, "form is 'dicom'; those of ACDC are nifti, ssl4mis, wsl4mis"),
        ("acdc", "nifti", {"form": "wsl4mis"}, "fits no form .* It holds testing/, training/"),
        ("acdc", "nifti", {"size": 0}, "size is"),
        ("acdc", "nifti", {"channels": 2}, "channels is 2"),
        ("acdc", "nifti", {"n_train": 0}, "n_train is 0"),
        ("acdc", "nifti", {"n_train": 9}, "n_train is 9; train has 3 patients"),
        ("acdc", "nifti", {"seed": -1}, "seed is -1"),
        ("acdc", "nifti", {"fractions": {"train": 1.0}}, "fractions has no val"),
        ("acdc", "nifti", {"fractions": {"train": 0.8, "val": 0.8}}, "fractions sum to 1.6"),
        ("acdc", "nifti", {"fractions": {"train": 0.8, "val": 0.05}}, "no patient of acdc falls to val"),
        ("acdc", "nifti", {"fractions": {"train": 0.9, "val": 0}}, "val is 0"),
        ("acdc", "nifti", {"lists": {"train": "a"}}, "lists has no val"),
        ("acdc", "nifti", {"lists": {"train": "a"}, "split": "published"}, "set one of the two"),
        ("acdc", "wsl4mis", {"spacing": (0, 1, 1)}, r"spacing is \(0, 1, 1\) mm"),
        ("acdc", "nifti", {"tests": {"val": ACDCTest()}}, "'val' is the name of another split"),
        ("acdc", "nifti", {"tests": {"x": ACDCTest(root="/nowhere")}}, "/nowhere is not a folder"),
        ("acdc", "nifti", {"tests": {"x": ACDCTest(form="nifti")}}, "form is given without root"),
        ("acdc", "nifti", {"where": {"Group": ["XYZ"]}}, "has Group 'XYZ'"),
        ("mmwhs", "nifti", {"modality": "pet"}, "modality is 'pet'"),
        (
            "mmwhs",
            "nifti",
            {"tests": {"mr": MMWHSTest(root=".", modality="mr")}},
            "tests: mr: . fits no form",
        ),
        ("mmwhs", "nifti", {"structures": ["liver"]}, "'liver' is none of myocardium"),
        ("mmwhs", "nifti", {"structures": ["myocardium"] * 2}, "each once"),
        ("mmwhs", "adaptation", {}, "have no right atrium"),
        ("mmwhs", "adaptation", {"structures": FOUR["structures"]}, "tells no patient"),
        ("synapse", "btcv", {"pairs": PAIRS, "label_map": "atlas"}, "label_map is 'atlas'"),
        ("synapse", "btcv", {"pairs": {"a": Pair("no.nii", "no.nii")}}, "no.nii does not exist"),
        ("synapse", "btcv", {"tests": {"x": SynapseTest(cases=["case0099"])}}, "'case0099'"),
    ],
)
def test_arguments_out_of_range_are_refused(intact, tmp_path, dataset, form, options, message):
    with pytest.raises(InputError, match=message):
        SOURCES[dataset](str(intact(f"{dataset}-{form}")), cache=str(tmp_path), **EVEN | options)


def test_no_folder():
    with pytest.raises(InputError, match="/nowhere is not a folder"):
        ACDCSource("/nowhere")
