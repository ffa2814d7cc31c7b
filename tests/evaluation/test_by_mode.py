import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_segmenter
from datamodules.sources import PhantomSource
from datamodules.sources.phantom import MODE_NAMES
from errors import InputError
from evaluation.by_mode import dsc_by_mode


class Bright(nn.Module):
    """Takes what is brighter than a level for an object."""

    device = torch.device("cpu")

    def freeze(self):
        return self

    def forward(self, image):
        level = image.mean(1, keepdim=True)
        return torch.cat([torch.zeros_like(level), level - 0.2], dim=1)


def test_modes_are_scored_apart():
    source = PhantomSource("polyp", size=32, n_test=60)
    table = dsc_by_mode(Bright(), source)
    assert list(table) == ["test", "test_uniform", "test_shift"]
    scores, modes = [], []
    for sample in source.dataset("test_uniform"):
        predicted = (sample["image"].mean(0) > 0.2).numpy()
        target = sample["mask"].numpy() == 1
        scores.append(200 * (predicted & target).sum() / (predicted.sum() + target.sum()))
        modes.append(sample["mode"])
    for mode in range(5):
        expected = np.mean([s for s, m in zip(scores, modes, strict=True) if m == mode])
        assert table["test_uniform"][MODE_NAMES[mode]] == pytest.approx(expected, abs=1e-3)
    assert table["test_uniform"]["all"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert table["test_uniform"]["bright"] > table["test_uniform"]["dark"] + 20


def test_images_without_modes(source):
    class Plain(PhantomSource):
        def _dataset(self, split):
            samples = super()._dataset(split)
            return [{k: v for k, v in samples[i].items() if k != "mode"} for i in range(len(samples))]

    with pytest.raises(InputError, match="no appearance mode"):
        dsc_by_mode(make_segmenter(), Plain("polyp", size=32, n_test=2))
