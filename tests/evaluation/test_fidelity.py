import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import make_segmenter
from datamodules.sources import PhantomSource
from datamodules.sources.synthetic import SyntheticSet
from errors import InputError
from evaluation.fidelity import adversariality, mask_fidelity
from networks.segmenter import Segmenter
from objectives import rewards


class Reader(Segmenter):
    """Reads the classes off the grey values, 0, 80 and 160; ``seen`` counts the images."""

    config_name = "config.json"

    def __init__(self, channels=1, classes=3):
        super().__init__()
        self.image_channels, self.num_classes = channels, classes
        self.scale = nn.Parameter(torch.tensor(100.0))

    def forward(self, image):
        assert not self.training
        assert not torch.is_grad_enabled()
        levels = (image[:, :1] + 1) * 127.5
        centres = 80.0 * torch.arange(self.num_classes).reshape(1, -1, 1, 1)
        return -self.scale * (levels - centres).abs() / 80

    features = None  # fidelity and adversariality read logits alone


def write_set(folder, images, masks):
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    lines = []
    for i, pair in enumerate(zip(images, masks, strict=True)):
        files = {kind: f"{kind}s/{i:06d}.png" for kind in ("image", "mask")}
        for file, array in zip(files.values(), pair, strict=True):
            Image.fromarray(array).save(folder / file)
        lines.append(json.dumps({"index": i, "value": i / 10, **files}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "dataset.json").write_text("{}")
    return SyntheticSet(folder)


@pytest.fixture
def crafted(tmp_path):
    """Four samples of 8 × 8 pixels: right, half of one class missing, both empty, a class made up."""
    masks = np.zeros((4, 8, 8), np.uint8)
    masks[0, :4], masks[0, 4:6] = 1, 2
    masks[1, :4], masks[1, 4:6] = 1, 2
    masks[3, :2] = 1
    shown = masks.copy()
    shown[1, 2:4] = 0
    shown[3, 7] = 2
    return write_set(tmp_path / "set", 80 * shown, masks)


def test_mask_fidelity_is_the_dsc_of_the_judge(crafted):
    dsc = mask_fidelity(crafted, Reader())
    # sample 1: class 1 has 2 · 16 / (16 + 32), class 2 is right; sample 3: class 1 is right, class 2 made up
    expected = torch.tensor([100, 100 * (2 / 3 + 1) / 2, float("nan"), 50], dtype=torch.float64)
    torch.testing.assert_close(dsc, expected, equal_nan=True)


@pytest.fixture
def noise_set(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)  # more than one batch
    return write_set(tmp_path / "noise", images, rng.integers(0, 2, (70, 32, 32), dtype=np.uint8))


def test_rewards_are_those_of_each_sample(noise_set):
    anchor = make_segmenter(seed=4)
    values = adversariality(noise_set, anchor)
    assert list(values) == ["ce", "bounded_ce", "balanced_ce", "bounded_balanced_ce", "dice", "focal"]
    for i in (0, 33, 69):
        sample = noise_set[i]
        with torch.no_grad():
            logits = anchor(sample["image"][None])
        for name, value in values.items():
            assert value.shape == (70,)
            direct = getattr(rewards, name)(logits, sample["mask"][None])
            assert float(value[i]) == pytest.approx(float(direct), rel=1e-5)
    assert len({float(value[0]) for value in values.values()}) == 6


def test_networks_are_frozen_and_in_eval_mode(noise_set):
    segmenter = make_segmenter().train()
    first = adversariality(noise_set, segmenter)["ce"]
    assert not segmenter.training
    assert not any(p.requires_grad for p in segmenter.parameters())
    torch.testing.assert_close(adversariality(noise_set, segmenter)["ce"], first, rtol=0, atol=0)


def test_a_trained_judge_tells_true_masks_from_wrong_ones(tmp_path):
    """Phantoms shown with their own masks, and with those of another sample."""
    dataset = PhantomSource("polyp", size=32, n_train=6).dataset("train")
    images = [((dataset[i]["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for i in range(6)]
    masks = [dataset[i]["mask"].byte().numpy() for i in range(6)]
    own = write_set(tmp_path / "own", images, masks)
    other = write_set(tmp_path / "other", images, masks[1:] + masks[:1])

    class Oracle(Reader):
        """Knows the mask of each phantom by heart."""

        def forward(self, image):
            gap = torch.stack(
                [(image - s["image"]).abs().sum((1, 2, 3)) for s in map(own.__getitem__, range(6))]
            )
            known = torch.stack([torch.from_numpy(m).long() for m in masks])[gap.argmin(0)]
            return nn.functional.one_hot(known, 2).permute(0, 3, 1, 2).float()

    oracle = Oracle(channels=3, classes=2)
    assert mask_fidelity(own, oracle).tolist() == [100] * 6
    assert float(mask_fidelity(other, oracle).max()) < 100


@pytest.mark.parametrize(("channels", "classes"), [(3, 3), (1, 2)])
@pytest.mark.parametrize(("function", "role"), [(mask_fidelity, "judge"), (adversariality, "anchor")])
def test_segmenter_of_other_images(crafted, function, role, channels, classes):
    with pytest.raises(InputError, match=f"{role}: reads {channels} channels and knows {classes} classes"):
        function(crafted, Reader(channels, classes))


def test_set_without_samples(crafted):
    empty = SyntheticSet(crafted.folder, count=0)
    with pytest.raises(InputError, match="holds no samples"):
        mask_fidelity(empty, Reader())
