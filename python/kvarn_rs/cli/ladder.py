"""The ladder: memory and quality of every quantized format on one prompt.

JSON: ``[{"format", "bytes_per_token", "bytes_per_token_at_rest", "bytes_in_use", "memory_saved", "kl_mean",
"kl_last_quarter", "same_top1", "calibrated"}]``, from the largest format to the smallest, then the codecs.

All caches are fed the same tokens as an unquantized one (`compare.py` documents how, and the quality metrics).
`kl_last_quarter` is the mean divergence over the last quarter of the positions, which shows whether errors grow.
`bytes_in_use` is measured after all tokens, `bytes_per_token` is `bytes_in_use` per token, and `memory_saved` is the
share of the unquantized cache's bytes that is saved. `bytes_per_token_at_rest` is computed from the layout of full,
sealed blocks. Codecs are other schemes, which quantize unquantized pages in place: their bytes in use and calibration
are null. The codecs of the KVarN paper and of KIVI leave the first and the last block unquantized.
"""

from __future__ import annotations

from typing import Any

from .. import CODECS, FORMATS, _core
from ..hf.layer import KvarnLayer
from .compare import Scores
from .console import Console
from .runs import held_bytes


def ladder_names(codecs: bool) -> list[str]:
    """Names of the quantized formats, and of the codecs if requested."""
    return [*(name for name in FORMATS if name != "raw"), *(CODECS if codecs else ())]


def ladder(scores: dict[str, Scores], reference_bytes: int, block_size: int) -> list[dict[str, Any]]:
    """The rows, with the keys listed in the module docstring."""
    return [_row(name, each, reference_bytes, block_size) for name, each in scores.items()]


def _row(name: str, scores: Scores, reference_bytes: int, block_size: int) -> dict[str, Any]:
    cache = scores.cache
    if name in CODECS:
        groups = [layer.group for layer in cache.layers if isinstance(layer, KvarnLayer)]
        cores = [group.core for group in groups if group is not None]
        at_rest = sum(
            core.num_kv_heads * _core.codec_bytes_per_token(name, core.head_dim, block_size) for core in cores
        )
        bytes_in_use = calibrated = None
    else:
        stats = cache.stats()
        at_rest, bytes_in_use, calibrated = stats["bytes_per_token"], held_bytes(cache), stats["calibrated"]
    return {
        "format": name,
        "bytes_per_token": None if bytes_in_use is None else bytes_in_use / cache.get_seq_length(),
        "bytes_per_token_at_rest": at_rest,
        "bytes_in_use": bytes_in_use,
        "memory_saved": None if bytes_in_use is None else 1 - bytes_in_use / reference_bytes,
        "kl_mean": scores.kl_mean,
        "kl_last_quarter": scores.kl_last_quarter,
        "same_top1": scores.same_top1,
        "calibrated": calibrated,
    }


def print_ladder(rows: list[dict[str, Any]], reference: str, console: Console) -> None:
    """Prints the rows as a table; `reference` is the name of the unquantized cache."""
    console.line()
    console.table(
        ("format", "at rest", "held", "tokens/GiB", "saved", "mean KL", "last quarter", "same top-1", "calibrated"),
        [
            (
                row["format"],
                f"{row['bytes_per_token_at_rest']:,.0f}",
                f"{row['bytes_per_token']:,.0f}" if row["bytes_per_token"] is not None else "-",
                tokens_per_gib(row["bytes_per_token"]),
                f"{row['memory_saved']:.1%}" if row["memory_saved"] is not None else "-",
                f"{row['kl_mean']:.2e}",
                f"{row['kl_last_quarter']:.2e}",
                f"{row['same_top1']:.2%}",
                row["calibrated"] or "-",
            )
            for row in rows
        ],
    )
    console.line()
    console.line(
        "at rest: bytes of a token in full sealed blocks; held: bytes in use per token; saved and KL divergence: "
        f"against {reference}"
    )


def tokens_per_gib(bytes_per_token: float | None) -> str:
    """Tokens per GiB as text; `-` where that is unknown or no layer is paged."""
    return f"{2**30 / bytes_per_token:,.0f}" if bytes_per_token else "-"
