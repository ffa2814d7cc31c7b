"""The planning command, and the training that its file configures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import cli
from datamodules.plan import main, measure, normalisation
from datamodules.sources.configured import read_source
from datamodules.sources.source import Source, Volume
from errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Volumes(Source):
    """Slices of 40 × 30 of three patients, 3, 2 and 4 of them."""

    name = "volumes"
    class_names = ("background", "organ")
    channels = 1
    size = (40, 30)
    splits = ("train", "val")
    slices = (3, 2, 4)

    def _dataset(self, split):
        rng = np.random.default_rng(0)
        samples = []
        for case, depth in enumerate(self.slices):
            for _ in range(depth):
                mask = torch.zeros(40, 30, dtype=torch.long)
                mask[5:20, 5:20] = 1
                image = torch.from_numpy(rng.uniform(-1, 1, (1, 40, 30))).float() / (case + 1)
                samples.append({"image": image, "mask": mask, "id": f"{case}_{len(samples)}"})
        return samples

    def volume(self, split, index):
        case = int(np.searchsorted(np.cumsum(self.slices), index, side="right"))
        return Volume(f"p{case}", 0, self.slices[case], (8.0, 1.5, 1.5) if case else None)


@pytest.fixture
def data(tmp_path):
    init = {"family": "cardiac", "size": 32, "n_train": 6, "n_val": 2, "n_test": 2}
    source = {"class_path": "PhantomSource", "init_args": init}
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump({"data": {"init_args": {"source": source}}}))
    return file


def test_slices_of_a_volume_are_one_case():
    fingerprint, (values,) = measure(Volumes())
    assert fingerprint.shapes == ((3, 40, 30), (2, 40, 30), (4, 40, 30))
    assert fingerprint.spacings == ((1.0, 1.0, 1.0), (8.0, 1.5, 1.5), (8.0, 1.5, 1.5))
    # Uniform in ±1, ±1/2 and ±1/3, a third of the weight each.
    assert values["mean"] == pytest.approx(0, abs=0.05)
    assert values["std"] == pytest.approx(np.sqrt((1 + 1 / 4 + 1 / 9) / 9), rel=0.03)
    assert values["upper"] == pytest.approx(0.97, abs=0.01)  # (1 − u) / 2 · 1/3 = 0.005


def test_channels_follow_their_names():
    values = [{"mean": 1.0, "std": 2.0, "lower": 0.0, "upper": 3.0}] * 2
    assert normalisation(["T1"], values) == [{"scheme": "zscore"}] * 2
    assert normalisation(["CT", "MR"], values) == [{"scheme": "ct", **values[0]}, {"scheme": "zscore"}]
    with pytest.raises(InputError, match="--channels: names 3, the images have 2"):
        normalisation(["a", "b", "c"], values)


def test_a_plan_is_shown_and_trained_by(data, tmp_path, capsys):
    file = tmp_path / "plan.yaml"
    main(["--config", str(data), "--output", str(file), "--channels", "ct"])
    shown = capsys.readouterr().out
    for line in ("patch         32 × 32", "batch         2", "features      32, 64, 128, 256", "6 cases"):
        assert line in shown
    assert "# patch         32 × 32" in file.read_text()
    arguments = [
        *("stages/segmenter.yaml", data, "segmenters/nnunet.yaml", file, "plans/small.yaml"),
    ]
    command = ["fit", *(f"--config={CONFIGS / argument}" for argument in arguments)]
    command += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu"]
    command += [
        "--trainer.max_steps=2",
        "--data.init_args.steps_per_epoch=2",
        "--data.init_args.batch_size=2",
    ]
    cli.main(command)
    trained = json.loads((tmp_path / "run" / "weights" / "config.json").read_text())
    (channel,) = trained["normalisation"]
    assert channel["scheme"] == "ct"
    assert channel["lower"] < channel["mean"] < channel["upper"]
    assert trained["strides"] == [[1, 1], [2, 2], [2, 2], [2, 2]]
    assert trained["base_features"] == 8
    cli.main(["test", *command[1:-3], f"--model.init_args.weights={tmp_path / 'run' / 'weights'}"])
    scores = json.loads((tmp_path / "run" / "test.json").read_text())
    assert "test_shift" in json.dumps(scores)


def test_later_files_go_over(data, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("data: {init_args: {source: {init_args: {n_train: 4}}}}")
    source = read_source(data, over)
    assert len(source.dataset("train")) == 4
    assert source.size == (32, 32)


def test_later_files_replace_what_is_given_as_a_mapping(tmp_path):
    """As on the command line: fractions of both files would be none."""
    files = []
    for name, fractions in (("one", "{train: 0.7, val: 0.1, test: 0.2}"), ("two", "{train: 0.8, val: 0.2}")):
        files.append(tmp_path / f"{name}.yaml")
        source = f"{{class_path: FolderSource, init_args: {{root: {tmp_path}, fractions: {fractions}}}}}"
        files[-1].write_text(f"data: {{init_args: {{source: {source}}}}}")
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for i in range(10):
            Image.new("L", (8, 8), 255).save(tmp_path / folder / f"{i}.png")
    assert read_source(*files).splits == ("train", "val")
    (tmp_path / "three.yaml").write_text(
        "data: {init_args: {source: {class_path: PhantomSource, init_args: {family: polyp, n_train: 3}}}}"
    )
    assert len(read_source(*files, tmp_path / "three.yaml").dataset("train")) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file"),
        ("data: [", "is no YAML"),
        ("model: {}", "has no data.init_args.source"),
        ("data: {init_args: {source: {class_path: Nope}}}", "Nope"),
    ],
)
def test_files_that_name_no_source(tmp_path, text, reason):
    file = tmp_path / "data.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=rf"data\.yaml.*{reason}"):
        read_source(file)


def test_no_memory(data, tmp_path):
    with pytest.raises(InputError, match="--memory 0: must be above 0"):
        main(["--config", str(data), "--output", str(tmp_path / "plan.yaml"), "--memory", "0"])
