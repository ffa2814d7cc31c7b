import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from errors import InputError
from evaluation.report.__main__ import main
from evaluation.report.collect import SET_KEYS, Run, own_budgets
from evaluation.report.examples import EXAMPLES, example_grid
from evaluation.report.figures import budget_figure
from evaluation.report.inputs import CURVE_POINTS
from evaluation.report.page import _cards, write
from evaluation.report.statistics import paired_differences, spread, summarise
from evaluation.report.tables import as_markdown, as_text, headline_table, mean_sd, number

SEEDS = (0, 1, 2)
DSC = {"real": (80.0, 82.0, 84.0), "base": (81.0, 83.0, 85.5), "miner": (83.0, 84.0, 88.0)}
CLASSES = ("disc", "ring")


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def scores(dsc: float, n_synthetic: int) -> dict:
    shift = {"dsc": dsc - 10, "asd": math.nan, "n_cases": 5, "dsc/disc": dsc - 10, "asd/disc": math.nan}
    return {
        "dataset": "phantom",
        "dataset_version": 7,
        "segmenter": "unet",
        "n_real": 1200,
        "n_synthetic": n_synthetic,
        "protocol": {"unit": "one slice & its <case>", "asd unit": "mm"},
        "test_sets": {
            "test": {"dsc": dsc, "asd": (100 - dsc) / 10, "n_cases": 5}
            | {f"dsc/{n}": dsc + k for k, n in enumerate(CLASSES)}
            | {f"asd/{n}": 1.0 + k for k, n in enumerate(CLASSES)},
            "shift": shift,
        },
    }


def synthetic(method: str, seed: int) -> dict:
    mined = method == "miner"
    return {
        "method": method,
        "backbone": "segdiff",
        "seed": seed,
        "n": 1200,
        "adversariality": 0.4 if mined else 0.2,
        "reward": "bounded_ce",
        "fid": 14.0 + seed if mined else math.nan,
        "fid_extractor": "unet encoder",
        "seconds_per_image": 1.02 if mined else 1.0,
        "kl": 12.5 if mined else 0.0,
        "values": list(np.linspace(0.0, 0.5, 20)),
    }


def write_images(folder: Path, method: str, seed: int, n: int = 11) -> None:
    lines = []
    for i in range(n):
        level = 100 if method == "base" else 100 + 51  # 51/255 = 20 % of the grey range
        names = {"image": f"images/{i:06d}.png", "mask": f"masks/{i:06d}.png"}
        for name in names.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), level, np.uint8)).save(folder / names["image"])
        Image.fromarray(np.eye(16, dtype=np.uint8) * 2).save(folder / names["mask"])
        entry = {
            "index": i,
            "seed": seed,
            "source_mask": f"case_{i}",
            "method": method,
            "reward": "bounded_ce",
        }
        lines.append(json.dumps(entry | {"value": i / 16, "kl": 0.0} | names))
    put(folder / "manifest.jsonl", "\n".join(lines) + "\n")


def log_scalars(folder: Path, tag: str) -> None:
    writer = SummaryWriter(str(folder / "tensorboard"))
    for step in range(500):
        writer.add_scalar(tag, 1 / (1 + step), step)
        writer.add_scalar("epoch", step // 50, step)
    writer.add_scalar("test/dsc", 90.0, 500)  # a single point is no curve
    writer.close()


def make_run(
    run: Path,
    seeds: tuple[int, ...] = SEEDS,
    budgets: tuple[float, ...] = (1,),
    methods: Sequence[str] = ("base", "miner"),
    **more: object,
) -> Path:
    """Write a run; a method that has no score in ``DSC`` has that of base plus its place, times budget."""
    settings = {"name": "tiny", "dataset": "phantom", "backbone": "segdiff", "segmenter": "unet"}
    settings |= {
        "methods": {m: {"stage": "miner"} if m == "miner" else None for m in methods},
        "budgets": list(budgets),
        "seeds": list(seeds),
        "mining": {"beta": 0.125},
    }
    put(run / "experiment.yaml", yaml.safe_dump(settings | more, sort_keys=False))
    for seed in seeds:
        put(run / f"seed{seed}/real/test.json", scores(DSC["real"][seed], 0))
        for place, method in enumerate(methods):
            for budget in budgets:
                dsc = DSC[method][seed] if method in DSC else DSC["base"][seed] + place * budget
                put(run / f"seed{seed}/{method}/{budget:g}x/test.json", scores(dsc, 1200))
            put(run / f"seed{seed}/{method}/synthetic.json", synthetic(method, seed))
    return run


def describe(run: Path, method: str, seed: int, **more: object) -> None:
    """Add to what is known of a synthetic set."""
    path = run / f"seed{seed}/{method}/synthetic.json"
    put(path, json.loads(path.read_text()) | more)


def skip_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave all plots empty: drawing takes most of the time."""
    for name in ("savefig", "draw_without_rendering"):
        monkeypatch.setattr(Figure, name, lambda *_, **__: None)


def drawn(uri: str) -> str:
    """Return the source of an SVG picture."""
    head, content = uri.split(",")
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(content).decode()


def words(uri: str) -> list[str]:
    """Return the texts of an SVG picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawn(uri))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "tiny")


def test_rows_are_one_per_test_set_arm_and_seed(run):
    rows = Run.read(run).rows
    assert len(rows) == 2 * 3 * 3
    assert asdict(rows[0]) == {
        "dataset": "phantom",
        "test_set": "test",
        "backbone": "none",
        "segmenter": "unet",
        "method": "real",
        "budget": 0,
        "seed": 0,
        "dsc": 80.0,
        "asd": 2.0,
        "n_real": 1200,
        "n_synthetic": 0,
        "scores": json.loads((run / "seed0/real/test.json").read_text())["test_sets"]["test"],
    }
    assert rows[0].scores["dsc/ring"] == 81.0
    assert rows[0].classes == ["disc", "ring"]
    mined = [r for r in rows if r.method == "miner" and r.test_set == "shift"]
    assert [(r.seed, r.dsc, r.asd, r.budget) for r in mined] == [
        (0, 73.0, None, 1),
        (1, 74.0, None, 1),
        (2, 78.0, None, 1),
    ]
    assert {r.backbone for r in mined} == {"segdiff"}


def test_summary_is_mean_and_sample_deviation_over_seeds(run):
    summaries = summarise(Run.read(run).rows)
    assert [(s.test_set, s.method) for s in summaries] == [
        (t, m) for t in ("test", "shift") for m in ("real", "base", "miner")
    ]
    miner = summaries[2].dsc
    assert (miner.n, miner.mean) == (3, 85.0)
    assert miner.sd == pytest.approx(math.sqrt(7))  # of 83, 84, 88
    assert summaries[5].asd == pytest.approx((0, *[math.nan] * 4), nan_ok=True)


@pytest.mark.parametrize(
    ("method", "reference", "gaps"),
    [("miner", "real", (3, 2, 4)), ("miner", "base", (2, 1, 2.5)), ("base", "real", (1, 1, 1.5))],
)
def test_paired_difference(run, method, reference, gaps):
    found = [d for d in paired_differences(Run.read(run).rows, reference) if d.method == method]
    difference, shifted = found
    low, high = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert difference.dsc == pytest.approx((3, np.mean(gaps), np.std(gaps, ddof=1), low, high))
    assert shifted.dsc == pytest.approx(difference.dsc)
    assert math.isnan(shifted.asd.mean)


def test_paired_difference_keeps_to_the_same_seed_and_budget(run):
    rows = [r for r in Run.read(run).rows if r.test_set == "test" and r.method != "base"]
    base = [r for r in Run.read(run).rows if r.test_set == "test" and r.method == "base"]
    unpaired = [r for r in rows if not (r.method == "real" and r.seed == 2)]
    unpaired += [replace(r, budget=3, dsc=99.0) for r in rows if r.method == "miner"]
    one, three = paired_differences(unpaired, "real")
    assert (one.budget, one.dsc.n, one.dsc.mean) == (1, 2, 2.5)
    assert math.isnan(one.dsc.low)  # two seeds are too few
    assert (three.budget, three.dsc.mean) == (3, 18.0)
    assert [d.budget for d in paired_differences(unpaired + base, "base")] == [1]  # base has no budget 3


@pytest.mark.parametrize(
    ("values", "shown"), [([], "–"), ([None], "–"), ([1.5], "1.50 ± –"), ([-1.0, -2.0], "−1.50 ± 0.71")]
)
def test_undefined_prints_as_a_dash(values, shown):
    assert mean_sd(spread(values)) == shown


def test_no_negative_zero():
    assert number(-0.001, signed=True) == "+0.00"


def test_table_as_text_and_markdown(run):
    table = headline_table(Run.read(run))
    text = as_text(table).splitlines()
    miner = (
        "test      miner 1×  1,200      1,200  85.00 ± 2.65  1.50 ± 0.26  +3.00 ± 1.00  +1.83 ± 0.76      3"
    )
    assert text[3] == miner
    assert "ASD (mm)" in text[0]
    assert text[0].index("DSC (%)") + len("DSC (%)") == text[3].index("2.65") + 4

    markdown = as_markdown(table).splitlines()
    assert len(markdown) == len(text) + 1
    assert {line.count("|") for line in markdown} == {10}
    assert markdown[4].startswith("| test | miner 1× | 1,200 | 1,200 | 85.00 ± 2.65 |")


def test_variants_of_real_stand_beside_it(run, monkeypatch):
    """They have no budget and no synthetic set, and are compared with ``real`` alone."""
    skip_drawing(monkeypatch)
    settings = yaml.safe_load((run / "experiment.yaml").read_text())
    put(
        run / "experiment.yaml",
        yaml.safe_dump(settings | {"real_arms": {"real_copy": {}}, "highlight": "base"}),
    )
    for seed in SEEDS:
        put(run / f"seed{seed}/real_copy/test.json", scores(DSC["real"][seed] + 1, 0))
    read = Run.read(run)
    lines = [line for line in headline_table(read).cells if line[0] == "test"]
    assert [line[1] for line in lines] == ["real", "real_copy", "base 1×", "miner 1×"]
    copied = next(line for line in lines if line[1] == "real_copy")
    assert copied[2:4] == ("1,200", "0")
    assert copied[6:8] == ("+1.00 ± 0.00", "")
    assert [r.backbone for r in read.rows if r.method == "real_copy"] == ["none"] * 6
    assert read.mined == "base"
    assert "real_copy" in write(read).read_text(encoding="utf-8")


def test_unknown_highlight(run):
    settings = yaml.safe_load((run / "experiment.yaml").read_text())
    put(run / "experiment.yaml", yaml.safe_dump(settings | {"highlight": "ours"}))
    with pytest.raises(InputError, match="highlight"):
        Run.read(run)


def test_json_has_the_contracts_keys(run, monkeypatch):
    skip_drawing(monkeypatch)
    page = write(Run.read(run))
    assert page == run / "report" / "report.html"
    text = (run / "report" / "report.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert list(content) == [
        *("experiment", "created", "dataset_version", "versions", "protocol", "rows", "synthetic_sets")
    ]
    assert content["dataset_version"] == 7
    assert content["experiment"] == "tiny"
    assert set(content["versions"]) == {"python", "torch", "lightning", "diffusers", "monai", "torchmetrics"}
    assert content["rows"] == [asdict(row) for row in Run.read(run).rows]
    assert [list(s) for s in content["synthetic_sets"]] == [list(SET_KEYS)] * 6
    assert content["synthetic_sets"][0]["fid"] is None
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json"]


def test_page_shows_the_numbers_and_needs_no_network(run):
    write_images(run / "seed0/base/synthetic", "base", 0)
    write_images(run / "seed0/miner/synthetic", "miner", 0)
    (run / "real/images").mkdir(parents=True)
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(run / "real/images/case_0.png")
    log_scalars(run / "backbone", "train/loss")
    log_scalars(run / "seed1/miner_training", "miner/reward")
    page = write(Run.read(run)).read_text(encoding="utf-8")
    seen = re.sub(r"</?small>", "", page)

    for shown in (
        "85.00 ± 2.65",  # DSC of the mined arm
        "+1.83 ± 0.76",  # its difference to base
        "[+0.52, +5.48]",  # the interval of its difference to real: 3 ± 4.303 · 1/√3
        "0.400 ± 0.000",
        "15.00 ± 1.00",
        "bounded_ce",
        "unet encoder",
        "(1.02×)",  # time to base
        "12.50 ± 0.00",
        "ASD (mm)",
        "86.00 ± 2.65",  # class ring
        "mining.beta",
        "one slice &amp; its &lt;case&gt;",
        "≥ 20.0 % of the grey range",
        "Training curves: Backbone",
        "Training curves: Network of miner",
    ):
        assert shown in seen, shown
    assert page.count('alt="miner"') == EXAMPLES
    assert page.count('alt="real"') == 1
    assert "://" not in page
    assert "<script" not in page
    assert "<link" not in page.replace('<link rel="icon" href="data:,">', "")
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert all(target.startswith(("#", "data:,")) for target in re.findall(r'href="([^"]*)"', page))
    body = re.sub(r'"data:[^"]*"', "", page.partition("</style>")[2])
    assert not re.search(r"\bnan\b|\bNone\b", body, re.IGNORECASE)
    assert len(page) < 3e6


def test_one_seed_without_images_or_logs(tmp_path, monkeypatch):
    skip_drawing(monkeypatch)
    page = write(Run.read(make_run(tmp_path / "one", seeds=(1,)))).read_text(encoding="utf-8")
    assert "82.00 ± –" in page
    assert "no interval" in page
    assert "holds no synthetic images" in page
    assert "holds no training logs" in page


def test_a_segmenter_alone(tmp_path):
    """An experiment without methods names neither budgets nor a backbone, and its page nothing synthetic."""
    run = make_run(tmp_path / "alone", methods=())
    settings = yaml.safe_load((run / "experiment.yaml").read_text())
    put(
        run / "experiment.yaml",
        yaml.safe_dump({k: settings[k] for k in ("name", "segmenter", "methods", "seeds")}),
    )
    for seed in SEEDS:
        log_scalars(run / f"seed{seed}/real", "val/dsc")
    read = Run.read(run)
    table = headline_table(read)
    assert table.columns == ("Test set", "Arm", "Real", "DSC (%)", "ASD (mm)", "Seeds")
    assert table.cells[0] == ("test", "real", "1,200", "82.00 ± 2.00", "1.80 ± 0.20", "3")
    assert {curve.stage for curve in read.curves()} == {"Segmenter"}
    page = write(read).read_text(encoding="utf-8")
    for word in ("ynthetic", "Paired", "backbone", "budget", "grey lines"):
        assert word not in page.partition("</style>")[2], word
    assert page.count("<img") == 2
    report = json.loads((run / "report/report.json").read_text())
    assert {row["backbone"] for row in report["rows"]} == {"none"}
    assert report["synthetic_sets"] == []


def test_curves_are_thinned_and_carry_arm_and_seed(run):
    log_scalars(run / "seed1/real", "val/dsc")
    log_scalars(run / "seed2/miner/1x", "val/dsc")
    curves = Run.read(run).curves()
    assert [(c.stage, c.tag, c.arm, c.seed) for c in curves] == [
        ("Segmenter, budget 1×", "val/dsc", "real", 1),
        ("Segmenter, budget 1×", "val/dsc", "miner", 2),
    ]
    assert len(curves[0].steps) == CURVE_POINTS
    assert (curves[0].steps[0], curves[0].steps[-1]) == (0, 499)
    assert curves[0].values[-1] == pytest.approx(1 / 500)


def test_budgets_are_drawn_when_there_are_several(run, tmp_path):
    assert budget_figure(Run.read(run)) is None
    several = make_run(tmp_path / "several", budgets=(1, 0.5))
    assert words(budget_figure(Run.read(several))).count("miner") == 1


def test_a_method_may_have_budgets_of_its_own(tmp_path):
    whole = {"subset": {"of": "miner", "tau": 0.3}}
    assert own_budgets(None, [1, 3]) == [1, 3]
    assert own_budgets(whole, [1, 3]) == [3]
    assert own_budgets(whole | {"budgets": [16]}, [1, 3]) == [16]
    methods = {"base": None, "miner": {"budgets": [6]}}
    run = make_run(tmp_path / "run", budgets=(1, 6))
    settings = yaml.safe_load((run / "experiment.yaml").read_text())
    put(run / "experiment.yaml", yaml.safe_dump(settings | {"methods": methods, "budgets": [1]}))
    found = Run.read(run)
    assert [(arm.method, arm.budget) for arm, _ in found.tests[:3]] == [
        ("real", 0),
        ("base", 1),
        ("miner", 6),
    ]
    assert "miner" in words(budget_figure(found))
    lines = [line[1] for line in headline_table(found).cells]
    assert lines[:3] == ["real", "base 1×", "miner 6×"]


def test_the_page_opens_with_a_method_of_budgets_of_its_own(tmp_path):
    run = make_run(tmp_path / "run", methods=("base", "all_plain"), budgets=(1, 8))
    settings = yaml.safe_load((run / "experiment.yaml").read_text())
    settings |= {"methods": {"base": None, "all_plain": {"budgets": [8]}}, "budgets": [1]}
    settings["highlight"] = None  # the method that had it is gone
    put(run / "experiment.yaml", yaml.safe_dump(settings, sort_keys=False))
    assert Run.read(run).mined == "all_plain"
    assert {card["title"] for card in _cards(Run.read(run))} == {"all_plain 8× − real"}


def test_cap_is_the_one_the_miner_was_trained_with(run):
    assert Run.read(run).cap() is None
    for changes, cap in (({}, 0.5), ({"reward": "dice"}, None), ({"reference": "weights"}, None)):
        config = {
            "model": {"init_args": {"kappa_up": 0.5, "reward": "bounded_ce", "reference": None} | changes}
        }
        put(run / "seed0/miner_training/tensorboard/config.yaml", yaml.safe_dump(config))
        assert Run.read(run).cap() == cap


def test_examples_are_spread_over_the_set(run):
    for method in ("base", "miner"):
        write_images(run / "seed0" / method / "synthetic", method, 0)
    grid = example_grid(Run.read(run))
    assert list(grid.lines) == ["mask", "real", "base", "miner"]
    assert {len(line) for line in grid.lines.values()} == {EXAMPLES}
    assert [p.note for p in grid.lines["mask"]][::7] == ["no. 0", "no. 10"]
    assert [p.note for p in grid.lines["miner"]][::7] == ["ℓ = 0.000", "ℓ = 0.625"]
    assert grid.lines["real"][0].uri is None
    assert list(grid.gaps) == ["miner"]
    assert grid.white == pytest.approx(20)
    assert [name for name, _ in grid.legend] == list(CLASSES)


def test_examples_of_a_subset_keep_their_column(run):
    """A set that lacks a sample has a gap there; one with another mask is not compared with base."""
    for method in ("base", "miner"):
        write_images(run / "seed0" / method / "synthetic", method, 0)
    mined = run / "seed0/miner/synthetic"
    entries = (mined / "manifest.jsonl").read_text().splitlines()
    put(mined / "manifest.jsonl", "\n".join(entries[1:]) + "\n")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(mined / "masks/000010.png")
    grid = example_grid(Run.read(run))
    assert [p.uri is None for p in grid.lines["miner"]] == [True] + [False] * 7
    assert [p.uri is None for p in grid.gaps["miner"]] == [True] + [False] * 6 + [True]
    assert grid.lines["miner"][-1].note == "ℓ = 0.625, own mask"


@pytest.mark.parametrize(
    "name",
    ["experiment.yaml", "seed2/real/test.json", "seed0/miner/1x/test.json", "seed1/base/synthetic.json"],
)
def test_missing_input_is_named_with_its_command(run, name):
    (run / name).unlink()
    with pytest.raises(InputError) as caught:
        main(["--run", str(run)])
    assert str(caught.value) == f"error: {run / name} is missing; make it with: make experiment NAME=tiny"
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("seed0/real/test.json", "{", "cannot be read"),
        ("seed0/real/test.json", "[]", "has no dataset"),
        ("seed0/base/synthetic.json", '{"method": "base"}', "has no backbone, seed"),
        ("experiment.yaml", "a: [", "cannot be read"),
        ("experiment.yaml", "{name: a, segmenter: d}", "methods must be a mapping"),
        (
            "experiment.yaml",
            "{name: a, backbone: c, segmenter: d, methods: {base: }}",
            "budgets must be a list",
        ),
        (
            "experiment.yaml",
            "{name: a, segmenter: d, methods: {base: }, budgets: [1], seeds: [0]}",
            "no backbone",
        ),
        ("experiment.yaml", "{name: a, segmenter: d, methods: {}, seeds: []}", "seeds must be a list"),
    ],
)
def test_unusable_input_is_named(run, name, content, problem):
    put(run / name, content)
    with pytest.raises(InputError, match=problem) as caught:
        write(Run.read(run))
    assert str(run / name) in str(caught.value)
    assert not (run / "report").exists()


def test_unusable_image_is_named(run):
    for method in ("base", "miner"):
        write_images(run / "seed0" / method / "synthetic", method, 0)
    (run / "seed0/miner/synthetic/images/000000.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"000000\.png"):
        write(Run.read(run))
    assert not (run / "report").exists()


def test_entry_prints_table_protocol_and_path(run, capsys, monkeypatch):
    skip_drawing(monkeypatch)
    main(["--run", str(run), "--markdown"])
    out = capsys.readouterr().out
    assert "| test | miner 1× |" in out
    assert "asd unit: mm" in out
    assert out.splitlines()[-1] == str(run / "report" / "report.html")


def test_a_protocol_need_not_measure_asd(run, capsys, monkeypatch):
    """``transunet`` has DSC and HD95."""
    for path in run.glob("seed*/**/test.json"):
        report = json.loads(path.read_text())
        report["protocol"] = {"unit": "one volume", "distance unit": "px"}
        for name, means in report["test_sets"].items():
            kept = {k: v for k, v in means.items() if not k.startswith("asd")}
            report["test_sets"][name] = kept | {"hd95": 3.0}
        put(path, report)
    skip_drawing(monkeypatch)
    main(["--run", str(run), "--markdown"])
    assert "ASD (not measured)" in capsys.readouterr().out
    assert all(row.asd is None for row in Run.read(run).rows)
