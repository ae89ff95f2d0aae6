"""Where a command's words go: its result to stdout, everything else to stderr, progress only onto a terminal."""

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
        quiet: no progress and no notes.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def note(self, text: str) -> None:
        """One line to stderr, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """One line to stderr, always."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def line(self, text: str = "") -> None:
        """One line of the result for people."""
        if not self.json:
            print(text, flush=True)

    def result(self, payload: dict[str, Any]) -> None:
        """The result for programs: one JSON object, if asked for."""
        if self.json:
            print(json.dumps(payload, allow_nan=False), flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The result as a table; the first column is text, the others numbers."""
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
            console.width = max(console.width, sum(widths) + 3 * len(widths))  # a number is never cut short
            console.print(table)
            return
        for row in (columns, *rows):
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            print("  ".join(cells).rstrip(), flush=True)

    @contextmanager
    def progress(self, label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A spinner, or a bar of `total` steps; yields the function that takes steps forward."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda steps: None
            return
        columns = [rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}")]
        if total is not None:
            columns += [rich.progress.BarColumn(), rich.progress.MofNCompleteColumn()]
        columns.append(rich.progress.TimeElapsedColumn())
        console = rich.console.Console(stderr=True)
        # Redrawn seldom: what goes on below it may be a measurement.
        with rich.progress.Progress(*columns, console=console, transient=True, refresh_per_second=2) as bars:
            task = bars.add_task(label, total=total)
            yield lambda steps: bars.advance(task, steps)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that every command has."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress and no notes on stderr")
