"""One table of several experiments: a line per backbone and arm, a column per data set and test set.

``python -m evaluation.table runs/a runs/b … [--test-set NAME …]``
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import InputError
from evaluation.report.collect import NO_BACKBONE, REAL, Row, arm_name
from evaluation.report.statistics import paired_differences, summarise
from evaluation.report.tables import Table, as_markdown, mean_sd


def read_rows(run: Path) -> list[Row]:
    """Return the rows of a run's ``report.json``, or of such a file itself.

    Raises:
        InputError: there is no report, or it is none.
    """
    path = run if run.suffix == ".json" else run / "report" / "report.json"
    try:
        return [Row(**row) for row in json.loads(path.read_text())["rows"]]
    except FileNotFoundError:
        raise InputError(f"{path} is missing; make it with: make experiment NAME={run.name}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no report ({error!r}); make it anew: make experiment NAME=…") from None


def grand_table(experiments: Sequence[Sequence[Row]], test_sets: Sequence[str] = ()) -> Table:
    """Return DSC, mean ± standard deviation over seeds, with the paired change to ``real`` in brackets.

    Args:
        experiments: rows of each experiment; two of them may not measure the same arm on the same images.
        test_sets: which test sets to show; none shows all.

    Raises:
        InputError: an arm comes twice, or a test set is unknown.
    """
    known = dict.fromkeys(row.test_set for rows in experiments for row in rows)
    if unknown := [name for name in test_sets if name not in known]:
        raise InputError(f"test set {unknown[0]}: is unknown; choose from {', '.join(known)}")
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.table", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="runs/<experiment>, or a report.json")
    parser.add_argument("--test-set", action="append", default=[], help="show this one; may be repeated")
    options = parser.parse_args(arguments)
    print(as_markdown(grand_table([read_rows(run) for run in options.runs], options.test_set)))
    print("\nDSC in percent, mean ± standard deviation over seeds; in brackets the change to real, by seed.")


if __name__ == "__main__":
    main()
