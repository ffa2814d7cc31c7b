"""Write what a segmenter predicts."""

import json
from datetime import UTC, datetime
from typing import Any

import lightning as L
import numpy as np
import torch.nn.functional as F
from PIL import Image

from callbacks.folder import FolderWriter, save_png
from datamodules.sources.folder import expand
from errors import InputError
from evaluation.colours import palette


def _described(data: Any) -> str:
    """Return which images are segmented: those of a folder, by its full path, or a source's test sets."""
    return f"test sets of {data.source.name}" if data.images is None else str(expand(data.images).resolve())


class PredictionWriter(FolderWriter):
    """Write the class maps that ``SegLitModule`` predicts to a folder.

    The folder holds ``<set>/<name>.png`` and ``predictions.json`` (by which weights, of which classes). A
    pixel is the number of its class; the file's palette gives each class a colour to look at. A map has the
    size of the image's file where images come from a folder, and else that of the data module's samples:
    logits are interpolated, then the largest one is taken. The folder is whole or absent.

    Args:
        folder: where the maps go, relative to ``trainer.default_root_dir``. Predictions of the same images
            that are already there are replaced; anything else is refused.

    Raises:
        InputError: ``folder`` exists and holds no predictions, or those of other images.
    """

    title = "folder of predictions"
    marker = "predictions.json"

    def __init__(self, folder: str = "predictions") -> None:
        super().__init__(folder)

    def parts(self, trainer: L.Trainer) -> list[str]:
        """See :meth:`FolderWriter.parts`."""
        return list(trainer.datamodule.predicted)  # type: ignore[attr-defined]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """See :meth:`FolderWriter.setup`; refuse to replace what was predicted for other images."""
        if stage == "predict":
            marker = self.check_folder(trainer) / self.marker
            now = _described(trainer.datamodule)  # type: ignore[attr-defined]
            before = json.loads(marker.read_text()).get("images", now) if marker.is_file() else now
            if before != now:
                raise InputError(
                    f"{marker.parent}: holds what was predicted for {before}; name another folder for {now}, "
                    "by trainer.default_root_dir, or move the old one away"
                )
        super().setup(trainer, pl_module, stage)

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
        """Write the class maps of a batch."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        name, dataset = list(data.predicted.items())[dataloader_idx]
        colours = palette(data.source.num_classes).flatten().tolist()
        for index, logits in zip(prediction["index"].tolist(), prediction["logits"].float(), strict=True):
            whole = F.interpolate(logits[None], dataset.shape(index), mode="bilinear")
            image = Image.fromarray(whole[0].argmax(0).cpu().numpy().astype(np.uint8), mode="P")
            image.putpalette(colours)
            save_png(image, self.partial / name / f"{dataset.name(index)}.png")

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say how the maps were made and move them to their place."""
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        made = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": _described(data),
            "source": data.source.name,
            "segmenter": type(pl_module.segmenter).__name__,
            "segmenter_fingerprint": pl_module.segmenter.fingerprint(),
            "class_names": list(data.source.class_names),
            "size": list(data.source.size),
            "sets": {name: len(dataset) for name, dataset in data.predicted.items()},
        }
        (self.partial / self.marker).write_text(json.dumps(made, indent=2) + "\n")
        self.publish()
        print(f"{self.folder}: " + ", ".join(f"{n} of {name}" for name, n in made["sets"].items()))
