"""What was made from images is made again when these change."""

import shutil

import pytest
from PIL import Image

from datamodules import twins
from errors import InputError
from workflow.data import SOURCE, check_splits, fingerprint
from workflow.experiment import read
from workflow.plan import Plan


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    for i in range(10):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.new(mode, (32, 32 + i)).save(folder / kind / f"{i}.png")
    monkeypatch.setenv("DATA_ROOT", str(folder))
    return folder


def stage(file="own", **arguments):
    files = ("stages/segmenter", f"data/{file}", "segmenters/nnunet_rgb64")
    return {
        "configs": [f"configs/{name}.yaml" for name in files],
        "arguments": {f"{SOURCE}.init_args.{key}": value for key, value in arguments.items()},
    }


@pytest.fixture
def once(monkeypatch):
    """Look at the files each time: a run of the workflow looks once."""
    monkeypatch.setattr("workflow.data._read", fingerprint.__globals__["_read"].__wrapped__)


def test_phantoms_have_none_and_need_no_folder():
    assert fingerprint(stage("phantom_longtail32")) == fingerprint({"configs": []}) == ""


def test_it_is_of_the_files_and_not_of_their_place(root, once, tmp_path, monkeypatch):
    first = fingerprint(stage())
    assert first == fingerprint(stage(size=32)) == fingerprint(stage(n_train=3))  # however they are used
    assert first != fingerprint(stage(fractions={"train": 0.5, "val": 0.2, "test": 0.3}))
    shutil.copytree(root, tmp_path / "moved")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "moved"))
    assert fingerprint(stage()) == first
    Image.new("L", (32, 60)).save(tmp_path / "moved" / "masks" / "4.png")
    assert fingerprint(stage()) != first
    assert fingerprint(stage(root=str(root))) == first
    for kind in ("images", "masks"):
        shutil.copy(root / kind / "9.png", root / kind / "10.png")
    assert fingerprint(stage(root=str(root))) != first
    assert fingerprint(stage(**{"tests": {"elsewhere": {"root": str(root)}}})) != fingerprint(stage())


def test_volumes_and_what_is_not_there(root, once, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="ACDC is not a folder: check root"):
        fingerprint(stage("acdc64"))
    twins.main(["--dataset", "acdc", "--form", "nifti", "--output", str(tmp_path / "ACDC"), "--cases", "10"])
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    first = fingerprint(stage("acdc64"))
    assert first == fingerprint(stage("acdc128"))
    label = next((tmp_path / "ACDC").rglob("*_gt.nii.gz"))
    label.write_bytes(label.read_bytes() + b" ")
    assert fingerprint(stage("acdc64")) != first


def test_a_network_of_other_images_has_another_key(root, once):
    settings = read("configs/experiments/own.yaml")
    stages = ("backbone", "segmenter", "reference")
    before = [Plan(settings, fingerprint).key(stage) for stage in stages]
    assert before == [Plan(settings, fingerprint).key(stage) for stage in stages]
    Image.new("RGB", (32, 99)).save(root / "images" / "4.png")
    after = [Plan(settings, fingerprint).key(stage) for stage in stages]
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_a_split_that_is_not_there_is_named_before_anything_is_trained(root, once):
    settings = read("configs/experiments/own.yaml")
    check_splits(settings)
    for key, stage in (("gain_split", "segmenter"), ("fid_split", "backbone"), ("mode_split", "backbone")):
        with pytest.raises(InputError, match=f"{key} is elsewhere.*{stage}.*train, val, test; choose"):
            check_splits(settings | {key: "elsewhere"})
    check_splits(settings | {"methods": {}, "fid_split": "elsewhere"})  # nothing is measured
    check_splits(read("configs/experiments/longtail.yaml") | {"fid_split": "elsewhere"})  # nothing is read
