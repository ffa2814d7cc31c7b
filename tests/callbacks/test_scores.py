"""Scores of test sets made of volumes: the means, the cases, the protocol."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from callbacks import ScoreWriter
from conftest import make_segmenter, make_trainer
from datamodules import SegDataModule
from datamodules.sources import PhantomSource, Source, Volume
from errors import InputError
from evaluation.protocols import PROTOCOLS
from evaluation.surfaces import score_case
from lightning_modules import SegLitModule

SPACING = (6.0, 1.5, 1.25)


class Scans(Source):
    """Phantoms of which every test set is two volumes, of three and two slices, the first one backwards."""

    def __init__(self, spacings=(SPACING, SPACING), tests=("test", "test_shift"), slices=(3, 2)):
        self.phantoms = PhantomSource("polyp", 32, n_train=2, n_val=5, n_test=5)
        self.name, self.channels, self.size = "scans", 3, (32, 32)
        self.class_names = self.phantoms.class_names
        self.splits = ("train", "val", *tests)
        self.spacings, self.slices = dict(zip(tests, spacings, strict=True)), slices

    def _dataset(self, split):
        return self.phantoms.dataset(split)

    def volume(self, split, index):
        spacing = self.spacings.get(split, SPACING)
        if index < 3:
            return Volume("scan1", 2 - index, self.slices[0], spacing)
        return Volume("scan2", index - 3, self.slices[1], spacing)


def scored_run(source, folder, protocol):
    module = SegLitModule(make_segmenter(), protocol=protocol)
    trainer = make_trainer(folder, callbacks=[ScoreWriter()])
    trainer.test(module, SegDataModule(source, batch_size=2), verbose=False)
    report = json.loads((folder / "test.json").read_text())
    with (folder / "test_cases.csv").open() as file:
        return module, report, list(csv.DictReader(file))


@torch.no_grad()
def expected_scores(source, split, spacing, protocol):
    """Scores of both volumes, (2, M), by the network's own predictions put together by hand."""
    net, dataset = make_segmenter().eval(), source.dataset(split)
    samples = [dataset[i] for i in (2, 1, 0, 3, 4)]
    target = torch.stack([sample["mask"] for sample in samples]).numpy()
    found = net(torch.stack([sample["image"] for sample in samples])).argmax(1).numpy()
    parts = (slice(0, 3), slice(3, 5))
    return np.array([score_case(found[p], target[p], 2, spacing, PROTOCOLS[protocol])[0] for p in parts])


@pytest.mark.parametrize("protocol", ["transunet", "nnunet", "acdc"])
def test_volumes_are_scored_and_written(tmp_path, protocol, capsys):
    source = Scans()
    _, report, lines = scored_run(source, tmp_path, protocol)
    spacing = (1.0, 1.0, 1.0) if protocol == "transunet" else SPACING
    measures = PROTOCOLS[protocol].measures
    assert list(report["test_sets"]) == ["test", "test_shift"]
    for name, means in report["test_sets"].items():
        expected = expected_scores(source, name, spacing, protocol)
        assert means["n_cases"] == 2
        assert [means[m] for m in measures] == pytest.approx(expected.mean(0).tolist())
        own = [line for line in lines if line["test set"] == name]
        assert [(line["case"], line["class"]) for line in own] == [("scan1", "polyp"), ("scan2", "polyp")]
        assert [[float(line[m]) for m in measures] for line in own] == pytest.approx(expected)
    unit = "px" if protocol == "transunet" else "mm"
    assert report["protocol"]["asd unit" if "asd" in measures else "distance unit"] == unit
    printed = capsys.readouterr().out
    assert f" {unit}, 2 cases" in printed
    assert f"only reference empty: {PROTOCOLS[protocol].rules()['only reference empty']}" in printed


def test_slices_are_cases_by_their_own_names(tmp_path):
    source = Scans()
    _, report, lines = scored_run(source, tmp_path, "paper")
    assert report["test_sets"]["test"]["n_cases"] == 5
    assert report["protocol"]["asd unit"] == "px"
    assert [line["case"] for line in lines[:5]] == [f"test-{i:05d}" for i in range(5)]
    mean = np.nanmean([float(line["dsc"] or math.nan) for line in lines[:5]])
    assert mean == pytest.approx(report["test_sets"]["test"]["dsc"])


def test_a_class_that_is_not_scored_is_left_empty(tmp_path):
    """``paper`` scores no class that neither side has: here none but the background is ever predicted."""

    class Blank(Scans):
        def _dataset(self, split):
            samples = [self.phantoms.dataset(split)[i] for i in range(5)]
            return [{**sample, "mask": torch.zeros_like(sample["mask"])} for sample in samples]

    net = make_segmenter()
    with torch.no_grad():
        net.network.decoder.seg_layers[-1].bias.copy_(torch.tensor([1e4, 0.0]))
    trainer = make_trainer(tmp_path, callbacks=[ScoreWriter(cases="by_case.csv")])
    trainer.test(SegLitModule(net), SegDataModule(Blank(), batch_size=2), verbose=False)
    assert (tmp_path / "by_case.csv").read_text().splitlines()[1] == "test,test-00000,polyp,,"


def test_validation_follows_the_protocol(tmp_path):
    source = Scans()
    trainer = make_trainer(tmp_path)
    module = SegLitModule(make_segmenter(), protocol="acdc")
    logged = trainer.validate(module, SegDataModule(source, batch_size=2), verbose=False)[0]
    expected = expected_scores(source, "val", SPACING, "acdc").mean(0)
    assert [logged[f"val/{m}"] for m in PROTOCOLS["acdc"].measures] == pytest.approx(
        expected.tolist(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("source", "protocol", "fragment"),
    [
        (Scans(slices=(4, 2)), "transunet", "scans, test: case scan1 has 3 of 4 slices"),
        (Scans(spacings=(SPACING, None)), "acdc", "mm in test, px in test_shift"),
    ],
)
def test_volumes_that_cannot_be_scored(tmp_path, source, protocol, fragment):
    with pytest.raises(InputError, match=fragment):
        scored_run(source, tmp_path, protocol)
    assert not (tmp_path / "test.json").exists()


def test_without_spacing_every_protocol_counts_in_pixels(tmp_path):
    volume = Scans(spacings=(None, None))
    assert replace(volume.volume("test", 0), slice=0) == Volume("scan1", 0, 3, None)
    _, report, _ = scored_run(volume, tmp_path, "nnunet")
    assert report["protocol"]["asd unit"] == "px"
    expected = expected_scores(volume, "test", (1.0, 1.0, 1.0), "nnunet").mean(0)
    assert [report["test_sets"]["test"][m] for m in PROTOCOLS["nnunet"].measures] == pytest.approx(
        expected.tolist()
    )
