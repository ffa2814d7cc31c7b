"""Every reader on its phantom twin and, where it is at hand, on the real set."""

import ast
import itertools
import json
import os
import pickle
import re
import shutil
import threading
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

import cli
from datamodules.sources import (
    ACDCSource,
    ACDCTest,
    MMWHSSource,
    MMWHSTest,
    Source,
    SynapseSource,
    SynapseTest,
    Volume,
    acdc,
    mmwhs,
    synapse,
    volume_cache,
    volumes,
)
from datamodules.sources.synapse import Pair
from datamodules.sources.volume_files import read_nifti
from datamodules.twins import DEPTH, FORMS, SPACING, twin_volume, write_nifti, write_twin
from errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("DATA_ROOT", REPOSITORY / ".." / "shared" / "data"))
SIZE = (32, 28)
CASES = 10
SOURCES = {"acdc": ACDCSource, "synapse": SynapseSource, "mmwhs": MMWHSSource}
FOUR = list(mmwhs.ADAPTATION[1:])
LEVEL = 2 / 65535


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Return a function that writes a twin once and returns its folder."""
    root = tmp_path_factory.mktemp("twins")

    def folder(dataset, form):
        path = root / f"{dataset}_{form}"
        return path if path.exists() else write_twin(dataset, form, path, CASES, SIZE[0])

    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def build(twins, cache):
    """Return a function that makes the source of a twin, without resizing."""

    def make(dataset, form, **options):
        options = {"size": SIZE, "cache": cache} | options
        if form == "adaptation":
            options = {"structures": FOUR, "split": "published"} | options
        return SOURCES[dataset](str(twins(dataset, form)), **options)

    return make


def refused(*fragments):
    """Expect an InputError whose message has all fragments in order."""
    return pytest.raises(InputError, match="(?s)" + ".*".join(re.escape(str(part)) for part in fragments))


def samples(source):
    """Every sample of the source with its split and index."""
    return [(name, k, each) for name in source.splits for k, each in enumerate(source.dataset(name))]


def patients(source, split):
    return {re.split(r"_frame|_slice", sample["id"])[0] for sample in source.dataset(split)}


def scaled(image, low, high):
    return (np.clip(image, low, high) - low) / (high - low) * 2 - 1


def acdc_truth(case):
    patient, frame = int(case[7:10]) - 1, case[-2:]
    twin = twin_volume("acdc", patient, SIZE[0], variant=int(frame == "09"))
    image = twin.image.astype(float)
    return scaled(image, image.min(), np.percentile(image, 99)), twin.label


def synapse_truth(case):
    numbers = ("0005", "0006", "0007", "0009", "0010", "0021", "0001", "0002", "0003", "0004")
    order = [f"case{number}" for number in numbers]
    twin = twin_volume("synapse", order.index(case), SIZE[0])
    return scaled(twin.image.astype(float), -125, 275), twin.label


def mmwhs_truth(case):
    modality, number = case.split("_")
    twin = twin_volume("mmwhs", int(number) - 1001, SIZE[0], variant=int(modality == "mr"))
    image = twin.image.astype(float)
    low, high = {"ct": (-2.8, 3.2), "mr": (-1.8, 4.4)}[modality]
    return scaled((image - image.mean()) / image.std(), low, high), twin.label


TRUTH = {"acdc": acdc_truth, "synapse": synapse_truth, "mmwhs": mmwhs_truth}


def assert_equals_truth(source, dataset, first=0):
    for split, index, sample in samples(source):
        case, number = sample["id"].split("_slice_")
        image, label = TRUTH[dataset](case)
        position = int(number) - first
        assert np.abs(sample["image"][0].numpy() - image[position]).max() < LEVEL, sample["id"]
        assert np.array_equal(sample["mask"].numpy(), label[position]), sample["id"]
        volume = source.volume(split, index)
        assert (volume.case, volume.slice, volume.slices) == (case, position, DEPTH)


# --------------------------------------------------------------------------- readers and forms


@pytest.mark.parametrize(
    ("dataset", "form"), [key for key in FORMS if key[1] != "adaptation" and key[0] in SOURCES]
)
def test_samples_equal_what_was_written(build, dataset, form):
    source = build(dataset, form)
    assert source.form.name == form
    assert_equals_truth(source, dataset, first=int(form == "ssl4mis"))
    sample = source.dataset("train")[0]
    assert sample["image"].shape == (1, *SIZE)
    assert sample["image"].dtype == torch.float32
    assert sample["mask"].dtype == torch.int64
    assert sum(len(source.dataset(name)) for name in source.splits) == len(samples(source))


def test_mr_of_mmwhs(build):
    source = build("mmwhs", "nifti", modality="mr")
    assert source.name == "mmwhs-mr"
    assert source.class_names == mmwhs.CLASS_NAMES
    assert_equals_truth(source, "mmwhs")


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_prepared_mmwhs(build, modality):
    """Slices without patients by side; volumes turned as the slices lie."""
    source = build("mmwhs", "adaptation", modality=modality)
    assert source.class_names == mmwhs.ADAPTATION
    assert [len(source.dataset(name)) for name in source.splits] == [7 * 4, 4, 2 * DEPTH]
    assert source.volume("train", 0) is None
    variant = int(modality == "mr")
    table = np.array([0, 1, 2, 3, 0, 0, 4, 0])
    for split, first in (("test", 0), ("val", 2), ("train", 3)):
        twin = twin_volume("mmwhs", first, SIZE[0], variant=variant)
        image = twin.image.astype(float)
        image = scaled((image - image.mean()) / image.std(), *mmwhs.WINDOWS[modality])
        sample, position = source.dataset(split)[2], 2 if split == "test" else 3
        assert np.abs(sample["image"][0].numpy() - image[position]).max() < LEVEL
        assert np.array_equal(sample["mask"].numpy(), table[twin.label[position]])
    volume = source.volume("test", DEPTH + 1)
    assert (volume.case, volume.slice) == (f"{modality}_{mmwhs.TEST_CASES[modality][1]}", 1)


def test_headers_of_numpy_are_read_one_by_one(build, tmp_path, monkeypatch):
    """Two threads in ``ast`` at once are more than Python 3.11 takes."""
    inside, most, parse = [], [], ast.literal_eval

    def slow(text):
        inside.append(text)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return parse(text)

    monkeypatch.setattr(ast, "literal_eval", slow)
    source = build("mmwhs", "adaptation", modality="ct", cache=str(tmp_path))
    assert len(source.dataset("test")) == 2 * DEPTH
    assert len(most) > 20
    assert max(most) == 1


def test_slices_alone_equal_volumes(build, twins, tmp_path, cache):
    for form, folders in (("ssl4mis", ("data",)), ("wsl4mis", ("ACDC_training_volumes",))):
        whole = tmp_path / form
        shutil.copytree(twins("acdc", form), whole)
        for folder in folders:
            for path in (whole / folder).glob("*.h5"):
                path.unlink()
        alone = ACDCSource(str(whole), size=SIZE, cache=cache)
        for a, b in zip(samples(alone), samples(build("acdc", form)), strict=True):
            assert torch.equal(a[2]["image"], b[2]["image"])
            assert torch.equal(a[2]["mask"], b[2]["mask"])


def test_swin_unets_keys_are_known(twins, tmp_path, cache, build):
    root = tmp_path / "set"
    shutil.copytree(twins("synapse", "transunet"), root)
    for path in (root / "train_npz").glob("*.npz"):
        with np.load(path) as file:
            arrays = {"data": file["image"], "seg": file["label"]}
        np.savez(path, **arrays)
    other = SynapseSource(str(root), size=SIZE, cache=cache)
    assert torch.equal(
        other.dataset("train")[7]["image"], build("synapse", "transunet").dataset("train")[7]["image"]
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_size_spacing_and_channels(build, channels):
    """Resized as torch resizes, with antialiasing; pixels grow as slices shrink."""
    full = build("acdc", "nifti").dataset("val")
    source = build("acdc", "nifti", size=(16, 20), channels=channels)
    for k, sample in enumerate(source.dataset("val")):
        image, mask = full[k]["image"][None], full[k]["mask"][None, None].float()
        wanted = torch.nn.functional.interpolate(image, (16, 20), mode="bilinear", antialias=True)
        assert (sample["image"] - wanted[0]).abs().max() < 1e-4
        assert sample["image"].shape == (channels, 16, 20)
        nearest = torch.nn.functional.interpolate(mask, (16, 20), mode="nearest-exact")
        assert torch.equal(sample["mask"], nearest[0, 0].long())
    spacing = source.volume("val", 0).spacing
    assert spacing == pytest.approx((10.0, 1.5 * 2, 1.25 * 28 / 20), rel=1e-6)


def test_spacing_of_forms_that_do_not_tell(build):
    assert build("acdc", "wsl4mis").volume("test", 0).spacing is None
    source = build("acdc", "wsl4mis", spacing=(10, 1.5, 1.25), size=16)
    assert source.volume("test", 0) == Volume("patient009_frame01", 0, DEPTH, (10.0, 3.0, 1.25 * 28 / 16))
    for dataset in SPACING:
        form = {"acdc": "nifti", "synapse": "btcv", "mmwhs": "nifti"}[dataset]
        assert build(dataset, form).volume("val", 0).spacing == pytest.approx(SPACING[dataset], rel=1e-6)


def test_rescale_applies_the_rule_to_prepared_files(build, twins, tmp_path, cache):
    root = tmp_path / "set"
    shutil.copytree(twins("acdc", "wsl4mis"), root)
    for path in (root / "ACDC_training_volumes").glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file["image"][...] = file["image"][()] * 700 + 20
    with refused("_frame", "20 to 720", "set rescale to true"):
        ACDCSource(str(root), size=SIZE, cache=cache).dataset("train")
    source = ACDCSource(str(root), size=SIZE, cache=cache, rescale=True)
    image = np.concatenate([sample["image"].numpy() for sample in source.dataset("train")][:DEPTH])
    assert (image.min(), image.max()) == (-1, 1)


def test_stray_label_of_mmwhs(twins, tmp_path, cache, build):
    root = tmp_path / "set"
    shutil.copytree(twins("mmwhs", "nifti"), root)
    path = root / "ct_train" / "ct_train_1003_label.nii.gz"
    file = nibabel.load(path)
    label = np.asarray(file.dataobj).copy()
    label[label == 420] = 421
    nibabel.save(nibabel.Nifti1Image(label, file.affine), path)
    with refused(path, "label 421", "set stray to true"):
        MMWHSSource(str(root), size=SIZE, cache=cache).dataset("train")
    source = MMWHSSource(str(root), size=SIZE, cache=cache, stray=True)
    assert_equals_truth(source, "mmwhs")


# -------------------------------------------------------------------------------- orientation


CODES = [
    "".join(code) for axes in itertools.permutations(("LR", "PA", "SI")) for code in itertools.product(*axes)
]


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_every_orientation_on_disk_reads_alike(tmp_path, plane):
    """Values are world positions, so that what lies where is known in closed form."""
    shape, steps = (3, 4, 5), (2.0, 0.5, 0.25)  # slices to the head, rows to the back, columns to the left
    head, back, left = np.meshgrid(*[np.arange(n, dtype=np.int16) for n in shape], indexing="ij")
    volume = (100 * head + 10 * back + left).astype(np.int16)
    wanted = {
        "axial": (volume, steps),
        "coronal": (volume[::-1].transpose(1, 0, 2), (steps[1], steps[0], steps[2])),
        "sagittal": (volume[::-1].transpose(2, 0, 1), (steps[2], steps[0], steps[1])),
    }[plane]
    assert len(CODES) == 48
    for code in CODES:
        files = [tmp_path / f"{code}_{kind}.nii" for kind in ("image", "label")]
        for file in files:
            write_nifti(file, volume, steps, code)
        raw = read_nifti(*files, plane=plane)
        assert np.array_equal(raw.image, wanted[0]), code
        assert np.array_equal(raw.label, wanted[0]), code
        assert raw.spacing == pytest.approx(wanted[1])


def test_stored_plane_is_the_third_axis(tmp_path):
    volume = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    for kind in ("image", "label"):
        write_nifti(tmp_path / f"{kind}.nii", volume, (2.0, 0.5, 0.25), "LSP")
    raw = read_nifti(tmp_path / "image.nii", tmp_path / "label.nii", "stored")
    coronal = read_nifti(tmp_path / "image.nii", tmp_path / "label.nii", "coronal")
    assert np.array_equal(raw.image, coronal.image)
    assert raw.image.shape == (4, 3, 5)


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1e-3), ("micron", 1e3), ("mm", 1), ("unknown", 1)])
def test_units_of_the_header(tmp_path, unit, scale):
    """Spacing is in mm whatever the header counts in, and so are the affines that are compared."""
    volume = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    write_nifti(tmp_path / "label.nii", volume, (2.0, 0.5, 0.25))
    file = nibabel.load(tmp_path / "label.nii")
    image = nibabel.Nifti1Image(np.asarray(file.dataobj), np.diag([scale] * 3 + [1]) @ file.affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "image.nii")
    raw = read_nifti(tmp_path / "image.nii", tmp_path / "label.nii", "axial")
    assert raw.spacing == pytest.approx((2.0, 0.5, 0.25))


def test_folders_of_acdc_in_other_letters(build, twins, tmp_path, cache):
    root = tmp_path / "set"
    shutil.copytree(twins("acdc", "nifti"), root)
    (root / "training").rename(root / "Training")
    source = ACDCSource(str(root), size=SIZE, cache=cache, split="published")
    assert patients(source, "train") == patients(build("acdc", "nifti", split="published"), "train")


def test_oblique_volumes_take_the_nearest_axes(tmp_path):
    volume = np.arange(1, 61, dtype=np.int16).reshape(3, 4, 5)
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.25, -0.5, 2.0])
    file = nibabel.Nifti1Image(volume.transpose(2, 1, 0), affine)
    for name, code in (("a", "LPS"), ("b", "RAI")):
        turned = file.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(code)))
        nibabel.save(turned, tmp_path / f"{name}.nii")
        raw = read_nifti(tmp_path / f"{name}.nii", tmp_path / f"{name}.nii", "axial")
        assert np.array_equal(raw.image, volume)
        assert raw.spacing == pytest.approx((2.0, 0.5, 0.25))


# ------------------------------------------------------------------------------ splits and leaks


def test_patients_stay_together_and_the_split_depends_on_the_seed_alone(build):
    source = build("acdc", "nifti")
    found = [patients(source, name) for name in source.splits]
    assert [len(each) for each in found] == [7, 1, 2]
    assert not found[0] & found[1] | found[0] & found[2] | found[1] & found[2]
    again, other = build("acdc", "ssl4mis"), build("acdc", "ssl4mis", seed=1)
    assert patients(again, "train") == found[0] != patients(other, "train")
    few = [patients(build("acdc", "nifti", n_train=n), "train") for n in (1, 3)]
    assert len(few[0]) == 1
    assert few[0] < few[1] < found[0]


def test_published_splits(build):
    sides = build("acdc", "nifti", split="published")
    assert patients(sides, "test") == {"patient008", "patient009", "patient010"}
    assert [len(patients(sides, name)) for name in ("train", "val")] == [6, 1]
    lists = build("acdc", "ssl4mis", split="published")
    assert patients(lists, "train") == {f"patient{n:03d}" for n in range(1, 8)}
    assert patients(lists, "val") == {"patient008"}
    tests = {f"case{n}" for n in ("0001", "0002", "0003", "0004")}
    for form in ("transunet", "btcv"):
        assert patients(build("synapse", form, split="published"), "test") == tests
    assert len(synapse.TEST_CASES) == 12
    mr = build("mmwhs", "nifti", modality="mr", split="published")
    assert patients(mr, "test") == {"mr_1007", "mr_1009"}
    with refused("no published split", "wsl4mis", "set split to random"):
        build("acdc", "wsl4mis", split="published")


def test_lists_name_patients_cases_or_slices(build, twins):
    root = twins("acdc", "wsl4mis")
    (root / "a.txt").write_text("patient001\npatient002_frame01.h5\n")
    (root / "b.txt").write_text("patient003_frame01_slice_4.h5\nslices/patient003_frame01_slice_2\n\n")
    (root / "c.txt").write_text("patient004_frame09\n", encoding="utf-8-sig")
    source = build("acdc", "wsl4mis", lists={"train": "a.txt", "val": "b.txt", "test": "c.txt"})
    assert [len(source.dataset(name)) for name in source.splits] == [3 * DEPTH, 2, DEPTH]
    assert [each["id"][-3:] for each in source.dataset("val")] == ["002", "004"]
    assert source.volume("val", 1) == Volume("patient003_frame01", 1, 2, None)


def test_slices_without_a_label_can_be_dropped_from_train(build, twins, tmp_path, cache):
    root = tmp_path / "set"
    shutil.copytree(twins("acdc", "wsl4mis"), root)
    for path in (root / "ACDC_training_volumes").glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file["label"][0] = 0
    whole, dropped = (ACDCSource(str(root), size=SIZE, cache=cache, drop_empty=d) for d in (False, True))
    assert len(whole.dataset("train")) == 14 * DEPTH
    assert len(dropped.dataset("train")) == 14 * (DEPTH - 1)
    assert len(dropped.dataset("test")) == 4 * DEPTH
    assert all(sample["mask"].any() for sample in dropped.dataset("train"))


def test_a_patient_in_two_lists_is_a_leak(build, twins):
    root = twins("acdc", "wsl4mis")
    (root / "x.txt").write_text("patient001_frame01\npatient002\n")
    (root / "y.txt").write_text("patient001_frame09\n")
    with refused("leakage: patient patient001", "train", "val"):
        build("acdc", "wsl4mis", lists={"train": "x.txt", "val": "y.txt"})
    (root / "y.txt").write_text("patient005\n")
    (root / "z.txt").write_text("patient002_frame09\n")
    with refused("leakage: patient patient002", "in train", "in test"):
        build("acdc", "wsl4mis", lists={"train": "x.txt", "val": "y.txt", "test": "z.txt"})


@pytest.mark.parametrize("count", [1, DEPTH], ids=["one slice", "a volume"])
def test_an_image_under_another_name_is_a_leak(build, twins, tmp_path, cache, count):
    root = tmp_path / "set"
    shutil.copytree(twins("acdc", "wsl4mis"), root)
    source = build("acdc", "wsl4mis")
    learnt, tested = sorted(patients(source, "train"))[0], sorted(patients(source, "test"))[0]
    folder = root / "ACDC_training_volumes"
    with (
        h5py.File(folder / f"{learnt}_frame01.h5") as a,
        h5py.File(folder / f"{tested}_frame09.h5", "r+") as b,
    ):
        b["image"][:count] = a["image"][:count]
    with refused("leakage: an image of", tested, "in test", learnt, "in train"):
        ACDCSource(str(root), size=SIZE, cache=cache).dataset("train")


ALTERED = {
    "rounded": lambda a: a.astype(np.float16).astype(a.dtype),
    "mirrored": lambda a: a[..., ::-1],
    "turned": lambda a: a.swapaxes(1, 2)[:, ::-1],
    "brighter": lambda a: a * 0.8 + 0.1,
}


@pytest.mark.parametrize("altered", ALTERED)
def test_a_volume_that_is_nearly_one_of_training_is_a_leak(build, twins, tmp_path, cache, altered):
    root = tmp_path / "set"
    shutil.copytree(twins("acdc", "wsl4mis"), root)
    source = build("acdc", "wsl4mis")
    learnt, tested = sorted(patients(source, "train"))[0], sorted(patients(source, "test"))[0]
    folder = root / "ACDC_training_volumes"
    with h5py.File(folder / f"{learnt}_frame01.h5") as file:
        arrays = {key: ALTERED[altered](file[key][()]) for key in ("image", "label")}
    with h5py.File(folder / f"{tested}_frame09.h5", "w") as file:
        arrays["label"] = np.rint(np.clip(arrays["label"], 0, 3))
        for key, array in arrays.items():
            file[key] = array
    with refused("leakage:", tested, "in test is nearly the same as", learnt, "in train, 6 of 6 slices"):
        ACDCSource(str(root), size=32, cache=cache).dataset("train")


def test_a_test_set_elsewhere_that_holds_training_images_is_a_leak(build, twins, tmp_path):
    root = tmp_path / "elsewhere"
    shutil.copytree(twins("acdc", "nifti") / "training", root / "training")
    for folder in sorted((root / "training").iterdir(), reverse=True):
        name = f"patient1{folder.name[-2:]}"
        for path in folder.glob("*.nii.gz"):
            path.rename(folder / path.name.replace(folder.name, name))
        folder.rename(folder.with_name(name))
    source = build("acdc", "nifti", tests={"other": ACDCTest(root=str(root))})
    with refused("leakage: an image of patient1", "in other"):
        source.dataset("train")


@pytest.mark.parametrize(
    ("dataset", "form", "other"), [("acdc", "nifti", "wsl4mis"), ("synapse", "transunet", "btcv")]
)
def test_a_patient_in_a_test_set_elsewhere_is_a_leak(build, twins, dataset, form, other):
    """By its name, however the images were prepared; unless it is said that these are others."""
    kind = ACDCTest if dataset == "acdc" else SynapseTest
    root = str(twins(dataset, other))
    for n_train in (None, 1):
        with refused("leakage: patient", "in x", "other_patients"):
            build(dataset, form, tests={"x": kind(root=root)}, n_train=n_train)

    def names(split, **options):
        source = build(dataset, form, tests={"x": kind(root=root, **options)})
        return {item.part.case.patient for item in source._items[split]}

    assert len(names("x", other_patients=True)) == CASES
    held_out = names("test", other_patients=True)
    assert names("x", cases=sorted(held_out)) == held_out


# ------------------------------------------------------------------------------- cross-domain


def test_acdc_by_pathology(build):
    tests = {name.lower(): ACDCTest(where={"Group": [name]}) for name in ("HCM", "RV")}
    fractions = {"train": 0.6, "val": 0.2, "test": 0.2}
    where = {"Group": ["NOR", "DCM", "MINF"]}
    source = build("acdc", "nifti", where=where, tests=tests, fractions=fractions)
    assert source.splits == ("train", "val", "test", "hcm", "rv")
    assert patients(source, "hcm") == {"patient003", "patient008"}
    assert patients(source, "rv") == {"patient005", "patient010"}
    few = build("acdc", "nifti", where=where, tests=tests, fractions=fractions, n_train=1)
    assert patients(few, "hcm") == patients(source, "hcm")
    all_test = build("acdc", "nifti", tests={"hcm": ACDCTest(where={"Group": ["HCM"]})}, split="published")
    assert patients(all_test, "hcm") == {"patient008"}  # patient003 is learnt from
    with refused("tests: x", "has Group 'XYZ'", "they have DCM, MINF"):
        build("acdc", "nifti", tests={"x": ACDCTest(where={"Group": ["XYZ"]})})
    with refused("tests: x", "no Info.cfg", "tells Vendor"):
        build("acdc", "nifti", tests={"x": ACDCTest(where={"Vendor": ["A"]})})
    with refused("tests: x", "no Info.cfg", "tells Group"):
        build("acdc", "wsl4mis", tests={"x": ACDCTest(where={"Group": ["HCM"]})})


@pytest.mark.parametrize(("here", "there"), [("ct", "mr"), ("mr", "ct")])
def test_mmwhs_from_one_modality_to_the_other(build, twins, here, there):
    other = MMWHSTest(modality=there)
    source = build("mmwhs", "nifti", modality=here, tests={there: other})
    assert source.splits == ("train", "val", "test", there)
    assert patients(source, there) == {f"{there}_{1001 + k}" for k in range(CASES)}
    assert all(name.startswith(here) for name in patients(source, "test"))
    assert_equals_truth(source, "mmwhs")


def test_some_cases_of_another_set(build, twins):
    root = str(twins("mmwhs", "nifti"))
    test = MMWHSTest(root=root, modality="mr", cases=["mr_1007"])
    assert patients(build("mmwhs", "nifti", tests={"mr": test}), "mr") == {"mr_1007"}
    with refused("tests: mr", "'mr_1077'"):
        build("mmwhs", "nifti", tests={"mr": MMWHSTest(root=root, modality="mr", cases=["mr_1077"])})


def test_a_row_for_each_test_set_from_the_command_line(twins, cache, tmp_path):
    """Fit and test on CT, test on MR: one ``test`` run, from the shipped configuration."""
    root = twins("mmwhs", "nifti")
    configs = REPOSITORY / "configs"
    files = ["stages/segmenter", "data/mmwhs_ct", "segmenters/nnunet_rgb32"]
    source, network = "--data.init_args.source.init_args", "--model.init_args.segmenter.init_args"
    common = [
        *(f"--config={configs / file}.yaml" for file in files),
        f"{source}.root={root}",
        f"{source}.size=32",
        f"{source}.cache={cache}",
        f"{network}.in_channels=1",
        f"{network}.num_classes=8",
        "--trainer.accelerator=cpu",
        "--data.init_args.batch_size=4",
    ]
    fit = [f"--trainer.default_root_dir={tmp_path / 'fit'}", "--trainer.max_steps=2"]
    cli.main(["fit", *common, *fit, "--data.init_args.steps_per_epoch=2"])
    weights = f"--model.init_args.weights={tmp_path / 'fit' / 'weights'}"
    cli.main(["test", *common, weights, f"--trainer.default_root_dir={tmp_path / 'test'}"])
    found = json.loads((tmp_path / "test" / "test.json").read_text())
    rows = json.dumps(found)
    assert '"test"' in rows
    assert '"mr"' in rows


# -------------------------------------------------------------------------------------- cache


def test_volumes_are_decoded_once(build, tmp_path, monkeypatch, twins):
    root, cache = tmp_path / "set", tmp_path / "cache"
    shutil.copytree(twins("acdc", "nifti"), root)
    decoded = []
    read = volumes.read_nifti
    monkeypatch.setattr(
        volumes, "read_nifti", lambda image, *a: decoded.append(image.name) or read(image, *a)
    )

    def made(**options):
        decoded.clear()
        ACDCSource(str(root), cache=str(cache), **{"size": SIZE} | options).dataset("val")
        return len(decoded)

    assert made() == 2 * CASES
    assert made() == 0
    assert made(size=16) == 2 * CASES
    path = root / "training" / "patient001" / "patient001_frame01_gt.nii.gz"
    os.utime(path, ns=(1, 1))
    assert made() == 1
    assert not list(cache.glob("*.partial"))


def test_affines_are_checked_also_where_the_cache_has_a_volume_of_other_options(twins, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(twins("acdc", "nifti"), root)
    path = root / "training" / "patient001" / "patient001_frame01_gt.nii.gz"
    file = nibabel.load(path)
    affine = file.affine.copy()
    affine[0, 3] += 500
    nibabel.save(nibabel.Nifti1Image(np.asarray(file.dataobj), affine), path)
    options = {"size": SIZE, "cache": str(tmp_path / "cache")}
    assert ACDCSource(str(root), check_affines=False, **options).dataset("train")
    with refused(path, "lies up to 500 mm away"):
        ACDCSource(str(root), **options).dataset("train")


DAMAGED = {
    "no facts": lambda entry: (entry / "facts.json").unlink(),
    "facts of another kind": lambda entry: (entry / "facts.json").write_text("{}"),
    "half a file": lambda entry: os.truncate(entry / "image.npy", 500),
    "an empty file": lambda entry: os.truncate(entry / "looks.npy", 0),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_entries_are_made_anew(tmp_path, damage):
    file = tmp_path / "a.bin"
    file.write_bytes(b"1")
    image = np.linspace(0, 1, 3 * 16 * 16, dtype=np.float32).reshape(3, 16, 16)

    def make():
        return volume_cache.resize(image, (image > 0.5).astype(np.uint8), None, (8, 8))

    cache = tmp_path / "cache"
    first = volume_cache.cached(cache, [file], "options", make)
    wanted = np.array(first.image)
    DAMAGED[damage](first.entry)
    assert np.array_equal(volume_cache.cached(cache, [file], "options", make).image, wanted)
    assert volume_cache.cached(cache, [file], "options", None).entry == first.entry
    assert len(list(cache.iterdir())) == 1


def test_slices_are_memory_mapped_also_in_another_process(build):
    source = build("acdc", "nifti")
    dataset = source.dataset("train")
    assert all(isinstance(slices.image, np.memmap) for _, slices in dataset._parts)
    packed = pickle.dumps(dataset)
    assert len(packed) < 100_000
    assert torch.equal(pickle.loads(packed)[5]["image"], dataset[5]["image"])


def test_two_processes_may_make_one_entry(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"1")
    barrier = threading.Barrier(2)
    image = np.linspace(0, 1, 3 * 16 * 16, dtype=np.float32).reshape(3, 16, 16)
    found = []

    def make():
        barrier.wait(10)
        return volume_cache.resize(image, (image > 0.5).astype(np.uint8), (1.0, 1.0, 1.0), (8, 8))

    def work():
        found.append(volume_cache.cached(tmp_path / "cache", [file], "options", make))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0].spacing == (1.0, 2.0, 2.0)
    assert np.array_equal(found[0].image, found[1].image)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert volume_cache.default_folder() == tmp_path / "native-adversarial-synthesis"
    (tmp_path / "file").write_text("")
    root = write_twin("acdc", "wsl4mis", tmp_path / "set", 5, 32)
    options = {"cache": str(tmp_path / "file"), "fractions": {"train": 0.6, "val": 0.2, "test": 0.2}}
    source = ACDCSource(str(root), **options)
    with refused("cannot be written", "set cache to a folder"):
        source.dataset("val")


# ----------------------------------------------------------------------------------- real images


REAL_ACDC = DATA / "ACDC" / "ACDC_training_volumes"
REAL_CT = DATA / "TotalSegmentator"


@pytest.mark.skipif(not REAL_ACDC.is_dir(), reason=f"no ACDC_training_volumes in {DATA}: set DATA_ROOT")
def test_real_acdc(tmp_path):
    source = ACDCSource(
        str(DATA / "ACDC"), form="wsl4mis", size=128, cache=str(tmp_path), spacing=(10, 1.5, 1.5)
    )
    files = sorted(REAL_ACDC.glob("*.h5"))
    names = {path.stem.split("_")[0] for path in files}
    found = [patients(source, name) for name in source.splits]
    assert set.union(*found) == names
    assert sum(map(len, found)) == len(names)
    depth, saturated = 0, []
    for path in files:
        with h5py.File(path) as file:
            depth += len(file["image"])
            saturated.append(float((file["image"][()] == 1).mean()))
    assert len(samples(source)) == depth
    assert 0.005 < np.mean(saturated) < 0.015  # the rule for raw files is what these files were made with
    classes = [sum((each["mask"] == k).sum().item() for _, _, each in samples(source)) for k in range(4)]
    assert min(classes) > 0
    first = source.volume("train", 0)
    assert first.spacing[0] == 10


@pytest.mark.skipif(
    not (REAL_CT / "example_seg.nii.gz").is_file(), reason=f"no TotalSegmentator in {DATA}: set DATA_ROOT"
)
def test_real_ct_has_all_organs_of_synapse(build, cache):
    pairs = {"example": Pair("example_ct_sm.nii.gz", "example_seg.nii.gz")}
    test = SynapseTest(root=str(REAL_CT), pairs=pairs, label_map="totalsegmentator")
    source = build("synapse", "btcv", size=128, tests={"ct": test})
    dataset = source.dataset("ct")
    mask = torch.stack([sample["mask"] for sample in dataset])
    assert mask.unique().tolist() == list(range(9))
    volume = source.volume("ct", 0)
    assert volume.slices == len(dataset) == 30
    assert volume.spacing == pytest.approx((3, 3 * 101 / 128, 3 * 122 / 128))
    points = {source.class_names[k]: (mask == k).nonzero().float().mean(0) for k in range(1, 9)}
    place = {name: (point[1], point[2]) for name, point in points.items()}
    assert place["liver"][1] < place["spleen"][1]  # the patient's right is on the left
    assert place["right kidney"][1] < place["aorta"][1] < place["left kidney"][1]
    assert place["stomach"][0] < place["left kidney"][0]  # the back is below


def test_label_maps_by_hand(build, tmp_path, cache):
    """A map of one's own names a structure for each value; a value that it does not know is an error."""
    volume = twin_volume("synapse", 0, 32)
    for k in range(5):
        each = twin_volume("synapse", k, 32)
        write_nifti(tmp_path / f"{k}_ct.nii.gz", each.image, each.spacing, "RAS")
        write_nifti(
            tmp_path / f"{k}_seg.nii.gz", np.where(each.label > 0, each.label + 40, 0), each.spacing, "RAS"
        )
    pairs = {f"p{k}": Pair(f"{k}_ct.nii.gz", f"{k}_seg.nii.gz") for k in range(5)}
    names = {0: "background"} | {40 + k: name for k, name in enumerate(synapse.CLASS_NAMES) if k}
    options = {
        "pairs": pairs,
        "size": SIZE,
        "cache": cache,
        "fractions": {"train": 0.6, "val": 0.2, "test": 0.2},
    }
    source = SynapseSource(str(tmp_path), label_map=names, **options)
    cases = {sample["id"]: sample for _, _, sample in samples(source)}
    assert np.array_equal(cases["p0_slice_002"]["mask"].numpy(), volume.label[2])
    with refused("label_map names no value for aorta"):
        SynapseSource(str(tmp_path), label_map={0: "background"}, **options)
    del names[45]
    names[99] = "liver"
    with refused("_seg.nii.gz has the label 45", "label_map"):
        SynapseSource(str(tmp_path), label_map=names, **options).dataset("train")


def test_the_same_images_may_have_the_labels_of_two_readers(build, tmp_path, cache):
    volume = twin_volume("synapse", 77, 32)
    write_nifti(tmp_path / "ct.nii.gz", volume.image, volume.spacing, "RAS")
    values = {"first": 1, "second": 6}  # spleen and liver of BTCV
    for reader, value in values.items():
        label = np.where(volume.label > 0, value, 0).astype(np.uint8)
        write_nifti(tmp_path / f"{reader}.nii.gz", label, volume.spacing, "RAS")
    tests = {
        reader: SynapseTest(
            root=str(tmp_path), pairs={"a": Pair("ct.nii.gz", f"{reader}.nii.gz")}, label_map="btcv"
        )
        for reader in values
    }
    source = build("synapse", "btcv", tests=tests)
    found = {
        reader: {k for sample in source.dataset(reader) for k in sample["mask"].unique().tolist()}
        for reader in values
    }
    names = {reader: [source.class_names[k] for k in sorted(found[reader])] for reader in values}
    assert names == {"first": ["background", "spleen"], "second": ["background", "liver"]}


def test_sources_from_yaml(twins, cache):
    """Pairs, label maps, spacings and conditions as a configuration file writes them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    pairs = {"a": {"image": "img/img0005.nii.gz", "label": "label/label0005.nii.gz"}}
    root = str(twins("synapse", "btcv"))
    names = {0: "background", 9: "vein"} | {
        value: synapse.CLASS_NAMES[k] for value, k in synapse.BTCV.classes if k
    }
    tests = {
        "named": {"root": root, "pairs": pairs, "label_map": "btcv"},
        "mapped": {"root": root, "pairs": pairs, "label_map": names},
        "prepared": {"root": str(twins("synapse", "transunet")), "cases": ["case0001"], "spacing": [3, 1, 1]},
    }
    tests["prepared"]["other_patients"] = True
    options = {"root": str(twins("synapse", "transunet")), "size": [16, 14], "cache": cache, "tests": tests}
    given = {"class_path": "SynapseSource", "init_args": options | {"spacing": [3, 0.75, 0.8]}}
    source = parser.instantiate_classes(parser.parse_object({"source": given})).source
    parts = source._items
    named, mapped = parts["named"][0].form, parts["mapped"][0].form
    assert named.labels == synapse.BTCV
    values = np.array([0, 1, 2, 3, 4, 6, 7, 8, 9, 11])
    assert np.array_equal(named.labels.apply(values, Path()), mapped.labels.apply(values, Path()))
    assert parts["prepared"][0].spacing == (3, 1, 1)
    assert parts["train"][0].spacing == (3, 0.75, 0.8)
    group = {"Group": ["MINF"]}
    options = {"root": str(twins("acdc", "nifti")), "cache": cache, "tests": {"minf": {"where": group}}}
    given = {"class_path": "ACDCSource", "init_args": options}
    source = parser.instantiate_classes(parser.parse_object({"source": given})).source
    assert [item.part.case.info["Group"] for item in source._items["minf"]] == ["MINF"] * 2


def test_label_values_are_the_true_ones():
    assert mmwhs.STRUCTURES == {
        205: "myocardium",
        420: "left atrium",
        500: "left ventricle",
        550: "right atrium",
        600: "right ventricle",
        820: "ascending aorta",
        850: "pulmonary artery",
    }
    values = {value: k for value, k in synapse.BTCV.classes if k}
    assert [values[v] for v in (8, 4, 3, 2, 6, 11, 1, 7)] == [1, 2, 3, 4, 5, 6, 7, 8]
    for labels, in_order in (
        (synapse.TOTALSEGMENTATOR, (52, 4, 3, 2, 5, 7, 1, 6)),
        (synapse.TOTALSEGMENTATOR_V1, (7, 4, 3, 2, 5, 10, 1, 6)),
    ):
        values = {value: k for value, k in labels.classes if k}
        assert [values[v] for v in in_order] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert acdc.CLASS_NAMES == ("background", "right ventricle", "myocardium", "left ventricle")
