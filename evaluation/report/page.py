"""Write ``report.json`` and the page."""

import importlib.metadata
import json
import math
import platform
import re
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from evaluation.report.collect import MORE_SET_KEYS, REAL, SET_KEYS, Run, arm_name
from evaluation.report.embedding import MOST, embedding_figure
from evaluation.report.examples import Grid, example_grid, example_sheet
from evaluation.report.figures import (
    FEW,
    budget_figure,
    curve_figures,
    has_lanes,
    histogram_figure,
    histogram_methods,
    scores_figure,
)
from evaluation.report.gain import gain_figure, gain_table
from evaluation.report.inputs import CURVE_POINTS
from evaluation.report.sets import mode_accuracy, mode_figure, nativeness_figure, yardstick
from evaluation.report.statistics import MIN_SEEDS, REFERENCES, paired_differences
from evaluation.report.style import picture, swatch
from evaluation.report.sweeps import sweep_figures
from evaluation.report.tables import (
    class_table,
    difference_table,
    headline_table,
    interval,
    number,
    synthetic_table,
)
from files import finite, write_atomically

PACKAGES = ("torch", "lightning", "diffusers", "monai", "torchmetrics")
"""Packages that the numbers depend on."""


def write(run: Run, figures: Path | None = None) -> Path:
    """Write ``report/report.json`` and ``report/report.html`` of a run, each whole or not at all.

    Args:
        run: the run.
        figures: folder that each figure of the page is also written to, as an SVG file of its own.

    Returns:
        The path of the page.

    Raises:
        InputError: an image of the run cannot be used; nothing has been written then.
    """
    report = {
        "experiment": run.experiment["name"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset_version": run.tests[0][1].get("dataset_version"),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "protocol": run.protocol,
        "rows": [asdict(row) for row in run.rows],
        "synthetic_sets": [_described(run, *key) for key in run.sets],
    }
    grid, drawn = example_grid(run), _figures(run)
    page = _render(run, report, grid, drawn)
    folder = run.folder / "report"
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "report.json", text + "\n")
    write_atomically(folder / "report.html", page)
    if figures is not None:
        sheet = {} if grid is None else {"examples": example_sheet(grid)}
        sweeps = {f"sweep_{k}": figure for k, figure in enumerate(drawn.get("sweeps", {}).values(), 1)}
        for name, figure in {**drawn, **sheet, **sweeps}.items():
            if isinstance(figure, str):
                write_atomically(
                    figures / f"{run.folder.resolve().name}_{name}.svg", picture(figure).decode()
                )
    return folder / "report.html"


def _figures(run: Run) -> dict[str, Any]:
    """Return the figures of the page by name, as data URIs; None for one that does not apply."""
    scores = {"scores": scores_figure(run)}
    if not run.methods:
        return scores
    return scores | {
        "budgets": budget_figure(run),
        "nativeness": nativeness_figure(run),
        "histogram": histogram_figure(run),
        "modes": mode_figure(run),
        "embedding": embedding_figure(run),
        "gain": gain_figure(run),
        "sweeps": sweep_figures(run),
    }


def _render(run: Run, report: dict[str, Any], grid: Grid | None, drawn: dict[str, Any]) -> str:
    """Return the page of a run, given the content of its ``report.json`` and its pictures."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(
        report=report,
        run=run,
        cards=_cards(run),
        headline=headline_table(run),
        differences=difference_table(run),
        classes={
            test_set: [(metric, class_table(list(rows), metric)) for metric in ("dsc", "asd")]
            for test_set, rows in groupby(run.rows, key=lambda row: row.test_set)
        },
        synthetic=synthetic_table(run),
        sizes={one["n"] for one in run.sets.values()},
        lanes=has_lanes(run),
        few=FEW,
        yardstick=yardstick(run),
        histogram_methods=histogram_methods(run),
        mode_accuracy=number(mode_accuracy(run), 1),
        most=MOST,
        gains=gain_table(run),
        grid=grid,
        **drawn,
        curves=curve_figures(run),
        settings=_flat(run.experiment),
        swatches={method: swatch(method, run.arms) for method in (REAL, *run.arms)},
        pieces=lambda cell: re.split(r" (?=[±(])", cell, maxsplit=1),
        min_seeds=MIN_SEEDS,
        curve_points=CURVE_POINTS,
    )


def _described(run: Run, method: str, seed: int) -> dict[str, Any]:
    """Return what ``report.json`` says about a synthetic set; of its gain, all but the single samples."""
    one = run.sets[method, seed]
    described = {key: finite(one[key]) for key in (*SET_KEYS, *MORE_SET_KEYS) if key in one}
    if (method, seed) in run.gains:
        parts = {
            key: {k: v for k, v in value.items() if k != "samples"} if isinstance(value, dict) else value
            for key, value in run.gains[method, seed].items()
        }
        described["gain"] = finite(
            {k: v for k, v in parts.items() if k not in ("method", "backbone", "seed")}
        )
    return described


def _cards(run: Run) -> list[dict[str, str]]:
    """Return the differences that the page opens with: of the mined arm, at budget 1 or its first."""
    if not run.methods:
        return []
    budgets = run.budgets_of(run.mined)
    budget = 1 if 1 in budgets else budgets[0]
    return [
        {
            "value": number(d.dsc.mean, signed=True),
            "title": f"{arm_name(d.method, budget)} − {arm_name(reference, budget)}",
            "test_set": d.test_set,
            "note": f"{interval(d.dsc) if math.isfinite(d.dsc.low) else 'no interval'}, "
            f"{d.dsc.n} seed{'' if d.dsc.n == 1 else 's'}",
        }
        for reference in REFERENCES
        if reference in (REAL, *run.methods)
        for d in paired_differences(run.rows, reference)
        if (d.method, d.budget) == (run.mined, budget)
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = isinstance(value, dict)
        shown = "" if value is None else value
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": shown}
    return flat
