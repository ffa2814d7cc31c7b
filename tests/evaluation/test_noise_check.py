import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from errors import InputError
from evaluation.noise import excess_kurtosis, power_spectrum, typical_set

SHAPE = (64, 3, 16, 16)


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def worst(check):
    return max(abs(z) for z in check["z"])


@pytest.mark.parametrize("shape", [SHAPE, (40, 4, 12, 20), (500, 1, 7, 5)])
def test_white_noise_passes(shape):
    checks = typical_set(noise(1, shape))
    assert {name: worst(check) < 4 for name, check in checks.items()} == dict.fromkeys(checks, True)
    assert len(checks["channel_mean"]["value"]) == shape[1]


def test_z_scores_are_standard_normal():
    """Over many draws every z has mean 0 and deviation 1."""
    draws = [typical_set(noise(seed, (8, 2, 8, 8))) for seed in range(300)]
    for name in draws[0]:
        z = np.array([draw[name]["z"] for draw in draws])
        np.testing.assert_allclose(z.mean(0), 0, atol=4 / 300**0.5)
        np.testing.assert_allclose(z.std(0), 1, atol=0.2)


def test_the_statistics_are_those_of_the_entries():
    x = noise(2, (5, 2, 4, 4)) * 1.3 + 0.2
    checks = typical_set(x.float())
    flat = x.float().double().numpy().reshape(5, -1)
    assert checks["norm_ratio"]["value"][0] == pytest.approx(
        np.mean([np.linalg.norm(r) for r in flat]) / 32**0.5
    )
    channels = x.float().double().numpy().transpose(1, 0, 2, 3).reshape(2, -1)
    assert checks["channel_mean"]["value"] == pytest.approx(channels.mean(1))
    assert checks["channel_variance"]["value"] == pytest.approx(channels.var(1, ddof=1))
    for check in checks.values():
        columns = (check[key] for key in ("value", "expected", "sd", "z"))
        for value, expected, sd, z in zip(*columns, strict=True):
            assert z == pytest.approx((value - expected) / sd)


def test_inflated_variance_is_flagged():
    x = noise()
    x[:, 1] *= 1.05
    checks = typical_set(x)
    z = checks["channel_variance"]["z"]
    assert abs(z[0]) < 4
    assert z[1] > 6
    assert checks["channel_variance"]["value"][1] == pytest.approx(1.05**2, abs=0.03)
    assert checks["norm_ratio"]["z"][0] > 4


def test_shifted_mean_is_flagged():
    x = noise()
    x[:, 2] += 0.1
    z = typical_set(x)["channel_mean"]["z"]
    assert abs(z[0]) < 4
    assert z[2] == pytest.approx(0.1 * (64 * 256) ** 0.5, abs=4)


def test_blurred_noise_of_the_right_norm_is_flagged_by_the_spectrum_alone():
    x = noise()
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1)
    x = x + 0.3 * blurred
    x = x / x.flatten(1).norm(dim=1)[:, None, None, None] * x[0].numel() ** 0.5
    checks = typical_set(x)
    assert worst(checks["kurtosis"]) < 4
    assert worst(checks["channel_variance"]) < 4
    assert checks["spectrum"]["z"][2] > 8
    assert checks["spectrum"]["z"][-3] < -4


def test_noise_inflated_in_places_is_flagged_by_the_kurtosis():
    x = noise()
    x[:, :, :8] *= 1.3
    x[:, :, 8:] *= (2 - 1.3**2) ** 0.5  # keeps the variance
    checks = typical_set(x)
    assert worst(checks["channel_variance"]) < 4
    assert checks["kurtosis"]["z"][0] > 20


def test_spectrum_of_a_wave_is_in_its_band():
    phase = 2 * math.pi * torch.arange(32, dtype=torch.float64) / 32
    x = torch.cos(3 * phase[:, None] + 4 * phase).expand(2, 1, 32, 32)  # 5 cycles an image
    power, count = power_spectrum(x)
    assert int(power.argmax()) == 5
    assert float(power[5] * count[5]) == pytest.approx(32 * 32 / 2)  # Parseval: the sum of squares
    assert int(count.sum()) == 32 * 32
    assert count[0] == 1


def test_kurtosis_of_known_distributions():
    uniform = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    assert float(excess_kurtosis(uniform)) == pytest.approx(-1.2, abs=1e-3)
    assert float(excess_kurtosis(torch.tensor([-1.0, 1.0]))) == pytest.approx(-2)


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 3, 4, 4), (1, 3, 1, 1)])
def test_noise_of_another_shape(shape):
    with pytest.raises(InputError, match="give \\(N, C, H, W\\)"):
        typical_set(torch.zeros(shape))


def test_noise_that_is_not_finite():
    x = noise()
    x[0, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match="not finite"):
        typical_set(x)
