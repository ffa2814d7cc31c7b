import itertools

import pytest
import torch

from diffusion.noise import NoiseStream, generator

SHAPE = (3, 16, 16)


def test_noise_belongs_to_the_sample():
    """Whatever the batch, its order and its size."""
    together = NoiseStream(7, range(8), SHAPE).draw(1)
    for index in range(8):
        assert torch.equal(NoiseStream(7, [index], SHAPE).draw(1)[0], together[index])
    backwards = NoiseStream(7, range(7, -1, -1), SHAPE).draw(1)
    assert torch.equal(backwards.flip(0), together)


def test_noise_takes_no_notice_of_the_global_generator():
    torch.manual_seed(1)
    first = NoiseStream(0, [3], SHAPE).draw()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(NoiseStream(0, [3], SHAPE).draw(), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # and leaves it alone


def test_a_stream_repeats_itself():
    noise = NoiseStream(0, [0, 1], SHAPE)
    assert torch.equal(noise.draw(4), noise.draw(4))
    assert torch.equal(noise.integers(1000, 4), noise.integers(1000, 4))


@pytest.mark.gpu
def test_the_device_changes_nothing():
    cpu, gpu = (NoiseStream(0, range(4), SHAPE, device) for device in ("cpu", "cuda"))
    assert torch.equal(gpu.draw().cpu(), cpu.draw())
    assert gpu.draw().device.type == "cuda"


def test_seeds_indices_and_streams_are_independent():
    keys = list(itertools.product((0, 1, 2**32, 2**32 + 1), (0, 1, 2), (0, 1)))
    fields = torch.stack([NoiseStream(s, [i], (64, 64)).draw(k).flatten() for s, i, k in keys])
    correlation = torch.corrcoef(fields) - torch.eye(len(keys))
    assert correlation.abs().max() < 5 / 64  # 5 standard deviations for 64² pixels


def test_moments():
    x = NoiseStream(0, range(64), (4096,)).draw()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert x.var().item() == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    assert (x**4).mean().item() == pytest.approx(3, abs=4 * (96 / n) ** 0.5)
    assert x.dtype == torch.float32


def test_integers_are_uniform_and_belong_to_the_sample():
    values = NoiseStream(0, range(4000), SHAPE).integers(4)
    assert values.dtype == torch.int64
    counts = torch.bincount(values, minlength=4)
    assert len(counts) == 4
    assert (counts - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert torch.equal(NoiseStream(0, [3999, 5], SHAPE).integers(4), values[[3999, 5]])


def test_generator_depends_on_the_order_of_its_arguments():
    seeds = {generator(*key).initial_seed() for key in itertools.permutations((1, 2, 3))}
    assert len(seeds) == 6
