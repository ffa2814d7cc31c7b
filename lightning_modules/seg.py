"""Train a segmenter on real images, or on real ∪ synthetic; score it on the test sets."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from datamodules.mixing import copy_paste, paired_cutmix
from datamodules.sources import Source
from datamodules.streams import item_generator
from errors import InputError
from evaluation.metrics import SegmentationScore
from evaluation.protocols import PresetName
from lightning_modules.checks import check_checkpoint, check_image_set, check_trained, started
from networks.pretrained import load_pretrained, training_facts
from networks.segmenter import Segmenter
from networks.sliding_window import sliding_window
from objectives.segmentation import DiceCE

_CUTMIX, _COPY_PASTE = 100, 101  # streams of randomness, apart from those of the data module


class SegLitModule(L.LightningModule):
    """Minimises cross-entropy + Dice; each stream counts by its share of the batch.

    Args:
        segmenter: the network to train; None is the one in ``weights``.
        weights: folder of a trained segmenter to start from (or to test); it must be of the same
            architecture. By default the network starts untrained.
        cutmix: chance of paired CutMix in a batch; applied to real-only batches as well.
        copy_paste: chance that a sample has the objects of another one of the batch pasted into it.
        optimizer: builds the optimiser from the parameters that learn.
        power: exponent of the polynomial decay of the learning rate over the trainer's steps.
        seed: seed of CutMix and copy-paste.
        protocol: preset by which the scores count; ``docs/metrics.md`` has them side by side.
        loss: what is minimised; None is nnU-Net's.
        inference: how validation and test images are segmented: as a ``whole``, or by a ``sliding_window`` of
            the network's patch, half a patch apart, with Gaussian weights. None is as ``weights`` were
            validated, and whole without any.
        mirror: average each window over its mirror images; None likewise, and true without weights.

    Raises:
        InputError: ``weights`` cannot be read, or are of another architecture; or neither is given.
    """

    def __init__(
        self,
        segmenter: Segmenter | None = None,
        weights: str | None = None,
        cutmix: float = 0.5,
        copy_paste: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.01, momentum=0.99, weight_decay=3e-5, nesterov=True
        ),
        power: float = 0.9,
        seed: int = 0,
        protocol: PresetName = "paper",
        loss: DiceCE | None = None,
        inference: Literal["whole", "sliding_window"] | None = None,
        mirror: bool | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss or DiceCE()
        before = {} if weights is None else training_facts(weights)
        self.inference = inference or before.get("inference", "whole")
        self.mirror: bool = before.get("mirror", True) if mirror is None else mirror
        self.normalised = False
        if segmenter is None and weights is None:
            raise InputError(
                "model.segmenter: is not given, nor are model.weights; add a file of configs/segmenters, or "
                "name the folder of a trained segmenter"
            )
        self.segmenter = segmenter or load_pretrained(str(weights), Segmenter)  # type: ignore[type-abstract]
        self.training_facts: dict[str, Any] = {}
        self.started = weights is not None
        if weights is not None:
            self.take(weights)
        self.cutmix = cutmix
        self.copy_paste = copy_paste
        self.optimizer = optimizer
        self.power = power
        self.seed = seed
        self.protocol: PresetName = protocol

    def take(self, weights: str) -> None:
        """Start from the trained weights in a folder, or test them.

        Raises:
            InputError: ``weights`` cannot be read, or are of another architecture.
        """
        started(self.segmenter, weights, "model.segmenter")
        self.training_facts = training_facts(weights)

    @property
    def trained(self) -> Segmenter:
        """The network whose weights this stage hands on."""
        return self.segmenter

    def check_data(self, source: Source, whole: bool = False) -> None:
        """Raise unless the segmenter fits the images; ``whole`` if it sees them so, however it infers."""
        check_image_set(source, self.segmenter, "model.segmenter", whole or self.inference == "whole")
        if self.inference != "whole" and (wrong := self.segmenter.misfit(self.segmenter.patch_size)):
            raise InputError(f"model.segmenter: its windows are {wrong}; set its patch_size to match")

    def check_trained(self, ckpt_path: str | Path | None) -> None:
        """Raise unless there are weights to score or to predict with, or a checkpoint is to be loaded."""
        check_trained(self.started or ckpt_path, "segmenter")

    def setup(self, stage: str) -> None:
        """Check the segmenter against the data and prepare the scores."""
        source: Source = self.trainer.datamodule.source  # type: ignore[attr-defined]
        # Training images are patches that the data module has normalised already, or whole.
        self.normalised = getattr(self.trainer.datamodule, "normalisation", None) is not None  # type: ignore[attr-defined]
        self.check_data(source, whole=stage == "fit" and not self.normalised)
        self.test_names = source.test_splits
        if stage in ("fit", "validate"):
            self.val_score = self._new_score("val")
        if stage == "predict":
            self.check_trained(self.trainer.ckpt_path)
        if stage == "test":
            scores = [self._new_score(name) for name in self.test_names]
            self.test_scores = nn.ModuleList(scores)
            self._check_units(
                {score.distance_unit: name for score, name in zip(scores, self.test_names, strict=True)}
            )

    def _check_units(self, examples: dict[str, str]) -> None:
        """Raise unless the test sets are scored in one unit, which the figures go with."""
        if len(examples) > 1:
            found = ", ".join(f"{unit} in {name}" for unit, name in examples.items())
            raise InputError(
                f"model.protocol {self.protocol}: distances would have several units ({found}); test these "
                "sets one by one, or by a protocol without spacing"
            )

    def _new_score(self, split: str) -> SegmentationScore:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        try:
            return SegmentationScore(
                data.source.class_names, protocol=self.protocol, volumes=data.volumes(split)
            )
        except ValueError as error:
            raise InputError(f"{data.source.name}, {split}: {error}") from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise unless the checkpoint holds exactly this network."""
        check_checkpoint(self.state_dict(), checkpoint["state_dict"], "segmenter")

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Return the loss, averaged over the streams by their share of the batch."""
        streams = list(batch.values())
        image, mask = (torch.cat([stream[key] for stream in streams]) for key in ("image", "mask"))
        first = int(streams[0]["index"][0])
        image, mask = copy_paste(image, mask, item_generator(self.seed, first, _COPY_PASTE), self.copy_paste)
        rng = item_generator(self.seed, first, _CUTMIX)
        image, mask = paired_cutmix(image, mask, rng, self.cutmix)
        output = self.segmenter.segment(image) if self.normalised else self.segmenter(image)
        levels = [output] if isinstance(output, Tensor) else output
        loss, start = levels[0].new_zeros(()), 0
        for name, stream in batch.items():
            part = slice(start, start + len(stream["image"]))
            stream_loss = self.loss([level[part] for level in levels], mask[part])
            loss = loss + stream_loss * len(stream["image"]) / len(image)
            self.log(f"seg/train_loss_{name}", stream_loss, batch_size=len(stream["image"]))
            start = part.stop
        self.log("seg/train_loss", loss, prog_bar=True, batch_size=len(image))
        return loss

    def predict_logits(self, image: Tensor) -> Tensor:
        """Return the logits ``(B, K, H, W)`` of whole images in [−1, 1], by the chosen way of inference."""
        if self.inference == "whole":
            return self.segmenter(image)
        segment: Any = self.segmenter.segment
        normalised = self.segmenter.normalise(image)
        return sliding_window(segment, normalised, self.segmenter.patch_size, mirror=self.mirror)

    def _score(self, score: SegmentationScore, batch: dict[str, Tensor]) -> Tensor:
        logits = self.predict_logits(batch["image"])
        score.update(logits.argmax(1), batch["mask"], batch["index"].tolist())
        return logits

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score a validation batch."""
        logits = self._score(self.val_score, batch)
        loss = self.loss(logits, batch["mask"])
        self.log("seg/val_loss", loss, batch_size=len(logits), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log every measure, overall and per class."""
        for key, value in self.val_score.compute().items():
            if not key.startswith("n_"):
                self.log(f"val/{key}", value, prog_bar=key == "dsc", sync_dist=True)
        self.val_score.reset()

    @torch.no_grad()
    def preview(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return columns of a picture grid: the image, and the classes predicted for it ``(B, H, W)``."""
        was_training = self.segmenter.training
        self.segmenter.eval()
        predicted = self.predict_logits(batch["image"].to(self.device)).argmax(1)
        self.segmenter.train(was_training)
        return {"image": batch["image"], "predicted": predicted}

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of one test set."""
        self._score(self.test_scores[dataloader_idx], batch)  # type: ignore[arg-type]

    def predict_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return the logits ``(B, K, H, W)`` of a batch of images, and their ``index``."""
        return {"index": batch["index"], "logits": self.predict_logits(batch["image"])}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser, with polynomial decay over the trainer's number of steps."""
        optimizer: Any = self.optimizer([p for p in self.segmenter.parameters() if p.requires_grad])
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total, self.power)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Let the decay of a run that is resumed for longer than it was planned end where it ends now."""
        schedule: Any = self.lr_schedulers()
        total = int(self.trainer.estimated_stepping_batches)
        if schedule.total_iters != total:
            schedule.total_iters = total
            decay = max(0.0, 1 - schedule.last_epoch / total) ** self.power
            for group, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = rate * decay
