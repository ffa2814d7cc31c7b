"""Pictures in TensorBoard."""

import io
from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import PreviewGrid
from callbacks.preview import colour_mask, picture_grid
from conftest import make_segmenter, make_trainer
from datamodules import SegDataModule
from datamodules.sources import PhantomSource
from evaluation.colours import palette
from lightning_modules import SegLitModule

SIZE = 32


def fit(folder, callbacks):
    """Train for three steps and return the module and its data."""
    data = SegDataModule(
        PhantomSource("polyp", SIZE, n_train=4, n_val=9, n_test=1), batch_size=2, steps_per_epoch=3
    )
    module = SegLitModule(make_segmenter())
    logger = TensorBoardLogger(folder, name="tensorboard", version="")
    make_trainer(folder, callbacks=callbacks, logger=logger, max_steps=3).fit(module, data)
    return module, data


def test_a_segmenter_shows_what_it_predicts(tmp_path):
    module, data = fit(tmp_path, [PreviewGrid(every_n_steps=2, count=3)])
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0})
    events.Reload()
    pictures = events.Images("mask/image/predicted")
    assert [picture.step for picture in pictures] == [2, 3]
    levels = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
    rows = [levels[2 + i * (SIZE + 2) :][:SIZE] for i in range(3)]
    cells = [[row[:, 2 + j * (SIZE + 2) :][:, :SIZE] for j in range(3)] for row in rows]
    for (mask, image, predicted), index in zip(cells, (0, 3, 6), strict=True):
        sample = data.val[index]
        assert np.array_equal(mask, palette(2)[sample["mask"].numpy()])
        assert np.abs(image - (sample["image"].permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 1
        with torch.no_grad():
            classes = module.segmenter.eval()(sample["image"][None]).argmax(1)[0]
        assert np.array_equal(predicted, palette(2)[classes.numpy()])


def test_pictures_change_nothing(tmp_path):
    """The same weights with and without; the network trains on in the mode it was in."""
    plain, _ = fit(tmp_path / "plain", [])
    shown, data = fit(tmp_path / "shown", [PreviewGrid(every_n_steps=1, count=3)])
    for one, other in zip(plain.segmenter.parameters(), shown.segmenter.parameters(), strict=True):
        assert torch.equal(one, other)
    for training in (True, False):
        shown.segmenter.train(training)
        shown.preview(data.preview(2))
        assert shown.segmenter.training is training


def test_a_picture_a_step_where_several_batches_make_one():
    drawn = []

    class Counted(PreviewGrid):
        def _draw(self, trainer, pl_module):
            super()._draw(trainer, pl_module)
            drawn.append(trainer.global_step)

    grid = Counted(every_n_steps=2)
    for step in (0, 0, 1, 1, 2, 2, 2, 3, 4, 4):
        trainer = SimpleNamespace(global_step=step, is_global_zero=False, logger=None)
        grid.on_train_batch_end(trainer, None, None, None, 0)
    assert drawn == [2, 4]


def test_pictures_of_few_samples():
    data = SegDataModule(PhantomSource("polyp", SIZE, n_train=2, n_val=2, n_test=1))
    data.setup("fit")
    assert data.preview(6)["index"].tolist() == [0, 1]


def test_class_maps_are_in_colours():
    mask = torch.tensor([[[0, 1], [2, 4]]])
    grid = picture_grid({"mask": colour_mask(mask, 5)})
    assert np.array_equal((grid * 255).round().byte().permute(1, 2, 0), palette(5)[mask[0].numpy()])


def test_each_class_has_a_colour():
    colours = palette(20)
    assert colours[:2].tolist() == [[0, 0, 0], [230, 159, 0]]
    assert len({tuple(colour) for colour in colours[:9].tolist()}) == 9
    assert np.array_equal(colours[9], colours[1])
