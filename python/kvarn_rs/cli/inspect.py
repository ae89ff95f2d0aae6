"""`kvarn inspect`: checks a cache or calibration file and summarizes its content.

JSON of a calibration: ``{"kind", "file", "bytes", "fingerprint", "model", "query_tokens", "groups": [{"layers": [int],
"num_kv_heads", "head_dim"}], "heads", "rotated_heads"}``

`kind` is "calibration". `query_tokens` is the smallest number of tokens that a layer was calibrated from.
`rotated_heads` is the number of `heads` with the smaller loss scale (the mean expected rounding error of a channel) in
the rotated frame; the frame of each tile is chosen when it is sealed.

JSON of a cache: ``{"kind", "file", "bytes", "model_type", "fingerprint", "caches": [{"format", "dtype", "layers":
[int], "num_layers", "num_kv_heads", "head_dim", "block_size", "num_blocks", "num_open_pages", "window", "sequences":
[{"id", "tokens", "first_held"}], "sealed_blocks", "open_blocks", "tile_bytes", "page_bytes", "bytes_per_token"}],
"sealed_blocks", "open_blocks", "tile_bytes", "page_bytes", "other_bytes", "bytes_per_token"}``

`kind` is "cache". A file has one entry of `caches` for each group of layers of one shape. `layers` are their indices in
the model; they, `model_type` and `fingerprint` are null if the file does not have them. The tokens of a sequence before
`first_held` were released by the window. Blocks shared by sequences count once; `open_blocks` are pages,
`sealed_blocks` are tiles. `bytes_per_token` is for a full block at rest, over all layers; `other_bytes` are the header
and block tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .console import Console, add_output_options
from .sizes import format_bytes

_SHOWN_SEQUENCES = 8


def add_parser(commands: Any) -> None:
    """Adds `inspect` to the command line."""
    parser = commands.add_parser(
        "inspect",
        help="check and summarize a cache or calibration file",
        description="Check a cache file or a calibration file and summarize its content.",
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="a file written by `kvarn calibrate` or by a cache's `save`"
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Runs the command."""
    from .. import _core

    if _core.file_kind(arguments.file) == "kvarn cache":
        _show_cache(arguments.file, console)
    else:
        _show_calibration(arguments.file, console)
    return 0


def _show_cache(file: Path, console: Console) -> None:
    from .. import _core

    found, note = _core.inspect_caches(file)
    model_type, fingerprint, layers_of = _read_note(note)
    caches = [
        {
            **cache,
            "layers": layers_of.get(index),
            "sequences": [
                {"id": sequence, "tokens": tokens, "first_held": first_held}
                for sequence, tokens, first_held in cache["sequences"]
            ],
        }
        for index, cache in enumerate(found)
    ]
    sums = ("sealed_blocks", "open_blocks", "tile_bytes", "page_bytes", "bytes_per_token")
    totals = {name: sum(cache[name] for cache in caches) for name in sums}
    num_bytes = file.stat().st_size
    report = {
        "kind": "cache",
        "file": str(file),
        "bytes": num_bytes,
        "model_type": model_type,
        "fingerprint": fingerprint,
        "caches": caches,
        **totals,
        "other_bytes": num_bytes - totals["tile_bytes"] - totals["page_bytes"],
    }
    console.result(report)
    console.line(f"cache of {f'a {model_type} model' if model_type else 'a model'}, {format_bytes(num_bytes)}")
    if fingerprint:
        console.line(f"fingerprint {fingerprint}")
    for cache in caches:
        layers = f"layers {ranges(cache['layers'])}" if cache["layers"] else f"{cache['num_layers']} layers"
        window = f", window {cache['window']:,}" if cache["window"] else ""
        console.line(
            f"{layers}: {cache['format']}, {cache['num_kv_heads']} kv heads of head_dim {cache['head_dim']}, "
            f"blocks of {cache['block_size']}{window}"
        )
        lengths = [f"{sequence['tokens']:,}" for sequence in cache["sequences"]]
        more = f" and {len(lengths) - _SHOWN_SEQUENCES} more" if len(lengths) > _SHOWN_SEQUENCES else ""
        tokens = f"{', '.join(lengths[:_SHOWN_SEQUENCES])}{more} tokens" if lengths else "no tokens"
        console.line(f"  {len(lengths)} sequence{'' if len(lengths) == 1 else 's'}: {tokens}")
        console.line(f"  {cache['sealed_blocks']} blocks sealed, {cache['open_blocks']} open")
    console.line(
        f"tiles {format_bytes(report['tile_bytes'])}, pages {format_bytes(report['page_bytes'])}, "
        f"header and tables {format_bytes(report['other_bytes'])}"
    )
    console.line(f"{report['bytes_per_token']:,.1f} bytes a token at rest")


def _read_note(note: str) -> tuple[str | None, str | None, dict[int, list[int]]]:
    """The note that `kvarn_rs.hf` writes: model type, fingerprint, and layers by cache; empty for other notes."""
    try:
        found = json.loads(note)
        if found["writer"] != "kvarn_rs.hf":
            return None, None, {}
        layers_of = {group["cache"]: [int(layer) for layer in group["layers"]] for group in found["groups"]}
        return str(found["model_type"]), found["fingerprint"] and str(found["fingerprint"]), layers_of
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None, None, {}


def _show_calibration(file: Path, console: Console) -> None:
    from .. import Calibration

    calibration = Calibration.load(file)
    layers = calibration.layers()
    groups: dict[tuple[int, int], list[int]] = {}
    for layer in layers:
        groups.setdefault((layer["num_kv_heads"], layer["head_dim"]), []).append(layer["layer"])
    report = {
        "kind": "calibration",
        "file": str(file),
        "bytes": file.stat().st_size,
        "fingerprint": calibration.fingerprint,
        "model": calibration.model,
        "query_tokens": min(layer["query_tokens"] for layer in layers),
        "groups": [
            {"layers": members, "num_kv_heads": heads, "head_dim": head_dim}
            for (heads, head_dim), members in groups.items()
        ],
        "heads": sum(layer["num_kv_heads"] for layer in layers),
        "rotated_heads": sum(layer["rotated_heads"] or 0 for layer in layers),
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


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as text, with runs as ranges: `0-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
