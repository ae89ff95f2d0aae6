"""The verdict on a record of `probe`: the outcome that the table groups a class by, and notes."""

from __future__ import annotations

import re
from typing import Any

# Changed tokens in the middle of the prompt move the logits after it by more than this part of their spread, or the
# comparison says nothing about attention.
POWER = 1e-2

# outcome: (title, what it says), in the order of the table
OUTCOMES = {
    "fused": ("Fused", "Attention of every layer works on the pages."),
    "mixed": (
        "Fused in part",
        "Attention of some layers works on the pages. The notes name the others: transformers keeps what they hold,\n"
        "unquantized, or their pages are decoded first.",
    ),
    "fallback": ("By fallback", "Layers are paged, and their pages are decoded for every attention: memory is saved."),
    "unpaged": (
        "Not paged",
        "The tokens are right, and nothing is quantized: pages cannot hold what these layers keep, or the model keeps\n"
        "it elsewhere.",
    ),
    "refused": ("Refused", "`KvarnCache`, or the first forward with it, raises one of `kvarn_rs.errors`."),
    "untried": (
        "Not tried",
        "The tiny model cannot be built, or does not generate with transformers' own `DynamicCache`.",
    ),
    "wrong": (
        "Wrong",
        "Other tokens than with `DynamicCache`, an error that is not one of `kvarn_rs.errors`, or a process that did\n"
        "not end well. To be mended.",
    ),
}


def judge(record: dict[str, Any]) -> tuple[str, list[str]]:
    """(outcome, notes) of one class."""
    if "failed" in record:
        return "wrong", [record["failed"]]
    if record["built"] is not None:
        return "untried", [f"not built: {_short(record['built']['message'])}"]
    if faults := _faults(record):
        return "wrong", faults
    modes = record["modes"]
    compared = [name for name, mode in modes.items() if "error" not in mode["reference"]]
    runs = {name: modes[name]["raw"] for name in compared or modes}
    refused = {name: run for name, run in runs.items() if run.get("typed")}
    if len(refused) == len(runs):
        return "refused", [_short(next(iter(refused.values()))["message"])]
    if why := _why_not_tried(record):
        return "untried", [why]
    done = [run for run in runs.values() if "error" not in run]
    kinds = sorted({kind for run in done for kind in run["own_layers"]})
    warned = sorted({_short(said) for run in done for said in map(_said, run["warnings"])})
    notes = [f"unquantized: {', '.join(kinds)}"] if kinds else []
    notes += [said for said in warned if said]
    notes += [f"{name}: {run['error']}, {_short(run['message'])}" for name, run in refused.items()]
    notes += [f"{name}: not with `DynamicCache` either" for name in modes if name not in runs]
    left_pages = any(run["stats"]["dense_fallbacks"] for run in done)
    if any(run["stats"]["fused_calls"] for run in done):
        return ("mixed" if kinds or left_pages or refused else "fused"), notes
    if not warned:
        notes.append("without a warning")
    if "error" not in record["strict"]:
        notes.append("`strict` does not refuse it")
    return ("fallback" if any(run["stats"]["bytes_in_use"] for run in done) else "unpaged"), notes


def _why_not_tried(record: dict[str, Any]) -> str | None:
    references = [mode["reference"] for mode in record["modes"].values()]
    if all("error" in reference for reference in references):
        return f"`DynamicCache`: {_short(references[0]['message'])}"
    if all(reference["held"] == 0 for reference in references if "error" not in reference):
        return "keeps nothing in a `DynamicCache`"
    if (power := record["power"]) is not None and power < POWER:
        return f"attention hardly matters to the tiny model: the logits move by {power:.1e} of their spread"
    return None


def _faults(record: dict[str, Any]) -> list[str]:
    """Every way in which a class breaks the rule: right tokens, or a typed error, and then nothing changed."""
    runs = {name: mode["raw"] for name, mode in record["modes"].items()}
    runs |= {name: record[name] for name in ("int4", "strict", "other_cache") if name in record}
    found: dict[str, list[str]] = {}
    for name, run in runs.items():
        tried = "error" not in record["modes"].get(name, {}).get("reference", {})
        if "error" in run:
            if not run["typed"] and (tried or not run["constructed"]):
                found.setdefault(f"{run['error']}, {_short(run['message'])}", []).append(name)
            if run.get("left_as_it_was") is False:
                found.setdefault("refused, and its attention is changed", []).append(name)
        elif name != "int4" and tried and not run["equal"]:
            found.setdefault(f"other tokens{' behind a warning' if run.get('warnings') else ''}", []).append(name)
    return [f"{', '.join(names)}: {what}" for what, names in found.items()]


def _said(warning: str) -> str:
    """A warning without its name, its remedy, the layers that a note names anyway, and shapes, which are the run's."""
    what = warning.removeprefix("kvarn: ").split(" Remedy: ")[0]
    what = "; ".join(part for part in what.split("; ") if "are not paged and stay unquantized" not in part)
    return re.sub(r", \[[\d, ]+\] and \[[\d, ]+\]", "", what)


def _short(message: str) -> str:
    """The first sentence of a message, on one line of a table."""
    first = re.split(r"(?<=[a-z0-9\])'`])\. |\n", " ".join(message.split()))[0].rstrip(".")
    return (first if len(first) <= 160 else first[:157] + "...").replace("|", "/")
