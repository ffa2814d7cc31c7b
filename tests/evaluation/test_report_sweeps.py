import math

import pytest
import yaml
from test_report import SEEDS, describe, make_run, skip_drawing, words

from errors import InputError
from evaluation.report.collect import Run
from evaluation.report.page import write
from evaluation.report.sweeps import places_of, sweep_figures, sweep_panels

METHODS = ("base", "b1", "b2", "b3")
SWEEPS = {"β": {1: "b3", 0.01: "b1", 0.1: "b2"}}


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "runs" / "tiny", methods=METHODS, budgets=(2, 1), sweeps=SWEEPS)
    for seed in SEEDS:
        describe(run, "base", seed, fid=9.0)
        for place in (1, 2, 3):
            describe(run, f"b{place}", seed, kl=10.0 * place + seed, adversariality=0.5 / place)
    return run


def test_panels_hold_the_numbers_in_order(run):
    read = Run.read(run)
    assert read.sweeps["β"] == [(0.01, "b1"), (0.1, "b2"), (1.0, "b3")]
    panels = {panel.title: panel for panel in sweep_panels(read, "β")}
    assert list(panels) == ["test: DSC", "shift: DSC", "adversariality", "KL to the prior"]
    scores = panels["test: DSC"]
    assert list(scores.lines) == ["budget 1×", "budget 2×"]
    base = (81 + 83 + 85.5) / 3
    assert [s.mean for s in scores.lines["budget 1×"]] == pytest.approx([base + 1, base + 2, base + 3])
    assert [s.mean for s in scores.lines["budget 2×"]] == pytest.approx([base + 2, base + 4, base + 6])
    assert scores.levels == pytest.approx({"real": 82, "base": base})
    kl = panels["KL to the prior"]
    assert [(s.mean, s.sd) for s in kl.lines["KL to the prior"]] == [(11, 1), (21, 1), (31, 1)]
    assert (kl.unit, kl.levels) == ("nats", {"base": 0})


def test_known_figures_are_drawn(run):
    for seed in SEEDS:
        describe(run, "b2", seed, fid=12.0, mask_fidelity=90.0)
    panels = {panel.title: panel for panel in sweep_panels(Run.read(run), "β")}
    assert {"FID", "mask fidelity"} <= set(panels)
    assert [s.n for s in panels["FID"].lines["FID"]] == [0, 3, 0]
    assert panels["FID"].levels == {"base": 9.0}
    assert panels["mask fidelity"].levels == {}


def test_methods_with_a_budget_of_their_own_are_drawn(tmp_path):
    """As τ subsets are: base has the experiment's budget, they have that of the set they are taken from."""
    run = make_run(tmp_path / "r", methods=METHODS, budgets=(4,), sweeps=SWEEPS)
    file = run / "experiment.yaml"
    settings = yaml.safe_load(file.read_text()) | {"budgets": [1]}
    settings["methods"] |= {name: {"budgets": [4]} for name in METHODS[1:]}
    file.write_text(yaml.safe_dump(settings))
    for seed in SEEDS:
        (run / f"seed{seed}/base/4x").rename(run / f"seed{seed}/base/1x")
    scores = sweep_panels(Run.read(run), "β")[0]
    base = (81 + 83 + 85.5) / 3
    assert [s.mean for s in scores.lines["mean ± SD"]] == pytest.approx([base + 4, base + 8, base + 12])
    assert scores.levels == pytest.approx({"real": 82, "base": base})


@pytest.mark.parametrize(
    ("numbers", "places"),
    [
        ([0.05, 1], [-3, 0]),
        ([0.06, 1], None),
        ([0, 0.05, 1], [-6, -3, 0]),  # 0 a step below
        ([0, 1, 400, 8000], [-4.5, 0, 6, 9]),
        ([0, 5], None),
        ([-1, 1, 100], None),
        ([3], None),
    ],
)
def test_numbers_over_a_wide_range_stand_at_their_logarithms(numbers, places):
    """In units of ln 20, the ratio from which on they do, by thirds."""
    expected = numbers if places is None else [place / 3 * math.log(20) for place in places]
    assert places_of(numbers) == pytest.approx(expected, abs=1e-12)


def test_a_figure_per_sweep(run, monkeypatch):
    figures = sweep_figures(Run.read(run))
    assert list(figures) == ["β"]
    shown = words(figures["β"])
    assert {"β", "0.01", "0.1", "1", "budget 1×", "budget 2×", "real", "base", "nats"} <= set(shown)
    skip_drawing(monkeypatch)
    page = write(Run.read(run)).read_text(encoding="utf-8")
    assert 'alt="Scores and synthetic sets against β"' in page
    assert 'href="#sweeps"' in page


def test_numbers_that_run_into_each_other_are_left_out(tmp_path):
    methods = ("base", *(f"b{i}" for i in range(5)))
    sweep = dict(zip((-2, 0.37, 0.47, 5, 10), methods[1:], strict=True))
    run = make_run(tmp_path / "r", methods=methods, sweeps={"w": sweep})
    shown = words(sweep_figures(Run.read(run))["w"])
    assert {"0.47", "5", "10"} <= set(shown)
    assert "0.37" not in shown


@pytest.mark.parametrize("sweeps", [{"β": {1: "ours"}}, {"β": {"high": "b1"}}, {"β": ["b1"]}, ["β"]])
def test_unusable_sweeps(tmp_path, sweeps):
    run = make_run(tmp_path / "r", methods=METHODS, sweeps=sweeps)
    with pytest.raises(InputError, match=r"experiment\.yaml: sweeps must map numbers to methods"):
        Run.read(run)
