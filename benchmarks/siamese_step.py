"""What a training step of Siamese-Diffusion costs: ``python -m benchmarks.siamese_step``.

Two ratios of the step with detached weights to the step as its authors write it, which copies the U-Net
and the ControlNet at every step and calls the ControlNet on the mask twice: seconds, measured in turns
(A B A B …) in one process, and the memory that a step takes at its peak (on the CPU that of a process of its
own).
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys

import torch
from torch import Tensor, nn

from benchmarks.miner_overhead import paired_ratios
from diffusion.backbones import SiameseDiff, TrainingBatch
from diffusion.schedule import add_noise

VARIANTS = ("detached", "copied")


def deep_copied(backbone: SiameseDiff, batch: TrainingBatch) -> dict[str, Tensor]:
    """Return the terms of the loss as the authors compute them: copies of both networks, call after call."""
    t, x_0, eps = batch.t, batch.x_0, batch.epsilon
    alpha_bar = backbone.alpha_bar(t)
    prompt = backbone.contexts[torch.zeros_like(t)]
    mask, image = backbone.picture(batch.mask, batch.image), (batch.image + 1) / 2
    networks = (backbone.controlnet, backbone.hint_encoder)

    def control(controlnet: nn.Module, encoder: nn.Module, hint: Tensor, x: Tensor) -> list[Tensor]:
        down, middle = controlnet(x, t, prompt, encoder(hint), return_dict=False)
        return [*down, middle]

    def output(unet: nn.Module, x: Tensor, added: list[Tensor]) -> Tensor:
        return unet(
            x, t, prompt, down_block_additional_residuals=added[:-1], mid_block_additional_residual=added[-1]
        ).sample

    x_t = add_noise(x_0, eps, alpha_bar)
    of_mask = output(backbone.unet, x_t, control(*networks, mask, x_t))
    still = [copy.deepcopy(network).requires_grad_(False) for network in networks]
    copied = copy.deepcopy(backbone.unet)
    seen = control(*networks, image, x_t)
    with torch.no_grad():
        fixed = control(*still, mask, x_t)
    both = [f.detach() + batch.progress * i for f, i in zip(fixed, seen, strict=True)]
    of_image = output(copied, x_t, both)
    terms = {
        "mask": (of_mask - eps).square().mean(),
        "image": (of_image - eps).square().mean(),
        "consistency": (of_mask - of_image.detach()).square().mean(),
    }
    if batch.progress > 1 / 3:
        denoised = (x_t - (1 - alpha_bar).sqrt() * of_image) / alpha_bar.sqrt()
        x_t = add_noise(denoised, eps, alpha_bar).detach()
        again = output(backbone.unet, x_t, control(*networks, mask, x_t))
        terms["augmented"] = ((again - eps).square().mean((1, 2, 3)) * (t <= 200)).mean()
    return terms


def step(variant: str, backbone: SiameseDiff, batch: TrainingBatch) -> None:
    """Run the forward and the backward pass of one training step."""
    backbone.zero_grad(set_to_none=True)
    terms = backbone.losses(batch) if variant == "detached" else deep_copied(backbone, batch)
    torch.stack(list(terms.values())).sum().backward()


def make(width: int, size: int, count: int, device: str) -> tuple[SiameseDiff, TrainingBatch]:
    """Return a network with Stable Diffusion's blocks at another width, and a batch late in training."""
    torch.manual_seed(0)
    widths = [width, 2 * width, 4 * width, 4 * width]
    unet = {"block_out_channels": widths, "cross_attention_dim": 768, "attention_head_dim": 8}
    vae = {
        "latent_channels": 4,
        "block_out_channels": (32, 32, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    backbone = SiameseDiff(unet_config=unet, vae_config=vae).to(device)
    mask = torch.zeros(count, size, size, dtype=torch.long)
    mask[:, size // 4 : size // 2, size // 4 : size // 2] = 1
    latent = (count, 4, size // 8, size // 8)
    tensors = [torch.rand(count, 3, size, size) * 2 - 1, mask, torch.randn(latent), torch.randn(latent)]
    tensors += [torch.linspace(0, 999, count).long(), torch.ones(count)]
    return backbone, TrainingBatch(*(tensor.to(device) for tensor in tensors), progress=0.5)


def peak(variant: str, options: argparse.Namespace) -> float:
    """Return the bytes that a step takes beyond those of the network itself."""
    if torch.cuda.is_available():
        backbone, batch = make(options.width, options.size, options.batch, "cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(variant, backbone, batch)
        return torch.cuda.max_memory_allocated() - before
    sizes = [f"--{name}={getattr(options, name)}" for name in ("width", "size", "batch")]
    command = [sys.executable, "-m", "benchmarks.siamese_step", *sizes, "--alone", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print both ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=96, help="features of the first level; 320 as published")
    parser.add_argument("--size", type=int, default=128, help="edge of the images in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.alone:
        backbone, batch = make(options.width, options.size, options.batch, device)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(options.alone, backbone, batch)
        print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
        return
    # Memory first: on Linux a new process begins with the peak of the one that started it.
    detached, copied = (peak(variant, options) for variant in VARIANTS)
    backbone, batch = make(options.width, options.size, options.batch, device)
    parameters = sum(p.numel() for p in backbone.parameters()) / 1e6
    print(f"{device}, {parameters:.0f} M parameters, {options.batch} × {options.size}², detached ÷ copied:")
    ratios = paired_ratios(
        lambda: step("detached", backbone, batch), lambda: step("copied", backbone, batch), options.rounds
    )
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"seconds a step: {middle:.2f} ({low:.2f} … {high:.2f})")
    print(f"memory of a step: {detached / copied:.2f} ({detached / 2**20:.0f} of {copied / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main()
