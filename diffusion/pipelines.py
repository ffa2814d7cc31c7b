"""A trained miner in any pipeline of diffusers: it chooses the ``latents``, the pipeline does the rest.

``docs/backbones.md`` has an example.
"""

import copy
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffusion.schedule import check_terminal, predict_x0
from errors import InputError
from networks.miner import Miner
from objectives.nativeness import preserve_norm


class _Predicted(Exception):  # noqa: N818  (it is no error)
    """Carries the first prediction out of a pipeline."""


@torch.no_grad()
def initial_epsilon(
    pipeline: Any, latents: Tensor, timestep: int | None = None, **call: Any
) -> tuple[Tensor, Tensor]:
    """Return what a pipeline predicts at its first step, guidance and all, and ᾱ there.

    The pipeline runs as it always does, and is stopped when it hands its first prediction to its scheduler.

    Args:
        pipeline: a pipeline of diffusers with a DDIM scheduler.
        latents: noise ``(B, C, H, W)``.
        timestep: takes the place of the first timestep of the schedule.
        call: what the pipeline is called with.

    Raises:
        InputError: the scheduler is not DDIM, its model predicts x_0, or its schedule leaves no signal.
    """
    usual = pipeline.scheduler
    scheduler = copy.copy(usual)
    kind = scheduler.config.prediction_type
    if not isinstance(scheduler, DDIMScheduler) or kind not in ("epsilon", "v_prediction"):
        raise InputError(
            f"{type(scheduler).__name__} ({kind}): a miner shifts the noise of DDIM; set pipeline.scheduler "
            "to DDIMScheduler.from_config(pipeline.scheduler.config)"
        )
    check_terminal(scheduler.alphas_cumprod, "pipeline.scheduler")
    spaced = scheduler.set_timesteps

    def start_at(*arguments: Any, **keywords: Any) -> None:
        spaced(*arguments, **keywords)
        if timestep is not None:
            scheduler.timesteps = torch.full_like(scheduler.timesteps, timestep)

    def caught(output: Tensor, t: Any, *arguments: Any, **keywords: Any) -> None:
        raise _Predicted(output, int(t))

    scheduler.step, scheduler.set_timesteps = caught, start_at
    pipeline.scheduler = scheduler
    try:
        pipeline(latents=latents, **call)
    except _Predicted as found:
        output, t = found.args
    finally:
        pipeline.scheduler = usual
    alpha_bar = scheduler.alphas_cumprod[t].to(output)
    if kind == "v_prediction":
        output = alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latents.to(output)
    return output.float(), alpha_bar.float()


@torch.no_grad()
def mined_latents(
    pipeline: Any,
    miner: Miner,
    probe: Tensor,
    fresh: Tensor | None = None,
    mask: Tensor | None = None,
    keep_norm: bool = False,
    **call: Any,
) -> Tensor:
    """Return noise x_T^r that the miner has shifted, to call the pipeline with as its ``latents``.

    Args:
        pipeline: a pipeline of diffusers with a DDIM scheduler, whose networks the miner was trained against.
        miner: the trained miner.
        probe: standard normal noise x̂_T ``(B, C, H, W)``, which the miner looks at.
        fresh: the noise ε that is shifted; None takes ``probe`` again, for a miner trained with paired noise.
        mask: int64 class maps ``(B, H', W')``, for a miner that reads them.
        keep_norm: rescale to the norm of ``fresh``, for a miner trained so.
        call: what the pipeline is called with: prompt, image, guidance_scale, num_inference_steps, ….

    Raises:
        InputError: the scheduler is none that a miner can be used with, the miner is for other latents, or
            it reads a mask and there is none.
    """
    if miner.channels != probe.shape[1]:
        raise InputError(
            f"the miner is for noise of {miner.channels} channels, the probe has {probe.shape[1]}; "
            "give one that was trained against the networks of this pipeline"
        )
    if miner.num_classes and mask is None:
        raise InputError(f"the miner reads masks of {miner.num_classes} classes: give mask")
    miner = miner.to(probe.device)
    eps = probe if fresh is None else fresh
    if miner.inputs == "noise":
        response = probe
    else:
        alphas = pipeline.scheduler.alphas_cumprod
        start = int((alphas >= miner.signal).sum()) - 1 if miner.inputs == "glance" else None
        predicted, alpha_bar = initial_epsilon(pipeline, probe, start, **call)
        if miner.inputs == "score":
            response = -predicted / (1 - alpha_bar).sqrt()
        else:
            response = predict_x0(probe, predicted, alpha_bar).clamp(-3, 3)
    x_T = miner(response.float(), mask).rsample(eps)
    return preserve_norm(x_T, eps) if keep_norm else x_T
