"""One sheet of pictures of several experiments."""

import numpy as np
import pytest
from PIL import Image
from test_report import make_run, put, write_images

from errors import InputError
from evaluation.pictures import joined, main
from evaluation.report.collect import Run
from evaluation.report.examples import example_grid


@pytest.fixture
def runs(tmp_path):
    """The same masks by two backbones; the second has one method more, and darker images."""
    runs = []
    for name, methods in (("segdiff", ("base", "miner")), ("fairdiff", ("base", "cig", "miner"))):
        run = make_run(tmp_path / f"table_{name}", methods=methods, name=f"table_{name}", backbone=name)
        for method in methods:
            write_images(run / "seed0" / method / "synthetic", method, 0)
        runs.append(run)
    for path in (tmp_path / "table_fairdiff/seed0").glob("*/synthetic/images/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
    return runs


def test_lines_stand_by_method_and_are_those_of_each_run(runs):
    read = [Run.read(run) for run in runs]
    grid = joined(read)
    assert [*grid.lines] == [
        *("mask", "real"),
        *("segdiff base", "fairdiff base", "segdiff miner", "fairdiff miner"),
    ]
    own = [example_grid(run) for run in read]
    assert grid.lines["mask"] == own[0].lines["mask"]
    assert grid.lines["segdiff miner"] == own[0].lines["miner"]
    assert grid.lines["fairdiff base"] == own[1].lines["base"] != own[0].lines["base"]
    assert grid.gaps == {}
    assert [*joined(read, ["miner"]).lines][2:] == ["segdiff miner", "fairdiff miner"]


def test_runs_of_one_backbone_go_by_their_own_names(runs):
    settings = (runs[1] / "experiment.yaml").read_text().replace("backbone: fairdiff", "backbone: segdiff")
    put(runs[1] / "experiment.yaml", settings)
    lines = [*joined([Run.read(run) for run in runs], ["base"]).lines]
    assert lines[2:] == ["table_segdiff base", "table_fairdiff base"]


def test_refuses_what_cannot_stand_in_one_sheet(runs, tmp_path):
    one, other = (Run.read(run) for run in runs)
    with pytest.raises(InputError, match=r"table_segdiff: has no cig; choose of base, miner"):
        joined([other, one], ["cig"])
    mask = runs[1] / "seed0/base/synthetic/masks/000000.png"
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(mask)
    with pytest.raises(InputError, match=r"table_fairdiff: shows other masks than .*table_segdiff"):
        joined([one, other])
    (runs[1] / "seed0/miner/synthetic/manifest.jsonl").unlink()
    with pytest.raises(InputError, match=r"make experiment NAME=table_fairdiff"):
        joined([one, other])
    alone = Run.read(make_run(tmp_path / "alone", methods=("cig",)))
    with pytest.raises(InputError, match=r"table_segdiff, .*alone: have no method in common"):
        joined([one, alone])


def test_command_writes_the_sheet(runs, tmp_path, capsys):
    output = tmp_path / "figures/sheet.svg"
    main([*map(str, runs), "--methods", "base", "--output", str(output)])
    assert capsys.readouterr().out.strip() == str(output)
    written = output.read_text()
    assert all(f">{name}<" in written for name in ("mask", "real", "segdiff base", "fairdiff base"))
    assert "|image − base|" not in written
    assert "data:image/png;base64," in written
