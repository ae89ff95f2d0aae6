"""Output of the commands: results to stdout, everything else to stderr, progress only if that is a terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import rich.box
import rich.console
import rich.progress
import rich.table


class Console:
    """The output of one command.

    Attributes:
        json: the result is one JSON object; `table` and `line` print nothing.
        quiet: print no progress and no notes.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Prints a line to stderr, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Prints a warning to stderr, even if quiet."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def line(self, text: str = "") -> None:
        """Prints a line of the result as text."""
        if not self.json:
            print(text, flush=True)

    def result(self, payload: dict[str, Any]) -> None:
        """Prints the result as one JSON object, if `json` is set."""
        if self.json:
            print(json.dumps(payload, allow_nan=False), flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table of the result; the first column is text, the others are numbers."""
        if self.json:
            return
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        if sys.stdout.isatty():
            table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
            for index, column in enumerate(columns):
                table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            console = rich.console.Console()
            console.width = max(console.width, sum(widths) + 3 * len(widths))  # never truncate a number
            console.print(table)
            return
        for row in (columns, *rows):
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            print("  ".join(cells).rstrip(), flush=True)

    @contextmanager
    def progress(self, label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Shows a spinner, or a bar of `total` steps; yields the function that advances it."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda steps: None
            return
        columns = [rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}")]
        if total is not None:
            columns += [rich.progress.BarColumn(), rich.progress.MofNCompleteColumn()]
        columns.append(rich.progress.TimeElapsedColumn())
        console = rich.console.Console(stderr=True)
        # Redrawn rarely, because the code inside may be a measurement.
        with rich.progress.Progress(*columns, console=console, transient=True, refresh_per_second=2) as bars:
            task = bars.add_task(label, total=total)
            yield lambda steps: bars.advance(task, steps)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options common to all commands."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress and no notes on stderr")
