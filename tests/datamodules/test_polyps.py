import json
import os
import re
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
from conftest import files_of
from datamodules import SegDataModule, twins_polyps
from datamodules.sources import PolypsSource
from datamodules.sources.folder import Pair
from datamodules.sources.phantom import phantom
from datamodules.sources.polyps import LOOK_SIZE, SEQUENCE_ENDS, _Kept, _Look, _split
from errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
DATA = Path(os.environ.get("DATA_ROOT", REPOSITORY / ".." / "shared" / "data"))
CASES = 20
OTHERS = ("endoscene", "colondb", "etis")
# Four frames that Kvasir-SEG has twice, by the names of one copy: a second apart, or compressed again.
STORED_TWICE = [
    ("test_16", "train_222"),
    ("train_300", "train_667"),
    ("train_459", "train_620"),
    ("train_510", "train_593"),
]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    twins_polyps.write_raw(root / "raw", CASES, seed=3)
    twins_polyps.write_pranet(root / "pranet", CASES, seed=3)
    return root


@pytest.fixture
def raw(twins, tmp_path):
    return Path(shutil.copytree(twins / "raw", tmp_path / "raw"))


@pytest.fixture
def pranet(twins, tmp_path):
    return Path(shutil.copytree(twins / "pranet", tmp_path / "pranet"))


def source(root, **settings):
    return PolypsSource(str(root), **({"size": 64} | settings))


def counts(polyps):
    return {split: len(pairs) for split, pairs in polyps._pairs.items()}


def names(polyps, split):
    return [pair.stem for pair in polyps._pairs[split]]


def refused(*fragments):
    """Expect an InputError of one line whose message has all fragments in order."""
    return pytest.raises(InputError, match=".*".join(re.escape(str(part)) for part in fragments) + "[^\n]*$")


def first(folder):
    return sorted(folder.iterdir())[0]


# ----------------------------------------------------------------------------------- two forms


def test_the_two_forms_hold_the_same_images(twins):
    every = ("test", "kvasir", "clinicdb", *OTHERS)
    read = [source(twins / form, tests=every) for form in ("raw", "pranet")]
    for polyps in read:
        assert polyps.splits == ("train", "val", *every)
        held_out = {"test": 8, "kvasir": 4, "clinicdb": 4}
        assert counts(polyps) == {"train": 28, "val": 4, **held_out, **dict.fromkeys(OTHERS, 5)}
        assert sorted(names(polyps, "kvasir") + names(polyps, "clinicdb")) == sorted(names(polyps, "test"))
    assert {split: names(read[0], split) for split in read[0].splits} == {
        split: names(read[1], split) for split in read[1].splits
    }
    for split in ("val", "clinicdb", "etis"):
        for one, other in zip(*(polyps.dataset(split) for polyps in read), strict=True):
            assert one["id"] == other["id"]
            if not one["id"].startswith("kvasir"):  # JPEG there
                assert torch.equal(one["image"], other["image"])
            assert (one["mask"] != other["mask"]).float().mean() < 0.01


def test_samples(twins):
    polyps = source(twins / "raw", size=(48, 40))
    assert (polyps.name, polyps.channels, polyps.class_names) == ("polyps", 3, ("background", "polyp"))
    sample = polyps.dataset("val")[0]
    assert sample["image"].shape == (3, 48, 40)
    assert sample["image"].dtype == torch.float32
    assert -1 <= sample["image"].min() < sample["image"].max() <= 1
    assert sample["mask"].dtype == torch.int64
    assert sample["mask"].unique().tolist() == [0, 1]
    assert (sample["image"][0] != sample["image"][2]).any()


def test_masks_are_the_phantoms_own(twins):
    """Cut at 127, soft JPEG and RGB masks are what the phantom says at that size."""
    polyps = source(twins / "raw", tests=["etis"], train_on=["kvasir"])
    stems = sorted(pair.stem for key in ("train", "val") for pair in polyps._pairs[key])
    assert len(stems) == 16
    read = {sample["id"]: sample["mask"].numpy() for sample in polyps.dataset("train")}
    jpegs = sorted((twins / "raw" / "Kvasir-SEG" / "masks").iterdir())
    grey = np.stack([np.asarray(Image.open(path)) for path in jpegs])
    assert 0.01 < ((grey > 8) & (grey < 247)).mean() < 0.2
    for index, path in enumerate(jpegs):
        if f"kvasir-{path.stem}" in read:
            mask = read[f"kvasir-{path.stem}"]
            assert np.array_equal(mask, (grey[index] > 127).astype(int))
            _, expected, _ = phantom("polyp", 3, index, 64)
            assert (mask & expected).sum() / (mask | expected).sum() > 0.93


def test_twins_are_the_same_every_time(twins, tmp_path):
    twins_polyps.write_raw(tmp_path, CASES, seed=3)
    assert files_of(tmp_path) == files_of(twins / "raw")
    assert Image.open(first(tmp_path / "CVC-ClinicDB" / "Ground Truth")).mode == "RGB"
    assert len(list((twins / "pranet" / "TrainDataset" / "masks").iterdir())) == 36
    with refused("cases is 9", "10 to 612"):
        twins_polyps.write_pranet(tmp_path, 9)


def test_other_names_of_folders(raw, pranet):
    expected = source(raw)
    for old, new in (
        ("CVC-ClinicDB/Ground Truth", "CVC-ClinicDB/PNG/Ground Truth"),
        ("CVC-ClinicDB/Original", "CVC-ClinicDB/PNG/Original"),
        ("Kvasir-SEG", "kvasir_seg"),
    ):
        (raw / new).parent.mkdir(exist_ok=True)
        (raw / old).rename(raw / new)
    assert all(names(source(raw), split) == names(expected, split) for split in expected.splits)
    for folder in (pranet / "TrainDataset", pranet / "TestDataset" / "CVC-ClinicDB"):
        (folder / "images").rename(folder / "image")
        (folder / "masks").rename(folder / "mask")
    assert all(names(source(pranet), split) == names(expected, split) for split in expected.splits)


def test_pranet_split_keeps_its_folders(twins):
    polyps = source(twins / "pranet", split="pranet", tests=("test", "clinicdb", "etis"))
    assert counts(polyps) == {"train": 34, "val": 2, "test": 4, "clinicdb": 2, "etis": 5}
    for split in polyps.splits:
        home = "TrainDataset" if split in ("train", "val") else "TestDataset"
        assert {pair.image.relative_to(twins / "pranet").parts[0] for pair in polyps._pairs[split]} == {home}
    kvasir = source(twins / "pranet", split="pranet", train_on=["kvasir"], tests=("test", "clinicdb"))
    assert counts(kvasir) == {"train": 17, "val": 1, "test": 2, "clinicdb": 2}


def test_without_names_every_set_on_disk_is_a_test_set(raw):
    shutil.rmtree(raw / "CVC-ColonDB")
    assert source(raw, train_on=["kvasir"], tests=None).test_splits == (
        "test",
        "clinicdb",
        "endoscene",
        "etis",
    )
    assert counts(source(raw, train_on=["kvasir"], tests=None))["clinicdb"] == CASES
    assert source(raw).test_splits == ("test",)
    with refused("raw has no CVC-ColonDB", "colondb", "found: CVC-300/, CVC-ClinicDB/"):
        source(raw, tests=["test", "colondb"])


# -------------------------------------------------------------------------------------- splits


def pool(key, count):
    """Files that nobody opens, and looks that differ."""
    pairs = {str(i): Pair(f"{key}-{i}", Path(f"{key}/{i}"), Path("none")) for i in range(1, count + 1)}
    small = np.random.default_rng(0).uniform(0, 255, (count, LOOK_SIZE**2)).astype(np.float32)
    looks = {pair.image: _Look(bytes(i), small[i]) for i, pair in enumerate(pairs.values())}
    return _Kept(pairs, {}), looks


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_papers_counts_are_exact(seed):
    kept, looks = pool("kvasir", 1000)
    parts = _split("kvasir", kept, "paper", True, seed, looks)
    assert {name: len(part) for name, part in parts.items()} == {"train": 700, "val": 100, "test": 200}
    kept, looks = pool("clinicdb", 612)
    for by_sequence in (False, True):
        parts = _split("clinicdb", kept, "paper", by_sequence, seed, looks)
        assert {name: len(part) for name, part in parts.items()} == {"train": 428, "val": 61, "test": 123}
        assert len({pair.stem for part in parts.values() for pair in part}) == 612
    frames = {name: [int(pair.stem.split("-")[1]) for pair in part] for name, part in parts.items()}
    sequences = {name: set(np.searchsorted(SEQUENCE_ENDS, part).tolist()) for name, part in frames.items()}
    assert sum(map(len, sequences.values())) == len(set.union(*sequences.values())) == 29


def test_sequences_of_clinicdb():
    ends = np.array(SEQUENCE_ENDS)
    lengths = np.diff(ends, prepend=0)
    assert (len(ends), ends[-1], lengths.min(), lengths.max()) == (29, 612, 6, 26)
    assert lengths[:4].tolist() == [25, 25, 17, 11]


def sequences(polyps, split):
    frames = [int(name.split("-")[1]) for name in names(polyps, split) if name.startswith("clinicdb")]
    return set(np.searchsorted(SEQUENCE_ENDS, frames).tolist())


def test_frames_of_a_sequence_stay_together(twins):
    """Five phantoms of four frames each; split by frame, neighbours are on both sides."""
    for seed in range(5):
        polyps = source(twins / "raw", by_sequence=True, seed=seed)
        assert counts(polyps) == {"train": 26, "val": 6, "test": 8}
        found = [sequences(polyps, split) for split in polyps.splits]
        assert [len(each) for each in found] == [3, 1, 1]
        assert set.union(*found) == {0, 1, 2, 3, 4}
        leaking = source(twins / "raw", seed=seed)
        assert sequences(leaking, "train") & sequences(leaking, "test")


def test_by_sequence_needs_frame_numbers(raw):
    for folder in ("Original", "Ground Truth"):
        (raw / "CVC-ClinicDB" / folder / "1.png").rename(raw / "CVC-ClinicDB" / folder / "613.png")
    with refused("Original/613.png", "1 to 612"):
        source(raw, by_sequence=True)
    assert counts(source(raw)) == {"train": 28, "val": 4, "test": 8}


def test_split_depends_on_the_seed_alone(raw, monkeypatch):
    polyps = source(raw)
    only = source(raw, train_on=["kvasir"])
    assert names(only, "test") == [name for name in names(polyps, "test") if name.startswith("kvasir")]
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listing(path), reverse=True))
    again = source(raw)
    assert all(names(again, split) == names(polyps, split) for split in polyps.splits)
    assert names(source(raw, seed=1), "test") != names(polyps, "test")
    assert {name.split("-")[0] for name in names(source(raw, n_train=8), "train")} == {"kvasir", "clinicdb"}
    assert names(source(raw, n_train=8), "train") == names(polyps, "train")[:8]


def test_images_that_nearly_coincide_stay_in_one_split(raw):
    images, masks = raw / "Kvasir-SEG" / "images", raw / "Kvasir-SEG" / "masks"
    stem = first(images).stem
    Image.open(images / f"{stem}.jpg").save(images / "again.jpg", quality=60)
    shutil.copy(masks / f"{stem}.jpg", masks / "again.jpg")
    homes = set()
    for seed in range(12):
        polyps = source(raw, seed=seed)
        home = [split for split in polyps.splits if f"kvasir-{stem}" in names(polyps, split)]
        assert home == [split for split in polyps.splits if "kvasir-again" in names(polyps, split)]
        homes |= set(home)
    assert len(homes) > 1


# ------------------------------------------------------------------------------------- leakage


def test_an_image_under_two_names(raw):
    images, masks = raw / "Kvasir-SEG" / "images", raw / "Kvasir-SEG" / "masks"
    for folder in (images, masks):
        shutil.copy(first(folder), folder / "planted.jpg")
    with refused(first(images), images / "planted.jpg", "one image under two names"):
        source(raw)


def test_an_image_of_training_in_a_test_set_even_in_another_file_type(raw):
    stem = first(raw / "CVC-ClinicDB" / "Original").stem
    Image.open(raw / "CVC-ClinicDB" / "Original" / f"{stem}.png").save(raw / "CVC-300" / "images" / "999.bmp")
    Image.open(raw / "CVC-ClinicDB" / "Ground Truth" / f"{stem}.png").save(
        raw / "CVC-300" / "masks" / "999.bmp"
    )
    for trained in (["kvasir", "clinicdb"], ["clinicdb"]):
        with refused(f"Original/{stem}.png", "CVC-300/images/999.bmp", "one image under two names"):
            source(raw, train_on=trained, tests=["endoscene"])
    assert counts(source(raw, train_on=["kvasir"], tests=["clinicdb", "endoscene"]))["endoscene"] == 6
    assert counts(source(raw))["train"] == 28


@pytest.mark.parametrize("trained", [["kvasir", "clinicdb"], ["kvasir"], ["clinicdb"]])
def test_an_image_compressed_again_in_another_set(raw, trained):
    stem = first(raw / "Kvasir-SEG" / "images").stem
    for here, there in (("images", "Original"), ("masks", "Ground Truth")):
        image = Image.open(raw / "Kvasir-SEG" / here / f"{stem}.jpg")
        image.convert("RGB").save(raw / "CVC-ClinicDB" / there / "400.jpg", quality=60)
    with (
        refused(f"{stem}.jpg", "nearly the same image")
        if trained[0] == "kvasir"
        else refused("400.jpg", stem)
    ):
        source(raw, train_on=trained, tests=["test", "kvasir", "clinicdb"])


def test_pranets_test_set_that_overlaps_with_training(pranet):
    for folder in ("images", "masks"):
        case = sorted((pranet / "TrainDataset" / folder).iterdir())[-1]
        shutil.copy(case, pranet / "TestDataset" / "Kvasir" / folder / "planted.png")
    for split in ("paper", "pranet"):
        with refused(
            "TrainDataset/images/cju", "TestDataset/Kvasir/images/planted.png", "one image under two"
        ):
            source(pranet, split=split)
    for folder in ("images", "masks"):
        (pranet / "TestDataset" / "Kvasir" / folder / "planted.png").rename(
            pranet / "TestDataset" / "Kvasir" / folder / case.name
        )
    with refused(f"TrainDataset/images/{case.name}", f"TestDataset/Kvasir/images/{case.name}", case.stem):
        source(pranet)


# ------------------------------------------------------------------------------ broken data sets


def test_unknown_layouts(raw, tmp_path):
    with refused("nowhere is not a folder", "root"):
        source(tmp_path / "nowhere")
    known = ("fits no known form", "TrainDataset/{images,masks}", "CVC-ClinicDB/{Original,Ground Truth}")
    with refused(raw / "Kvasir-SEG", *known, "Found: images/, masks/"):
        source(raw / "Kvasir-SEG")
    (tmp_path / "empty").mkdir()
    with refused(*known, "Found: nothing"):
        source(tmp_path / "empty")
    (raw / "TrainDataset").mkdir()
    with refused("has PraNet's form and the raw one", "keep one"):
        source(raw)
    (raw / "TrainDataset").rename(raw / "kvasir")
    with refused("Kvasir-SEG and kvasir, two names of one set"):
        source(raw)
    (raw / "kvasir").rename(raw / "other")
    (raw / "CVC-300" / "masks").rename(raw / "CVC-300" / "labels")
    with refused("CVC-300 has no two folders images and masks", "found: images/, labels/"):
        source(raw, tests=["endoscene"])


def test_half_of_pranets_form(pranet):
    with refused("split: pranet: PraNet has no etis for training"):
        source(pranet, split="pranet", train_on=["etis"])
    (pranet / "TrainDataset").rename(pranet / "Training")
    with refused("has no TrainDataset", "PraNet's form needs it", "TestDataset/, Training/"):
        source(pranet)


def write_16_bit_rgb(path, pixels):
    """A PNG of 16 bits a channel, which Pillow reads and cannot write."""
    height, width, _ = pixels.shape

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replaced(path, image):
    path.unlink()
    image.save(path.with_suffix(".tif"))


BROKEN = {
    "image of 16 bits": (
        lambda image, mask: write_16_bit_rgb(image, np.full((64, 64, 3), 4095, np.uint16)),
        ["Original/1.png has 16 bits a channel"],
    ),
    "grey image": (
        lambda image, mask: Image.open(image).convert("L").save(image),
        ["Original/1.png is grey, mode L", "is it a mask?"],
    ),
    "truncated PNG": (lambda image, mask: cut(image), ["Original/1.png cannot be decoded"]),
    "truncated mask": (lambda image, mask: cut(mask), ["Ground Truth/1.png cannot be decoded"]),
    "mask of floats": (
        lambda image, mask: replaced(mask, Image.fromarray(np.ones((64, 64), np.float32))),
        ["Ground Truth/1.tif has floating-point pixels"],
    ),
    "black mask": (
        lambda image, mask: Image.new("L", (64, 64), 100).save(mask),
        ["Ground Truth/1.png is empty", "largest value is 100", "allow_empty"],
    ),
    "turned mask": (
        lambda image, mask: Image.new("L", (64, 48), 255).save(mask),
        ["Ground Truth/1.png is 48 × 64", "is 64 × 64"],
    ),
    "no mask": (lambda image, mask: mask.unlink(), ["Original/1.png has no mask"]),
    "no image": (lambda image, mask: image.unlink(), ["Ground Truth/1.png has no image"]),
    "one stem twice": (
        lambda image, mask: Image.open(image).save(image.with_suffix(".bmp")),
        ["Original/1.bmp and 1.png have the same stem"],
    ),
    "no masks at all": (
        lambda image, mask: [path.unlink() for path in mask.parent.iterdir()],
        ["Ground Truth has no images"],
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_sets(raw, kind):
    """Each has an error of its own that names the file, when the source is made or the set is read."""
    harm, fragments = BROKEN[kind]
    harm(raw / "CVC-ClinicDB" / "Original" / "1.png", raw / "CVC-ClinicDB" / "Ground Truth" / "1.png")
    with refused(*fragments):
        source(raw, train_on=["kvasir"], tests=["clinicdb"]).dataset("clinicdb")


def test_truncated_jpeg(raw):
    cut(first(raw / "Kvasir-SEG" / "images"))
    with refused("Kvasir-SEG/images", ".jpg cannot be decoded"):
        source(raw)


def test_masks_without_a_polyp_can_be_allowed(raw):
    for path in (raw / "CVC-300" / "masks").iterdir():
        if path.stem in "123":
            Image.new("L", (64, 64)).save(path)
    read = source(raw, tests=["endoscene"], allow_empty=True).dataset("endoscene")
    assert [bool(sample["mask"].any()) for sample in read] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"train_on": []}, ["train_on is []"]),
        ({"train_on": ["kvasir", "kvasir"]}, ["train_on", "each once"]),
        ({"train_on": ["cvc"]}, ["train_on: 'cvc' is none of kvasir, clinicdb"]),
        ({"tests": ["val"]}, ["tests: 'val' is none of test, kvasir"]),
        ({"split": "pranet"}, ["split: pranet needs PraNet's form", "raw"]),
        ({"n_train": 99}, ["n_train is 99", "train has 28"]),
        ({"size": 0}, ["size"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"train_on": ["etis"]}, ["no image of etis falls to val", "5 images"]),
    ],
)
def test_bad_arguments(twins, arguments, fragments):
    with refused(*fragments):
        source(twins / "raw", **arguments)


def test_sequences_and_pranets_split_exclude_each_other(twins):
    with refused("split: pranet", "by_sequence"):
        source(twins / "pranet", split="pranet", by_sequence=True)


def test_counts_other_than_published_are_said(twins):
    with pytest.warns(UserWarning, match="kvasir has 20 images, the published set 1000"):
        source(twins / "raw", train_on=["kvasir"])


# ------------------------------------------------------------------------------------- one run


def test_one_test_run_has_a_row_for_each_test_set(twins, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(twins / "raw"))
    files = ("stages/segmenter", "data/polyps", "segmenters/nnunet_rgb32")
    settings = {
        "trainer.default_root_dir": tmp_path,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "data.init_args.source.init_args.size": 32,
        "data.init_args.batch_size": 8,
        "data.init_args.steps_per_epoch": 1,
        "model.init_args.segmenter.init_args.base_features": 4,
        "model.init_args.segmenter.init_args.max_features": 8,
    }
    shared = [f"--config={CONFIGS / file}.yaml" for file in files]
    shared += [f"--{key}={value}" for key, value in settings.items()]
    cli.main(["fit", *shared])
    cli.main(["test", *shared, f"--model.init_args.weights={tmp_path / 'weights'}"])
    scores = json.loads((tmp_path / "test.json").read_text())
    assert scores["dataset"] == "polyps"
    assert {name: row["n_cases"] for name, row in scores["test_sets"].items()} == {
        "test": 8,
        "endoscene": 5,
        "colondb": 5,
        "etis": 5,
    }


# ----------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def real():
    for name in ("Kvasir-SEG", "CVC-ClinicDB"):
        if not (DATA / name).is_dir():
            pytest.skip(f"no {name} in {DATA}: set DATA_ROOT")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the counts are those published
        return source(DATA, tests=("test", "kvasir", "clinicdb"), by_sequence=True)


def test_real_counts(real):
    assert counts(real) == {"train": 1128, "val": 161, "test": 323, "kvasir": 200, "clinicdb": 123}
    assert sum(name.startswith("kvasir") for name in names(real, "train")) == 700
    masks = torch.stack([sample["mask"] for sample in SegDataModule(real).source.dataset("val")])
    assert masks.flatten(1).any(1).all()
    assert 0.05 < masks.float().mean() < 0.3


def test_real_images_stored_twice_stay_together(real):
    if not (DATA / "Kvasir-SEG" / "images" / "test_16.jpg").is_file():
        pytest.skip("another copy of Kvasir-SEG, with other names")
    home = {name: split for split in ("train", "val", "test") for name in names(real, split)}
    for one, other in STORED_TWICE:
        assert home[f"kvasir-{one}"] == home[f"kvasir-{other}"]


def test_real_sequences_begin_where_the_picture_changes(real):
    """The published ends against what is in the frames: neighbours differ more across an end than within."""
    frames = [DATA / "CVC-ClinicDB" / "Original" / f"{i}.png" for i in range(1, 613)]
    looks = np.stack([np.asarray(Image.open(f).convert("RGB").resize((32, 32))) for f in frames]).astype(
        float
    )
    apart = np.abs(np.diff(looks, axis=0)).mean((1, 2, 3))
    ends = np.isin(np.arange(1, 612), SEQUENCE_ENDS)
    assert (apart[ends][:, None] > apart[~ends]).mean() > 0.95
    assert np.median(apart[ends]) > 2.5 * np.median(apart[~ends])
