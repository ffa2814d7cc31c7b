import json
import math
import os

import numpy as np
import pytest
from PIL import Image

from conftest import files_of
from datamodules.sources.synthetic import SyntheticSet
from errors import InputError
from evaluation import subsets as module
from evaluation.subsets import main, subset, write_subset

VALUES = [0.31, 0.5, 0.05, 0.30, 0.72, 0.0]
FACTS = {"method": "miner", "reward": "bounded_ce", "n": 6}


@pytest.fixture
def whole(tmp_path):
    """A synthetic set of six 4 × 4 images, image i of grey value i."""
    folder = tmp_path / "synthetic"
    lines = []
    for i, value in enumerate(VALUES):
        files = {kind: f"{kind}s/{i:06d}.png" for kind in ("image", "mask")}
        for file, level in zip(files.values(), (i, i % 2), strict=True):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), level, np.uint8)).save(folder / file)
        facts = {"index": i, "value": value, "kl": 10.0 * i, "name": "x", "calls": 50.0, "seconds": 0.1 * i}
        lines.append(json.dumps(facts | files) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "dataset.json").write_text(json.dumps(FACTS))
    return folder


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(-1, [0, 1, 2, 3, 4, 5]), (0, [0, 1, 2, 3, 4]), (0.3, [0, 1, 4]), (0.5, [4]), (0.72, [])],
)
def test_samples_above_tau(tau, expected):
    assert subset([{"value": value} for value in VALUES], tau) == expected


def test_another_key_decides():
    assert subset([{"value": 1.0, "kl": 2}, {"value": 0.0, "kl": 5.0}], 3, "kl") == [1]


def test_key_that_is_no_number():
    with pytest.raises(InputError, match="no number 'name'; choose from value, kl"):
        subset([{"value": 1.0, "name": "x", "kl": 2.0}], 0, "name")


def test_tau_that_is_no_number():
    with pytest.raises(InputError, match="not a number"):
        subset([{"value": 1.0}], float("nan"))


@pytest.mark.parametrize("links", [True, False])
def test_subset_is_a_set_of_its_own(whole, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no hard links here")))
    before = files_of(whole)
    output = tmp_path / "deep" / "subset"
    assert write_subset(whole, output, 0.3) == 3
    chosen = SyntheticSet(output)
    assert [entry["value"] for entry in chosen.entries] == [0.31, 0.5, 0.72]
    assert [round(float((chosen[i]["image"][0, 0, 0] + 1) * 127.5)) for i in range(3)] == [0, 1, 4]
    assert [int(chosen[i]["mask"][0, 0]) for i in range(3)] == [0, 1, 0]
    lines = (whole / "manifest.jsonl").read_text().splitlines()
    kept = [json.loads(lines[i]) for i in (0, 1, 4)]
    nats = pytest.approx(math.log(6 / 3))  # three of six
    for entry, was in zip(chosen.entries, kept, strict=True):
        assert entry.pop("kl") - was.pop("kl") == nats
        for cost in ("calls", "seconds"):  # those of the samples that were left out, too
            assert entry.pop(cost) == 6 / 3 * was.pop(cost)
        assert entry == was
    assert json.loads((output / "dataset.json").read_text()) == FACTS | {
        "n": 3,
        "subset": [{"set": str(whole), "key": "value", "tau": 0.3, "control": False, "of": 6}],
    }
    assert len(files_of(output)) == 2 * 3 + 2
    assert files_of(whole) == before
    shared = [os.path.samefile(whole / e["image"], output / e["image"]) for e in chosen.entries]
    assert shared == [links] * 3
    assert [f.name for f in output.parent.iterdir()] == ["subset"]


def test_subset_of_a_subset_tells_both(whole, tmp_path):
    write_subset(whole, tmp_path / "a", 0.3)
    assert write_subset(tmp_path / "a", tmp_path / "b", 5, "kl") == 2
    made = json.loads((tmp_path / "b/dataset.json").read_text())
    assert made["n"] == 2
    assert [(s["key"], s["tau"], s["of"]) for s in made["subset"]] == [("value", 0.3, 6), ("kl", 5, 3)]


def test_an_older_subset_is_replaced(whole, tmp_path):
    write_subset(whole, tmp_path / "out", 0)
    write_subset(whole, tmp_path / "out", 0.5)
    assert len(SyntheticSet(tmp_path / "out")) == 1
    assert len(files_of(tmp_path / "out")) == 4


def test_what_is_refused_stays_as_it_is(whole, tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("precious")
    before = files_of(tmp_path)
    for output, problem in ((foreign, "is no synthetic set"), (whole, "is the set to choose from")):
        with pytest.raises(InputError, match=problem):
            write_subset(whole, output, 0.3)
    with pytest.raises(InputError, match=r"no value is above 0\.9, the highest is 0\.72"):
        write_subset(whole, tmp_path / "out", 0.9)
    with pytest.raises(InputError, match="no complete synthesised set"):
        write_subset(foreign, tmp_path / "out", 0.3)
    assert files_of(tmp_path) == before


def test_damaged_facts_are_named(whole, tmp_path):
    (whole / "dataset.json").write_text('{"method": "mi')
    with pytest.raises(
        InputError, match=r"synthetic/dataset\.json: cannot be read .* synthesise the set again"
    ):
        write_subset(whole, tmp_path / "out", 0.3)
    assert not (tmp_path / "out").exists()


def test_a_copy_that_fails_leaves_no_set(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_link", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_subset(whole, tmp_path / "out", 0.3)
    assert not (tmp_path / "out").exists()


def test_command(whole, tmp_path, capsys):
    main(["--set", str(whole), "--tau", "25", "--key", "kl", "--output", str(tmp_path / "out")])
    assert len(SyntheticSet(tmp_path / "out")) == 3
    assert "3 samples, with kl > 25" in capsys.readouterr().out


def test_control_is_as_many_of_the_first(whole, tmp_path):
    (whole / "noise").mkdir()
    for i in range(6):
        np.save(whole / "noise" / f"{i:06d}.npy", np.full(3, i))
    assert write_subset(whole, tmp_path / "out", 0.4, control=True) == 2
    assert [(e["index"], e["calls"]) for e in SyntheticSet(tmp_path / "out").entries] == [(0, 50), (1, 50)]
    assert [np.load(tmp_path / "out/noise" / f"{i:06d}.npy")[0] for i in (0, 1)] == [0, 1]
    assert json.loads((tmp_path / "out/dataset.json").read_text())["subset"][0]["control"] is True
