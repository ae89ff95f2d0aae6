"""What a record of `probe` means: the one word that the table sorts a class by, and what else is to be said of it."""

from __future__ import annotations

import re
from typing import Any

# outcome: (title, what it says), in the order of the table
OUTCOMES = {
    "fused": ("Fused", "Attention of every layer works on the pages."),
    "mixed": (
        "Fused in part",
        "Attention of some layers works on the pages; the others are named: they stay transformers' own, unquantized, or "
        "their pages are decoded first.",
    ),
    "fallback": (
        "By fallback",
        "The tokens are right, and no attention works on pages: pages are decoded first, or cannot hold this K and V.",
    ),
    "unpaged": ("Not paged", "The tokens are right, and nothing is quantized: no layer is one that pages can hold."),
    "refused": ("Refused", "`KvarnCache`, or the first forward with it, raises one of `kvarn_rs.errors`."),
    "unrunnable": (
        "Not tried",
        "The tiny model cannot be built, or does not generate with transformers' own `DynamicCache`.",
    ),
    "wrong": (
        "Wrong",
        "Other tokens than with `DynamicCache`, or an error that is not one of `kvarn_rs.errors`. To be mended.",
    ),
}


def judge(record: dict[str, Any]) -> tuple[str, list[str]]:
    """(outcome, notes) of one class."""
    if why := _why_not_tried(record):
        return "unrunnable", [why]
    modes = {name: mode for name, mode in record["modes"].items() if "error" not in mode["reference"]}
    runs = {name: mode["raw"] for name, mode in modes.items()}
    notes = [f"{name}: not with `DynamicCache` either" for name in record["modes"] if name not in modes]
    if faults := _faults(record, runs):
        return "wrong", faults
    refused = {name: run for name, run in runs.items() if "error" in run}
    notes += [f"{name}: {run['error']}, {_short(run['message'])}" for name, run in refused.items()]
    if len(refused) == len(runs):
        return "refused", [_short(next(iter(refused.values()))["message"])]
    done = [run for name, run in runs.items() if name not in refused]
    own_layers = sorted({kind for run in done for kind in run["own_layers"]})
    warned = sorted({_short(said) for run in done for said in map(_said, run["warnings"])})
    notes = [f"{kind} layers stay transformers' own" for kind in own_layers] + warned + notes
    left_pages = any(run["stats"]["dense_fallbacks"] for run in done)
    if any(run["stats"]["fused_calls"] for run in done):
        return ("mixed" if own_layers or left_pages or refused else "fused"), notes
    if not warned:
        notes.append("without a warning")
    if "error" not in record["strict"]:
        notes.append("`strict` does not refuse it")
    return ("fallback" if left_pages else "unpaged"), notes


def _why_not_tried(record: dict[str, Any]) -> str | None:
    if "failed" in record:
        return record["failed"]
    if record["built"] is not None:
        return f"not built: {_short(record['built']['message'])}"
    failures = [mode["reference"] for mode in record["modes"].values()]
    if all("error" in failure for failure in failures):
        return f"`DynamicCache`: {_short(failures[0]['message'])}"
    if all(failure.get("held") == 0 for failure in failures):
        return "keeps nothing in a `DynamicCache`"
    return None


def _faults(record: dict[str, Any], runs: dict[str, Any]) -> list[str]:
    """Every way in which a class breaks the rule: right tokens, or a typed error."""
    after = {"a cache of transformers, after `KvarnCache(model)`": record["other_cache"]}
    checked = {**runs, "strict": record["strict"], **after}
    found: dict[str, list[str]] = {}
    for name, run in checked.items():
        if "error" in run:
            if not run["typed"]:
                found.setdefault(f"{run['error']}, {_short(run['message'])}", []).append(name)
        elif not run["equal"]:
            notice = " behind a warning" if run.get("warnings") else ""
            found.setdefault(f"other tokens{notice}", []).append(name)
    int4 = record["int4"]
    if "error" in int4 and not int4["typed"]:
        found.setdefault(f"{int4['error']}, {_short(int4['message'])}", []).append("int4")
    return [f"{', '.join(names)}: {what}" for what, names in found.items()]


def _said(warning: str) -> str:
    """A warning without its name, its remedy, and the shapes that differ from run to run."""
    return re.sub(
        r"\[\d+, (\d+), \d+, (\d+)\]", r"[..., \1, ..., \2]", warning.removeprefix("kvarn: ").split(" Remedy: ")[0]
    )


def _short(message: str) -> str:
    """The first sentence of a message, on one line of a table."""
    first = re.split(r"(?<=[a-z0-9\])'`])\. |\n", " ".join(message.split()))[0].rstrip(".")
    return (first if len(first) <= 160 else first[:157] + "...").replace("|", "/")
