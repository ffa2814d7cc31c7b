"""What a run showed: ``report.json``, one self-contained page, and the table in the terminal.

``python -m evaluation.report --run runs/<experiment>`` reads the results that the stages of an experiment
left in the run's folder. Only ``write`` and ``main`` write anything.
"""

import argparse
import base64
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypedDict

import jinja2
import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from errors import InputError

REAL = "real"
"""Name of the arm that is trained on real images alone."""

PACKAGES = ("torch", "lightning", "diffusers", "monai", "torchmetrics")
CONFIDENCE = 0.95
MAKE = "snakemake --cores all"
"""Command that makes a file of a run, given its path."""

MIN_SEEDS = 3
"""Fewest seeds for which an interval is given."""

SET_KEYS = (
    *("method", "backbone", "seed", "n", "adversariality", "reward", "fid", "fid_extractor"),
    "seconds_per_image",
)
"""What ``synthetic.json`` must hold and ``report.json`` repeats."""


# --- Inputs -------------------------------------------------------------------------------------------


class Row(TypedDict):
    """One arm, trained with one seed, on one test set; ``dsc`` in percent, None where undefined."""

    dataset: str
    test_set: str
    backbone: str
    segmenter: str
    method: str
    budget: float
    seed: int
    dsc: float | None
    asd: float | None
    n_real: int
    n_synthetic: int


@dataclass(frozen=True)
class Arm:
    """One training of the segmenter: on real images, plus ``budget``·N synthetic ones of a method."""

    method: str
    budget: float
    seed: int

    @property
    def folder(self) -> str:
        """Folder of the arm inside the run."""
        leaf = REAL if self.method == REAL else f"{self.method}/{self.budget:g}x"
        return f"seed{self.seed}/{leaf}"


def arms(experiment: dict[str, Any]) -> list[Arm]:
    """Return every arm of an experiment, seed by seed, real first."""
    return [
        arm
        for seed in experiment["seeds"]
        for arm in (
            Arm(REAL, 0, seed),
            *(Arm(m, b, seed) for m in experiment["methods"] for b in experiment["budgets"]),
        )
    ]


def read_experiment(run: Path) -> dict[str, Any]:
    """Return the settings in ``<run>/experiment.yaml``.

    Raises:
        InputError: the file is missing, is no YAML mapping, or lacks a setting.
    """
    path = run / "experiment.yaml"
    settings = _read(path, yaml.safe_load, ("name", "dataset", "backbone", "segmenter"))
    for key, kind, what in (
        ("methods", str, "names"),
        ("budgets", int | float, "numbers"),
        ("seeds", int, "integers"),
    ):
        values = settings.get(key)
        if not isinstance(values, list) or not values or not all(isinstance(v, kind) for v in values):
            raise InputError(f"{path}: {key} must be a list of {what}; write it as {key}: [...]")
    return settings


def read_tests(run: Path) -> list[tuple[Arm, dict[str, Any]]]:
    """Return every arm of the run with its ``test.json``.

    Raises:
        InputError: a file is missing or lacks a key.
    """
    keys = ("dataset", "segmenter", "n_real", "n_synthetic", "test_sets")
    return [
        (arm, _read(run / arm.folder / "test.json", json.loads, keys)) for arm in arms(read_experiment(run))
    ]


def collect_rows(run: Path) -> list[Row]:
    """Return one row per test set, arm and seed, from the ``test.json`` files of a run.

    Raises:
        InputError: ``experiment.yaml`` or a ``test.json`` is missing or lacks a key.
    """
    backbone = str(read_experiment(run)["backbone"])
    return [
        {
            "dataset": result["dataset"],
            "test_set": test_set,
            "backbone": "none" if arm.method == REAL else backbone,
            "segmenter": result["segmenter"],
            "method": arm.method,
            "budget": arm.budget,
            "seed": arm.seed,
            "dsc": _finite(scores.get("dsc")),
            "asd": _finite(scores.get("asd")),
            "n_real": result["n_real"],
            "n_synthetic": result["n_synthetic"],
        }
        for arm, result in read_tests(run)
        for test_set, scores in result["test_sets"].items()
    ]


def collect_synthetic_sets(run: Path) -> list[dict[str, Any]]:
    """Return the contents of every ``seed*/<method>/synthetic.json``, seed by seed.

    Raises:
        InputError: a file is missing or lacks a key.
    """
    experiment = read_experiment(run)
    return [
        _read(run / f"seed{seed}" / method / "synthetic.json", json.loads, SET_KEYS)
        for seed in experiment["seeds"]
        for method in experiment["methods"]
    ]


def read_protocol(run: Path) -> dict[str, str]:
    """Return how the scores of the run count, with the unit of ASD under ``asd unit``."""
    return {"asd unit": "px"} | next((result.get("protocol") or {} for _, result in read_tests(run)), {})


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def report_json(run: Path, created: str) -> dict[str, Any]:
    """Return the content of ``report.json``; undefined numbers are None.

    Args:
        run: folder of the run.
        created: when the report is made, ISO 8601.
    """
    sets = [{k: _finite(s[k]) for k in SET_KEYS} for s in collect_synthetic_sets(run)]
    name = read_experiment(run)["name"]
    return {
        "experiment": name,
        "created": created,
        "versions": versions(),
        "rows": collect_rows(run),
        "synthetic_sets": sets,
    }


def _read(path: Path, parse: Callable[[str], Any], keys: Sequence[str]) -> dict[Any, Any]:
    """Return the mapping in a file of the run, which must have the keys."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; make it with: {MAKE} {path}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read ({str(error).splitlines()[0]}); make it again") from error
    missing = [k for k in keys if not isinstance(content, dict) or k not in content]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}; make it again")
    return content


def _finite(value: Any) -> Any:
    """Return None for a NaN or infinite number, anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- Statistics ---------------------------------------------------------------------------------------


class Spread(TypedDict):
    """Mean, sample standard deviation and t interval of the mean over ``n`` seeds."""

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


class Summary(TypedDict):
    """Scores of one arm on one test set, or their paired difference to a reference, over seeds."""

    test_set: str
    method: str
    budget: float
    n_real: int
    n_synthetic: int
    dsc: Spread
    asd: Spread


def spread(values: Iterable[float | None]) -> Spread:
    """Return mean, standard deviation (n − 1) and 95 % t interval of the values that are defined.

    The mean needs one value, the standard deviation two, the interval :data:`MIN_SEEDS`.
    """
    x = np.array([v for v in values if v is not None], dtype=float)
    n = len(x)
    mean = float(x.mean()) if n else math.nan
    sd = float(x.std(ddof=1)) if n > 1 else math.nan
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * sd / math.sqrt(n) if n >= MIN_SEEDS else math.nan
    return {
        "n": n,
        "mean": _finite(mean),
        "sd": _finite(sd),
        "low": _finite(mean - half),
        "high": _finite(mean + half),
    }


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Return DSC and ASD of every arm on every test set, over its seeds, in the order of the rows."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in sorted(rows, key=lambda r: _position(r["test_set"], (q["test_set"] for q in rows))):
        groups.setdefault((row["test_set"], row["method"], row["budget"]), []).append(row)
    return [_summary(members, members) for members in groups.values()]


def paired_difference(rows: Sequence[Row], method: str, reference: str) -> list[Summary]:
    """Return method − reference per seed, over seeds, for every test set and budget.

    Both arms of a difference have the same seed and, unless the reference is ``real``, the same budget.
    Seeds in which either is undefined do not count.
    """
    by_arm = {(r["test_set"], r["method"], r["budget"], r["seed"]): r for r in rows}
    groups: dict[tuple[str, float], list[Row]] = {}
    differences: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["method"] != method:
            continue
        other = by_arm.get(
            (row["test_set"], reference, 0 if reference == REAL else row["budget"], row["seed"])
        )
        group = (row["test_set"], row["budget"])
        groups.setdefault(group, []).append(row)
        if other is not None:
            gap: Row = {
                **row,
                "dsc": _minus(row["dsc"], other["dsc"]),
                "asd": _minus(row["asd"], other["asd"]),
            }
            differences.setdefault(group, []).append(gap)
    return [_summary(members, differences.get(group, [])) for group, members in groups.items()]


def _summary(members: Sequence[Row], scored: Sequence[Row]) -> Summary:
    first = members[0]
    return {
        "test_set": first["test_set"],
        "method": first["method"],
        "budget": first["budget"],
        "n_real": first["n_real"],
        "n_synthetic": first["n_synthetic"],
        "dsc": spread(r["dsc"] for r in scored),
        "asd": spread(r["asd"] for r in scored),
    }


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _position(name: str, names: Iterable[str]) -> int:
    return list(dict.fromkeys(names)).index(name)


# --- Tables -------------------------------------------------------------------------------------------

Style = Literal["text", "markdown"]


@dataclass(frozen=True)
class Table:
    """Formatted cells; ``methods`` names the method of each line, for its colour on the page, or is empty."""

    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    methods: tuple[str, ...]


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """Return a number for a reader: "–" where undefined, a real minus sign, "+" if asked."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def mean_sd(value: Spread, digits: int = 2, signed: bool = False) -> str:
    """Return "mean ± sd", each "–" where undefined."""
    if value["mean"] is None:
        return "–"
    return f"{number(value['mean'], digits, signed)} ± {number(value['sd'], digits)}"


def interval(value: Spread, digits: int = 2) -> str:
    """Return the t interval, or why there is none."""
    if value["low"] is None:
        return f"– (fewer than {MIN_SEEDS} seeds)"
    return f"[{number(value['low'], digits, True)}, {number(value['high'], digits, True)}]"


def arm_name(method: str, budget: float) -> str:
    """Return what tables and figures call an arm."""
    return "real" if method == REAL else f"{method} {budget:g}×"


def headline_table(rows: Sequence[Row], asd_unit: str) -> Table:
    """Return mean ± standard deviation over seeds of every arm, with its paired differences."""
    summaries = summarise(rows)
    methods = dict.fromkeys(s["method"] for s in summaries if s["method"] != REAL)
    gaps = {
        (reference, d["test_set"], d["method"], d["budget"]): d["dsc"]
        for reference in (REAL, "base")
        for method in methods
        if method != reference
        for d in paired_difference(rows, method, reference)
    }

    def gap(s: Summary, reference: str) -> str:
        found = gaps.get((reference, s["test_set"], s["method"], s["budget"]))
        return mean_sd(found, signed=True) if found else ""

    cells = tuple(
        (
            s["test_set"],
            arm_name(s["method"], s["budget"]),
            f"{s['n_real']:,}",
            f"{s['n_synthetic']:,}",
            mean_sd(s["dsc"]),
            mean_sd(s["asd"]),
            gap(s, REAL),
            gap(s, "base"),
            str(s["dsc"]["n"]),
        )
        for s in summaries
    )
    scores = ("DSC (%)", f"ASD ({asd_unit})", "ΔDSC to real", "ΔDSC to base", "Seeds")
    return Table(
        ("Test set", "Arm", "Real", "Synthetic", *scores), cells, tuple(s["method"] for s in summaries)
    )


def difference_table(rows: Sequence[Row], asd_unit: str) -> Table:
    """Return the paired differences of every method to real and to base, with their intervals."""
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] != REAL))
    found = [
        (reference, d)
        for method in methods
        for reference in (REAL, "base")
        if reference != method and reference in (REAL, *methods)
        for d in paired_difference(rows, method, reference)
    ]
    found.sort(key=lambda item: _position(item[1]["test_set"], (r["test_set"] for r in rows)))
    cells = tuple(
        (
            d["test_set"],
            f"{arm_name(d['method'], d['budget'])} − {arm_name(reference, d['budget'])}",
            mean_sd(d["dsc"], signed=True),
            interval(d["dsc"]),
            mean_sd(d["asd"], signed=True),
            interval(d["asd"]),
            str(d["dsc"]["n"]),
        )
        for reference, d in found
    )
    columns = (
        "Test set",
        "Difference",
        "ΔDSC (points)",
        "95 % interval",
        f"ΔASD ({asd_unit})",
        "95 % interval",
    )
    return Table((*columns, "Seeds"), cells, tuple(d["method"] for _, d in found))


def class_table(run: Path, test_set: str, metric: str) -> Table:
    """Return mean ± standard deviation over seeds of every class, arm by arm, on one test set."""
    scores: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for arm, result in read_tests(run):
        if test_set in result["test_sets"]:
            scores.setdefault((arm.method, arm.budget), []).append(result["test_sets"][test_set])
    names = class_names(seed for seeds in scores.values() for seed in seeds)
    cells = tuple(
        (
            arm_name(*arm),
            *(mean_sd(spread(_finite(seed.get(f"{metric}/{n}")) for seed in seeds)) for n in names),
        )
        for arm, seeds in scores.items()
    )
    return Table(("Arm", *names), cells, tuple(method for method, _ in scores))


def class_names(scores: Iterable[dict[str, Any]]) -> list[str]:
    """Return the foreground classes that scores name, in their order."""
    keys = (key for one in scores for key in one if key.startswith("dsc/"))
    return list(dict.fromkeys(key.removeprefix("dsc/") for key in keys))


def synthetic_table(sets: Sequence[dict[str, Any]]) -> Table:
    """Return what describes the synthetic sets, a column per method: mean ± standard deviation over seeds.

    Beside the keys of the contract every other number in the files has a line. Times also show the mean
    over seeds of their ratio to base.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for one in sets:
        by_method.setdefault(one["method"], []).append(one)
    base = {one["seed"]: one for one in by_method.get("base", [])}
    more = dict.fromkeys(k for one in sets for k, v in one.items() if k not in SET_KEYS and _is_number(v))

    def cell(members: list[dict[str, Any]], key: str) -> str:
        if any(isinstance(one.get(key), str) for one in members) or key == "n":
            return ", ".join(dict.fromkeys(str(one[key]) for one in members))
        value = spread(_finite(one.get(key)) for one in members)
        text = mean_sd(value, 2 if key == "fid" else _digits(value["mean"]))
        if not key.endswith("seconds_per_image"):
            return text
        pairs = [(_finite(one.get(key)), _finite(base.get(one["seed"], {}).get(key))) for one in members]
        ratio = spread(value / reference for value, reference in pairs if value is not None and reference)
        return f"{text} ({number(ratio['mean'])}×)"

    heads = {
        "n": "images per seed",
        "adversariality": "adversariality",
        "reward": "reward",
        "fid": "FID to real",
        "fid_extractor": "FID over",
        "seconds_per_image": "seconds per image",
    } | {key: key.replace("kl_", "KL ").replace("_", " ") for key in more}
    cells = [(head, *(cell(members, key) for members in by_method.values())) for key, head in heads.items()]
    cells.append(("seeds", *(str(len(members)) for members in by_method.values())))
    return Table(("", *by_method), tuple(cells), ())


def table(rows: Sequence[Row], asd_unit: str, style: Style = "text") -> str:
    """Return the headline table as aligned text or as Markdown, one line per arm and test set."""
    headline = headline_table(rows, asd_unit)
    lines = [headline.columns, *headline.cells]
    if style == "markdown":
        rule = tuple("---" if i < 2 else "---:" for i in range(len(headline.columns)))
        return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _digits(value: float | None) -> int:
    """Return how many decimals show three significant digits."""
    return 2 if not value else min(6, max(0, 2 - math.floor(math.log10(abs(value)))))


# --- Figures ------------------------------------------------------------------------------------------

INK, RULE = "#26323b", "#d5dbe0"
COLOURS = {REAL: "#5b6770", "base": "#0072b2", "miner": "#d55e00"}
MORE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe & Ito's palette, which colour-blind readers can tell apart."""

CLASS_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff")
SEED_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5ad",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ecef",
    "xtick.color": "#5b6770",
    "ytick.color": "#5b6770",
    "legend.frameon": False,
}
CURVE_POINTS = 150
"""Most points drawn of a training curve, spread evenly over it; first and last always."""

NOT_DRAWN = ("epoch", "hp_metric")
UNITS = {"dsc": "DSC (%)", "asd": "ASD", "loss": "loss", "lr": "learning rate", "kl": "KL (nats)"}


@dataclass(frozen=True)
class Curve:
    """One scalar of one training; ``seed`` is None where the stage has no seed of its own."""

    stage: str
    tag: str
    arm: str
    seed: int | None
    steps: np.ndarray
    values: np.ndarray


def colour(method: str, methods: Sequence[str]) -> str:
    """Return the colour of a method, the same throughout the page."""
    others = [m for m in methods if m not in COLOURS]
    return COLOURS.get(method) or MORE_COLOURS[others.index(method) % len(MORE_COLOURS)]


@matplotlib.rc_context(STYLE)
def scores_figure(rows: Sequence[Row], asd_unit: str) -> str:
    """Draw DSC and ASD of every arm: a point per seed, same seeds joined, the mean as a bar."""
    test_sets = list(dict.fromkeys(r["test_set"] for r in rows))
    names = list(dict.fromkeys((r["method"], r["budget"]) for r in rows))
    figure = _figure(9.2, 2.7 * len(test_sets))
    axes = figure.subplots(len(test_sets), 2, squeeze=False)
    for line, test_set in zip(axes, test_sets, strict=True):
        here = [r for r in rows if r["test_set"] == test_set]
        for ax, metric, label in zip(line, ("dsc", "asd"), ("DSC (%)", f"ASD ({asd_unit})"), strict=True):
            _strip(ax, here, names, metric)
            ax.set(title=f"{test_set}: {metric.upper()}", ylabel=label)
    return _svg(figure)


def _strip(ax: Axes, rows: Sequence[Row], names: Sequence[tuple[str, float]], metric: str) -> None:
    methods = [m for m, _ in names]
    for seed in dict.fromkeys(r["seed"] for r in rows):
        score = {(r["method"], r["budget"]): r[metric] for r in rows if r["seed"] == seed}  # type: ignore[literal-required]
        heights = [math.nan if score.get(n) is None else score[n] for n in names]
        ax.plot(range(len(names)), heights, color=RULE, lw=1, zorder=1)
        ax.scatter(range(len(names)), heights, s=26, c=[colour(m, methods) for m in methods], zorder=3, lw=0)
    for x, name in enumerate(names):
        found = [r[metric] for r in rows if (r["method"], r["budget"]) == name]  # type: ignore[literal-required]
        mean = spread(found)["mean"]
        if mean is not None:
            ax.plot([x - 0.22, x + 0.22], [mean, mean], color=colour(name[0], methods), lw=2.2, zorder=2)
    ax.set_xticks(range(len(names)), [arm_name(*n).replace(" ", "\n") for n in names])
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.grid(axis="x", visible=False)


@matplotlib.rc_context(STYLE)
def budget_figure(rows: Sequence[Row]) -> str | None:
    """Draw DSC against the synthetic budget, mean ± standard deviation; None for a single budget."""
    summaries = [s for s in summarise(rows) if s["dsc"]["mean"] is not None]
    budgets = sorted({s["budget"] for s in summaries if s["method"] != REAL})
    if len(budgets) < 2:
        return None
    test_sets = list(dict.fromkeys(s["test_set"] for s in summaries))
    methods = list(dict.fromkeys(s["method"] for s in summaries))
    figure = _figure(9.2, 2.9)
    for ax, test_set in zip(figure.subplots(1, len(test_sets), squeeze=False)[0], test_sets, strict=True):
        for method in methods:
            points = [s for s in summaries if (s["test_set"], s["method"]) == (test_set, method)]
            x = [s["budget"] for s in points]
            y, sd = [s["dsc"]["mean"] or 0.0 for s in points], [s["dsc"]["sd"] or 0.0 for s in points]
            if method == REAL:
                ax.axhline(y[0], color=COLOURS[REAL], lw=1.5, ls=(0, (4, 2)), label=method)
                continue
            ax.errorbar(x, y, sd, color=colour(method, methods), marker="o", ms=4, capsize=3, label=method)
        ax.set(title=test_set, xlabel="synthetic budget (× N real)", ylabel="DSC (%)", xticks=budgets)
        ax.legend()
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def histogram_figure(sets: Sequence[dict[str, Any]], cap: float | None) -> str | None:
    """Draw the adversariality of single samples, all methods overlaid, seeds pooled; None without values."""
    pooled: dict[str, list[float]] = {}
    for one in sets:
        values = [float(v) for v in one.get("values") or [] if _finite(v) is not None]
        pooled.setdefault(one["method"], []).extend(values)
    pooled = {method: values for method, values in pooled.items() if values}
    if not pooled:
        return None
    edges = np.histogram_bin_edges([v for values in pooled.values() for v in values], bins=36).tolist()
    figure = _figure(9.2, 3.0)
    ax = figure.subplots()
    for method, values in pooled.items():
        weights = np.full(len(values), 100 / len(values))
        shade = colour(method, list(pooled))
        label = f"{method} (mean {np.mean(values):.3f}, {len(values):,} images)"
        ax.hist(values, edges, weights=weights, color=shade, alpha=0.22, histtype="stepfilled")
        ax.hist(values, edges, weights=weights, color=shade, histtype="step", lw=1.6, label=label)
    if cap is not None:
        ax.axvline(cap, color=INK, lw=1.2, ls=(0, (4, 2)), label=f"cap κ = {cap:g}")
    rewards = ", ".join(dict.fromkeys(str(one["reward"]) for one in sets))
    ax.set(xlabel=f"adversariality of an image (reward: {rewards})", ylabel="share of images (%)")
    ax.grid(axis="x", visible=False)
    ax.legend()
    return _svg(figure)


def read_curves(run: Path) -> list[Curve]:
    """Return every scalar in the TensorBoard files below the run's ``tensorboard`` folders."""
    experiment = read_experiment(run)
    places: list[tuple[str, str, str, int | None]] = [
        ("Backbone", "backbone", "backbone", None),
        ("Reference segmenter", "reference", "reference", None),
    ]
    for seed in experiment["seeds"]:
        places.append(("Miner", f"seed{seed}/miner_training", "miner", seed))
    for arm in arms(experiment):
        budgets = experiment["budgets"] if arm.method == REAL else [arm.budget]
        places += [(f"Segmenter, synthetic budget {b:g}×", arm.folder, arm.method, arm.seed) for b in budgets]
    return [
        Curve(stage, tag, arm, seed, steps, values)
        for stage, folder, arm, seed in places
        for logs in sorted({p.parent for p in (run / folder).glob("**/tensorboard/**/events.out.tfevents*")})
        for tag, steps, values in _scalars(logs)
    ]


def _scalars(logs: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    series = []
    for tag in events.Tags()["scalars"]:
        if tag not in NOT_DRAWN:
            points = _evenly(events.Scalars(tag), CURVE_POINTS)
            series.append((tag, np.array([p.step for p in points]), np.array([p.value for p in points])))
    return series


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most ``count`` items, spread evenly, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


@matplotlib.rc_context(STYLE)
def curve_figures(curves: Sequence[Curve], methods: Sequence[str]) -> dict[str, str]:
    """Draw the curves of every stage: a panel per scalar, a colour per arm, a line per seed."""
    return {
        stage: _stage_figure([c for c in curves if c.stage == stage], methods)
        for stage in dict.fromkeys(c.stage for c in curves)
    }


def _stage_figure(curves: Sequence[Curve], methods: Sequence[str]) -> str:
    tags = sorted({c.tag for c in curves})
    lines = math.ceil(len(tags) / 3)
    figure = _figure(9.2, 2.15 * lines + 0.3)
    panels = figure.subplots(lines, 3, squeeze=False).flatten()
    seeds = list(dict.fromkeys(c.seed for c in curves))
    handles = {}
    for ax, tag in zip(panels, tags, strict=False):
        for curve in (c for c in curves if c.tag == tag):
            shade = colour(curve.arm, methods) if curve.arm in (REAL, "miner", *methods) else INK
            dashes = SEED_DASHES[seeds.index(curve.seed) % len(SEED_DASHES)]
            label = curve.arm if curve.seed is None else f"{curve.arm}, seed {curve.seed}"
            marker = "o" if len(curve.steps) == 1 else ""
            (handles[label],) = ax.plot(
                curve.steps, curve.values, color=shade, ls=dashes, lw=1.1, marker=marker, ms=3
            )
        unit = tag.rsplit("/", 1)[-1].removesuffix("_step").removesuffix("_epoch")
        ax.set(title=tag, xlabel="step", ylabel=UNITS.get(unit, unit.replace("_", " ")))
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in panels[len(tags) :]:
        ax.set_axis_off()
    if len(handles) > 1:
        names = sorted(handles, key=lambda name: _position(name.split(",")[0], (c.arm for c in curves)))
        figure.legend(
            [handles[n] for n in names],
            names,
            loc="outside upper left",
            ncols=6,
            fontsize=8,
            handlelength=2.6,
        )
    return _svg(figure)


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, in the style of the page."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # the reader may have these fonts
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09))


def _svg(figure: Figure) -> str:
    """Return a figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _data_uri(buffer.getvalue(), "image/svg+xml")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- Examples -----------------------------------------------------------------------------------------

EXAMPLES = 8
THUMBNAIL = 128
"""Longest side of an example on the page, in pixels."""


@dataclass(frozen=True)
class Picture:
    """One picture of the grid: a data URI (None where there is no such image) and what is written below."""

    uri: str | None
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """Examples side by side; ``white`` is the difference, in percent of the grey range, drawn brightest."""

    columns: tuple[str, ...]
    lines: tuple[tuple[Picture, ...], ...]
    legend: tuple[tuple[str, str], ...]
    seed: int
    white: float | None


def example_grid(run: Path) -> Grid | None:
    """Return mask / real / each method / |base − mined| of samples spread evenly over a synthetic set.

    The samples are those of the first seed, chosen by their place in the set and not by any result. None
    when a method has no images.
    """
    experiment = read_experiment(run)
    methods, seed = experiment["methods"], experiment["seeds"][0]
    folders = {m: run / f"seed{seed}" / m / "synthetic" for m in methods}
    if not all((f / "manifest.jsonl").is_file() for f in folders.values()):
        return None
    entries = {m: _read(f / "manifest.jsonl", _manifest, ()) for m, f in folders.items()}
    chosen = _evenly(sorted(set.intersection(*(set(e) for e in entries.values()))), EXAMPLES)
    images = {(m, i): _pixels(folders[m] / entries[m][i]["image"]) for m in methods for i in chosen}
    pair = ("base", "miner") if {"base", "miner"} <= set(methods) else tuple(methods[:2])
    gaps = {}
    if len(pair) == 2:
        gaps = {i: _gap(images[pair[0], i], images[pair[1], i]) for i in chosen}
    white = max((float(np.percentile(g, 99.5)) for g in gaps.values()), default=0.0) or 1.0
    reference = run / "reference" / "real" / "images"
    lines = tuple(
        (
            _mask_picture(folders[methods[0]] / entries[methods[0]][i]["mask"], f"no. {i}"),
            _real_picture(reference / f"{entries[methods[0]][i]['source_mask']}.png"),
            *(
                Picture(_thumbnail(images[m, i]), f"ℓ = {number(entries[m][i].get('value'), 3)}")
                for m in methods
            ),
            *([Picture(_thumbnail(_heat(gaps[i] / white)))] if gaps else []),
        )
        for i in chosen
    )
    columns = ("mask", "real", *methods, *([f"|{pair[0]} − {pair[1]}|"] if gaps else []))
    names = class_names(scores for _, r in read_tests(run) for scores in r["test_sets"].values())
    legend = tuple((n, CLASS_COLOURS[k % len(CLASS_COLOURS)]) for k, n in enumerate(names))
    return Grid(columns, lines, legend, seed, 100 * white if gaps else None)


def _manifest(text: str) -> dict[int, dict[str, Any]]:
    """Return the lines of a manifest by index."""
    entries = [json.loads(line) for line in text.splitlines() if line.strip()]
    if any({"index", "source_mask", "image", "mask"} - entry.keys() for entry in entries):
        raise ValueError("a line lacks index, source_mask, image or mask")
    return {entry["index"]: entry for entry in entries}


def _pixels(path: Path, keep: tuple[str, ...] = ("L",), otherwise: str = "RGB") -> np.ndarray:
    """Return an image as uint8 (H, W) or (H, W, 3), converted unless its mode is one to keep.

    Raises:
        InputError: the file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode in keep else image.convert(otherwise))
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image; make its set again") from error


def _gap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return |a − b| (H, W) as a fraction of the grey range, mean over the channels."""
    gap = np.abs(a.astype(float) - b.astype(float)) / 255
    return gap if gap.ndim == 2 else gap.mean(axis=2)


def _heat(values: np.ndarray) -> np.ndarray:
    """Return values (H, W) in [0, 1], clipped, as colours (H, W, 3)."""
    return (matplotlib.colormaps["magma"](values.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)


def _mask_picture(path: Path, note: str) -> Picture:
    labels = _pixels(path, ("L", "P"), "L")
    palette = np.array([matplotlib.colors.to_rgb(c) for c in CLASS_COLOURS]) * 255
    colours = np.where(labels[..., None] > 0, palette[(labels.astype(int) - 1) % len(palette)], 20)
    return Picture(_thumbnail(colours.astype(np.uint8), Image.Resampling.NEAREST), note)


def _real_picture(path: Path) -> Picture:
    return Picture(_thumbnail(_pixels(path))) if path.is_file() else Picture(None)


def _thumbnail(pixels: np.ndarray, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> str:
    """Return pixels as a PNG of at most THUMBNAIL a side, as a data URI."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), resampling)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return _data_uri(buffer.getvalue(), "image/png")


# --- Page ---------------------------------------------------------------------------------------------


def render(run: Path, report: dict[str, Any]) -> str:
    """Return the page of a run.

    Args:
        run: folder of the run, for what ``report.json`` does not hold: classes, curves, images.
        report: content of ``report.json``.

    Raises:
        InputError: a file of the run is missing or cannot be used.
    """
    experiment, rows, sets = read_experiment(run), report["rows"], collect_synthetic_sets(run)
    protocol = read_protocol(run)
    asd_unit = protocol["asd unit"]
    test_sets = list(dict.fromkeys(r["test_set"] for r in rows))
    methods = experiment["methods"]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(
        report=report,
        experiment=experiment,
        seeds=experiment["seeds"],
        cards=_cards(rows, methods, experiment["budgets"]),
        headline=headline_table(rows, asd_unit),
        differences=difference_table(rows, asd_unit),
        classes={t: [(m, class_table(run, t, m)) for m in ("dsc", "asd")] for t in test_sets},
        synthetic=synthetic_table(sets),
        scores=scores_figure(rows, asd_unit),
        budgets=budget_figure(rows),
        histogram=histogram_figure(sets, _cap(sets, _flat(experiment))),
        grid=example_grid(run),
        curves=curve_figures(read_curves(run), methods),
        protocol=protocol,
        settings=_flat(experiment),
        colours={m: colour(m, methods) for m in (REAL, *methods)},
        min_seeds=MIN_SEEDS,
        curve_points=CURVE_POINTS,
    )


def _cards(rows: Sequence[Row], methods: Sequence[str], budgets: Sequence[float]) -> list[dict[str, str]]:
    """Return the differences that the page opens with: of the mined arm, at budget 1 or the first."""
    method, budget = "miner" if "miner" in methods else methods[-1], 1 if 1 in budgets else budgets[0]
    return [
        {
            "value": number(d["dsc"]["mean"], 2, True),
            "title": f"{arm_name(method, budget)} − {arm_name(reference, budget)}",
            "test_set": d["test_set"],
            "note": _evidence(d["dsc"]),
        }
        for reference in dict.fromkeys((REAL, "base" if "base" in methods else REAL))
        if reference != method
        for d in paired_difference(rows, method, reference)
        if d["budget"] == budget
    ]


def _evidence(value: Spread) -> str:
    seeds = f"{value['n']} seed{'' if value['n'] == 1 else 's'}"
    return f"{seeds}, no interval" if value["low"] is None else f"{interval(value)}, {seeds}"


def _cap(sets: Sequence[dict[str, Any]], settings: dict[str, Any]) -> float | None:
    """Return the reward's cap κ where the sets or the flat settings give one as ``kappa_up``."""
    values = [one.get("kappa_up") for one in sets]
    values += [value for key, value in settings.items() if key.split(".")[-1] == "kappa_up"]
    return next((float(v) for v in values if v is not None and _is_number(v)), None)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(run: Path) -> Path:
    """Write ``report/report.json`` and ``report/report.html`` of a run, each whole or not at all.

    Returns:
        The path of the page.

    Raises:
        InputError: a file of the run is missing or cannot be used; nothing has been written then.
    """
    report = report_json(run, datetime.now(UTC).isoformat(timespec="seconds"))
    page = render(run, report)
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    _replace(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _replace(folder / "report.html", page)
    return folder / "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m evaluation.report``; returns the exit status, 2 for unusable input."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.report", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, runs/<experiment>")
    parser.add_argument(
        "--style", choices=("text", "markdown"), default="text", help="form of the printed table"
    )
    options = parser.parse_args(arguments)
    try:
        page = write(options.run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(collect_rows(options.run), read_protocol(options.run)["asd unit"], options.style))
    print("\n" + "\n".join(f"{key}: {text}" for key, text in read_protocol(options.run).items()))
    print(f"\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
