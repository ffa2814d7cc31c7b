"""One table of several experiments: a line per backbone and arm, a column per data set and test set.

``python -m evaluation.table runs/a runs/b … [--test-set NAME …]``; with ``--sets`` one of each experiment and
test set: a line per arm, its scores beside what describes its synthetic sets; with ``--against all_plain/8x``
the paired differences of every other arm to that one, with their intervals; with ``--classes dsc asd`` one
of each test set and measure: a line per segmenter and arm, a column per class; with ``--of noise.norm.z …``
one of each experiment: a line per method, a column per figure of its sets in ``report.json``.
``--without CLASS …`` leaves classes out of all scores; ``--together`` takes the seeds of several experiments
for those of one, in the arms that all of them have.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from errors import InputError
from evaluation.report.collect import NO_BACKBONE, REAL, Row, arm_folder, arm_name
from evaluation.report.statistics import Spread, paired_differences, spearman, spread, summarise
from evaluation.report.tables import Table, as_markdown, class_table, interval, mean_sd, number

SET_COLUMNS = {
    "adversariality": ("adversariality", 3, 1),
    "fid": ("FID × 10³", 2, 1000),
    "precision": ("precision", 3, 1),
    "precision_base_modes": ("… at base's modes", 3, 1),
    "mask_fidelity": ("mask fidelity", 1, 1),
    "mask_fidelity_hardest": ("… of the hardest quarter", 1, 1),
    "rare": ("rare appearances", 2, 1),
    "kl": ("KL, nats", 1, 1),
    "calls_per_image": ("calls", 0, 1),
}
"""Columns of :func:`arms_table` about the synthetic sets: head, decimals, factor; without those unknown."""

FAITHFUL = 95.0
"""Mask fidelity from which on the masks of a set are taken for labels of its images."""


def read_report(run: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows and synthetic sets in a run's ``report.json``, or in such a file itself.

    Raises:
        InputError: there is no report, or it is none.
    """
    path = run if run.suffix == ".json" else run / "report" / "report.json"
    try:
        report = json.loads(path.read_text())
        return [Row(**row) for row in report["rows"]], with_rare(report.get("synthetic_sets", []))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; make it with: make experiment NAME={run.name}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no report ({error!r}); make it anew: make experiment NAME=…") from None


def with_rare(sets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return synthetic sets with ``rare``: the share of samples without base's commonest appearance.

    Where appearances are not known, or plain samples are not there to say which is the common one, without.
    """

    def shown(one: dict[str, Any]) -> dict[str, int]:
        return (one.get("modes") or {}).get("histogram") or {}

    counts = Counter[str]()
    for one in sets:
        if one["method"] == "base":
            counts.update(shown(one))
    if not counts:
        return [dict(one) for one in sets]
    ((common, _),) = counts.most_common(1)
    return [
        one | ({"rare": 1 - shown(one).get(common, 0) / total} if (total := sum(shown(one).values())) else {})
        for one in sets
    ]


def together(
    reports: Sequence[tuple[Sequence[Row], Sequence[dict[str, Any]]]],
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return several reports as one of all their seeds, with the arms that each of them has.

    Args:
        reports: rows and synthetic sets of each, as from :func:`read_report`.

    Raises:
        InputError: two have a seed in common, or no arm is in all.
    """
    seeds = Counter(seed for rows, _ in reports for seed in {row.seed for row in rows})
    if twice := sorted(seed for seed, count in seeds.items() if count > 1):
        raise InputError(f"--together: seed {twice[0]} is in two of the experiments; name those of others")
    arms = [{(row.test_set, row.method, row.budget) for row in rows} for rows, _ in reports]
    common = set.intersection(*arms)
    if not common:
        raise InputError("--together: no arm is in all of the experiments; name others")
    methods = {method for _, method, _ in common}
    return (
        [row for rows, _ in reports for row in rows if (row.test_set, row.method, row.budget) in common],
        [one for _, sets in reports for one in sets if one["method"] in methods],
    )


def grand_table(experiments: Sequence[Sequence[Row]], test_sets: Sequence[str] = ()) -> Table:
    """Return DSC, mean ± standard deviation over seeds, with the paired change to ``real`` in brackets.

    Args:
        experiments: rows of each experiment; two of them may not measure the same arm on the same images.
        test_sets: which test sets to show; none shows all.

    Raises:
        InputError: an arm comes twice, or a test set is unknown.
    """
    _known(experiments, test_sets)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for rows in experiments:
        shown = [row for row in rows if not test_sets or row.test_set in test_sets]
        gaps = {(d.test_set, d.method, d.budget): d.dsc for d in paired_differences(shown, REAL)}
        facts = {(row.method, row.budget): row for row in shown}
        for arm in summarise(shown):
            fact: Any = facts[arm.method, arm.budget]
            column = f"{fact.dataset}, {fact.segmenter}: {arm.test_set}"
            line = (fact.backbone, arm_name(arm.method, arm.budget))
            gap = gaps.get((arm.test_set, arm.method, arm.budget))
            text = mean_sd(arm.dsc) + (f" ({mean_sd(gap, signed=True)})" if gap else "")
            columns.setdefault(column)
            if cells.setdefault(line, {}).setdefault(column, text) != text:
                raise InputError(f"{' '.join(line)} on {column}: two experiments differ; name one of them")
    order = sorted(cells, key=lambda line: line[0] != NO_BACKBONE)  # what needs no backbone comes first
    return Table(
        ("Backbone", "Arm", *columns),
        [(*line, *(cells[line].get(column, "–") for column in columns)) for line in order],
        [line[1] for line in order],
    )


def arms_table(
    rows: Sequence[Row], sets: Sequence[dict[str, Any]], test_set: str, best_first: bool = False
) -> Table:
    """Return a line per arm of an experiment: DSC on a test set, paired changes, and its synthetic sets.

    Scores are mean ± standard deviation over seeds, figures of the sets means over seeds. They are of a
    method's whole set, whatever part of it an arm takes.

    Args:
        rows: rows of the experiment.
        sets: ``synthetic_sets`` of its report.
        test_set: the test set.
        best_first: sort by DSC, instead of as the experiment has the arms.

    Raises:
        InputError: the test set is unknown.
    """
    _known([rows], [test_set])
    shown = [row for row in rows if row.test_set == test_set]
    gaps = {
        (reference, d.method, d.budget): d.dsc
        for reference in (REAL, "base")
        for d in paired_differences(shown, reference)
    }
    columns = {
        key: column for key, column in SET_COLUMNS.items() if any(one.get(key) is not None for one in sets)
    }

    def described(method: str, key: str) -> str:
        _, digits, factor = SET_COLUMNS[key]
        found = spread(one.get(key) for one in sets if one["method"] == method)
        return number(factor * found.mean, digits) if found.n else ""

    lines = []
    for arm in summarise(shown):
        real, base = (gaps.get((name, arm.method, arm.budget)) for name in (REAL, "base"))
        cells = (
            arm_name(arm.method, arm.budget),
            mean_sd(arm.dsc),
            mean_sd(real, signed=True) if real else "",
            mean_sd(base, signed=True) if base else "",
            interval(base) if base else "",
            *(described(arm.method, key) for key in columns),
        )
        lines.append((arm.dsc.mean, arm.method, cells))
    if best_first:
        lines.sort(key=lambda line: -line[0])
    heads = (
        "Arm",
        f"DSC, {test_set}",
        "Δ real",
        "Δ base",
        "95 % interval",
        *(c[0] for c in columns.values()),
    )
    return Table(heads, [cells for *_, cells in lines], [method for _, method, _ in lines], left=1)


def differences_table(rows: Sequence[Row], test_set: str, against: str) -> Table:
    """Return the difference of every other arm to one of them, paired by seed, and its 95 % interval.

    Args:
        rows: rows of one experiment.
        test_set: the test set.
        against: the arm, as ``base/3x`` or ``real``: its folder in that of a seed.

    Raises:
        InputError: the test set or the arm is unknown.
    """
    _known([rows], [test_set])
    shown = [row for row in rows if row.test_set == test_set]
    arms = {arm_folder(row.method, row.budget): (row.method, row.budget) for row in shown}
    if against not in arms:
        raise InputError(f"arm {against}: is unknown; choose from {', '.join(arms)}")
    found = paired_differences(shown, *arms[against])
    return Table(
        ("Arm", f"ΔDSC to {arm_name(*arms[against])}, {test_set}", "95 % interval"),
        [(arm_name(d.method, d.budget), mean_sd(d.dsc, signed=True), interval(d.dsc)) for d in found],
        [d.method for d in found],
        left=1,
    )


def without(rows: Sequence[Row], classes: Sequence[str]) -> list[Row]:
    """Return rows with the means over the other foreground classes, of every measure.

    As in the mean over all, a class that is scored in no case does not count.

    Raises:
        InputError: a row has no scores of such a class, or none of another.
    """
    shorter = []
    for row in rows:
        if unknown := [name for name in classes if name not in row.classes]:
            known = f"it has {', '.join(row.classes)}" if row.classes else "make its report.json anew"
            raise InputError(f"class {unknown[0]}: {row.dataset} has no scores of it; {known}")
        if not {*row.classes} - {*classes}:
            raise InputError(f"{row.dataset}: no class is left; name fewer of {', '.join(row.classes)}")
        scores = {key: value for key, value in row.scores.items() if key.partition("/")[2] not in classes}
        for measure in {key.partition("/")[0] for key in scores if "/" in key}:
            found = spread(value for key, value in scores.items() if key.startswith(f"{measure}/"))
            scores[measure] = found.mean if found.n else None
        shorter.append(replace(row, dsc=scores["dsc"], asd=scores.get("asd"), scores=scores))
    return shorter


def correlations(rows: Sequence[Row], sets: Sequence[dict[str, Any]], test_set: str) -> list[str]:
    """Return whether harder sets were better ones, and those with rare appearances.

    That is ρ over methods of DSC and adversariality, or the share of rare appearances, for each budget:
    over all methods, and over those whose images still show their masks (:data:`FAITHFUL`); the mean over
    seeds is a method's value. A budget with fewer than three methods has no line.
    """
    notes = []
    shown = [row for row in rows if row.test_set == test_set]
    arms = summarise(shown)
    for budget in sorted({arm.budget for arm in arms if arm.budget}):
        for key, what in (("adversariality", "adversariality"), ("rare", "share of rare appearances")):
            found = [
                (
                    spread(one.get(key) for one in sets if one["method"] == arm.method).mean,
                    arm.dsc.mean,
                    spread(one.get("mask_fidelity") for one in sets if one["method"] == arm.method).mean,
                )
                for arm in arms
                if arm.budget == budget
            ]
            whole = spearman((value, dsc) for value, dsc, _ in found)
            faithful = spearman((value, dsc) for value, dsc, fidelity in found if fidelity >= FAITHFUL)
            parts = [
                f"{number(rho, signed=True)} over {name}"
                for (rho, n), name in (
                    (whole, f"all {whole.n} sets"),
                    (faithful, f"the {faithful.n} with a mask fidelity of {FAITHFUL:g} or more"),
                )
                if n >= 3
            ]
            if parts:
                notes.append(f"Spearman's ρ of DSC and {what}, {budget:g}×: {', '.join(parts)}.")
    return notes


def measures_table(sets: Sequence[dict[str, Any]], paths: Sequence[str]) -> Table:
    """Return any figures of synthetic sets, mean ± standard deviation over seeds: a line per method.

    Args:
        sets: ``synthetic_sets`` of a report.
        paths: where each figure lies in them, such as ``noise.norm.z`` or ``gain.all.set.cosine``.

    Raises:
        InputError: no set has a number there.
    """

    def at(one: Any, path: str) -> float | None:
        for key in path.split("."):
            one = one.get(key) if isinstance(one, dict) else None
        return one if isinstance(one, int | float) else None

    for path in paths:
        if all(at(one, path) is None for one in sets):
            raise InputError(f"{path}: no synthetic set of the report has a number there")
    methods = list(dict.fromkeys(one["method"] for one in sets))
    found = [[spread(at(one, p) for one in sets if one["method"] == m) for p in paths] for m in methods]
    lines = [
        (method, *(_significant(value) if value.n else "" for value in values))
        for method, values in zip(methods, found, strict=True)
    ]
    return Table(("Method", *paths), lines, methods, left=1)


def class_tables(rows: Sequence[Row], test_set: str, measures: Sequence[str]) -> dict[tuple[str, str], Table]:
    """Return the table by class of each data set and measure, on one test set.

    Raises:
        InputError: a measure is unknown, or the reports are older than scores by class.
    """
    tables = {}
    for dataset in dict.fromkeys(row.dataset for row in rows if row.test_set == test_set):
        shown = [row for row in rows if (row.dataset, row.test_set) == (dataset, test_set)]
        known = dict.fromkeys(
            key for row in shown for key in row.scores if "/" not in key and key != "n_cases"
        )
        if not known:
            raise InputError(f"{dataset}, {test_set}: no scores by class; make its report.json anew")
        for measure in measures:
            if measure not in known:
                raise InputError(f"measure {measure}: is unknown; choose from {', '.join(known)}")
            tables[dataset, measure] = class_table(shown, measure)
    return tables


def _significant(value: Spread) -> str:
    """Return "mean ± sd" with significant digits, for figures of any size."""
    sd = f"{value.sd:.2g}" if value.n > 1 else "–"
    return f"{value.mean:.3g} ± {sd}".replace("-", "−")


def _known(experiments: Sequence[Sequence[Row]], test_sets: Sequence[str]) -> None:
    """Raise unless these test sets are in some experiment."""
    known = dict.fromkeys(row.test_set for rows in experiments for row in rows)
    if unknown := [name for name in test_sets if name not in known]:
        raise InputError(f"test set {unknown[0]}: is unknown; choose from {', '.join(known)}")


def _alone(rows: Sequence[Row]) -> None:
    """Raise where two experiments score the same arm and seed: they are no seeds of one."""
    seen = set()
    for row in rows:
        arm = (row.dataset, row.test_set, row.segmenter, row.backbone, row.method, row.budget, row.seed)
        if arm in seen:
            raise InputError(
                f"{row.dataset}, {row.test_set}: {row.method} of seed {row.seed} is in two of the "
                "experiments; show them one by one"
            )
        seen.add(arm)


def _shown(rows: Sequence[Row], test_sets: Sequence[str]) -> list[str]:
    """Return the test sets of these rows, of those that are asked for."""
    return [
        name for name in dict.fromkeys(row.test_set for row in rows) if not test_sets or name in test_sets
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.table", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="runs/<experiment>, or a report.json")
    parser.add_argument("--test-set", action="append", default=[], help="show this one; may be repeated")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="CLASS", help="leave these out of all scores"
    )
    parser.add_argument("--together", action="store_true", help="as one experiment of all their seeds")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sets", action="store_true", help="a table of each experiment and test set")
    kind.add_argument("--against", metavar="ARM", help="differences to this arm, such as real or base/3x")
    kind.add_argument("--classes", nargs="+", metavar="MEASURE", help="a table of each measure, by class")
    kind.add_argument("--of", nargs="+", metavar="PATH", help="a table of these figures of synthetic sets")
    parser.add_argument("--best-first", action="store_true", help="with --sets: sort by DSC")
    options = parser.parse_args(arguments)
    reports = [read_report(run) for run in options.runs]
    if options.without:
        reports = [(without(rows, options.without), sets) for rows, sets in reports]
    if options.together:
        reports, options.runs = [together(reports)], options.runs[:1]
    _known([rows for rows, _ in reports], options.test_set)
    unit = "DSC in percent, mean ± standard deviation over seeds; changes are paired by seed"
    if options.of:
        for _, sets in reports:
            print(as_markdown(measures_table(sets, options.of)), end="\n\n")
        print("Mean ± standard deviation over seeds.")
    elif options.classes:
        rows = [row for found, _ in reports for row in found]
        _alone(rows)
        for name in _shown(rows, options.test_set):
            for (dataset, measure), table in class_tables(rows, name, options.classes).items():
                print(f"{dataset}, {name}: {measure}\n\n{as_markdown(table)}", end="\n\n")
        print(
            "Mean ± standard deviation over seeds. DSC and NSD in percent; for the unit of distances see\n"
            "the protocol in report.json."
        )
    elif options.against or options.sets:
        for run, (rows, sets) in zip(options.runs, reports, strict=True):
            if len(reports) > 1:
                print(f"**{run}**", end="\n\n")
            for name in _shown(rows, options.test_set):
                if options.against:
                    print(as_markdown(differences_table(rows, name, options.against)), end="\n\n")
                else:
                    print(as_markdown(arms_table(rows, sets, name, options.best_first)), end="\n\n")
                    print(*(f"{note}\n\n" for note in correlations(rows, sets, name)), sep="", end="")
        print(f"{unit}.")
    else:
        print(as_markdown(grand_table([rows for rows, _ in reports], options.test_set)), end="\n\n")
        print(f"{unit}, those to real in brackets.")


if __name__ == "__main__":
    main()
