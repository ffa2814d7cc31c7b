import json
import math

import numpy as np
import pytest
import yaml
from test_report import SEEDS, make_run, put, skip_drawing, words

from errors import InputError
from evaluation.report.collect import Run
from evaluation.report.gain import correlation, gain_figure, gain_table, gains
from evaluation.report.page import write

METHODS = ("base", "a", "b", "c", "d")


def gain(value, cosine=0.2):
    one = {"norm_syn": 3.0, "norm_real": 0.5, "cosine": cosine, "gain": value}
    part = {"set": one, "mean": one | {"gain": -1.0}, "samples": {"gain": [value] * 4}}
    last = {"set": one | {"gain": value / 10}, "mean": one, "samples": {}}
    facts = {"method": "m", "backbone": "segdiff", "seed": 0, "split": "val"}
    return facts | {"loss": "dice_ce", "gamma": 0.01, "n": 4, "all": part, "last": last}


@pytest.fixture
def run(tmp_path):
    """ΔDSC of a, b, c and d at budget 1, the largest, is 1, 2, 3 and 4 above base, which is (1, 1, 1.5)."""
    run = make_run(tmp_path / "runs" / "tiny", methods=METHODS, budgets=(1, 0.5))
    for place, method in enumerate(("a", "b", "d", "c")):
        for seed in SEEDS:
            put(run / f"seed{seed}/{method}/gain.json", gain((place + 1 + 0.1 * seed) / 1000))
    return run


def test_gain_and_what_retraining_brought(run):
    found = {g.method: g for g in gains(Run.read(run))}
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"].whole[:3] == pytest.approx((3, 0.0011, 0.0001))
    assert found["a"].last.mean == pytest.approx(0.00011)
    assert (found["a"].norm.mean, found["a"].cosine.mean) == pytest.approx((3.0, 0.2))
    brought = found["d"].retrained["test"]
    assert brought[:3] == pytest.approx((3, np.mean((1, 1, 1.5)) + 4, np.std((1, 1, 1.5), ddof=1)))
    assert set(found["d"].retrained) == {"test", "shift"}


def test_table(run):
    table = gain_table(Run.read(run))
    heads = ("Method", "‖g_syn‖", "cos ζ", "gain, all ×10³", "gain, last ×10³")
    assert table.columns == (*heads, "ΔDSC test, 1×", "ΔDSC shift, 1×")
    figures = ("3.000 ± 0.000", "+0.200 ± 0.000", "+1.100 ± 0.100", "+0.110 ± 0.010")
    assert table.cells[0] == ("a", *figures, "+2.17 ± 0.29", "+2.17 ± 0.29")
    assert table.methods == ["a", "b", "c", "d"]
    assert table.note == "loss: dice_ce · γ: 0.01 · real images: val · synthetic images per seed: 4"


def test_rank_correlation(run):
    """Ranks 1, 2, 4, 3 against 1, 2, 3, 4: ρ = 1 − 6·2 / (4·15)."""
    read = Run.read(run)
    assert correlation(gains(read), "test") == pytest.approx((0.8, 4))
    assert "test: Spearman’s ρ = +0.80 (4 methods)" in words(gain_figure(read))
    assert {"a", "b", "c", "d"} <= set(words(gain_figure(read)))


def test_rank_correlation_needs_three_methods(run):
    found = gains(Run.read(run))
    rho, n = correlation(found[:2], "test")
    assert (math.isnan(rho), n) == (True, 2)
    assert math.isnan(correlation([found[0]] * 4, "test").rho)
    assert correlation(found, "elsewhere").n == 0


def test_page_and_json(run, monkeypatch):
    skip_drawing(monkeypatch)
    page = write(Run.read(run))
    text = page.read_text(encoding="utf-8")
    assert 'href="#gain"' in text
    assert "+1.100 <small>± 0.100</small>" in text
    sets = json.loads((page.parent / "report.json").read_text())["synthetic_sets"]
    shown = next(one for one in sets if (one["method"], one["seed"]) == ("a", 2))["gain"]
    assert shown["all"]["set"]["gain"] == 0.0012
    assert set(shown) == {"split", "loss", "gamma", "n", "all", "last"}
    assert set(shown["all"]) == {"set", "mean"}
    assert "gain" not in next(one for one in sets if one["method"] == "base")


def test_seeds_without_a_gain_do_not_count(run, monkeypatch):
    skip_drawing(monkeypatch)
    for seed in (0, 1):
        (run / f"seed{seed}/a/gain.json").unlink()
    put(run / "seed1/b/gain.json", gain(math.nan, math.nan))
    a, b, *_ = gains(Run.read(run))
    assert (a.whole.n, a.whole.mean, b.whole.n) == (1, 0.0012, 2)
    assert gain_table(Run.read(run)).cells[0][3] == "+1.200 ± –"
    sets = json.loads((write(Run.read(run)).parent / "report.json").read_text())["synthetic_sets"]
    assert next(s for s in sets if (s["method"], s["seed"]) == ("b", 1))["gain"]["all"]["set"]["gain"] is None


def test_a_set_of_another_size_is_not_held_against_the_budget(run):
    settings = yaml.safe_load((run / "experiment.yaml").read_text())
    settings["methods"]["d"] = {"budgets": [0.5, 1, 3]}
    put(run / "experiment.yaml", yaml.safe_dump(settings))
    for seed in SEEDS:
        put(run / f"seed{seed}/d/3x/test.json", (run / f"seed{seed}/d/1x/test.json").read_text())
    found = {g.method: g.retrained for g in gains(Run.read(run))}
    assert found["d"] == {}
    assert set(found["c"]) == {"test", "shift"}


def test_none_without_gains(tmp_path):
    read = Run.read(make_run(tmp_path / "r"))
    assert gain_table(read) is None
    assert gain_figure(read) is None


def test_unusable_gain_is_named(run):
    put(run / "seed0/a/gain.json", gain(0.1) | {"last": {}})
    with pytest.raises(InputError, match=r"a/gain\.json has no last\.set\.norm_syn, last\.set\.cosine"):
        Run.read(run)
