"""The tables of the report, and their form in the terminal; the page has its own in ``report.html.j2``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.report.collect import REAL, Row, Run, arm_name
from evaluation.report.statistics import (
    REFERENCES,
    YARDSTICK,
    Spread,
    paired_differences,
    set_spread,
    spread,
    summarise,
)
from files import finite

SET_FACTS = {
    "n": "images per seed",
    "reward": "reward",
    "fid_extractor": "features",
    "judge": "judge of mask fidelity",
}
"""What the figures of synthetic sets rest on: below their table where all methods have it in common."""

SET_COLUMNS = {
    "n": "images",
    "reward": "reward",
    "adversariality": "adversariality",
    "kl": "KL (nats)",
    "fid": "FID",
    "fid_extractor": "features",
    "kid": "KID",
    "precision": "precision",
    "precision_base_modes": "precision at base's modes",
    "recall": "recall",
    "vendi": "Vendi",
    "mask_fidelity": "mask fidelity (%)",
    "mask_fidelity_hardest": "… of the hardest quarter",
    "judge": "judge",
    "noise.norm": "noise norm",
    "noise.variance": "noise variance",
    "calls_per_image": "calls/image",
    "seconds_per_image": "s/image",
}
"""Columns of the table of synthetic sets; "noise.norm" is ``noise["norm"]``. Those unknown are left out."""


@dataclass(frozen=True)
class Table:
    """Formatted cells.

    Attributes:
        columns: their heads.
        cells: line by line.
        methods: the method of each line, for its colour on the page.
        note: what is true of all lines, below the table.
        left: how many columns are aligned to the left in the terminal.
    """

    columns: tuple[str, ...]
    cells: list[tuple[str, ...]]
    methods: list[str]
    note: str = ""
    left: int = 2


def number(value: float, digits: int = 2, signed: bool = False) -> str:
    """Return a number for a reader: "–" where undefined, a real minus sign, "+" if asked."""
    if not math.isfinite(value):
        return "–"
    rounded = round(value, digits) + 0.0  # no −0.00
    return f"{rounded:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def mean_sd(value: Spread, digits: int = 2, signed: bool = False) -> str:
    """Return "mean ± sd", each "–" where undefined."""
    return f"{number(value.mean, digits, signed)} ± {number(value.sd, digits)}" if value.n else "–"


def interval(value: Spread) -> str:
    """Return the t interval, "–" where undefined."""
    known = math.isfinite(value.low)
    return f"[{number(value.low, signed=True)}, {number(value.high, signed=True)}]" if known else "–"


def headline_table(run: Run) -> Table:
    """Return mean ± standard deviation over seeds of every arm, with its paired differences."""
    rows = run.rows
    gaps = {
        (reference, d.test_set, d.method, d.budget): mean_sd(d.dsc, signed=True)
        for reference in REFERENCES
        for d in paired_differences(rows, reference)
    }
    summaries = summarise(rows)
    references = {
        REAL: run.arms,
        "base": run.methods,
    }  # to what, and whether there is anything to compare with it
    shown = [reference for reference in REFERENCES if references[reference]]
    made = ["Synthetic"] if run.methods else []
    scores = ("DSC (%)", f"ASD ({run.asd_unit})", *(f"ΔDSC to {reference}" for reference in shown), "Seeds")
    return Table(
        ("Test set", "Arm", "Real", *made, *scores),
        [
            (
                s.test_set,
                arm_name(s.method, s.budget),
                f"{s.n_real:,}",
                *(f"{s.n_synthetic:,}" for _ in made),
                mean_sd(s.dsc),
                mean_sd(s.asd),
                *(gaps.get((reference, s.test_set, s.method, s.budget), "") for reference in shown),
                str(s.dsc.n),
            )
            for s in summaries
        ],
        [s.method for s in summaries],
    )


def difference_table(run: Run) -> Table:
    """Return the paired differences of every method to real, base and best of 4, with their intervals."""
    known = [r for r in (*REFERENCES, YARDSTICK) if r in (REAL, *run.methods)]
    found = [
        (r, d)
        for r in known
        for d in paired_differences(run.rows, r)
        if r != YARDSTICK or d.method not in REFERENCES
    ]
    columns = ("ΔDSC (points)", "95 % interval", f"ΔASD ({run.asd_unit})", "95 % interval", "Seeds")
    return Table(
        ("Test set", "Difference", *columns),
        [
            (
                d.test_set,
                f"{arm_name(d.method, d.budget)} − {arm_name(reference, d.budget)}",
                mean_sd(d.dsc, signed=True),
                interval(d.dsc),
                mean_sd(d.asd, signed=True),
                interval(d.asd),
                str(d.dsc.n),
            )
            for reference, d in found
        ],
        [d.method for _, d in found],
    )


def class_table(rows: Sequence[Row], metric: str) -> Table:
    """Return mean ± standard deviation over seeds of every class, and of their mean, arm by arm.

    Args:
        rows: of one test set; a column names the segmenter where there are several.
        metric: what was measured, as ``dsc``.
    """
    arms: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        arms.setdefault((row.segmenter, row.method, row.budget), []).append(row)
    classes = list(dict.fromkeys(name for row in rows for name in row.classes))
    several = len({segmenter for segmenter, *_ in arms}) > 1
    return Table(
        (*(["Segmenter"] if several else []), "Arm", "mean", *classes),
        [
            (
                *([segmenter] if several else []),
                arm_name(method, budget),
                *(
                    mean_sd(spread(row.scores.get(key) for row in found))
                    for key in (metric, *(f"{metric}/{name}" for name in classes))
                ),
            )
            for (segmenter, method, budget), found in arms.items()
        ],
        [method for _, method, _ in arms],
        left=1 + several,
    )


def synthetic_table(run: Run) -> Table:
    """Return what describes the synthetic sets, a line per method: mean ± standard deviation over seeds.

    The time also shows the mean over seeds of its ratio to base; a statistic of the initial noise has, in
    place of the deviation, the |z| against N(0, I) of the seed that is farthest from it.
    """
    facts = {key: [_fact(run, method, key) for method in run.methods] for key in SET_FACTS}
    common = {key: found[0] for key, found in facts.items() if len(set(found)) == 1}
    known = {
        key for one in run.sets.values() for key in (*one, *(f"noise.{k}" for k in one.get("noise") or ()))
    }
    columns = {
        head: facts[key] if key in facts else _set_column(run, key)
        for key, head in SET_COLUMNS.items()
        if key in known and key not in common
    }
    return Table(
        ("Method", *columns),
        list(zip(run.methods, *columns.values(), strict=True)),
        run.methods,
        " · ".join(f"{SET_FACTS[key]}: {fact}" for key, fact in common.items() if fact != "–"),
        left=1,
    )


def _fact(run: Run, method: str, key: str) -> str:
    """Return a fact of the synthetic sets of a method; where its seeds differ, all of them or the range."""
    found = [one.get(key, "–") for (name, _), one in run.sets.items() if name == method]
    if all(isinstance(fact, int) for fact in found):
        return "–".join(f"{fact:,}" for fact in sorted({min(found), max(found)}))
    return ", ".join(dict.fromkeys(map(str, found)))


def _set_column(run: Run, key: str) -> list[str]:
    """Return a figure of the synthetic sets of every method, to the same number of decimals."""
    if key.startswith("noise."):
        return [_noise(run, method, key.removeprefix("noise.")) for method in run.methods]
    spreads = {method: set_spread(run, method, key) for method in run.methods}
    digits = _digits(max((abs(s.mean) for s in spreads.values() if s.n), default=0.0))
    cells = {method: mean_sd(value, digits) for method, value in spreads.items()}
    if key == "seconds_per_image" and "base" in run.methods:
        for method in run.methods:
            ratio = spread(
                one[key] / run.sets["base", seed][key]
                for (name, seed), one in run.sets.items()
                if name == method != "base"
            )
            cells[method] += f" ({number(ratio.mean)}×)" if ratio.n else ""
    return list(cells.values())


def _noise(run: Run, method: str, key: str) -> str:
    """Return the mean over seeds of a statistic of the initial noise, and its |z| farthest from N(0, I)."""
    sets = (one.get("noise") or {} for (name, _), one in run.sets.items() if name == method)
    found = [one[key] for one in sets if key in one]
    scores = [abs(one["z"]) for one in found if finite(one["z"]) is not None]
    value = number(spread(one["value"] for one in found).mean, 3)
    return f"{value} (z {number(max(scores), 1)})" if scores else value


def as_markdown(table: Table) -> str:
    """Return a table as Markdown, its note below."""
    rule = ("---" if i < table.left else "---:" for i in range(len(table.columns)))
    lines = [f"| {' | '.join(line)} |" for line in (table.columns, rule, *table.cells)]
    return "\n".join([*lines, *(("", table.note) if table.note else ())])


def as_text(table: Table) -> str:
    """Return a table as aligned text, its note below."""
    lines = [table.columns, *table.cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(f"{c:{'<' if i < table.left else '>'}{widths[i]}}" for i, c in enumerate(line)).rstrip()
        for line in lines
    ]
    return "\n".join([*text, *(("", table.note) if table.note else ())])


def _digits(value: float) -> int:
    """Return how many decimals show three significant digits, at least two."""
    known = value and math.isfinite(value)
    return min(6, max(2, 2 - math.floor(math.log10(abs(value))))) if known else 2
