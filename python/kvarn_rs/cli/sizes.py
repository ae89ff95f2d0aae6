"""Parsing and formatting of command-line values: sizes (`80GiB`), counts (`32k`), lists (`int8,bf16`)."""

from __future__ import annotations

import argparse
import re

_BYTE_UNITS = {"": 1, "b": 1}
_COUNT_UNITS = {"": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _BYTE_UNITS[f"{_letter}b"] = 1000**_power
    _BYTE_UNITS[f"{_letter}ib"] = _BYTE_UNITS[_letter] = 1024**_power
    _COUNT_UNITS[_letter] = 1024**_power

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_LIMIT = 2**63


def _scaled(text: str, units: dict[str, int], least: int, expected: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    whole, _, fraction = match[1].partition(".")
    value = int(whole) * factor + int(fraction or 0) * factor // 10 ** len(fraction)
    if not least <= value < _LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: it must be at least {least} and below 2^63")
    return value


def parse_bytes(text: str) -> int:
    """Parses a size in bytes: `GiB`, `MiB` (and `G`, `M`) are powers of 1024, `GB`, `MB` of 1000."""
    return _scaled(text, _BYTE_UNITS, 0, "a size; write for example 80GiB, 512MiB or 80GB")


def parse_count(text: str) -> int:
    """Parses a count of tokens or other things; `k` is 1024, so `32k` is 32,768."""
    return _scaled(text, _COUNT_UNITS, 1, "a number of at least 1; write for example 4096 or 32k")


def parse_names(text: str) -> list[str]:
    """Parses a comma-separated list; repeats are dropped."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected at least one name")
    return list(dict.fromkeys(names))


def format_bytes(count: float) -> str:
    """A size with four significant digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"


def format_count(count: int) -> str:
    """A count: `32768` as `32k`, other numbers with thousands separators."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"
