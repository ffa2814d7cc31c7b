"""What mining costs: ``python -m benchmarks.miner_overhead``.

Two ratios, each measured in turns (A B A B …) in one process:

- synthesis with the miner ÷ plain synthesis, seconds an image. The floor is 51/50: one more call of the
  backbone (the paper reports 1.20, the authors' repository 1.06);
- a rollout's forward and backward pass with the full gradient ÷ with the closed form, seconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from diffusion.backbones import SegDiff
from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from methods import Base, Mined, Request
from networks import Miner, NNUNet


def paired_ratios(
    numerator: Callable[[], object], denominator: Callable[[], object], rounds: int
) -> list[float]:
    """Return the ratio of the two durations in each of ``rounds`` rounds, after one unmeasured round."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for call in (numerator, denominator):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return ratios[1:]


def main() -> None:
    """Measure and print both ratios: median, minimum and maximum over the rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=64, help="edge of the images in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--miner-width", type=int, default=79, help="base width; 79 is the authors' value")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    backbone = SegDiff(3, 2, "onehot", (32, 64, 96, 128), 1, (3,), 8).freeze().to(device)
    sampler = Sampler(backbone, steps=50)
    size = (options.size, options.size)
    noise = NoiseStream(0, range(options.batch), backbone.noise_shape(size), device)
    mask = torch.zeros(options.batch, *size, dtype=torch.long, device=device)
    mask[:, 8:24, 8:24] = 1
    condition = backbone.condition(mask)
    segmenter = NNUNet(3, 2, size).freeze().to(device)
    image = torch.zeros(options.batch, 3, *size, device=device)
    request = Request(sampler, noise, mask, condition, segmenter, image)
    mined = Mined(Miner(3, options.miner_width).freeze().to(device))

    def synthesis(method: Base | Mined) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return method.synthesize(request)

        return run

    def rollout(gradient: str) -> Callable[[], object]:
        def run() -> None:
            x_T = noise.draw().requires_grad_()
            sampler.rollout(x_T, condition, 10, gradient).square().mean().backward()  # type: ignore[arg-type]

        return run

    for name, numerator, denominator in (
        ("mined / base synthesis, 50 steps", synthesis(mined), synthesis(Base())),
        ("full / stop gradient, 10-step rollout", rollout("full"), rollout("stop")),
    ):
        ratios = paired_ratios(numerator, denominator, options.rounds)
        print(
            f"{name}: median {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}, "
            f"{options.rounds} rounds; {device}, {options.size} × {options.size}, batch {options.batch}, "
            f"miner width {options.miner_width})"
        )


if __name__ == "__main__":
    main()
