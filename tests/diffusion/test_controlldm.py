import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler, DDPMScheduler

from conftest import latent_batch, make_controlldm
from diffusion.backbones import ControlLDM, SiameseDiff, TrainingBatch
from diffusion.checkpoints import read_original, write_folder
from diffusion.hints import contour
from diffusion.sampler import Sampler
from errors import InputError
from networks.autoencoder import Autoencoder
from networks.hed import HED
from networks.pretrained import load_pretrained, save_pretrained
from original import edit, inputs


@pytest.fixture
def batch():
    return latent_batch(make_controlldm(), t=[0, 10, 500, 999])


def stock_output(backbone, x_t, t, hint, prompt):
    """Return what diffusers' own ControlNet and U-Net say, the hint encoded inside the ControlNet."""
    control = ControlNetModel.from_unet(backbone.unet, conditioning_embedding_out_channels=(4, 8))
    control.load_state_dict(
        backbone.controlnet.state_dict()
        | {f"controlnet_cond_embedding.{k}": v for k, v in backbone.hint_encoder.state_dict().items()}
    )
    down, middle = control(x_t, t, prompt, hint, return_dict=False)
    return backbone.unet(
        x_t, t, prompt, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample


def test_a_hint_that_is_encoded_once_gives_what_diffusers_gives(batch):
    backbone = make_controlldm(guidance=1.0).eval()
    mask, x, t = batch["mask"], batch["epsilon"], batch["t"]
    with torch.no_grad():
        hint = mask[:, None].float().expand(-1, 3, -1, -1)
        expected = stock_output(backbone, x, t, hint, backbone.contexts[[0]].expand(4, -1, -1))
        found = backbone.epsilon(x, t, backbone.condition(mask))
        other = backbone.epsilon(x, t, backbone.condition(1 - mask))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, other, atol=1e-3)


def test_guidance_leads_away_from_the_empty_prompt(batch):
    backbone = make_controlldm(guidance=3.0).eval()
    x, t, condition = batch["epsilon"], batch["t"], backbone.condition(batch["mask"])
    hint = condition["hint"]
    with torch.no_grad():
        wanted, unwanted = (
            backbone._output(x, t, hint, backbone.contexts[[row]].expand(4, -1, -1)) for row in (0, 3)
        )
        found = backbone.epsilon(x, t, condition)
    assert torch.allclose(found, unwanted + 3 * (wanted - unwanted), atol=1e-5)
    assert not torch.allclose(wanted, unwanted, atol=1e-4)
    assert backbone.passes == 2


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_training_loss_is_the_formula(batch, prediction):
    backbone = make_controlldm(prediction=prediction, prompt_dropout=0.5)
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    x_t = scheduler.add_noise(batch["x_0"], batch["epsilon"], batch["t"])
    target = batch["epsilon"]
    if prediction == "v":
        target = scheduler.get_velocity(batch["x_0"], batch["epsilon"], batch["t"])
    rows = torch.tensor([3, 3, 0, 0])  # the first two prompts are dropped
    hint = batch["mask"][:, None].float().expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = F.mse_loss(stock_output(backbone, x_t, batch["t"], hint, backbone.contexts[rows]), target)
        loss = backbone.training_loss(TrainingBatch(**batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_epsilon_of_v_goes_back_to_v(batch):
    backbone = make_controlldm(prediction="v", guidance=1.0).eval()
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    x_0, eps, t = batch["x_0"], batch["epsilon"], batch["t"]
    x_t, v = scheduler.add_noise(x_0, eps, t), scheduler.get_velocity(x_0, eps, t)
    assert torch.allclose(backbone._as_epsilon(v, x_t, t), eps, atol=1e-5)


def test_sampling_is_that_of_the_original_code(batch):
    """diffusers' DDIM with the settings that repeat the original sampler, step by step."""
    backbone = make_controlldm(guidance=2.0).eval()
    scheduler = DDIMScheduler(
        1000,
        0.00085,
        0.012,
        "scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(10)
    condition = backbone.condition(batch["mask"])
    x = batch["epsilon"]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(backbone.epsilon(x, t.expand(4), condition), t, x).prev_sample
        expected = backbone.decode(x).clamp(-1, 1)
    found = Sampler(backbone, 10).sample(batch["epsilon"], condition)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("learn", ["control", "decoder", "all"])
def test_what_is_trained(batch, learn):
    backbone = make_controlldm(learn=learn)
    backbone.training_loss(TrainingBatch(**batch)).backward()
    moved = {name.split(".")[0] for name, p in backbone.named_parameters() if p.grad is not None}
    unet = {
        ".".join(n.split(".")[:2])
        for n, p in backbone.unet.named_parameters(prefix="unet")
        if p.grad is not None
    }
    assert {"controlnet", "hint_encoder"} <= moved
    assert ("contexts" in moved) == (learn == "all")
    assert "vae" not in moved
    decoder = {"unet.up_blocks", "unet.conv_norm_out", "unet.conv_out"}
    if learn == "all":
        assert unet > decoder
    else:
        assert unet == (decoder if learn == "decoder" else set())


def test_gradient_checkpointing_changes_nothing(batch):
    plain, thrifty = (make_controlldm(gradient_checkpointing=on).train() for on in (False, True))
    assert thrifty.unet.is_gradient_checkpointing
    for network in (plain, thrifty):
        network.training_loss(TrainingBatch(**batch)).backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        if a.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.mark.parametrize("kind", [ControlLDM, SiameseDiff])
@pytest.mark.parametrize("thrifty", [False, True])
def test_training_in_bfloat16(batch, kind, thrifty):
    backbone = make_controlldm(kind=kind, gradient_checkpointing=thrifty).train()
    example = TrainingBatch(**batch, progress=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = backbone.training_loss(example)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(backbone.training_loss(example).item(), rel=0.05)
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


def test_images_are_decoded_one_at_a_time_where_a_gradient_is_asked_for(batch):
    backbone = make_controlldm().eval().freeze()
    sizes = []
    backbone.vae.decoder.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    latent = batch["epsilon"].requires_grad_()
    image = backbone.decode(latent)
    assert sizes == [1] * 4
    image.square().sum().backward()
    gradient = latent.grad.clone()
    with torch.no_grad():
        whole = backbone.decode(batch["epsilon"])
    assert sizes[-1] == 4
    assert torch.allclose(image, whole, atol=1e-5)
    direct = batch["epsilon"].detach().requires_grad_()
    backbone._decoded(direct / backbone.vae.config.scaling_factor).square().sum().backward()
    assert torch.allclose(gradient, direct.grad, rtol=1e-3, atol=1e-5)


def test_grey_images_through_a_vae_of_colours():
    """DiffBoost's decoder returns the mean of the channels; grey images are repeated on the way in."""
    grey, colour = make_controlldm(image_channels=1).eval(), make_controlldm().eval()
    image = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(grey.encode(image), colour.encode(image.expand(-1, 3, -1, -1)))
        z = torch.randn(2, 4, 8, 8)
        assert torch.allclose(grey.decode(z), colour.decode(z).mean(1, keepdim=True), atol=1e-6)


def test_hints_of_diffboost(batch):
    backbone = make_controlldm(hint="contour", edges="sobel")
    mask, image = batch["mask"], batch["image"]
    picture = backbone.picture(mask, image)
    assert picture.shape == (4, 3, 16, 16)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert not torch.equal(picture, backbone.picture(mask, image.flip(0)))
    with pytest.raises(InputError, match="edges sobel: the backbone reads edges of real images"):
        backbone.condition(mask)


def test_edges_by_the_network_of_diffboost(batch, tmp_path):
    torch.manual_seed(5)
    detector = HED()
    torch.save(detector.state_dict(), tmp_path / "network-bsds500.pth")
    backbone = make_controlldm(hint="contour", edges="hed", hed=str(tmp_path / "network-bsds500.pth"))
    with torch.no_grad():
        expected = (contour(batch["mask"]) + detector(batch["image"])).clamp(max=1)
        assert torch.equal(backbone.picture(batch["mask"], batch["image"]), expected.expand(-1, 3, -1, -1))
    assert not any(p.requires_grad for p in backbone.edge_detector.parameters())
    save_pretrained(backbone, tmp_path / "weights", {})
    again = load_pretrained(tmp_path / "weights", ControlLDM)
    assert again.fingerprint() == backbone.fingerprint()
    picture = again.picture(batch["mask"], batch["image"])
    assert torch.equal(picture, backbone.picture(batch["mask"], batch["image"]))
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth: holds another network than HED"):
        make_controlldm(edges="hed", hed=str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match="edges hed: its network has no weights; give hed"):
        make_controlldm(hint="contour", edges="hed").training_loss(TrainingBatch(**batch))
    with pytest.raises(InputError, match="is of use with edges hed only"):
        make_controlldm(hed=str(tmp_path / "network-bsds500.pth"))


def test_a_trained_autoencoder_is_taken_over(tmp_path):
    torch.manual_seed(3)
    autoencoder = Autoencoder(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    autoencoder.rescale(1 / 0.7)
    save_pretrained(autoencoder, tmp_path / "vae", {})
    backbone = make_controlldm(vae_config=None, autoencoder=str(tmp_path / "vae"))
    assert backbone.vae.config.scaling_factor == pytest.approx(0.7)
    trained = autoencoder.vae.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in backbone.vae.state_dict().items())
    save_pretrained(backbone, tmp_path / "backbone", {})
    again = load_pretrained(tmp_path / "backbone", ControlLDM)
    assert again.fingerprint() == backbone.fingerprint()
    assert "autoencoder" not in again.config


def test_prompts_are_embedded_once(originals, tokenizer, tmp_path):
    write_folder(read_original(originals["controlldm"], heads=4), tmp_path / "start", tokenizer)
    settings = {
        "prompt": "a cell",
        "sampling_prompt": {"a cell": 0.3, "a dog": 0.7},
        "negative_prompt": "bad",
    }
    backbone = ControlLDM(start=str(tmp_path / "start"), **settings)
    single = ControlLDM(start=str(tmp_path / "start"), prompt="a dog")
    trained, sampled, negative, empty = backbone.contexts
    assert torch.allclose(sampled, 0.3 * trained + 0.7 * single.contexts[0], atol=1e-6)
    assert torch.equal(single.contexts[1], single.contexts[0])  # without another prompt for sampling
    assert torch.equal(single.contexts[2], single.contexts[3])
    assert not torch.equal(negative, empty)
    condition = backbone.condition(inputs()["mask"])
    assert torch.equal(condition["prompt"][0], sampled)
    assert torch.equal(condition["negative"][0], negative)
    save_pretrained(backbone, tmp_path / "weights", {})
    (tmp_path / "start").rename(tmp_path / "elsewhere")  # what was started from is not needed again
    again = load_pretrained(tmp_path / "weights", ControlLDM)
    assert torch.equal(again.contexts, backbone.contexts)


@pytest.fixture
def stable(originals, tokenizer, tmp_path):
    """A folder to start from, and the file of its schedule."""
    write_folder(read_original(originals["controlldm"], heads=4), tmp_path / "start", tokenizer)
    return tmp_path / "start", tmp_path / "start" / "scheduler" / "scheduler_config.json"


def test_schedule_and_prediction_of_what_one_starts_from_are_taken_over(stable, tmp_path):
    start, file = stable
    assert ControlLDM(start=str(start)).config.beta_end == 0.012
    edit(file, prediction_type="v_prediction", beta_schedule="linear", beta_end=0.02, num_train_timesteps=500)
    backbone = ControlLDM(start=str(start))
    expected = DDPMScheduler(500, 0.00085, 0.02, "linear").alphas_cumprod
    assert torch.equal(backbone.alphas_cumprod, expected)
    assert (backbone.prediction, backbone.config.prediction) == ("v", "v")
    assert ControlLDM(start=str(start), beta_end=0.02).config.beta_end == 0.02
    with pytest.raises(InputError, match=r"start: its model has beta_end 0.02, not 0.03: set it so"):
        ControlLDM(start=str(start), beta_end=0.03)
    save_pretrained(backbone, tmp_path / "weights", {})
    again = load_pretrained(tmp_path / "weights", ControlLDM)
    assert again.prediction == "v"
    assert torch.equal(again.alphas_cumprod, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, and a backbone's is False"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is squaredcos_cap_v2, .* or linear"),
        ({"prediction_type": "sample"}, "prediction_type is sample"),
        ({"beta_end": "much"}, "has no number for one"),
        ({"beta_end": 1.0}, "beta_end 1 after 1000 train_steps: the schedule ends at zero"),
    ],
)
def test_a_schedule_that_no_backbone_has_is_refused(settings, said, stable):
    start, file = stable
    edit(file, **settings)
    with pytest.raises(InputError, match=said):
        ControlLDM(start=str(start))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"palette": [[0, 0, 0]]}, "palette: has 1 colours for 2 classes"),
        ({"prompt_dropout": 1.0}, "prompt_dropout 1.0: must be"),
        ({"hint_channels": (4, 8, 8)}, "hint_channels .*halve the mask 2 times, the VAE its images 1 times"),
        ({"image_channels": 2}, "image_channels 2: the VAE reads 3"),
        ({"start": "x", "autoencoder": "y"}, "start and autoencoder: choose one"),
        ({"vae_config": None}, "autoencoder: there is no VAE; give"),
    ],
)
def test_arguments_that_do_not_fit(changes, said):
    with pytest.raises(InputError, match=said):
        make_controlldm(**changes)


def test_sizes_that_the_vae_cannot_halve():
    with pytest.raises(InputError, match=r"images of 15 × 16 pixels: the VAE needs .* multiples of 2"):
        make_controlldm().noise_shape((15, 16))
    assert make_controlldm().noise_shape((16, 24)) == (4, 8, 12)


def test_network_of_stable_diffusion():
    """859.5 million parameters in the U-Net, 361.3 in the ControlNet, 83.7 in the VAE."""
    vae = {
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    with torch.device("meta"):
        backbone = ControlLDM(vae_config=vae)
    counts = {
        "unet": backbone.unet,
        "vae": backbone.vae,
        "control": torch.nn.ModuleList([backbone.controlnet, backbone.hint_encoder]),
    }
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in counts.items()}
    assert found == {"unet": 859_520_964, "vae": 83_653_863, "control": 361_279_120}
