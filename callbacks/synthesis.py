"""Write a synthetic set: images, masks, a manifest, and how it was made."""

import json
from datetime import UTC, datetime
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.folder import FolderWriter, save_png


def _defined(value: Any) -> Any:
    """Return None for NaN, which JSON does not know."""
    return None if value != value else value


class SynthesisCallback(FolderWriter):
    """Write what ``SynthesisLitModule`` or ``MinerLitModule`` predicts to a folder.

    The folder holds ``images/<index>.png`` (8 bit), ``masks/<index>.png`` (class maps),
    ``manifest.jsonl`` (a line a sample) and ``dataset.json`` (how it was made). All is written beside
    the folder and moved there when the last sample is done: it is whole or absent. File names are the
    sample's index, whatever the batch size or the number of devices.

    Args:
        folder: where the set goes, relative to ``trainer.default_root_dir``. A set that
            is already there is replaced; anything else is refused.
        noise: also write the initial noise of each sample, ``noise/<index>.npy`` (float32, without the
            batch), where the method starts from one and it takes no more than this many KiB: ``latents``
            for any other pipeline, and what ``evaluation.synthetic`` compares with N(0, I). 0 is never.

    Raises:
        InputError: ``folder`` exists and is no synthetic set.
    """

    title = "synthetic set"
    marker = "dataset.json"

    def __init__(self, folder: str = "synthetic", noise: int = 0) -> None:
        super().__init__(folder)
        self.noise = noise

    def parts(self, trainer: L.Trainer) -> list[str]:
        """See :meth:`FolderWriter.parts`."""
        return ["images", "masks", *(["noise"] if self.noise else [])]

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Note which networks the samples are made with, once those of a checkpoint are there."""
        self.fingerprints = pl_module.fingerprints()

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the samples of a batch and their lines of the manifest."""
        images = prediction["image"].cpu().numpy()
        masks = prediction["mask"].cpu().numpy().astype(np.uint8)
        noise = None if prediction["noise"] is None else prediction["noise"].float().cpu().numpy()
        notes = {key: [_defined(v) for v in value.tolist()] for key, value in prediction["notes"].items()}
        values = prediction["value"].tolist()
        lines = []
        for i, index in enumerate(prediction["index"].tolist()):
            files = {kind: f"{kind}s/{index:06d}.png" for kind in ("image", "mask")}
            image = images[i, 0] if images.shape[1] == 1 else images[i].transpose(1, 2, 0)
            save_png(image, self.partial / files["image"])
            save_png(masks[i], self.partial / files["mask"])
            if noise is not None and noise[i].nbytes <= 1024 * self.noise and np.isfinite(noise[i]).all():
                np.save(self.partial / "noise" / f"{index:06d}.npy", noise[i])
            entry = {
                "index": index,
                "seed": pl_module.seed,
                "source_mask": prediction["source_mask"][i],
                "method": pl_module.method.name,
                "reward": pl_module.reward_name,
                "value": values[i],
                "kl": None,
                "seconds": prediction["seconds"],
                "calls": prediction["calls"],
                **{key: value[i] for key, value in notes.items()},
                **files,
                "weights": self.fingerprints,
            }
            lines.append(json.dumps(entry, allow_nan=False))
        with (self.partial / f"manifest.{trainer.global_rank}.jsonl").open("a") as manifest:
            manifest.write("\n".join(lines) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Join the manifests of all ranks and move the finished set to its place."""
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        entries = {}
        for part in self.partial.glob("manifest.*.jsonl"):
            for line in part.read_text().splitlines():
                entry = json.loads(line)
                entries[entry["index"]] = entry
            part.unlink()
        ordered = [entries[index] for index in sorted(entries)]
        (self.partial / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ordered))
        source = trainer.datamodule.source  # type: ignore[attr-defined]
        made = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "n": len(ordered),
            "source": source.name,
            "class_names": list(source.class_names),
            "size": list(source.size),
            "method": pl_module.method.name,
            "backbone": type(pl_module.backbone).__name__,
            "segmenter": type(pl_module.anchor).__name__,
            "reward": pl_module.reward_name,
            "seed": pl_module.seed,
            "steps": len(pl_module.sampler.pairs),
            "weights": self.fingerprints,
        }
        (self.partial / "dataset.json").write_text(json.dumps(made, indent=2) + "\n")
        self._log(trainer, ordered)
        self.publish()

    def _log(self, trainer: L.Trainer, entries: list[dict[str, Any]]) -> None:
        """Show how hard the samples are, and how far from the prior, in TensorBoard."""
        if not isinstance(trainer.logger, TensorBoardLogger):
            return
        for key, name in (("value", "reward"), ("kl", "kl"), ("seconds", "seconds_per_image")):
            if any(entry[key] is None for entry in entries):
                continue
            values = np.array([entry[key] for entry in entries])
            trainer.logger.experiment.add_histogram(f"synthesis/{name}", values, 0)
            trainer.logger.log_metrics({f"synthesis/mean_{name}": float(values.mean())}, step=0)
