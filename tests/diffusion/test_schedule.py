import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from diffusion.sampler import Sampler
from diffusion.schedule import add_noise, alphas_cumprod, ddim_timesteps, min_snr_mse, predict_x0
from errors import InputError

LINEAR = ("linear", 1e-4, 0.02)
SCALED = ("scaled_linear", 0.00085, 0.012)


def times(pairs):
    return [t for t, _ in pairs]


@pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
)
@pytest.mark.parametrize("steps", [1, 4, 10, 50, 100, 500])
def test_timesteps_are_those_of_diffusers(spacing, offset, steps):
    scheduler = DDIMScheduler(1000, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    expected = scheduler.timesteps.tolist()
    if spacing == "linspace" and steps == 1:
        expected = [999]  # numpy starts a list of one at the clean end
    pairs = ddim_timesteps(steps, 1000, spacing, offset)
    assert times(pairs) == expected
    assert [previous for _, previous in pairs] == [*expected[1:], -1]


@pytest.mark.parametrize("steps", [3, 7, 30, 999])
def test_trailing_starts_at_the_end_where_steps_do_not_divide(steps):
    scheduler = DDIMScheduler(1000, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert times(ddim_timesteps(steps, 1000, "trailing")) == scheduler.timesteps.tolist()
    assert ddim_timesteps(steps, 1000, "trailing")[0][0] == 999


def test_the_first_ten_of_fifty_are_no_schedule_of_ten():
    head = ddim_timesteps(50)[:10]
    assert times(head) == list(range(980, 780, -20))
    assert head[-1] == (800, 780)
    assert times(ddim_timesteps(10)) == list(range(900, -1, -100))
    assert ddim_timesteps(50, offset=1)[0] == (981, 961)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(InputError, match="1000"):
        ddim_timesteps(steps)


@pytest.mark.parametrize(("steps", "left_out"), [(600, 400), (501, 499), (334, 332)])
def test_leading_steps_that_would_begin_amid_the_schedule(steps, left_out):
    with pytest.raises(InputError, match=f"noisiest {left_out} of 1000"):
        ddim_timesteps(steps)
    assert ddim_timesteps(steps, spacing="trailing")[0][0] == 999


def test_offset_beyond_the_schedule():
    with pytest.raises(InputError, match="offset 1"):
        ddim_timesteps(1000, 1000, "leading", 1)


@pytest.mark.parametrize(
    ("schedule", "t", "expected"),
    [(SCALED, 999, 14.65), (SCALED, 981, 13.16), (LINEAR, 999, 157.4), (LINEAR, 980, 130.1)],
)
def test_known_amplification(schedule, t, expected):
    alpha = alphas_cumprod(*schedule, 1000)[t].item()
    assert math.sqrt(1 / alpha) == pytest.approx(expected, rel=1e-3)


def test_cumulative_product_written_out():
    product = 1.0
    table = alphas_cumprod(*LINEAR, 1000)
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        if t in (0, 1, 500, 999):
            assert table[t].item() == pytest.approx(product, rel=1e-4)


def test_noising_and_its_inverse():
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 2, 3, 4, 5).double()
    for alpha in (0.9, 0.1):
        alpha = torch.tensor(alpha, dtype=torch.double)
        x_t = add_noise(x_0, eps, alpha)
        assert torch.allclose(x_t, alpha**0.5 * x_0 + (1 - alpha) ** 0.5 * eps)
        assert torch.allclose(predict_x0(x_t, eps, alpha), x_0)


class ZeroTerminal:
    """A schedule rescaled to zero terminal SNR (Lin et al., WACV 2024)."""

    spacing = "trailing"
    steps_offset = 0
    alphas_cumprod = DDIMScheduler(1000, rescale_betas_zero_snr=True).alphas_cumprod


def test_zero_terminal_snr_is_refused():
    with pytest.raises(InputError, match="ZeroTerminal: the schedule ends at zero signal-to-noise"):
        Sampler(ZeroTerminal())


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("v", [False, True])
def test_weights_of_min_snr_are_those_of_diffusers_training_scripts(gamma, v):
    torch.manual_seed(0)
    output, target, t = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.tensor([0, 50, 300, 700, 999])
    scheduler = DDIMScheduler(1000, *LINEAR[1:], LINEAR[0])
    snr = compute_snr(scheduler, t)
    weights = torch.stack([snr, torch.full_like(snr, gamma)]).min(0).values / (snr + 1 if v else snr)
    expected = ((output - target).square().mean((1, 2, 3)) * weights).mean()
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert min_snr_mse(output, target, alpha_bar, gamma, v).item() == pytest.approx(expected.item(), rel=1e-4)
    assert min_snr_mse(output, target, alpha_bar, None, v).item() == F.mse_loss(output, target).item()
