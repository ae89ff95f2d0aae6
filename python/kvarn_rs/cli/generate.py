"""`kvarn generate`: generates text with a kvarn cache, and compares it with the unquantized cache.

JSON: ``{"format", "text", "tokens", "prompt_tokens", "bytes_per_token", "bytes_in_use", "dense_fallbacks",
"calibrated", "decode_tokens_per_s", "prefill_s", "stats"}``; with ``--compare``, ``"compare": {"reference", "kl_mean",
"same_top1", "positions", "agreement_tokens", "reference_bytes_per_token", "reference_bytes_in_use",
"reference_decode_tokens_per_s", "reference_prefill_s"}``; and with ``--ladder``, ``"ladder"``, a list.

`tokens` is the number of generated tokens. Bytes are measured after generation: of the cache's blocks (partial ones in
full) and of the tensors of layers that are not paged, in total and per token in the cache; for the reference, of its
tensors. `decode_tokens_per_s` is null if fewer than two tokens were generated. `stats` is `KvarnCache.stats()`;
`compare.py` documents `compare`, and `ladder.py` documents `ladder`.

Every cache uses the model's calibration file if there is one; otherwise each learns from its own prompt, never from an
earlier run.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnknownFormatError
from .console import Console, add_output_options
from .demo import load_demo
from .models import load_folder, require
from .sizes import format_bytes, parse_count


def add_parser(commands: Any) -> None:
    """Adds `generate` to the command line."""
    parser = commands.add_parser(
        "generate",
        help="generate text with a quantized cache",
        description="Generate text greedily with a model whose keys and values are in a kvarn cache. Runs on the CPU.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt")
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file; - is standard input")
    parser.add_argument("--model", default="demo", metavar="DIR", help="a transformers model's folder (default: demo)")
    parser.add_argument("--format", default="int4", help="cache format (default: int4)")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="a file made by `kvarn calibrate` (default: the model's file in the cache folder, if there is one)",
    )
    parser.add_argument(
        "--max-new-tokens", type=parse_count, default=64, metavar="N", help="tokens to generate (default: 64)"
    )
    parser.add_argument("--block-size", type=parse_count, default=128, help="tokens per block (default: 128)")
    parser.add_argument("--raw", action="store_true", help="do not apply the model's chat template to the prompt")
    parser.add_argument(
        "--compare", action="store_true", help="compare memory, speed and quality with the unquantized cache"
    )
    parser.add_argument(
        "--ladder", action="store_true", help="compare memory and quality of every quantized format on the same tokens"
    )
    parser.add_argument("--codecs", action="store_true", help="with --ladder: also other published schemes")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Runs the command."""
    prompt = read_prompt(arguments)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("the prompt is not UTF-8 text")
    if not prompt.strip():
        raise ConfigError("the prompt is empty: there is nothing to continue")
    if arguments.codecs and not arguments.ladder:
        raise ConfigError("--codecs adds rows to the ladder: give --ladder too")
    require("torch", "transformers")
    check_format(arguments.format, arguments.block_size)
    if arguments.model == "demo":
        model, tokenizer = load_demo(console)
    else:
        with console.progress(f"loading {arguments.model}"):
            model, tokenizer = load_folder(Path(arguments.model))
    prompt_ids = encode(tokenizer, prompt, arguments.raw)
    check_prompt(model, prompt_ids, arguments.max_new_tokens)

    from .runs import attention_name, greedy, held_bytes, warm_up

    reference_attention = attention_name(model)
    make_cache = cache_maker(model, arguments, console)
    warm_up(model, prompt_ids)
    cache = make_cache(arguments.format)
    stream = None if console.json else tokenizer
    generated = greedy(model, prompt_ids, cache, arguments.max_new_tokens, stream)
    stats = cache.stats()
    bytes_in_use = held_bytes(cache)
    payload: dict[str, Any] = {
        "format": arguments.format,
        "text": tokenizer.decode(generated.tokens, skip_special_tokens=True),
        "tokens": len(generated.tokens),
        "prompt_tokens": prompt_ids.shape[1],
        "bytes_per_token": bytes_in_use / cache.get_seq_length(),
        "bytes_in_use": bytes_in_use,
        "dense_fallbacks": stats["dense_fallbacks"],
        "calibrated": stats["calibrated"],
        "decode_tokens_per_s": generated.decode_tokens_per_s,
        "prefill_s": generated.prefill_s,
        "stats": stats,
    }
    if arguments.compare or arguments.ladder:
        payload |= compared(model, prompt_ids, generated, make_cache, reference_attention, arguments, console)
    console.result(payload)
    if arguments.compare:
        _print_comparison(payload, console)
    elif not console.json:
        console.note(
            f"[{arguments.format}: {_seconds(payload['prefill_s'])} for {payload['prompt_tokens']} prompt tokens, then "
            f"{_speed(payload['decode_tokens_per_s'])}; cache {format_bytes(payload['bytes_in_use'])}]"
        )
    if arguments.ladder:
        from .compare import reference_name
        from .ladder import print_ladder

        print_ladder(payload["ladder"], reference_name(model), console)
    return 0


def cache_maker(model: Any, arguments: argparse.Namespace, console: Console) -> Callable[[str], Any]:
    """A function that makes a cache, given the name of its format or codec.

    Each cache has a calibration of its own, unless the model has a calibration file.

    Raises:
        CalibrationError: the given file cannot be read, is damaged, or is of another model.
    """
    from .. import CODECS, Calibration
    from ..hf import KvarnCache
    from ..hf.calibration import resolve

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = resolve(model, arguments.calibration)
    for warning in caught:  # the file in the cache folder is unusable
        console.warn(str(warning.message))

    def make_cache(name: str) -> Any:
        return KvarnCache(
            model,
            "raw" if name in CODECS else name,
            block_size=arguments.block_size,
            calibration=found if found.state == "file" else Calibration(),
            codec=name if name in CODECS else None,
        )

    return make_cache


def compared(
    model: Any,
    prompt_ids: Any,
    generated: Any,
    make_cache: Callable[[str], Any],
    reference_attention: str,
    arguments: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    """The entries `compare` and `ladder` of the result, as far as requested. Each cache is scored once for both."""
    from .compare import compare, score
    from .ladder import ladder, ladder_names

    rungs = ladder_names(arguments.codecs) if arguments.ladder else []
    names = [arguments.format, *rungs] if arguments.compare else rungs
    caches = {name: make_cache(name) for name in dict.fromkeys(names)}
    scores, reference_bytes = score(model, prompt_ids, generated.tokens, caches, reference_attention, console)
    found: dict[str, Any] = {}
    if arguments.compare:
        its_scores = scores[arguments.format]
        found["compare"] = compare(model, prompt_ids, generated, its_scores, reference_attention, console)
    if arguments.ladder:
        found["ladder"] = ladder({name: scores[name] for name in rungs}, reference_bytes, arguments.block_size)
    return found


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt, from the argument, a file or standard input."""
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise ConfigError("give either a PROMPT or --prompt-file FILE")
    if arguments.prompt is not None:
        return arguments.prompt
    try:
        if arguments.prompt_file == "-":
            return sys.stdin.read()
        return Path(arguments.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {arguments.prompt_file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{arguments.prompt_file} is not UTF-8 text: {error}") from error


def check_format(name: str, block_size: int) -> None:
    """Refuses settings that are invalid for every model, before a model is loaded."""
    from .. import FORMATS, _core

    if name not in FORMATS:
        raise UnknownFormatError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    _core.block_bytes(name, 16, block_size)


def encode(tokenizer: Any, prompt: str, raw: bool) -> Any:
    """Token ids [1, T] of the prompt, in the model's chat template unless it has none or `raw` is set."""
    if tokenizer.chat_template and not raw:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    else:
        prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if prompt_ids.shape[1] == 0:
        raise ConfigError("the prompt is empty: there is nothing to continue")
    return prompt_ids.long()


def check_prompt(model: Any, prompt_ids: Any, new_tokens: int) -> None:
    """Refuses token ids outside the model's vocabulary, and more tokens than it has positions for."""
    prompt_tokens = prompt_ids.shape[1]
    known = model.get_input_embeddings().num_embeddings
    if prompt_ids.max() >= known:
        raise ConfigError(
            f"the tokenizer made token {prompt_ids.max()}, the model knows {known}: not one model's folder"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones make {prompt_tokens + new_tokens}: the "
            f"model's limit is {limit} (max_position_embeddings)"
        )


def _speed(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _print_comparison(payload: dict[str, Any], console: Console) -> None:
    from .ladder import tokens_per_gib

    compared = payload["compare"]
    rows = [
        (
            name,
            f"{per_token:,.0f}",
            format_bytes(in_use),
            tokens_per_gib(per_token),
            _seconds(prefill),
            _speed(speed),
        )
        for name, per_token, in_use, prefill, speed in (
            (
                payload["format"],
                payload["bytes_per_token"],
                payload["bytes_in_use"],
                payload["prefill_s"],
                payload["decode_tokens_per_s"],
            ),
            (
                compared["reference"],
                compared["reference_bytes_per_token"],
                compared["reference_bytes_in_use"],
                compared["reference_prefill_s"],
                compared["reference_decode_tokens_per_s"],
            ),
        )
    ]
    console.line()
    console.table(("cache", "bytes/token", "in all", "tokens/GiB", "prefill", "decode"), rows)
    console.line()
    console.line(
        f"{payload['prompt_tokens']:,} prompt tokens, {payload['tokens']:,} generated, "
        f"{payload['dense_fallbacks']} dense fallbacks"
    )
    console.line(
        f"mean KL divergence {compared['kl_mean']:.2e} and same likeliest token {compared['same_top1']:.2%}, over "
        f"{compared['positions']:,} positions"
    )
    console.line(f"greedy tokens until the first difference: {compared['agreement_tokens']} of {payload['tokens']}")
