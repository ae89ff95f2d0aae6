"""Loading of a model folder with transformers, with errors that fit on one line."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedError
from .model_shape import read_config


def require(*modules: str) -> None:
    """Refuses to go on without these modules; the error has the command that installs them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"{' and '.join(missing)} not installed; run: pip install {' '.join(missing)}")


def quiet_transformers() -> None:
    """Silences transformers' warnings and progress bars, since the command writes to stderr."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read on import; the bar of GGUF conversion has no other switch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_folder(folder: Path) -> tuple[Any, Any]:
    """Loads the causal language model in `folder`, in the dtype it was saved in, and its tokenizer.

    Raises:
        ConfigError: there is no such folder, or the model in it cannot be loaded completely.
    """
    require("torch", "transformers")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give the folder of a model, or demo")
    read_config(folder)
    quiet_transformers()
    import transformers
    from safetensors import SafetensorError

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"cannot load the model in {folder}: {reason}") from error
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ConfigError(f"the weights in {folder} lack {len(missing)} tensors, {missing[0]} among them")
    return model.eval(), tokenizer
