"""docs/models.md: the classes by outcome, and back from the page to the classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .outcome import OUTCOMES, judge
from .probe import BLOCK_SIZE, NEW, PROMPT

HEADING = re.compile(r"^## (.+) \((\d+)\)$")
ROW = re.compile(r"^\| `([^`]+)` \| `([^`]*)` \|")


def render(records: dict[str, dict[str, Any]], command: str, date: str, versions: dict[str, str]) -> str:
    """The page. records: by model type, as `probe` makes them; versions: of the packages that they were made with."""
    rows: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for model_type, record in sorted(records.items()):
        outcome, notes = judge(record)
        rows[outcome].append(f"| `{model_type}` | `{record['class']}` | {'; '.join(notes)} |")
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Models",
        "",
        "Every class of transformers' causal language models with a `KvarnCache`, one tiny random model of each. Made by",
        f"`{command}` on {date}; {made_with}. Do not edit: run it again.",
        "",
        f"Each model generates {NEW} tokens from {PROMPT} with `raw` pages of {BLOCK_SIZE} tokens: one row, two rows with "
        "padding on the left, two turns, three",
        "beams. The tokens must equal those of eager attention with `DynamicCache`, the logits to rounding, and the model "
        "must still do the",
        "same with a cache of transformers afterwards. `int4` must run. Sizes are shrunk (heads of 16, windows of 16): a "
        "head of more than 256, or",
        "not a multiple of 16, falls back in a model of any class.",
        "",
        *_summary(rows),
    ]
    for outcome, (title, what) in OUTCOMES.items():
        if rows[outcome]:
            lines += ["", f"## {title} ({len(rows[outcome])})", "", what, ""]
            lines += ["| model type | class | notes |", "|---|---|---|", *rows[outcome]]
    return "\n".join(lines) + "\n"


def _summary(rows: dict[str, list[str]]) -> list[str]:
    counts = [f"| {title} | {len(rows[outcome])} |" for outcome, (title, _) in OUTCOMES.items()]
    return ["| | classes |", "|---|---|", *counts, f"| all | {sum(map(len, rows.values()))} |"]


def parse(page: str) -> dict[str, dict[str, str]]:
    """By the title of an outcome, model type and class of each row of a page.

    Raises:
        ValueError: a section that does not have as many rows as its heading says.
    """
    sections: dict[str, dict[str, str]] = {}
    said: dict[str, int] = {}
    for line in page.splitlines():
        if heading := HEADING.match(line):
            title = heading[1]
            sections[title], said[title] = {}, int(heading[2])
        elif row := ROW.match(line):
            sections[title][row[1]] = row[2]
    wrong = {title: (len(rows), said[title]) for title, rows in sections.items() if len(rows) != said[title]}
    if wrong:
        raise ValueError(f"rows, and what the heading says: {wrong}")
    return sections


def sentence(outcomes: Iterable[str]) -> str:
    """The counts, as the README has them."""
    all_outcomes = list(outcomes)
    counts = {outcome: all_outcomes.count(outcome) for outcome in OUTCOMES}
    return ", ".join(f"{count} {OUTCOMES[outcome][0].lower()}" for outcome, count in counts.items() if count)
