"""The command ``python -m evaluation.report --run runs/<experiment>``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from evaluation.report.collect import Run
from evaluation.report.page import write
from evaluation.report.tables import as_markdown, as_text, headline_table


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a run, and print its headline table."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report",
        description="Write report/report.json and report/report.html of a run, and print its main table.",
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, runs/<experiment>")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--figures", type=Path, help="folder that every figure is also written to, as SVG")
    options = parser.parse_args(arguments)
    run = Run.read(options.run)
    page = write(run, options.figures)
    table = headline_table(run)
    print(as_markdown(table) if options.markdown else as_text(table))
    print("\n" + "\n".join(f"{key}: {text}" for key, text in run.protocol.items()))
    print(f"\n{page}")


if __name__ == "__main__":
    main()
