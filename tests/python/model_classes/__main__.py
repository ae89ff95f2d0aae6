"""`just models`: tries a `KvarnCache` with every causal language model class of transformers.

Without names, every class is tried and docs/models.md written; with some, only these are, and their records printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import kvarn_rs

from .configs import classes
from .outcome import OUTCOMES, judge
from .pool import run_each
from .probe import probe
from .table import render, sentence

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/models.md"
RESULTS = ROOT / "target/models.json"


def main() -> int:
    """Exit status 1 if a class is wrong, 2 for a name that does not exist."""
    parser = argparse.ArgumentParser(prog="just models", description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="MODEL_TYPE", help="as transformers names it: llama, gpt2")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one class")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="every record, as JSON")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the table, as Markdown")
    options = parser.parse_args()
    known = classes()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no such model type: {', '.join(unknown)}")

    names = options.names or list(known)
    console = Console(stderr=True)
    records = {}
    with Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=len(names))
        for name, record in run_each(names, probe, options.jobs, options.limit):
            records[name] = {"class": known[name], **record}
            progress.update(task, description=name, advance=1)

    outcomes = {name: judge(record) for name, record in records.items()}
    if options.names:
        json.dump(records, sys.stdout, indent=1)
        print()
    else:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        versions = {module.__name__: module.__version__ for module in (kvarn_rs, transformers, torch)}
        versions["Python"] = platform.python_version()
        page = render(records, str(date.today()), versions)
        options.page.write_text(page, encoding="utf-8")
        print(f"{len(records)} classes: {sentence(page)}")
    wrong = {name: notes for name, (outcome, notes) in outcomes.items() if outcome == "wrong"}
    for name, notes in wrong.items():
        print(f"{OUTCOMES['wrong'][0].lower()}: {name}: {'; '.join(notes)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
