"""The tables of the report, and their form in the terminal; the page has its own in ``report.html.j2``."""

import math
from dataclasses import dataclass

from evaluation.report.collect import REAL, Run, arm_name
from evaluation.report.statistics import REFERENCES, Spread, paired_differences, spread, summarise

SET_LINES = {
    "n": "images per seed",
    "reward": "reward",
    "adversariality": "adversariality",
    "kl": "KL to the prior (nats)",
    "fid": "FID to real images",
    "fid_extractor": "FID over",
    "kid": "KID, same features",
    "precision": "precision, same features",
    "recall": "recall, same features",
    "vendi": "Vendi score, same features",
    "mask_fidelity": "mask fidelity, DSC (%)",
    "judge": "mask fidelity by",
    "calls_per_image": "backbone calls per image",
    "seconds_per_image": "seconds per image",
}
"""Lines of the table of synthetic sets; those that no set has are left out."""


@dataclass(frozen=True)
class Table:
    """Formatted cells; ``methods`` names the method of each line, for its colour on the page, or is empty."""

    columns: tuple[str, ...]
    cells: list[tuple[str, ...]]
    methods: list[str]


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
    scores = ("DSC (%)", f"ASD ({run.asd_unit})", "ΔDSC to real", "ΔDSC to base", "Seeds")
    return Table(
        ("Test set", "Arm", "Real", "Synthetic", *scores),
        [
            (
                s.test_set,
                arm_name(s.method, s.budget),
                f"{s.n_real:,}",
                f"{s.n_synthetic:,}",
                mean_sd(s.dsc),
                mean_sd(s.asd),
                *(gaps.get((reference, s.test_set, s.method, s.budget), "") for reference in REFERENCES),
                str(s.dsc.n),
            )
            for s in summaries
        ],
        [s.method for s in summaries],
    )


def difference_table(run: Run) -> Table:
    """Return the paired differences of every method to real and to base, with their intervals."""
    rows = run.rows
    found = [(r, d) for r in REFERENCES if r in (REAL, *run.methods) for d in paired_differences(rows, r)]
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


def class_table(run: Run, test_set: str, metric: str) -> Table:
    """Return mean ± standard deviation over seeds of every class, arm by arm, on one test set."""
    scores: dict[tuple[str, float], list[dict[str, float]]] = {}
    for arm, test in run.tests:
        scores.setdefault((arm.method, arm.budget), []).append(test["test_sets"].get(test_set, {}))
    return Table(
        ("Arm", *run.classes),
        [
            (
                arm_name(*arm),
                *(mean_sd(spread(s.get(f"{metric}/{name}") for s in seeds)) for name in run.classes),
            )
            for arm, seeds in scores.items()
        ],
        [method for method, _ in scores],
    )


def synthetic_table(run: Run) -> Table:
    """Return what describes the synthetic sets, a column per method: mean ± standard deviation over seeds.

    The time also shows the mean over seeds of its ratio to base.
    """

    def cell(method: str, key: str) -> str:
        found = {seed: one.get(key) for (name, seed), one in run.sets.items() if name == method}
        if key in ("n", "reward", "fid_extractor", "judge"):
            return ", ".join(dict.fromkeys(map(str, found.values())))
        value = spread(found.values())
        text = mean_sd(value, _digits(value.mean))
        if key != "seconds_per_image" or method == "base" or "base" not in run.methods:
            return text
        ratio = spread(seconds / run.sets["base", seed][key] for seed, seconds in found.items())
        return f"{text} ({number(ratio.mean)}×)"

    known = {key for one in run.sets.values() for key in one}
    cells = [
        (head, *(cell(method, key) for method in run.methods))
        for key, head in SET_LINES.items()
        if key in known
    ]
    return Table(("", *run.methods), cells, [])


def as_markdown(table: Table) -> str:
    """Return a table as Markdown."""
    rule = ("---", "---", *("---:" for _ in table.columns[2:]))
    return "\n".join(f"| {' | '.join(line)} |" for line in (table.columns, rule, *table.cells))


def as_text(table: Table) -> str:
    """Return a table as aligned text, the first two columns to the left."""
    lines = [table.columns, *table.cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{c:{'<' if i < 2 else '>'}{widths[i]}}" for i, c in enumerate(line)).rstrip()
        for line in lines
    )


def _digits(value: float) -> int:
    """Return how many decimals show three significant digits, at least two."""
    known = value and math.isfinite(value)
    return min(6, max(2, 2 - math.floor(math.log10(abs(value))))) if known else 2
