"""`kvarn inspect`: what a file that kvarn wrote holds. Every byte of it is checked on the way.

JSON: ``{"kind", "file", "bytes", "fingerprint", "model", "query_tokens", "groups": [{"layers": [int], "num_kv_heads",
"head_dim"}], "heads", "rotated_heads"}``

`kind` is "calibration", the only one so far. `query_tokens` is what every layer has seen at least. `rotated_heads` of
the `heads` have the smaller loss scale, the mean of what rounding a channel is expected to cost, in the rotated frame;
which frame a tile is kept in is decided tile by tile.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .console import Console, add_output_options
from .sizes import format_bytes


def add_parser(commands: Any) -> None:
    """Adds `inspect` to the command line."""
    parser = commands.add_parser(
        "inspect",
        help="what a calibration file holds",
        description="Checks a calibration file and says what it holds.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a file of `kvarn calibrate`")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Reads, checks, and prints."""
    from .. import Calibration

    calibration = Calibration.load(arguments.file)
    layers = calibration.layers()
    groups: dict[tuple[int, int], list[int]] = {}
    for layer in layers:
        groups.setdefault((layer["num_kv_heads"], layer["head_dim"]), []).append(layer["layer"])
    report = {
        "kind": "calibration",
        "file": str(arguments.file),
        "bytes": arguments.file.stat().st_size,
        "fingerprint": calibration.fingerprint,
        "model": calibration.model,
        "query_tokens": min(layer["query_tokens"] for layer in layers),
        "groups": [
            {"layers": members, "num_kv_heads": heads, "head_dim": head_dim}
            for (heads, head_dim), members in groups.items()
        ],
        "heads": sum(layer["num_kv_heads"] for layer in layers),
        "rotated_heads": sum(layer["rotated_heads"] for layer in layers),
    }
    console.result(report)
    console.line(f"calibration of {report['model'] or 'a model without a name'}, {format_bytes(report['bytes'])}")
    console.line(f"fingerprint {report['fingerprint']}")
    console.line(f"from {report['query_tokens']:,} query tokens")
    for group in report["groups"]:
        console.line(
            f"layers {ranges(group['layers'])}: {group['num_kv_heads']} kv heads of head_dim {group['head_dim']}"
        )
    console.line(f"{report['rotated_heads']} of {report['heads']} heads have the smaller loss scale when rotated")
    return 0


def ranges(numbers: list[int]) -> str:
    """Ascending numbers, runs of them by their ends: `0-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
