"""The writer and the parser of docs/models.md, which lists model classes by outcome."""

from __future__ import annotations

import re
from typing import Any

from .outcome import OUTCOMES, judge
from .probe import BLOCK_SIZE, NEW, PROMPT

HEADING = re.compile(r"^## (.+) \((\d+)\)$")
ROW = re.compile(r"^\| `([^`]+)` \| `([^`]*)` \|")
INTRODUCTION = """\
# Models

How a `KvarnCache` works with every causal language model class of transformers, tried on tiny random models. Made by
`just models` on {date}, {made_with}. Do not edit: run it again.

Each model generates {new} tokens from {prompt} with `raw` pages of {block_size} tokens: one row; two rows, one of them
padded on the left; two turns; three beams. Tokens must equal those of eager attention with `DynamicCache`, and logits
to rounding (beams: tokens alone). A model that a `KvarnCache` was made for must do the same with a cache of
transformers afterwards, and `int4` must run; its accuracy is not compared, since random weights say nothing of it.

Sizes are shrunk (except Gemma 4's heads of 512), and other settings are a class's defaults, plus kinds of layers that
its models have and its default lacks. In every class, heads whose size is not a multiple of 16, or above 256, stay
unquantized, with a warning.
"""


def render(records: dict[str, dict[str, Any]], date: str, versions: dict[str, str]) -> str:
    """Renders the page from the records of `probe`, by model type, and the versions of the packages used."""
    rows: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for model_type, record in sorted(records.items()):
        outcome, notes = judge(record)
        rows[outcome].append(f"| `{model_type}` | `{record['class']}` | {'; '.join(notes)} |".replace("|  |", "| |"))
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts = {"date": date, "made_with": made_with, "new": NEW, "prompt": PROMPT, "block_size": BLOCK_SIZE}
    lines = [INTRODUCTION.format(**facts), *_summary(rows)]
    for outcome, (title, what) in OUTCOMES.items():
        if rows[outcome]:
            lines += ["", f"## {title} ({len(rows[outcome])})", "", what, ""]
            lines += ["| model type | class | notes |", "|---|---|---|", *rows[outcome]]
    return "\n".join(lines) + "\n"


def _summary(rows: dict[str, list[str]]) -> list[str]:
    counts = [f"| {title} | {len(rows[outcome])} |" for outcome, (title, _) in OUTCOMES.items()]
    return ["| | classes |", "|---|---|", *counts, f"| all | {sum(map(len, rows.values()))} |"]


def parse(page: str) -> dict[str, dict[str, str]]:
    """Parses a page: the class of each model type, by the title of its outcome.

    Raises:
        ValueError: a section that does not have as many rows as its heading says.
    """
    sections: dict[str, dict[str, str]] = {}
    said: dict[str, int] = {}
    rows: dict[str, str] = {}
    for line in page.splitlines():
        if heading := HEADING.match(line):
            rows = sections[heading[1]] = {}
            said[heading[1]] = int(heading[2])
        elif row := ROW.match(line):
            rows[row[1]] = row[2]
    wrong = {title: (len(rows), said[title]) for title, rows in sections.items() if len(rows) != said[title]}
    if wrong:
        raise ValueError(f"rows, and what the heading says: {wrong}")
    return sections


def sentence(page: str) -> str:
    """The counts of a page, as a phrase of the README."""
    return ", ".join(f"{len(rows)} {title.lower()}" for title, rows in parse(page).items())
