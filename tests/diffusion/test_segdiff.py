import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file, save_file

from conftest import make_backbone
from diffusion.backbones import SegDiff, TrainingBatch
from diffusion.noise import NoiseStream
from errors import InputError
from networks.pretrained import load_pretrained, save_pretrained
from original import edit, write_published


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {
        "image": torch.rand(4, 3, 16, 16) * 2 - 1,
        "mask": torch.randint(0, 2, (4, 16, 16)),
        "epsilon": torch.randn(4, 3, 16, 16),
        "t": torch.tensor([0, 10, 500, 999]),
        "chance": torch.tensor([0.0, 0.3, 0.6, 0.9]),
    }


@pytest.mark.parametrize("encoding", ["onehot", "index"])
@pytest.mark.parametrize("schedule", [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012)])
def test_training_loss_is_the_formula(batch, encoding, schedule):
    kind, start, end = schedule
    backbone = make_backbone(mask_encoding=encoding, beta_schedule=kind, beta_start=start, beta_end=end)
    scheduler = DDPMScheduler(1000, start, end, kind)
    channel = batch["mask"][:, None].float() / (1 if encoding == "onehot" else 255)
    x_t = scheduler.add_noise(batch["image"], batch["epsilon"], batch["t"])
    with torch.no_grad():
        predicted = backbone.unet(torch.cat([x_t, channel], 1), batch["t"]).sample
        loss = backbone.training_loss(TrainingBatch(x_0=batch["image"], **batch))
    assert loss.item() == pytest.approx(F.mse_loss(predicted, batch["epsilon"]).item(), rel=1e-5)


def test_sizes_that_cannot_be_halved_are_refused():
    backbone = make_backbone(block_out_channels=(8, 8, 8))
    assert backbone.noise_shape((16, 20)) == (3, 16, 20)
    with pytest.raises(InputError, match=r"18 × 20 pixels.*3 levels.*multiples of 4"):
        backbone.noise_shape((18, 20))


def test_a_share_of_the_masks_is_hidden_in_training(batch):
    backbone = make_backbone(unconditional=0.5)
    x_t = DDPMScheduler(1000, 1e-4, 0.02, "linear").add_noise(batch["image"], batch["epsilon"], batch["t"])
    channel = batch["mask"][:, None].float()
    channel[:2] = -1
    with torch.no_grad():
        predicted = backbone.unet(torch.cat([x_t, channel], 1), batch["t"]).sample
        loss = backbone.training_loss(TrainingBatch(x_0=batch["image"], **batch))
    assert loss.item() == pytest.approx(F.mse_loss(predicted, batch["epsilon"]).item(), rel=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_goes_from_the_hidden_mask_past_the_mask(batch, guidance):
    backbone = make_backbone(unconditional=0.1, guidance=guidance).eval()
    x, t, condition = batch["image"], batch["t"], backbone.condition(batch["mask"])
    with torch.no_grad():
        with_mask, without = (
            backbone.unet(torch.cat([x, channel], 1), t).sample
            for channel in (condition, -torch.ones_like(condition))
        )
        eps = backbone.epsilon(x, t, condition)
    assert torch.allclose(eps, without + guidance * (with_mask - without), atol=1e-5)
    assert not torch.allclose(with_mask, without, atol=1e-3)


def test_guidance_needs_a_model_that_has_seen_hidden_masks():
    with pytest.raises(InputError, match=r"guidance 2\.5: needs a model trained with unconditional"):
        SegDiff(guidance=2.5)
    with pytest.raises(InputError, match=r"unconditional 1\.0"):
        SegDiff(unconditional=1.0)


def test_training_loss_on_v(batch):
    backbone = make_backbone(prediction="v", snr_gamma=5.0)
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear")
    x_0, eps, t = batch["image"], batch["epsilon"], batch["t"]
    x_t, v = scheduler.add_noise(x_0, eps, t), scheduler.get_velocity(x_0, eps, t)
    with torch.no_grad():
        output = backbone.unet(torch.cat([x_t, batch["mask"][:, None].float()], 1), t).sample
        loss = backbone.training_loss(TrainingBatch(x_0=x_0, **batch))
        predicted = backbone.epsilon(x_t, t, backbone.condition(batch["mask"]))
    snr = compute_snr(scheduler, t)
    expected = ((output - v).square().mean((1, 2, 3)) * snr.clamp(max=5) / (snr + 1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert torch.allclose(predicted, alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * x_t, atol=1e-5)
    assert torch.allclose(backbone._as_epsilon(v, x_t, t), eps, atol=1e-4)


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_training_in_bfloat16(batch, fusion):
    backbone = make_backbone(fusion=fusion, encoder_width=4, encoder_blocks=1)
    example = TrainingBatch(x_0=batch["image"], **batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = backbone.training_loss(example)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(backbone.training_loss(example).item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


def test_features_are_added_to_those_of_the_first_layer(batch):
    backbone = make_backbone(fusion="sum", encoder_width=4, encoder_blocks=1).eval()
    x, t, mask = batch["image"], batch["t"], batch["mask"]
    first = {}
    backbone.unet.down_blocks[0].resnets[0].register_forward_hook(
        lambda module, given, out: first.update(x=given[0])
    )
    with torch.no_grad():
        eps = backbone.epsilon(x, t, backbone.condition(mask))
        channel = mask[:, None].float()
        assert torch.allclose(
            first["x"], backbone.unet.conv_in.image(x) + backbone.encoder(channel), atol=1e-6
        )
        assert not torch.allclose(eps, backbone.epsilon(x, t, backbone.condition(1 - mask)), atol=1e-4)
        loss = backbone.training_loss(TrainingBatch(x_0=x, **batch))
        x_t = DDPMScheduler(1000, 1e-4, 0.02, "linear").add_noise(x, batch["epsilon"], t)
        expected = F.mse_loss(backbone.epsilon(x_t, t, backbone.condition(mask)), batch["epsilon"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    backbone.train().training_loss(TrainingBatch(x_0=x, **batch)).backward()
    assert all(p.grad is not None and p.grad.any() for p in backbone.encoder.parameters())


def test_features_of_a_hidden_mask_under_guidance(batch):
    backbone = make_backbone(
        fusion="sum", encoder_width=4, encoder_blocks=1, unconditional=0.1, guidance=2.5
    ).eval()
    x, t, mask = batch["image"], batch["t"], batch["mask"]
    with torch.no_grad():
        with_mask, without = (
            backbone._output(x, t, backbone.encoder(channel))
            for channel in (mask[:, None].float(), -torch.ones(4, 1, 16, 16))
        )
        eps = backbone.epsilon(x, t, backbone.condition(mask))
    assert torch.allclose(eps, without + 2.5 * (with_mask - without), atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_published_folder_is_taken_over(tmp_path, kind):
    unet = write_published(tmp_path).eval()
    if kind == "bin":
        torch.save(unet.state_dict(), tmp_path / "unet" / "diffusion_pytorch_model.bin")
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    backbone = SegDiff(num_classes=3, start=str(tmp_path)).eval()
    mask, x, t = torch.randint(0, 3, (2, 16, 16)), torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        expected = unet(torch.cat([x, mask[:, None] / 255], 1), t).sample
        assert torch.equal(backbone.epsilon(x, t, backbone.condition(mask)), expected)
    assert (backbone.image_channels, backbone.clip_sample) == (1, True)
    save_pretrained(backbone, tmp_path / "weights", {})
    again = load_pretrained(tmp_path / "weights", SegDiff)
    assert again.fingerprint() == backbone.fingerprint()
    assert again.noise_shape((16, 16)) == (1, 16, 16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 4}, "has 3 channels for the mask, not 1"),
        ({"attention_head_dim": 4}, "has attention_head_dim 4"),
        ({"freq_shift": 1}, "has freq_shift 1"),
        ({"norm_eps": 0.01}, "has norm_eps 0.01"),
        ({"flip_sin_to_cos": False}, "has flip_sin_to_cos False"),
        ({"mid_block_scale_factor": 2.0}, "has mid_block_scale_factor 2.0"),
        ({"downsample_padding": 0}, "has downsample_padding 0"),
        ({"up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")}, "has up_block_types AttnUp"),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")}, "ResnetDown"),
    ],
)
def test_another_network_is_refused(tmp_path, changes, said):
    write_published(tmp_path, **changes)
    with pytest.raises(InputError, match=said):
        SegDiff(start=str(tmp_path))


def test_a_folder_without_its_files_says_so(tmp_path):
    with pytest.raises(InputError, match=r"unet/config.json: cannot be read"):
        SegDiff(start=str(tmp_path))
    write_published(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"unet: holds no weights"):
        SegDiff(start=str(tmp_path))
    with pytest.raises(InputError, match="start: the published network has fusion concat"):
        SegDiff(start=str(tmp_path), mask_encoding="onehot")


def test_schedule_and_prediction_of_a_published_folder_are_taken_over(tmp_path):
    write_published(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    edit(file, prediction_type="v_prediction", beta_end=0.01, num_train_timesteps=500)
    backbone = SegDiff(start=str(tmp_path))
    assert (backbone.prediction, backbone.config.prediction, backbone.config.beta_end) == ("v", "v", 0.01)
    assert len(backbone.alphas_cumprod) == backbone.config.train_steps == 500
    with pytest.raises(InputError, match=r"start: its model has beta_end 0.01, not 0.03: set it so"):
        SegDiff(start=str(tmp_path), beta_end=0.03)
    edit(file, rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match=r"scheduler_config.json: rescale_betas_zero_snr is True"):
        SegDiff(start=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("unet/config.json", "{}", "0 channels for the mask|is no network of segmentation"),
        ("unet/config.json", "[]", "holds no settings by name, but a list"),
        ("scheduler/scheduler_config.json", "{", "cannot be read"),
        (
            "scheduler/scheduler_config.json",
            "{}",
            "lacks a setting, .*beta_schedule",
        ),
    ],
)
def test_damaged_settings_say_so(tmp_path, name, content, said):
    write_published(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        SegDiff(start=str(tmp_path))


def test_other_weights_than_the_settings_ask_for_say_so(tmp_path):
    write_published(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(dict(list(weights.items())[::2]), file)
    with pytest.raises(InputError, match=r"the unet is not whole: \d+ .*is missing"):
        SegDiff(start=str(tmp_path))
    save_file(weights | {"conv_in.bias": weights["conv_in.bias"] / 0}, file)
    with pytest.raises(InputError, match=r"1 weights differ .*conv_in.bias holds NaN or infinity"):
        SegDiff(start=str(tmp_path))
    save_file(weights, file)
    edit(tmp_path / "unet" / "config.json", in_channels=4, out_channels=3)
    with pytest.raises(InputError, match=r"the unet is not whole: .*conv_in.weight is"):
        SegDiff(start=str(tmp_path))
    edit(tmp_path / "unet" / "config.json", block_out_channels=[8, 6, 16])
    with pytest.raises(InputError, match=r"unet/config.json describes no network \(ValueError"):
        SegDiff(start=str(tmp_path))


def test_a_schedule_without_signal_at_its_end_is_refused():
    with pytest.raises(InputError, match=r"beta_end 1 after 1000 train_steps: the schedule ends at zero"):
        make_backbone(beta_end=1.0)


def test_weights_of_the_timesteps_are_not_part_of_the_network():
    plain, weighted = make_backbone(), make_backbone(snr_gamma=5.0)
    assert plain.fingerprint() == weighted.fingerprint()
    with pytest.raises(InputError, match="snr_gamma 0: must be positive"):
        SegDiff(snr_gamma=0)


def test_index_encoding():
    mask = torch.tensor([[[0, 1], [2, 255]]])
    encoded = make_backbone(mask_encoding="index").condition(mask)
    assert torch.equal(encoded, torch.tensor([[[[0, 1 / 255], [2 / 255, 1]]]]))


def test_onehot_encoding_leaves_the_background_out():
    encoded = make_backbone(num_classes=3).condition(torch.tensor([[[0, 1], [2, 1]]]))
    assert encoded.tolist() == [[[[0, 1], [0, 1]], [[0, 0], [1, 0]]]]


def test_epsilon_has_the_noise_shape_and_sees_mask_and_time():
    backbone = make_backbone(image_channels=1, num_classes=4).eval()
    assert backbone.noise_shape((16, 24)) == (1, 16, 24)
    x, t = torch.randn(2, 1, 16, 24), torch.tensor([5, 5])
    mask = torch.zeros(2, 16, 24, dtype=torch.long)
    with torch.no_grad():
        eps = backbone.epsilon(x, t, backbone.condition(mask))
        assert eps.shape == x.shape
        assert not torch.allclose(eps, backbone.epsilon(x, t, backbone.condition(mask + 3)), atol=1e-4)
        assert not torch.allclose(eps, backbone.epsilon(x, t + 500, backbone.condition(mask)), atol=1e-4)
    assert torch.equal(backbone.decode(x), x)


def test_alpha_bar_of_tensors_and_of_the_end():
    backbone = make_backbone()
    values = backbone.alpha_bar(torch.tensor([0, 999, -1]))
    assert values.shape == (3, 1, 1, 1)
    assert values.flatten().tolist() == [*backbone.alphas_cumprod[[0, 999]].tolist(), 1.0]
    backbone.final_alpha = 0.5
    assert backbone.alpha_bar(-1).item() == 0.5


def test_published_network():
    with torch.device("meta"):
        ours = SegDiff()
        theirs = UNet2DModel(
            in_channels=4,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        )
    expected = {f"unet.{name}": p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == expected


def test_it_learns():
    """Flat images whose value the mask gives away: the loss falls well below that of predicting zero."""
    backbone = make_backbone(block_out_channels=(16, 16))
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=3e-3)
    losses = []
    for step in range(80):
        noise = NoiseStream(0, range(8 * step, 8 * step + 8), (3, 8, 8))
        mask = noise.integers(2, 2)[:, None, None].expand(8, 8, 8)
        image = (mask[:, None].float() - 0.5).expand(8, 3, 8, 8)
        loss = backbone.training_loss(
            TrainingBatch(image, mask, image, noise.draw(), noise.integers(1000, 1), torch.zeros(8))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[:3]) / 3 > 0.7
    assert sum(losses[-10:]) / 10 < 0.35
