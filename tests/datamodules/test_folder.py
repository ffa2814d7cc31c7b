import os
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.sources import Folder, FolderSource
from errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("DATA_ROOT", REPOSITORY / ".." / "shared" / "data"))


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)


def square_mask(high=255, size=(24, 20)):
    mask = np.zeros(size, np.uint8)
    mask[6:18, 5:15] = high
    return mask


def write_set(root, stems, images="images", masks="masks", high=255):
    rng = np.random.default_rng(zlib.crc32(str(root).encode()))
    for stem in stems:
        save(root / images / f"{stem}.png", rng.integers(0, 256, (24, 20, 3), np.uint8))
        save(root / masks / f"{stem}.png", square_mask(high))
    return root


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set", [f"case{i:02d}" for i in range(10)])


def write_lists(root, **lists):
    for name, stems in lists.items():
        (root / f"{name}.txt").write_text("\n".join(stems) + "\n", encoding="utf-8")
    return {name: f"{name}.txt" for name in lists}


def ids(source, split):
    return [sample["id"] for sample in source.dataset(split)]


def refused(*fragments):
    """Expect an InputError whose message has all fragments in order."""
    return pytest.raises(InputError, match="(?s)" + ".*".join(re.escape(str(part)) for part in fragments))


# ------------------------------------------------------------------------------------- samples


def test_samples_have_the_interface_types(root):
    source = FolderSource(str(root), size=(12, 10))
    assert source.name == "set"
    assert source.splits == ("train", "val", "test")
    assert source.class_names == ("background", "foreground")
    sample = source.dataset("train")[0]
    assert sample["image"].shape == (3, 12, 10)
    assert sample["image"].dtype == torch.float32
    assert -1 <= sample["image"].min() < sample["image"].max() <= 1
    assert sample["mask"].dtype == torch.int64
    assert np.array_equal(sample["mask"].numpy(), square_mask(1)[1::2, 1::2])
    assert [len(source.dataset(split)) for split in source.splits] == [7, 1, 2]


def test_full_range_maps_to_minus_one_and_one(tmp_path):
    for i, value in enumerate((0, 255, 51)):
        save(tmp_path / "images" / f"{i}.bmp", np.full((8, 8), value, np.uint8))
        save(tmp_path / "masks" / f"{i}.png", square_mask(size=(8, 8)))
    lists = write_lists(tmp_path, train=["0"], val=["1.bmp"], test=["2"])
    source = FolderSource(str(tmp_path), size=8, lists=lists)
    for split, value in (("train", -1), ("val", 1), ("test", -0.6)):
        sample = source.dataset(split)[0]
        assert sample["image"].shape == (3, 8, 8)
        assert torch.allclose(sample["image"], torch.tensor(float(value)), atol=1e-6)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_images_are_scaled_by_their_range(root, suffix):
    ramp = np.linspace(0, 65535, 24 * 20).reshape(24, 20).astype(np.uint16)
    (root / "images" / "case03.png").unlink()
    save(root / "images" / f"case03{suffix}", ramp)
    lists = write_lists(root, train=["case03"], val=["case01"])
    sample = FolderSource(str(root), size=(24, 20), channels=1, lists=lists).dataset("train")[0]
    assert sample["image"].shape == (1, 24, 20)
    assert np.abs(sample["image"][0].numpy() - (ramp / 32767.5 - 1)).max() < 0.005


def test_suffixes_ignore_case_and_other_files_are_ignored(root):
    (root / "images" / "case00.png").rename(root / "images" / "case00.PNG")
    (root / "images" / ".hidden.png").write_bytes(b"")
    (root / "images" / "Thumbs.db").write_bytes(b"")
    assert len(FolderSource(str(root)).dataset("train")) == 7


def test_pairs_by_stem_with_any_suffix(root):
    image = np.full((24, 20), 255, np.uint8)
    (root / "images" / "case09.png").unlink()
    save(root / "images" / "case09.jpg", image)
    lists = write_lists(root, train=["case09"], val=["case00"])
    sample = FolderSource(str(root), lists=lists).dataset("train")[0]
    assert sample["id"] == "case09"
    assert sample["image"].min() == 1


def test_images_are_resized_with_antialiasing(root):
    stripes = np.zeros((240, 200), np.uint8)
    stripes[:, ::2] = 255
    save(root / "images" / "case00.png", stripes)
    save(root / "masks" / "case00.png", square_mask(size=(240, 200)))
    lists = write_lists(root, train=["case00"], val=["case01"])
    image = FolderSource(str(root), size=24, lists=lists).dataset("train")[0]["image"]
    assert image[:, :, 2:-2].abs().max() < 0.1


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_binary_masks_of_any_mode(root, mode):
    save(root / "masks" / "case00.png", square_mask(), mode)
    lists = write_lists(root, train=["case00"], val=["case01"])
    sample = FolderSource(str(root), size=(24, 20), lists=lists).dataset("train")[0]
    assert np.array_equal(sample["mask"].numpy(), square_mask(1))


def test_anti_aliased_mask_is_cut_at_the_threshold(root):
    soft = square_mask()
    soft[6], soft[17] = soft[6] // 255 * 127, soft[17] // 255 * 128
    save(root / "masks" / "case00.png", soft)
    lists = write_lists(root, train=["case00"], val=["case01"])
    mask = FolderSource(str(root), size=(24, 20), lists=lists).dataset("train")[0]["mask"].numpy()
    assert np.array_equal(mask, (soft > 127).astype(int))
    assert mask[6].sum() == 0
    assert mask[17].sum() == 10


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_class_values(root, mode):
    values = np.array([0, 85, 170], np.uint8)
    classes = np.arange(24 * 20).reshape(24, 20) // 160
    names = ["background", "a", "b"]
    for path in (root / "masks").iterdir():
        if mode == "P":
            image = Image.fromarray(values[classes])
            image = Image.frombytes("P", image.size, image.tobytes())
            image.putpalette([7, 8, 9] * 256)
            image.save(path)
        else:
            save(path, values[classes], mode)
    source = FolderSource(
        str(root), size=(24, 20), class_names=names, threshold=None, class_values=[0, 85, 170]
    )
    assert np.array_equal(source.dataset("val")[0]["mask"].numpy(), classes)
    reordered = FolderSource(
        str(root), size=(24, 20), class_names=names, threshold=None, class_values=[85, 170, 0]
    )
    assert np.array_equal(reordered.dataset("val")[0]["mask"].numpy(), (classes + 2) % 3)
    with refused("masks", ".png has the label 85, 170", "0, 1, 2"):
        FolderSource(str(root), class_names=names, threshold=None).dataset("val")


def test_16_bit_masks_of_classes(root):
    mask = np.zeros((24, 20), np.uint16)
    mask[5:9] = 1000
    for path in (root / "masks").iterdir():
        save(path, mask)
    source = FolderSource(str(root), size=(24, 20), threshold=None, class_values=[0, 1000])
    assert np.array_equal(source.dataset("val")[0]["mask"].numpy(), mask // 1000)


def test_datasets_are_decoded_once_and_safe_to_change(root):
    source = FolderSource(str(root), size=16)
    dataset = source.dataset("val")
    before = dataset[0]["image"].clone()
    dataset[0]["image"].zero_()
    assert torch.equal(source.dataset("val")[0]["image"], before)
    assert source.dataset("val") is dataset


# -------------------------------------------------------------------------------------- splits


def test_split_is_seeded_and_independent_of_the_order_on_disk(root, tmp_path, monkeypatch):
    first = FolderSource(str(root), seed=1)
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listing(path), reverse=True))
    again = FolderSource(str(root), seed=1)
    assert all(ids(first, split) == ids(again, split) for split in first.splits)
    assert any(ids(FolderSource(str(root), seed=s), "train") != ids(first, "train") for s in (2, 3))


@pytest.mark.parametrize(
    ("count", "fractions", "expected"),
    [
        (1000, None, [700, 100, 200]),
        (7, None, [5, 1, 1]),
        (100, {"train": 0.1, "val": 0.1, "far": 0.3}, [10, 10, 30]),
        (100, {"test": 0.2, "val": 0.1, "train": 0.7}, [70, 10, 20]),
    ],
)
def test_fraction_counts_are_exact(tmp_path, count, fractions, expected):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for i in range(count):
            (tmp_path / folder / f"{i}.png").touch()
    source = FolderSource(str(tmp_path), fractions=fractions)
    assert [len(source._pairs[split]) for split in source.splits] == expected
    stems = [pair.stem for pairs in source._pairs.values() for pair in pairs]
    assert len(set(stems)) == sum(expected)


def test_few_training_images_are_the_first_of_all_and_the_rest_stays(root):
    whole, few = FolderSource(str(root)), FolderSource(str(root), n_train=2)
    assert ids(few, "train") == ids(whole, "train")[:2]
    assert [ids(few, split) for split in ("val", "test")] == [ids(whole, split) for split in ("val", "test")]
    with refused("n_train is 99", "train has 7"):
        FolderSource(str(root), n_train=99)


def test_groups_never_straddle_splits(tmp_path):
    stems = [f"p{patient}_s{i}" for patient in range(12) for i in range(1 + patient % 4)]
    write_set(tmp_path, stems)
    for seed in range(20):
        source = FolderSource(str(tmp_path), size=8, group=r"^(p\d+)_", seed=seed)
        patients = [{stem.split("_")[0] for stem in ids(source, split)} for split in source.splits]
        assert sum(map(len, patients)) == len(set.union(*patients)) == 12
        assert abs(len(ids(source, "train")) - 21) <= 4


def test_lists_keep_their_order(root):
    lists = write_lists(root, test=["case05"], val=["case04", "", "case03"], train=["case02", "case00.png"])
    source = FolderSource(str(root), lists=lists)
    assert source.splits == ("train", "val", "test")
    assert ids(source, "train") == ["case02", "case00"]
    assert ids(source, "val") == ["case04", "case03"]


def test_further_test_sets(root, tmp_path):
    other = write_set(tmp_path / "other", ["1", "2"], "Original", "Ground Truth")
    source = FolderSource(str(root), tests={"centre": Folder(str(other), "Original", "Ground Truth")})
    assert source.test_splits == ("test", "centre")
    assert ids(source, "centre") == ["1", "2"]
    with refused("tests", "'val'"):
        FolderSource(str(root), tests={"val": Folder(str(other), "Original", "Ground Truth")})
    with refused(other / "images", "images"):
        FolderSource(str(root), tests={"centre": Folder(str(other))})


# -------------------------------------------------------------------------------------- errors


def test_absent_and_empty_folders(root, tmp_path):
    with refused(tmp_path / "nowhere", "root"):
        FolderSource(str(tmp_path / "nowhere"))
    with refused(root / "pictures", "images"):
        FolderSource(str(root), images="pictures")
    with refused(root / "labels", "masks"):
        FolderSource(str(root), masks="labels")
    (root / "empty").mkdir()
    with refused(root / "empty", ".png"):
        FolderSource(str(root), masks="empty")


def test_unpaired_files(root):
    (root / "masks" / "case04.png").rename(root / "masks" / "other.png")
    with refused(root / "images" / "case04.png", "has no mask", "remove"):
        FolderSource(str(root))
    (root / "images" / "case04.png").unlink()
    with refused(root / "masks" / "other.png", "has no image", "remove"):
        FolderSource(str(root))


def test_two_files_with_one_stem(root):
    save(root / "images" / "case04.jpg", np.zeros((24, 20), np.uint8))
    with refused("case04.jpg", "case04.png", "same stem"):
        FolderSource(str(root))


@pytest.mark.parametrize("folder", ["images", "masks"])
@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_file_that_does_not_decode(root, folder, content):
    path = root / folder / "case04.png"
    path.write_bytes(path.read_bytes()[:60] if content == "cut" else content)
    lists = write_lists(root, train=["case04"], val=["case01"])
    source = FolderSource(str(root), lists=lists)
    source.dataset("val")
    with refused(path, "cannot be decoded"):
        source.dataset("train")


def test_mask_of_another_size(root):
    save(root / "masks" / "case04.png", square_mask(size=(20, 24)))
    source = FolderSource(str(root), lists=write_lists(root, train=["case04"], val=["case01"]))
    with refused(root / "masks" / "case04.png", "20 × 24", "case04.png", "24 × 20"):
        source.dataset("train")


def test_label_outside_the_classes(root):
    for path in (root / "masks").iterdir():
        save(path, square_mask(1))
    save(root / "masks" / "case04.png", square_mask(7))
    lists = write_lists(root, train=["case04"], val=["case01"])
    source = FolderSource(str(root), threshold=None, lists=lists)
    source.dataset("val")
    with refused(root / "masks" / "case04.png", "label 7", "0, 1"):
        source.dataset("train")


def test_colour_and_floating_point_files(root):
    colours = np.zeros((24, 20, 3), np.uint8)
    colours[..., 0] = 1
    save(root / "masks" / "case04.png", colours)
    (root / "images" / "case05.png").unlink()
    save(root / "images" / "case05.tif", np.zeros((24, 20), np.float32))
    lists = write_lists(root, train=["case04"], val=["case05"])
    with refused(root / "masks" / "case04.png", "colour"):
        FolderSource(str(root), threshold=None, lists=lists).dataset("train")
    with refused(root / "images" / "case05.tif", "floating-point"):
        FolderSource(str(root), lists=lists).dataset("val")


def test_threshold_above_all_masks(tmp_path):
    write_set(tmp_path, "abcdefghij", high=1)
    with refused(tmp_path / "masks", ".png", "threshold 127", "largest value is 1"):
        FolderSource(str(tmp_path)).dataset("train")
    mask = FolderSource(str(tmp_path), size=(24, 20), threshold=0).dataset("train")[0]["mask"]
    assert np.array_equal(mask.numpy(), square_mask(1))


def test_masks_of_0_and_1_among_others(tmp_path):
    write_set(tmp_path, "abcdefghij")
    save(tmp_path / "masks" / "c.png", square_mask(1))
    with refused("c.png is 0 and 1", "goes up to 255", "set threshold below 1"):
        for name in ("train", "val", "test"):
            FolderSource(str(tmp_path)).dataset(name)
    noisy = square_mask(0)
    noisy[0, :3] = 1, 2, 3  # an empty mask that was a JPEG
    save(tmp_path / "masks" / "c.png", noisy)
    source = FolderSource(str(tmp_path))
    assert sum(len(source.dataset(name)) for name in ("train", "val", "test")) == 10


def test_masks_of_several_classes_that_a_threshold_makes_two_of(tmp_path):
    write_set(tmp_path, "abcdefghij")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FolderSource(str(tmp_path)).dataset("train")
    for path in (tmp_path / "masks").iterdir():
        several = square_mask(255)
        several[:2] = 128
        save(path, several)
    with pytest.warns(UserWarning, match="have the values 0, 128, 255, .*set threshold to null"):
        FolderSource(str(tmp_path)).dataset("train")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(tmp_path, orientation):
    """As a viewer shows them, and as their masks were drawn."""
    write_set(tmp_path, "abcdefghij")
    upright = np.repeat(square_mask(255)[..., None], 3, axis=2)
    upright[:6] = 90
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images" / "c.png").unlink()
    stored.save(tmp_path / "images" / "c.jpg", exif=exif, quality=95)
    source = FolderSource(str(tmp_path), size=(24, 20))
    sample = next(s for name in source.splits for s in source.dataset(name) if s["id"] == "c")
    image = (sample["image"].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(image - upright).mean() < 5


def test_images_of_12_bits_are_refused(tmp_path):
    write_set(tmp_path, "abcdefghij")
    for path in (tmp_path / "images").iterdir():
        Image.fromarray(np.full((24, 20), 3000 + ord(path.stem), np.uint16)).save(path)
    with refused("goes up to", "of 65535", "nearly black"):
        FolderSource(str(tmp_path)).dataset("train")


def test_an_image_in_two_splits_is_refused(root, tmp_path):
    (root / "images" / "twin.png").write_bytes((root / "images" / "case04.png").read_bytes())
    (root / "masks" / "twin.png").write_bytes((root / "masks" / "case04.png").read_bytes())
    stems = [f"case{i:02d}" for i in range(8)]
    lists = write_lists(root, train=stems, val=["case08"], test=["case09", "twin"])
    source = FolderSource(str(root), lists=lists)
    source.dataset("train")
    source.dataset("val")
    with refused("leakage", "twin in test", "case04 in train"):
        source.dataset("test")
    again = FolderSource(str(root), lists=lists, tests={"elsewhere": Folder(str(root))})
    again.dataset("elsewhere")
    with refused("leakage", "elsewhere"):
        again.dataset("train")
    lists = write_lists(root, train=stems, val=["case08"], test=["case09"])
    source = FolderSource(str(root), lists=lists)
    assert [len(source.dataset(name)) for name in ("test", "train", "val")] == [1, 8, 1]


def test_files_of_several_pages_are_refused(tmp_path):
    write_set(tmp_path, "abcdefghij")
    (tmp_path / "images" / "c.png").unlink()
    pages = [Image.new("RGB", (20, 24)) for _ in range(3)]
    pages[0].save(tmp_path / "images" / "c.tif", save_all=True, append_images=pages[1:])
    with refused("c.tif has 3 pages"):
        for name in ("train", "val", "test"):
            FolderSource(str(tmp_path)).dataset(name)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"size": 0}, ["size"]),
        ({"channels": 2}, ["channels is 2"]),
        ({"class_names": ["background"]}, ["class_names has 1"]),
        ({"class_names": ["b", "x", "y"]}, ["threshold 127", "null"]),
        ({"class_values": [0, 1]}, ["class_values", "threshold", "null"]),
        ({"threshold": None, "class_values": [0, 0]}, ["class_values is [0, 0]"]),
        ({"threshold": None, "class_values": [0, 1, 2]}, ["class_values is [0, 1, 2]"]),
        ({"fractions": {"train": 0.7, "val": 0.2, "test": 0.2}}, ["fractions sum to 1.1"]),
        ({"fractions": {"train": 0.7, "test": 0.2}}, ["fractions has no val"]),
        ({"fractions": {"train": 0.7, "val": 0.0}}, ["val is 0.0"]),
        ({"fractions": {"train": 0.9, "val": 0.02}}, ["falls to val", "10 images"]),
        ({"fractions": {"train": 0.9, "val": 0.1}, "lists": {}}, ["fractions and lists"]),
        ({"lists": {"val": "val.txt"}}, ["lists has no train"]),
        ({"lists": {"train": "train.txt", "val": "val.txt"}}, ["train.txt", "does not exist"]),
        ({"group": "("}, ["group '('", "regular expression"]),
        ({"group": "case"}, ["0 groups in parentheses"]),
        ({"group": "(patient)"}, ["case00.png", "does not match"]),
        ({"group": "(case)"}, ["falls to", "1 groups"]),
        ({"seed": -1}, ["seed is -1"]),
    ],
)
def test_bad_arguments(root, arguments, fragments):
    with refused(*fragments):
        FolderSource(str(root), **arguments)


def test_bad_lists(root):
    with refused(root / "val.txt", "'case77'"):
        FolderSource(str(root), lists=write_lists(root, train=["case01"], val=["case77"]))
    with refused(root / "val.txt", "'case01'", root / "train.txt"):
        FolderSource(str(root), lists=write_lists(root, train=["case01"], val=["case02", "case01"]))
    with refused(root / "train.txt", "'case01'", "once"):
        FolderSource(str(root), lists=write_lists(root, train=["case01", "case01"], val=["case02"]))
    with refused(root / "val.txt", "empty"):
        FolderSource(str(root), lists=write_lists(root, train=["case01"], val=[]))


def test_lists_with_a_byte_order_mark(root):
    lists = write_lists(root, train=["case01"], val=["case02"])
    (root / "train.txt").write_text("case01\n", encoding="utf-8-sig")
    assert ids(FolderSource(str(root), lists=lists), "train") == ["case01"]


def test_files_of_nearly_the_name_are_asked_for(root):
    (root / "masks" / "case03.png").rename(root / "masks" / "case03_mask.png")
    with refused("case03.png has no mask", "is case03_mask.png it?"):
        FolderSource(str(root))
    (root / "masks" / "case03_mask.png").rename(root / "masks" / "case03.webp")
    with refused("case03.png has no mask", "is case03.webp it?"):
        FolderSource(str(root))


def test_group_across_lists(tmp_path):
    write_set(tmp_path, ["p1_a", "p1_b", "p2_a"])
    lists = write_lists(tmp_path, train=["p1_a"], val=["p2_a", "p1_b"])
    with refused(tmp_path / "val.txt", "'p1_b'", "'p1'", "'p1_a'", tmp_path / "train.txt"):
        FolderSource(str(tmp_path), lists=lists, group="(p[0-9])_")


# ----------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not (DATA / "Kvasir-SEG").is_dir(), reason=f"no Kvasir-SEG in {DATA}: set DATA_ROOT")
def test_kvasir_counts_and_masks():
    source = FolderSource(str(DATA / "Kvasir-SEG"), size=64)
    assert {split: len(pairs) for split, pairs in source._pairs.items()} == {
        "train": 700,
        "val": 100,
        "test": 200,
    }
    masks = torch.stack([sample["mask"] for sample in source.dataset("val")])
    assert masks.unique().tolist() == [0, 1]
    assert 0.05 < masks.float().mean() < 0.4


@pytest.mark.skipif(not (DATA / "CVC-ClinicDB").is_dir(), reason=f"no CVC-ClinicDB in {DATA}: set DATA_ROOT")
def test_cvc_as_another_centre(root):
    centre = Folder(str(DATA / "CVC-ClinicDB"), "Original", "Ground Truth")
    dataset = FolderSource(str(root), size=32, tests={"cvc": centre}).dataset("cvc")
    assert len(dataset) == 612
    assert 0.03 < torch.stack([sample["mask"] for sample in dataset]).float().mean() < 0.3
