"""Train the seed scorer: how hard will the finished sample be, from the backbone's first response?"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from datamodules.conditions import GlanceDataModule
from datamodules.scored import ScoredDataModule
from datamodules.sources.source import Source
from datamodules.streams import item_generator
from diffusion.noise import NoiseStream
from errors import InputError, require
from evaluation.ranks import spearman_within
from lightning_modules.checks import check_checkpoint, check_image_set, check_trained
from lightning_modules.synthesis import CALIBRATION_SEED, SynthesisLitModule
from methods.method import PROBE
from methods.seed_scorer import SeedScorer
from networks.pretrained import frozen, load_pretrained
from networks.response import SIGNAL
from networks.scorer import Scorer
from networks.segmenter import Segmenter
from objectives.rewards import REWARDS, Transform, reducible

_FLIPS = 200  # stream of randomness, apart from those of the data
_TEACHING_SEED = 2**34  # keeps the noise of training glances apart from that of samples at any seed below


class ScorerLitModule(SynthesisLitModule):
    """Regresses the loss of samples on their noise, or on what one call of the backbone says about it.

    The target is φ(ℓ_anchor) − λ·φ(ℓ_reference), of finished images as they lie on disk
    (``ScoredDataModule``), or of glances at noises drawn anew for every step (``GlanceDataModule``): a few
    calls each, as many as one likes. ``predict`` fills a set with the trained scorer.

    Args:
        backbone: folder of the diffusion backbone q_φ that made the plain samples, or that glances.
        anchor: folder of the segmenter f_ϑ whose loss is predicted.
        scorer: the network; by default one for the backbone's noise.
        weights: folder of a trained scorer to start from.
        reward: ℓ, the loss that is predicted.
        transform: φ; ``log`` evens out the long tail of a loss, ``none`` takes it as it is.
        reference: folder of a stronger segmenter; what it finds hard as well is not learnable.
        reducible: λ, how much of the reference's loss is taken off.
        glance: calls of the backbone in a glance (:meth:`Sampler.glance`) that the target is read from; 0
            where finished images are at hand.
        signal: ᾱ at which a glance reads the noise, be it that of the target or one that the scorer reads;
            the scorer remembers it.
        flip: mirror response and mask at random while training.
        n: proposals a mask when predicting.
        steps: DDIM steps of the full schedule.
        optimizer: builds the optimiser from the scorer's parameters.
        seed: seed of the flips, and with the sample's index of the noise when predicting.

    Raises:
        InputError: a folder cannot be used, or two parts do not fit.
    """

    frozen_parts: tuple[str, ...] = ("backbone", "anchor", "reference")

    def __init__(
        self,
        backbone: str,
        anchor: str,
        scorer: Scorer | None = None,
        weights: str | None = None,
        reward: str = "ce",
        transform: Transform = "log",
        reference: str | None = None,
        reducible: float = 1.0,
        glance: int = 0,
        signal: float = SIGNAL,
        flip: bool = True,
        n: int = 8,
        steps: int = 50,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=1e-2),
        seed: int = 0,
    ) -> None:
        # The method comes once the networks are there to build it from.
        super().__init__(backbone, anchor, SeedScorer(Scorer()), reward, steps, seed, signal)
        channels = self.backbone.noise_shape((64, 64))[0]
        network = (
            load_pretrained(weights, Scorer).train()
            if weights
            else scorer or Scorer(channels, self.backbone.num_classes)
        )
        if (network.channels, network.num_classes) != (channels, self.backbone.num_classes):
            raise InputError(
                f"model.scorer: reads {network.channels} channels and {network.num_classes} classes, "
                f"{backbone} has {channels} and {self.backbone.num_classes}; set them to match"
            )
        if not weights and network.signal == SIGNAL:
            network.begin_at(signal)
        require(glance >= 0, "model.glance", glance, "choose at least 1 call of the backbone, or 0")
        self.started = weights is not None
        self.method = SeedScorer(network, n)
        self.reference = None if reference is None else frozen(reference, Segmenter)  # type: ignore[type-abstract]
        self.transform: Transform = transform
        self.reducible = reducible
        self.glance = glance
        self.flip = flip
        self.optimizer = optimizer
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        self.validated: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def scorer(self) -> Scorer:
        """The network that is trained."""
        assert isinstance(self.method, SeedScorer)
        return self.method.scorer

    @property
    def trained(self) -> Scorer:
        """The network whose weights this stage hands on."""
        return self.scorer

    def check_data(self, source: Source) -> None:
        """Raise unless all frozen networks fit the images."""
        super().check_data(source)
        if self.reference is not None:
            check_image_set(source, self.reference, "model.reference")

    def setup(self, stage: str) -> None:
        """Check the frozen networks against the data, and that the data have what the target is read from."""
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        wanted = GlanceDataModule if self.glance else ScoredDataModule
        if stage == "fit" and not isinstance(data, wanted):
            raise InputError(
                f"model.glance {self.glance}: the target is read from "
                f"{'glances' if self.glance else 'finished images'}, which {type(data).__name__} does not "
                f"give; take data {wanted.__name__}"
            )

    def check_trained(self, ckpt_path: str | Path | None) -> None:
        """Raise unless there are weights to sample with, or a checkpoint is to be loaded."""
        check_trained(self.started or ckpt_path, "seed scorer")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise unless the checkpoint holds exactly this scorer."""
        check_checkpoint(self.own_state(), checkpoint["state_dict"], "scorer")

    def target(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return φ(ℓ_anchor) − λ·φ(ℓ_reference) of images in [−1, 1] ``(B,)``."""
        reward = self.reward(image, mask)
        learnt = (
            reward
            if self.reference is None
            else REWARDS[self.reward_name](self.reference(image).float(), mask)
        )
        return reducible(reward, learnt, 0 if self.reference is None else self.reducible, self.transform)

    @torch.no_grad()
    def _know(self, batch: dict[str, Any]) -> None:
        """Call the backbone and the segmenters once for every sample."""
        mask = batch["mask"]
        shape = self.backbone.noise_shape((mask.shape[-2], mask.shape[-1]))
        seeds = batch["seed"].tolist()
        streams = [
            NoiseStream(seed, [i], shape) for seed, i in zip(seeds, batch["sample"].tolist(), strict=True)
        ]
        x_T = torch.cat([stream.draw(PROBE) for stream in streams]).to(self.device)
        condition = self.backbone.condition(mask)
        response = self.sampler.response(x_T, condition, self.scorer)
        target = self.target(batch["image"], mask)
        for i, r, t in zip(batch["sample"].tolist(), response.half().cpu(), target.cpu(), strict=True):
            self.known[i] = (r, t)

    @torch.no_grad()
    def _glanced(self, batch: dict[str, Any], seed_stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return response, target and image of a glance at the noise of each mask."""
        request = self.request(batch, seed_stream)
        x_T = request.noise.draw(PROBE)
        latent = self.sampler.glance(x_T, request.condition, self.glance)
        image = self.backbone.decode(latent).clamp(-1, 1)
        response = self.sampler.response(x_T, request.condition, self.scorer)
        return response, self.target(image, request.mask), image

    def on_fit_start(self) -> None:
        """Standardise the target: over the training part of a plain set, read once, or over fresh glances."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not self.glance:
            for batch in data.everything(self.device):
                self._know(batch)
        if self.trainer.global_step == 0:
            if self.glance:
                batches = data.calibration(data.n_val, self.device)
                targets = torch.cat([self._glanced(batch, _TEACHING_SEED)[1] for batch in batches])
            else:
                targets = torch.stack([self.known[i][1] for i in data.training_samples])
            self.scorer.offset.copy_(targets.mean())
            self.scorer.scale.copy_(targets.std().clamp(min=1e-6))

    def _read(self, batch: dict[str, Any], seed_stream: int) -> tuple[Tensor, Tensor]:
        """Return responses, and their standardised targets."""
        if self.glance:
            response, target, _ = self._glanced(batch, seed_stream)
        else:
            known = [self.known[i] for i in batch["sample"].tolist()]
            response = torch.stack([r for r, _ in known]).float().to(self.device)
            target = torch.stack([t for _, t in known]).to(self.device)
        return response, (target - self.scorer.offset) / self.scorer.scale

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the Huber loss of every member, averaged."""
        response, target = self._read(batch, _TEACHING_SEED)
        mask = batch["mask"]
        if self.flip:
            rng = item_generator(self.seed, int(batch["index"][0]), _FLIPS)
            dims = [dim for dim in (-1, -2) if rng.random() < 0.5]
            response, mask = response.flip(dims), mask.flip(dims)
        predictions = self.scorer(response, mask)
        loss = F.smooth_l1_loss(predictions, target.expand_as(predictions))
        self.log("scorer/train_loss", loss, prog_bar=True, batch_size=len(target))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep predictions and targets of samples that training does not see."""
        response, target = self._read(batch, CALIBRATION_SEED)
        self.validated.append((self.scorer(response, batch["mask"]).mean(0), target, batch["index"]))

    def on_validation_epoch_end(self) -> None:
        """Log correlation, calibration, and what selecting by the prediction would bring.

        ``val_within`` is Spearman's ρ inside of the samples of one real mask, averaged over masks: a choice
        compares no others. It is logged where at least one mask has three samples held out.
        """
        parts = [torch.cat(values) for values in zip(*self.validated, strict=True)]
        self.validated.clear()
        gathered: Any = self.all_gather(parts)
        predicted, target, index = (part.flatten().cpu() for part in gathered)
        index, order = index.sort(stable=True)
        once = order[torch.cat([index.new_ones(1), index.diff()]) > 0]  # devices fill up their shares
        predicted, target = predicted[once].float(), target[once].float()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        masks = [data.real_mask(i) for i in index.unique().tolist()]
        within = spearman_within(predicted.tolist(), target.tolist(), masks)
        if math.isfinite(within):
            self.log("scorer/val_within", within)
        top = predicted.topk(max(1, len(predicted) // 8)).indices
        slope = torch.cov(torch.stack([predicted, target]))[0, 1] / predicted.var().clamp(min=1e-12)
        self.log_dict(
            {
                "scorer/val_pearson": pearson_corrcoef(predicted, target),
                "scorer/val_spearman": spearman_corrcoef(predicted, target),
                "scorer/val_slope": slope,  # 1 where a predicted difference is a true one
                "scorer/val_top_eighth": target[top].mean(),  # in standard deviations of the target
            },
            prog_bar=False,
        )

    @torch.no_grad()
    def preview(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return columns of a picture grid: the first response, and the finished sample or the glance."""
        if self.glance:
            batch = {key: value.to(self.device) for key, value in batch.items()}
            response, _, image = self._glanced(batch, 0)
        else:
            response = torch.stack([self.known[i][0] for i in batch["sample"].tolist()])
            response = response.float().to(self.device)
            image = batch["image"]
        is_estimate = self.scorer.inputs not in ("noise", "score")
        shown = self.backbone.decode(response) if is_estimate else response[:, : image.shape[1]]
        return {"response": shown, "glance" if self.glance else "sample": image}

    def configure_optimizers(self) -> Any:
        """Build the optimiser of the scorer's parameters."""
        return self.optimizer(list(self.scorer.parameters()))
