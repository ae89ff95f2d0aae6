"""`kvarn calibrate`: makes a model's calibration file, in the folder where caches look for it.

JSON: ``{"model", "file", "bytes", "fingerprint", "query_tokens", "layers", "heads", "seconds"}``

`layers` and `heads` are counts; `heads` are key/value heads over all layers. `seconds` covers the forward over the
text, factoring and writing, but not loading the model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .console import Console, add_output_options
from .demo import load_demo
from .models import load_folder, require
from .sizes import format_bytes


def add_parser(commands: Any) -> None:
    """Adds `calibrate` to the command line."""
    parser = commands.add_parser(
        "calibrate",
        help="make a model's calibration file",
        description="Run a model over up to 2,048 tokens of text and save the statistics of its queries and keys that "
        "sealing uses. Runs on the CPU.",
    )
    parser.add_argument("model", metavar="MODEL", help="a transformers model's folder, or demo")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="a text of at least 128 tokens (default: a built-in text)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="output file (default: where caches look for it)")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Runs the command."""
    text = None if arguments.text is None else read_text(arguments.text)
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise ConfigError(f"{arguments.out.parent} is not a folder: nothing can be written there")
    require("torch", "transformers")
    if arguments.model == "demo":
        model, tokenizer = load_demo(console)
    else:
        with console.progress(f"loading {arguments.model}"):
            model, tokenizer = load_folder(Path(arguments.model))

    from .. import Calibration
    from .._core import QUERY_TOKENS
    from ..hf import calibrate
    from ..hf.calibration import calibration_path

    file = arguments.out or calibration_path(model)
    start = time.perf_counter()
    with console.progress("calibrating", total=QUERY_TOKENS) as advance:
        calibrate(model, text, tokenizer=tokenizer, path=arguments.out, progress=advance)
    seconds = time.perf_counter() - start
    saved = Calibration.load(file)  # as a cache will load it
    layers = saved.layers()
    report = {
        "model": saved.model,
        "file": str(file),
        "bytes": file.stat().st_size,
        "fingerprint": saved.fingerprint,
        "query_tokens": min(layer["query_tokens"] for layer in layers),
        "layers": len(layers),
        "heads": sum(layer["num_kv_heads"] for layer in layers),
        "seconds": seconds,
    }
    console.result(report)
    console.line(
        f"{report['query_tokens']:,} tokens, {report['layers']} layers of {report['heads']} kv heads in all, "
        f"{seconds:.1f} s"
    )
    console.line(f"{file} ({format_bytes(report['bytes'])})")
    return 0


def read_text(file: Path) -> str:
    """Reads a UTF-8 text file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error}") from error
