"""One sheet of samples of several experiments, for the same masks.

``python -m evaluation.pictures runs/a runs/b … [--methods base miner …] --output sheet.svg``: a line per
method and experiment, named by the backbone, or by the experiment where two have the same.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from errors import InputError
from evaluation.report.collect import Run
from evaluation.report.examples import Grid, example_grid, example_sheet
from evaluation.report.style import picture
from files import write_atomically

HEAD = ("mask", "real")


def joined(runs: Sequence[Run], methods: Sequence[str] = ()) -> Grid:
    """Return the examples of several runs in one grid: mask, real image, then by method the line of each run.

    Args:
        runs: experiments on the same data with the same first seed.
        methods: whose samples to show; none shows all that every run has.

    Raises:
        InputError: a run has no pictures or not all of the methods, or two show other masks.
    """
    methods = methods or [m for m in runs[0].methods if all(m in run.methods for run in runs)]
    if not methods:
        raise InputError(f"{', '.join(str(run.folder) for run in runs)}: have no method in common")
    grids = []
    for run in runs:
        lacking = [m for m in methods if m not in run.methods]
        if lacking:
            raise InputError(f"{run.folder}: has no {', '.join(lacking)}; choose of {', '.join(run.methods)}")
        grid = example_grid(run)
        if grid is None:
            raise InputError(
                f"{run.folder}: its synthetic sets are not there; "
                f"make them: make experiment NAME={run.experiment['name']}"
            )
        grids.append(grid)
    for run, grid in zip(runs, grids, strict=True):
        if [p.uri for p in grid.lines["mask"]] != [p.uri for p in grids[0].lines["mask"]]:
            raise InputError(
                f"{run.folder}: shows other masks than {runs[0].folder}; "
                "choose experiments on the same data, with the same first seed and budgets"
            )
    names = [run.experiment["backbone"] for run in runs]
    if len(set(names)) < len(names):
        names = [run.experiment["name"] for run in runs]
    lines = {
        f"{name} {method}": grid.lines[method]
        for method in methods
        for name, grid in zip(names, grids, strict=True)
    }
    head = {name: grids[0].lines[name] for name in HEAD}
    return Grid(head | lines, {}, grids[0].legend, grids[0].seed, None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.pictures",
        description="Write one sheet of samples of several experiments, for the same masks, as SVG.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of experiments, runs/NAME")
    parser.add_argument("--methods", nargs="+", default=(), help="whose samples; all that every run has")
    parser.add_argument("--output", type=Path, required=True, help="SVG file to write")
    options = parser.parse_args(arguments)
    if options.output.suffix.lower() != ".svg":
        raise InputError(f"--output {options.output}: the sheet is an SVG; give a file that ends in .svg")
    grid = joined([Run.read(run) for run in options.runs], options.methods)
    write_atomically(options.output, picture(example_sheet(grid)).decode())
    print(options.output)


if __name__ == "__main__":
    main()
