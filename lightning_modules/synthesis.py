"""Fill a synthetic set with a frozen backbone, by any method (``cli.py predict``)."""

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from datamodules.sources import Source
from diffusion.backbones import Backbone
from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from errors import InputError, require
from lightning_modules.checks import check_image_set
from methods import Method, Preparation, Request
from networks.pretrained import frozen
from networks.response import SIGNAL
from networks.segmenter import Segmenter
from objectives.rewards import REWARDS, require_reward

CALIBRATION_SEED = 2**33
"""Keeps the noise of calibration apart from that of synthesis at any seed below."""


def quantize(image: Tensor) -> Tensor:
    """Return images in [−1, 1] as 8-bit levels: what is written is what is scored."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class SynthesisLitModule(L.LightningModule):
    """Masks in, synthetic images out; each scored by how hard the anchor finds it.

    The backbone and the anchor are frozen: they stay in eval mode, learn nothing, and are left out of
    checkpoints.

    Args:
        backbone: folder of a trained diffusion backbone q_φ.
        anchor: folder of a trained segmenter f_ϑ; its loss on a sample is the sample's adversariality.
        method: how the samples are made.
        reward: which loss is reported: ce, bounded_ce, balanced_ce, bounded_balanced_ce, dice or focal.
        steps: DDIM steps of the full schedule.
        seed: with the sample's index it decides the sample's noise.
        signal: ᾱ at which a glance reads the noise (:meth:`Sampler.glance`).

    Raises:
        InputError: a folder cannot be used, the reward is unknown, or backbone and anchor do not fit.
    """

    strict_loading = False
    frozen_parts: tuple[str, ...] = ("backbone", "anchor")

    def __init__(
        self,
        backbone: str,
        anchor: str,
        method: Method,
        reward: str = "bounded_ce",
        steps: int = 50,
        seed: int = 0,
        signal: float = SIGNAL,
    ) -> None:
        super().__init__()
        require(0 < signal < 1, "model.signal", signal, f"choose an ᾱ between 0 and 1, such as {SIGNAL}")
        require(1 <= steps <= 1000, "model.steps", steps, "choose 1 to 1000 DDIM steps")
        require(seed >= 0, "model.seed", seed, "must not be negative")
        require_reward(reward, "model.reward")
        self.backbone = frozen(backbone, Backbone)  # type: ignore[type-abstract]
        self.anchor = frozen(anchor, Segmenter)  # type: ignore[type-abstract]
        self.method = method
        self.reward_name = reward
        self.seed = seed
        self.sampler = Sampler(self.backbone, steps, signal)
        if self.backbone.image_channels != self.anchor.image_channels:
            raise InputError(
                f"model.anchor {anchor}: reads {self.anchor.image_channels} channels, but the backbone "
                f"{backbone} makes {self.backbone.image_channels}; give an anchor trained on such images"
            )

    def check_data(self, source: Source) -> None:
        """Raise unless both frozen networks fit the images."""
        check_image_set(source, self.backbone, "model.backbone")
        check_image_set(source, self.anchor, "model.anchor")

    def setup(self, stage: str) -> None:
        """Check both frozen networks against the data."""
        self.check_data(self.trainer.datamodule.source)  # type: ignore[attr-defined]

    def own_state(self) -> dict[str, Tensor]:
        """Return the state without the frozen networks: all that a checkpoint of this stage holds."""
        frozen = tuple(f"{part}." for part in self.frozen_parts)
        return {key: value for key, value in self.state_dict().items() if not key.startswith(frozen)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen networks out."""
        checkpoint["state_dict"] = self.own_state()

    def reward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the reward of images in [−1, 1] under the anchor ``(B,)``."""
        return REWARDS[self.reward_name](self.anchor(image).float(), mask)

    def noise(self, batch: dict[str, Any], seed_stream: int = 0) -> NoiseStream:
        """Return the batch's own noise."""
        mask = batch["mask"]
        shape = self.backbone.noise_shape((mask.shape[-2], mask.shape[-1]))
        return NoiseStream(self.seed + seed_stream, batch["index"].tolist(), shape, self.device)

    def request(self, batch: dict[str, Any], seed_stream: int = 0) -> Request:
        """Return what a method is asked for, from ``mask``, ``image`` and ``index``."""
        return Request(
            sampler=self.sampler,
            noise=self.noise(batch, seed_stream),
            mask=batch["mask"],
            condition=self.backbone.condition(batch["mask"], batch["image"]),
            anchor=self.anchor,
            image=batch["image"],
        )

    def on_predict_start(self) -> None:
        """Let the method look at the real images."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]

        def requests(count: int) -> list[Request]:
            return [self.request(batch, CALIBRATION_SEED) for batch in data.calibration(count, self.device)]

        self.method.prepare(Preparation(self.anchor, data.real, requests))

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of every network that a sample depends on."""
        networks = {"backbone": self.backbone.fingerprint(), "segmenter": self.anchor.fingerprint()}
        return networks | self.method.fingerprints()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return a batch of synthetic pairs.

        Returns:
            ``image`` uint8 ``(B, C, H, W)``, ``mask`` int64 ``(B, H, W)``, ``index``, ``source_mask``,
            ``value`` (the reward) ``(B,)``, ``notes`` of the method, the initial ``noise`` ``(B, …)`` of
            a method that starts from one, and of an image the ``seconds`` and the ``calls`` of the
            backbone, averaged over the batch.
        """
        if batch_idx == 0:
            self._warm_up(batch)
        self._wait()
        start, calls = time.perf_counter(), float(self.sampler.calls)
        image, notes = self.method.synthesize(self.request(batch))
        self._wait()
        seconds = (time.perf_counter() - start) / len(image)
        calls = (self.sampler.calls - calls) / len(image)
        self._check_finite(image, batch["index"])
        levels = quantize(image)
        value = self.reward(levels.float() / 127.5 - 1, batch["mask"])
        return {
            "image": levels,
            "mask": batch["mask"],
            "index": batch["index"],
            "source_mask": batch["source_mask"],
            "value": value,
            "noise": notes.pop("x_T", None),
            "notes": notes,
            "seconds": seconds,
            "calls": calls,
        }

    def _check_finite(self, image: Tensor, index: Tensor) -> None:
        """Raise unless all images are numbers: as levels, what is not would be black."""
        wrong = index[~image.isfinite().flatten(1).all(1)].tolist()
        if wrong:
            raise InputError(
                f"samples {', '.join(map(str, wrong))}: {self.method.name} gives images with values that are "
                f"no numbers, by precision {self.trainer.precision}; take --trainer.precision=32-true (a VAE "
                "can overflow in half precision), or look whether a trained network has diverged"
            )

    def _warm_up(self, batch: dict[str, Any]) -> None:
        """Call the backbone once, so that the first batch's time is not that of loading kernels."""
        self.sampler.initial_score(self.noise(batch).draw(), self.request(batch).condition)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
