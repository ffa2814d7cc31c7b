import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)
from transformers import AutoTokenizer, CLIPTextModel

from conftest import make_miner
from diffusion.backbones import ControlLDM, SiameseDiff
from diffusion.checkpoints import read_original, write_folder
from diffusion.noise import NoiseStream
from diffusion.pipelines import initial_epsilon, mined_latents
from diffusion.sampler import Sampler
from errors import InputError
from methods import Mined
from methods.method import FRESH, PROBE, Request

PROMPT, NEGATIVE = "a cell", "bad"
STEPS, GUIDANCE = 6, 3.0


@pytest.fixture(scope="module", params=["controlldm", "siamesediff"])
def both(request, originals, tokenizer, tmp_path_factory):
    """A backbone, and a stock pipeline of the same networks."""
    folder = tmp_path_factory.mktemp("pipeline") / "folder"
    write_folder(read_original(originals[request.param], heads=4), folder, tokenizer)
    kind = {"controlldm": ControlLDM, "siamesediff": SiameseDiff}[request.param]
    settings = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance": GUIDANCE}
    backbone = kind(start=str(folder), **settings).eval().freeze()
    pipeline = StableDiffusionControlNetPipeline(
        vae=backbone.vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        unet=backbone.unet,
        controlnet=backbone.stock_controlnet(),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return backbone, pipeline


def test_a_folder_gives_no_pipeline_with_a_random_hint_encoder(originals, tokenizer, tmp_path):
    write_folder(read_original(originals["siamesediff"], heads=4), tmp_path / "folder", tokenizer)
    with pytest.raises(ValueError, match=r"expected .*'controlnet'"):
        StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "folder")
    control = SiameseDiff(start=str(tmp_path / "folder")).stock_controlnet()
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "folder", controlnet=control)
    assert pipeline.controlnet is control


def asked(backbone, count=2):
    mask = torch.zeros(count, 64, 64, dtype=torch.long)
    mask[0, 10:30, 20:40] = 1
    mask[1:, 30:60, 5:25] = 1
    noise = NoiseStream(3, range(count), backbone.noise_shape((64, 64)))
    image = torch.zeros(count, 3, 64, 64)
    return Request(Sampler(backbone, STEPS), noise, mask, backbone.condition(mask, image), None, image)


def call(request):
    hint = request.mask[:, None].float().expand(-1, 3, -1, -1)
    count = len(hint)
    return {
        "prompt": [PROMPT] * count,
        "negative_prompt": [NEGATIVE] * count,
        "image": hint,
        "guidance_scale": GUIDANCE,
        "num_inference_steps": STEPS,
        "output_type": "pt",
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"inputs": "score"},
        {"inputs": "estimate", "num_classes": 2},
        {"inputs": "glance", "signal": 0.1},
        {"inputs": "noise", "variance_bound": 0},
    ],
    ids=lambda settings: settings["inputs"],
)
@pytest.mark.parametrize("noise", ["fresh", "paired"])
def test_same_noise_in_same_image_out(both, settings, noise):
    backbone, pipeline = both
    request = asked(backbone)
    miner = make_miner(trained=True, channels=4, **settings).eval()
    ours, notes = Mined(miner, noise, keep_norm=noise == "paired").synthesize(request)
    latents = mined_latents(
        pipeline,
        miner,
        request.noise.draw(PROBE),
        request.noise.draw(FRESH) if noise == "fresh" else None,
        mask=request.mask,
        keep_norm=noise == "paired",
        **call(request),
    )
    assert torch.allclose(latents, notes["x_T"], atol=1e-4)
    theirs = pipeline(latents=latents, **call(request)).images
    assert torch.allclose(theirs, (ours + 1) / 2, atol=1e-3)
    plain = pipeline(latents=request.noise.draw(PROBE), **call(request)).images
    assert not torch.allclose(theirs, plain, atol=1e-2)


def test_the_pipeline_is_left_as_it_was(both):
    backbone, pipeline = both
    request = asked(backbone)
    before = pipeline(latents=request.noise.draw(), **call(request)).images
    initial_epsilon(pipeline, request.noise.draw(), **call(request))
    assert torch.equal(pipeline(latents=request.noise.draw(), **call(request)).images, before)


@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
def test_another_scheduler_is_refused(both, kind, monkeypatch):
    backbone, pipeline = both
    request = asked(backbone)
    monkeypatch.setattr(pipeline, "scheduler", kind.from_config(pipeline.scheduler.config))
    with pytest.raises(InputError, match=rf"{kind.__name__} .*: a miner shifts the noise of DDIM"):
        mined_latents(pipeline, make_miner(channels=4), request.noise.draw(), **call(request))


def test_a_schedule_without_signal_at_its_end_is_refused(both, monkeypatch):
    backbone, pipeline = both
    request = asked(backbone)
    zero = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    monkeypatch.setattr(pipeline, "scheduler", zero)
    with pytest.raises(InputError, match=r"pipeline.scheduler: the schedule ends at zero signal-to-noise"):
        mined_latents(pipeline, make_miner(channels=4), request.noise.draw(), **call(request))


def test_a_miner_that_does_not_fit_is_refused(both):
    backbone, pipeline = both
    request = asked(backbone)
    with pytest.raises(InputError, match="reads masks of 2 classes: give mask"):
        mined_latents(pipeline, make_miner(channels=4, num_classes=2), request.noise.draw(), **call(request))
    with pytest.raises(InputError, match="is for noise of 3 channels, the probe has 4"):
        mined_latents(pipeline, make_miner(channels=3), request.noise.draw(), **call(request))
