"""Labelled images for training a segmenter or a backbone, the test sets, and images to be segmented."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from datamodules.augment import Augmentation, SegLevel
from datamodules.nnunet_augment import NNUNetAugmentation
from datamodules.sources import Source, Volume
from datamodules.sources.folder import expand
from datamodules.sources.image_folder import ImageFolder
from datamodules.sources.synthetic import SyntheticSet
from datamodules.streams import StreamDataset, Transform, stream_sampler
from errors import InputError, require
from networks.normalisation import check_channels
from networks.segmenter import Segmenter


def _share(total: int, parts: int, place: int) -> int:
    """Return how many of ``total`` fall to a part; the first parts get what is left over."""
    return total // parts + (place < total % parts)


class _Numbered(Dataset[dict[str, Any]]):
    """Samples of an evaluation set with the number of their case."""

    def __init__(self, source: Source, split: str) -> None:
        self.dataset = source.dataset(split)
        self.size = source.size

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        return {"image": sample["image"], "mask": sample["mask"], "index": index}

    def name(self, index: int) -> str:
        """Return the name of a sample, as its source gives it."""
        return self.dataset[index]["id"]

    def shape(self, index: int) -> tuple[int, int]:
        """Return height and width of a sample, the same for all."""
        return self.size


class SegDataModule(L.LightningDataModule):
    """U_train, or U_train ∪ U_syn as two streams.

    A training batch is ``{"real": {image, mask, index}}``, with a second stream ``"synthetic"`` where a
    synthetic set is given. Both together always make ``batch_size`` samples, and an epoch is
    ``steps_per_epoch`` batches whatever the amount of data: arms that are compared train equally long.

    Args:
        source: where the real images come from.
        synthetic: folder of a synthesised set, or folders of several; None trains on real images alone.
        budget: synthetic samples to take, as a multiple of the number of real ones, evenly from all sets;
            None takes all.
        real_fraction: share of a batch that is real, in (0, 1); 0.5 is real : synthetic = 1 : 1.
        max_real: use only the first real training samples; None uses all.
        batch_size: samples a batch, of both streams together, on each device.
        steps_per_epoch: batches an epoch; validation and resume points lie between epochs.
        augmentation: ``none``, ``flip``, ``full`` or ``nnunet``; or ``nnunetv2``, patches that are normalised
            and transformed as nnU-Net's own; the same for both streams.
        patch_size: height and width of these patches; None takes the size of the images.
        normalisation: how these patches are normalised, an entry a channel as the network has it; None is
            the z-score of each channel.
        oversample_foreground: share of these patches that are cut out around foreground.
        images: folder of images without masks, for ``predict``; None predicts the test sets.
        seed: seed of the order and the augmentation.
        num_workers: loader processes a stream.

    Raises:
        InputError: a source or a synthesised set cannot be used, or the arguments contradict each other.
    """

    def __init__(
        self,
        source: Source,
        synthetic: str | list[str] | None = None,
        budget: float | None = None,
        real_fraction: float = 0.5,
        max_real: int | None = None,
        batch_size: int = 16,
        steps_per_epoch: int = 250,
        augmentation: SegLevel = "full",
        patch_size: tuple[int, int] | None = None,
        normalisation: list[dict[str, Any]] | None = None,
        oversample_foreground: float = 0.33,
        images: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if synthetic and not 0 < batch_size * real_fraction < batch_size:
            raise InputError(
                f"real_fraction {real_fraction}: must lie between 0 and 1 when a synthetic set is given"
            )
        if synthetic and batch_size < 2:
            raise InputError(f"batch_size {batch_size}: two streams need at least 2")
        if budget is not None and budget <= 0:
            raise InputError(f"budget {budget}: must be positive")
        require(seed >= 0, "data.seed", seed, "must not be negative")
        if max_real is not None and max_real < 1:
            raise InputError(f"max_real {max_real}: must be at least 1, or null for all")
        if not synthetic and budget is not None:
            raise InputError(f"budget {budget}: there is no synthetic set; give --data.synthetic its folder")
        self.source = source
        self.synthetic = [synthetic] if isinstance(synthetic, str) else synthetic or []
        self.budget = budget
        self.real_fraction = real_fraction
        self.max_real = max_real
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        if augmentation == "nnunetv2":
            normalisation = normalisation or [{"scheme": "zscore"}] * source.channels
            check_channels(normalisation, source.channels, "data.normalisation")
            size = source.size if patch_size is None else (patch_size[0], patch_size[1])
            self.augmentation: Transform = NNUNetAugmentation(size, normalisation, oversample_foreground)
        elif patch_size is not None or normalisation is not None:
            raise InputError(
                f"augmentation {augmentation}: trains on whole images that the network normalises; leave "
                "patch_size and normalisation out, or set augmentation to nnunetv2"
            )
        else:
            self.augmentation = Augmentation(augmentation)
        self.normalisation = normalisation
        self.images = images
        self.seed = seed
        self.num_workers = num_workers
        self.n_real = 0
        self.n_synthetic = 0

    def setup(self, stage: str) -> None:
        """Read what the stage needs; every problem with the data is raised here.

        Training reads the test sets too: what is wrong there is known before, and not after it.
        """
        if stage in ("fit", "validate"):
            self.val = _Numbered(self.source, "val")
        if stage == "predict" and self.images is not None:
            folder = ImageFolder(self.images, self.source.size, self.source.channels)
            self.predicted: dict[str, ImageFolder | _Numbered] = {expand(self.images).resolve().name: folder}
        elif stage in ("test", "predict"):
            self.tests = {name: _Numbered(self.source, name) for name in self.source.test_splits}
            if not self.tests:
                raise InputError(
                    f"{self.source.name}: has no test set here; name one in data.source, or a folder to "
                    "segment as data.images"
                )
            self.predicted = {**self.tests}
        if stage == "fit":
            self._check_reader()
            for name in self.source.test_splits:
                self.source.dataset(name)
            real = self.source.dataset("train")
            self.n_real = len(real)  # type: ignore[arg-type]
            if self.max_real is not None and self.max_real < self.n_real:
                real, self.n_real = Subset(real, range(self.max_real)), self.max_real
            self.streams: dict[str, Dataset] = {"real": real}
            if self.synthetic:
                total = None if self.budget is None else round(self.budget * self.n_real)
                sets = [
                    self._read_synthetic(
                        folder, None if total is None else _share(total, len(self.synthetic), k)
                    )
                    for k, folder in enumerate(self.synthetic)
                ]
                self.n_synthetic = sum(map(len, sets))
                self.streams["synthetic"] = ConcatDataset(sets)

    def _check_reader(self) -> None:
        """Raise unless what is trained takes images as they are cut and normalised here."""
        if self.normalisation is None or self.trainer is None:
            return
        segmenter = getattr(self.trainer.lightning_module, "segmenter", None)
        if getattr(segmenter, "normalisation", None) != self.normalisation:
            raise InputError(
                f"augmentation nnunetv2: normalises by {self.normalisation}, the network by "
                f"{getattr(segmenter, 'normalisation', None)}; give both the same normalisation, as a plan "
                "does, or choose another augmentation"
            )
        cut = self.augmentation.patch_size if isinstance(self.augmentation, NNUNetAugmentation) else None
        wrong = segmenter.misfit(cut) if cut is not None and isinstance(segmenter, Segmenter) else None
        if wrong:
            raise InputError(f"data.patch_size: cuts {wrong}; set it to match")

    def _read_synthetic(self, folder: str, count: int | None) -> SyntheticSet:
        dataset = SyntheticSet(folder, count)
        if len(dataset) == 0:
            raise InputError(f"{folder}: no synthetic sample is left; raise the budget")
        shapes, top = dataset.shapes, dataset.highest_class
        expected = (self.source.channels, *self.source.size)
        if shapes != {expected}:
            raise InputError(f"{folder}: images are {shapes}, those of {self.source.name} {expected}")
        if top >= self.source.num_classes:
            raise InputError(
                f"{folder}: masks hold class {top}, {self.source.name} has {self.source.num_classes}"
            )
        return dataset

    def train_dataloader(self) -> dict[str, DataLoader]:
        """Return a loader for each stream."""
        n_real = self.batch_size if len(self.streams) == 1 else round(self.batch_size * self.real_fraction)
        n_real = min(max(n_real, 1), self.batch_size - len(self.streams) + 1)
        sizes = {"real": n_real, "synthetic": self.batch_size - n_real}
        loaders = {}
        for stream, (name, dataset) in enumerate(self.streams.items()):
            loaders[name] = DataLoader(
                StreamDataset(dataset, self.seed, self.augmentation, stream),
                batch_size=sizes[name],
                sampler=stream_sampler(self.trainer, sizes[name], self.steps_per_epoch),
                num_workers=self.num_workers,
            )
        return loaders

    def _evaluation_loader(self, dataset: Dataset) -> DataLoader:
        return DataLoader(dataset, batch_size=2 * self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Return the validation set."""
        return self._evaluation_loader(self.val)

    def test_dataloader(self) -> list[DataLoader]:
        """Return every test set, in the order of ``source.test_splits``."""
        return [self._evaluation_loader(dataset) for dataset in self.tests.values()]

    def predict_dataloader(self) -> list[DataLoader]:
        """Return what is to be segmented, in the order of ``predicted``."""
        return [self._evaluation_loader(dataset) for dataset in self.predicted.values()]

    def volumes(self, split: str) -> list[Volume | None]:
        """Return where each sample of ``val`` or of a test set lies in a 3-D case, by ``index``."""
        dataset = self.val if split == "val" else self.tests[split]
        return [self.source.volume(split, i) for i in range(len(dataset))]

    def sample_name(self, split: str, index: int) -> str:
        """Return the name of a sample of a test set, as its source gives it."""
        return self.tests[split].name(index)

    def preview(self, count: int) -> dict[str, Tensor]:
        """Return ``count`` validation samples, spread evenly, as a batch: ``image``, ``mask``, ``index``."""
        n = min(count, len(self.val))
        return default_collate([self.val[i * len(self.val) // n] for i in range(n)])
