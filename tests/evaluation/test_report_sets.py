import json
import re

import numpy as np
import pytest
from test_report import SEEDS, describe, make_run, skip_drawing, words, write_images

from errors import InputError
from evaluation.report.collect import Run
from evaluation.report.embedding import MOST, embedding_figure, sampled_features, tsne
from evaluation.report.examples import example_grid
from evaluation.report.page import write
from evaluation.report.sets import mode_figure, mode_shares, nativeness_figure, yardstick
from evaluation.report.tables import as_markdown, as_text, difference_table, synthetic_table

METHODS = ("best_of_4", "base", "best_of_2", "miner")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "tiny", methods=METHODS)


def column(run, head):
    table = synthetic_table(Run.read(run))
    place = table.columns.index(head)
    return {line[0]: line[place] for line in table.cells}


def test_table_has_a_line_per_method(run):
    table = synthetic_table(Run.read(run))
    assert table.columns == ("Method", "adversariality", "KL (nats)", "FID", "s/image")
    assert table.cells[3] == ("miner", "0.400 ± 0.000", "12.50 ± 0.00", "15.00 ± 1.00", "1.02 ± 0.00 (1.02×)")
    assert table.cells[1] == ("base", "0.200 ± 0.000", "0.00 ± 0.00", "–", "1.00 ± 0.00")
    assert table.methods == list(METHODS)
    assert table.note == "images per seed: 1,200 · reward: bounded_ce · features: unet encoder"


def test_table_as_text_and_markdown(run):
    table = synthetic_table(Run.read(run))
    lines = as_text(table).splitlines()
    assert lines[4] == "miner       0.400 ± 0.000  12.50 ± 0.00  15.00 ± 1.00  1.02 ± 0.00 (1.02×)"
    assert lines[-2:] == ["", table.note]
    assert as_markdown(table).splitlines()[1] == "| --- | ---: | ---: | ---: | ---: |"


def test_facts_that_differ_are_columns(run):
    describe(run, "miner", 0, n=300, judge="unet 0a1b")
    describe(run, "miner", 1, n=280, judge="unet 0a1b")
    describe(run, "miner", 2, n=310, judge="unet 2c3d")
    assert column(run, "images") == dict.fromkeys(METHODS, "1,200") | {"miner": "280–310"}
    assert column(run, "judge")["miner"] == "unet 0a1b, unet 2c3d"
    assert column(run, "judge")["base"] == "–"
    assert synthetic_table(Run.read(run)).note == "reward: bounded_ce · features: unet encoder"


def test_a_column_has_one_number_of_decimals(run):
    for seed in SEEDS:
        describe(run, "base", seed, kid=0.0123)
        describe(run, "miner", seed, kid=0.00123)
    expected = {"base": "0.0123 ± 0.0000", "miner": "0.0012 ± 0.0000", "best_of_2": "–", "best_of_4": "–"}
    assert column(run, "KID") == expected


def test_more_figures_are_shown_where_they_are_known(run, monkeypatch):
    for seed in SEEDS:
        for method in METHODS:
            calls = 51 if method == "miner" else 50
            more = {"mask_fidelity": 93.5, "calls_per_image": calls, "judge": "unet 0a1b", "kid": None}
            describe(run, method, seed, **more)
    assert set(column(run, "mask fidelity (%)").values()) == {"93.50 ± 0.00"}
    assert column(run, "calls/image")["miner"] == "51.00 ± 0.00"
    assert set(column(run, "KID").values()) == {"–"}
    table = synthetic_table(Run.read(run))
    assert table.note.endswith(" · judge of mask fidelity: unet 0a1b")
    assert "Vendi" not in table.columns
    skip_drawing(monkeypatch)
    sets = json.loads((write(Run.read(run)).parent / "report.json").read_text())["synthetic_sets"]
    assert {one["calls_per_image"] for one in sets} == {50, 51}


def test_noise_shows_the_z_that_is_farthest_off(run, monkeypatch):
    assert "noise norm" not in synthetic_table(Run.read(run)).columns
    for seed, z in zip(SEEDS, (0.3, -4.26, 2.0), strict=True):
        noise = {"norm": {"value": 1 + seed / 100, "z": z}, "mean": {"value": 0.0, "z": float("nan")}}
        describe(run, "miner", seed, noise=noise | {"variance": {"value": 0.98, "z": 0.84}})
    assert column(run, "noise norm") == dict.fromkeys(METHODS, "–") | {"miner": "1.010 (z 4.3)"}
    assert column(run, "noise variance")["miner"] == "0.980 (z 0.8)"
    skip_drawing(monkeypatch)
    page = write(Run.read(run))
    assert "1.010 <small>(z 4.3)</small>" in page.read_text(encoding="utf-8")
    sets = json.loads((page.parent / "report.json").read_text())["synthetic_sets"]
    shown = {one["seed"]: one["noise"] for one in sets if one["method"] == "miner"}
    assert shown[1]["norm"] == {"value": 1.01, "z": -4.26}
    assert shown[1]["mean"] == {"value": 0.0, "z": None}
    assert not any("noise" in one for one in sets if one["method"] == "base")


def test_yardstick_is_in_order_of_adversariality(run, monkeypatch):
    for seed in SEEDS:
        describe(run, "best_of_4", seed, adversariality=0.3, fid=16.0, mask_fidelity=91.0)
        describe(run, "best_of_2", seed, adversariality=0.25, fid=15.0, mask_fidelity=92.0)
    read = Run.read(run)
    assert yardstick(read) == ["base", "best_of_2", "best_of_4"]
    shown = words(nativeness_figure(read))
    assert {"FID", "mask fidelity", "adversariality"} <= set(shown)
    assert (shown.count("best_of_2"), shown.count("miner"), shown.count("base")) == (2, 1, 0)
    skip_drawing(monkeypatch)
    assert "joins base, best_of_2, best_of_4" in write(read).read_text(encoding="utf-8")


def test_nativeness_needs_fid_or_mask_fidelity(tmp_path):
    run = make_run(tmp_path / "base_alone", methods=("base",))
    assert nativeness_figure(Run.read(run)) is None


def test_what_is_far_off_does_not_squeeze_the_others(run):
    for seed in SEEDS:
        for method, hardness, fid in zip(METHODS, (0.1, 0.2, 0.25, 0.7), (5.0, 6.0, 6.5, 44.0), strict=True):
            describe(run, method, seed, adversariality=hardness, fid=fid)
    shown = words(nativeness_figure(Run.read(run)))
    assert "miner (0.7, 44)" in shown
    assert {"base", "best_of_2", "best_of_4"} <= set(shown)
    ticks = [float(word) for word in shown if re.fullmatch(r"[0-9.]+", word)]
    assert max(ticks) < 8
    for seed in SEEDS:
        describe(run, "miner", seed, adversariality=0.6, fid=44.0)
    assert "miner" in words(
        nativeness_figure(Run.read(run))
    )  # 2.4 times as hard as the hardest of the yardstick


def test_fid_is_drawn_of_sets_of_one_size_only(run):
    for seed in SEEDS:
        for method in METHODS:
            described = {"fid": 1.0, "mask_fidelity": 90.0}
            describe(run, method, seed, **described, **({"n": 300} if method == "miner" else {}))
    shown = words(nativeness_figure(Run.read(run)))
    assert [shown.count(m) for m in METHODS] == [2, 2, 2, 1]


def test_differences_to_best_of_4_are_of_methods(run):
    shown = [line[1] for line in difference_table(Run.read(run)).cells if line[1].endswith("− best_of_4 1×")]
    assert shown == ["best_of_2 1× − best_of_4 1×", "miner 1× − best_of_4 1×"] * 2


def test_shares_of_modes_are_means_over_seeds(run, monkeypatch):
    assert mode_figure(Run.read(run)) is None
    for seed, common in zip(SEEDS, (90, 80, 70), strict=True):
        histogram = {"plain": common, "striped": 100 - common}
        describe(run, "miner", seed, modes={"histogram": histogram, "accuracy": 0.9, "recall": {}})
    describe(run, "base", 1, modes={"histogram": {"plain": 3, "pale": 1}, "accuracy": None})
    read = Run.read(run)
    assert mode_shares(read) == {"base": {"plain": 75, "pale": 25}, "miner": {"plain": 80, "striped": 20}}
    shown = words(mode_figure(read))
    assert {"plain", "striped", "pale", "80", "20", "75", "25", "miner"} <= set(shown)
    assert "best_of_2" not in shown
    skip_drawing(monkeypatch)
    assert "right on 90.0 % of real images" in write(read).read_text(encoding="utf-8")


def test_precision_is_compared_at_the_modes_of_base(run, monkeypatch):
    """Striped samples are less precise in either set; the miner only has more of them."""
    assert "precision at base's modes" not in synthetic_table(Run.read(run)).columns
    for seed in SEEDS:
        precision = {"plain": 0.9, "striped": 0.5, "pale": None}
        base = {"histogram": {"plain": 3, "striped": 1, "pale": 0}, "precision": precision}
        mined = {"histogram": {"plain": 1, "striped": 3, "pale": 0}, "precision": precision}
        describe(run, "base", seed, precision=0.8, modes=base)
        describe(run, "miner", seed, precision=0.6, modes=mined)
        describe(run, "best_of_2", seed, precision=0.5, modes=mined | {"precision": {"striped": 0.5}})
    found = column(run, "precision at base's modes")
    expected = {"base": "0.800 ± 0.000", "miner": "0.800 ± 0.000", "best_of_2": "0.500 ± 0.000"}
    assert found == expected | {"best_of_4": "–"}
    skip_drawing(monkeypatch)
    sets = json.loads((write(Run.read(run)).parent / "report.json").read_text())["synthetic_sets"]
    assert {one["method"]: one.get("precision_base_modes") for one in sets if one["seed"] == SEEDS[0]} == {
        "base": pytest.approx(0.8),
        "miner": pytest.approx(0.8),
        "best_of_2": pytest.approx(0.5),
        "best_of_4": None,
    }


def test_mask_fidelity_of_the_hardest_quarter(run):
    head = "… of the hardest quarter"
    assert head not in synthetic_table(Run.read(run)).columns
    values, fidelity = [0.1, 0.9, 0.3, 0.8, 0.2], [99.0, 50.0, 98.0, 70.0, None]
    for seed in SEEDS:
        describe(run, "base", seed, values=values, samples={"mask_fidelity": fidelity})
        describe(run, "miner", seed, values=[0, 0, 0, 0, 1], samples={"mask_fidelity": [1, 2, None, 4, None]})
        describe(run, "best_of_2", seed, values=[1, 1], samples={"mask_fidelity": [None, None]})
    found = column(run, head)  # two of five; of the miner's the unknown one and, of equals, the first
    assert found == {"base": "60.00 ± 0.00", "miner": "1.00 ± 0.00", "best_of_2": "–", "best_of_4": "–"}


def features(run, method, synthetic, real):
    path = run / f"seed0/{method}/features.npz"
    np.savez(path, real=np.asarray(real, np.float32), synthetic=np.asarray(synthetic, np.float32))


def test_embedding_keeps_clusters_apart(tmp_path):
    run = make_run(tmp_path / "r", methods=METHODS, embedding=["base", "miner", "best_of_2"])
    assert embedding_figure(Run.read(run)) is None
    rng = np.random.default_rng(0)
    real = rng.normal(0, 1, (30, 5))
    features(run, "base", rng.normal(0, 1, (20, 5)), real)
    features(run, "miner", rng.normal(50, 1, (20, 5)), real)
    places = tsne(sampled_features(Run.read(run)))
    assert {name: p.shape for name, p in places.items()} == {
        "real": (30, 2),
        "base": (20, 2),
        "miner": (20, 2),
    }
    centre = {name: p.mean(0) for name, p in places.items()}
    near, far = (np.linalg.norm(centre["real"] - centre[m]) for m in ("base", "miner"))
    assert far > 3 * near
    figure = embedding_figure(Run.read(run))
    assert words(figure) == ["base", "miner"]
    assert figure == embedding_figure(Run.read(run))


def test_embedding_takes_so_many_of_each_evenly(tmp_path):
    run = make_run(tmp_path / "r", embedding=["miner"])
    many = np.arange(2 * (3 * MOST)).reshape(-1, 2)
    features(run, "miner", many[:10], many)
    found = sampled_features(Run.read(run))
    assert list(map(len, found.values())) == [MOST, 10]
    np.testing.assert_array_equal(found["real"][[0, -1]], many[[0, -1]])
    assert np.ptp(np.diff(found["real"][:, 0])) <= 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"real": np.ones((3, 2))}, "synthetic"),
        ({"real": np.ones((3, 2)), "synthetic": np.ones((3, 4))}, r"\(R, D\)"),
        ({"real": np.ones((3, 2)), "synthetic": np.full((3, 2), np.nan)}, "not finite"),
        (None, "cannot be read"),
    ],
)
def test_unusable_features_are_named(tmp_path, content, problem):
    run = make_run(tmp_path / "r", embedding=["miner"])
    path = run / "seed0/miner/features.npz"
    path.write_bytes(b"no arrays") if content is None else np.savez(path, **content)
    with pytest.raises(InputError, match=problem) as caught:
        write(Run.read(run))
    assert str(path) in str(caught.value)


def test_features_of_two_extractors(tmp_path):
    run = make_run(tmp_path / "r", embedding=["base", "miner"])
    for method, width in (("base", 3), ("miner", 4)):
        features(run, method, np.ones((5, width)), np.ones((5, width)))
    with pytest.raises(InputError, match="one extractor"):
        sampled_features(Run.read(run))


def test_embedding_of_an_unknown_method(tmp_path):
    run = make_run(tmp_path / "r", embedding=["ours"])
    with pytest.raises(InputError, match="embedding must be a list of methods"):
        Run.read(run)


def test_without_base_there_are_no_differences(tmp_path, monkeypatch):
    run = make_run(tmp_path / "r", methods=("miner",))
    write_images(run / "seed0/miner/synthetic", "miner", 0)
    grid = example_grid(Run.read(run))
    assert (grid.gaps, grid.white) == ({}, None)
    skip_drawing(monkeypatch)
    assert "Difference to base" not in write(Run.read(run)).read_text(encoding="utf-8")


def test_optional_parts_are_absent_by_default(run, monkeypatch):
    skip_drawing(monkeypatch)
    page = write(Run.read(run)).read_text(encoding="utf-8")
    for title in ("Appearance modes", "Map of features", "First-order gain", "Sweeps", "noise norm"):
        assert title not in page, title
