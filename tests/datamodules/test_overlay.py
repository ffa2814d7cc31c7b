import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.overlay import OPACITY, chosen, main, overlay, sheet
from datamodules.sources import PhantomSource
from errors import InputError
from evaluation.colours import palette

CONFIG = """
data:
  init_args:
    source:
      class_path: PhantomSource
      init_args: {family: cardiac, size: 32, n_train: 5, n_val: 3, n_test: 4}
"""


def square(channels):
    mask = torch.zeros(128, 100, dtype=torch.long)
    mask[40:80, 30:70] = 2
    return {"image": torch.full((channels, 128, 100), -0.2), "mask": mask, "id": "a"}


@pytest.mark.parametrize("channels", [1, 3])
def test_classes_are_translucent_in_full_outlines(channels):
    picture = overlay(square(channels), 3)
    assert picture.shape == (256, 200, 3)
    colour, grey = palette(3)[2].astype(float), 0.4 * 255
    for (row, column), expected in {
        (10, 10): grey,
        (79, 100): grey,
        (80, 100): colour,
        (81, 61): colour,
        (159, 139): colour,
        (120, 100): OPACITY * colour + (1 - OPACITY) * grey,
    }.items():
        assert np.abs(picture[row, column] - expected).max() <= 0.5, (row, column)


def test_samples_are_spread_and_show_classes():
    """Of the slices around each place, one that is labelled."""
    labelled = {7: 1, 45: 2, 99: 1}
    samples = [{"mask": torch.full((2, 2), labelled.get(k, 0)), "id": k} for k in range(100)]
    for sample in samples[45:46]:
        sample["mask"][0] = 1
    assert [each["id"] for each in chosen(samples, 3)] == [0, 45, 66]
    assert [each["id"] for each in chosen(samples[:2], 3)] == [0, 1]


def test_a_row_for_each_split():
    source = PhantomSource("cardiac", size=32, n_train=5, n_val=1, n_test=4)
    figure = sheet(source, 2)
    titles = [place.get_title() for place in figure.axes]
    wanted = [f"{split}\n{len(source.dataset(split))} images" for split in source.splits]
    assert [place.get_ylabel() for place in figure.axes[::2]] == wanted
    assert [bool(title) for title in titles[:6]] == [True, True, True, False, True, True]
    assert titles[2] == source.dataset("val")[0]["id"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(source.class_names[1:])


def test_command(tmp_path, capsys):
    (tmp_path / "data.yaml").write_text(CONFIG)
    given = ["--config", str(tmp_path / "data.yaml"), "--output"]
    main([*given, str(tmp_path / "new" / "a.png"), "--count", "2"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "a.png")
    picture = np.asarray(Image.open(tmp_path / "new" / "a.png").convert("RGB")).reshape(-1, 3)
    assert all((picture == colour).all(1).any() for colour in palette(4)[1:])
    with pytest.raises(InputError, match=r"--output .*a.bmp: give a file that ends in .png"):
        main([*given, str(tmp_path / "a.bmp")])
    with pytest.raises(InputError, match="--count 0"):
        main([*given, str(tmp_path / "a.png"), "--count", "0"])
