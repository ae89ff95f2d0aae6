"""Which calibration belongs to a model, where is it kept, and how is it made ahead?

A calibration is shared by all caches of a model object. Without a file it learns from the model's first tokens; a file
made ahead makes results the same from the first token on. Files are named by the model's *fingerprint*: another model,
or the same loaded again after training, finds none. A model object keeps the calibration that its caches began with.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kvarn_rs import Calibration
from kvarn_rs._core import FIRST_TOKENS, QUERY_TOKENS
from kvarn_rs.errors import CalibrationError, ConfigError

# What a config says of how and by whom a model is run, not of what it computes.
_VOLATILE = frozenset(
    (
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
_SAMPLED_ROWS = 4  # of each weight, evenly spaced
_SAMPLED_COLUMNS = 64  # of each of them
_CHUNK_TOKENS = 512  # of a calibration's forward: bounds what its activations take

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_lock = threading.Lock()
_of_model: WeakKeyDictionary[Any, Calibration] = WeakKeyDictionary()
_warned: set[Path] = set()


def fingerprint(model: Any) -> str:
    """Identifies a decoder by its text config and a sample of its weights, in a fraction of a second.

    The same for the same weights in another dtype that holds them exactly (float32 from bfloat16 files), with or
    without a language model head, and under any attention implementation. A weight that cannot be read as numbers
    (on no device, or packed by another library) takes part by its name and shape alone.

    Returns:
        64 hexadecimal digits of a sha256.

    Raises:
        ConfigError: not a transformers model.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not hasattr(config, "get_text_config"):
        raise ConfigError(f"expected a transformers model, not {type(model).__name__}")
    find_decoder: Any = getattr(model, "get_decoder", None)
    decoder = model if find_decoder is None else find_decoder()
    digest = hashlib.sha256()
    digest.update(json.dumps(_lasting(config.get_text_config(decoder=True).to_dict()), sort_keys=True).encode())
    samples = []
    for name, weight in sorted(decoder.named_parameters(), key=lambda entry: entry[0]):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        samples += _sample(weight.detach())
    if samples:
        digest.update(torch.cat(samples).numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _lasting(value: Any) -> Any:
    """A config's part without what may change: keys of `_VOLATILE`, private ones, token ids, those without a value."""
    if isinstance(value, dict):
        return {
            str(key): _lasting(entry)
            for key, entry in value.items()
            if entry is not None and key not in _VOLATILE and not re.match(r"_|.*_token_id$", str(key))
        }
    if isinstance(value, (list, tuple)):
        return [_lasting(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str)) else repr(value)


def _sample(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some elements of a weight as float32, whatever its strides; none of one that has no memory or is not dense."""
    if weight.is_meta or weight.numel() == 0 or not weight.is_floating_point():
        return
    try:
        for part in range(_SAMPLED_ROWS):
            row = weight
            while row.dim() > 1:
                row = row[(row.shape[0] - 1) * part // (_SAMPLED_ROWS - 1)]
            row = row.reshape(-1)
            start = max(row.shape[0] - _SAMPLED_COLUMNS, 0) * part // (_SAMPLED_ROWS - 1)
            yield row[start : start + _SAMPLED_COLUMNS].to("cpu", torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):  # a quantized weight that cannot be indexed
        return


def calibration_folder() -> Path:
    """Where calibrations are kept: `kvarn-rs/calibration` under `XDG_CACHE_HOME`, or under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return folder / "kvarn-rs" / "calibration"


def calibration_path(model: Any) -> Path:
    """The file of a model's calibration, whether it is there or not."""
    return _path_of(fingerprint(model))


def _path_of(model_fingerprint: str) -> Path:
    return calibration_folder() / f"{model_fingerprint}.safetensors"


def resolve(model: Any, calibration: Calibration | str | os.PathLike[str] | None = None) -> Calibration:
    """The calibration that a cache of a model uses.

    Args:
        model: the model, or None where only its config is known.
        calibration: one, or the file of one; None: the model's own, which is the same for all its caches. That is its
            file in `calibration_folder()` if there is one (looked for once), else one that learns.

    Raises:
        CalibrationError: a given file that cannot be read, is damaged, or is of another model. The model's own file is
            passed over with a warning in that case.
        ConfigError: neither a calibration nor a path.
    """
    if isinstance(calibration, Calibration):
        return calibration
    if isinstance(calibration, (str, os.PathLike)):
        return Calibration.load(calibration, None if model is None else fingerprint(model))
    if calibration is not None:
        raise ConfigError(f"calibration is a Calibration, a path or None, not {type(calibration).__name__}")
    if model is None:
        return Calibration()
    with _lock:
        if model not in _of_model:
            _of_model[model] = _from_folder(fingerprint(model))
        return _of_model[model]


def of_fingerprint(model_fingerprint: str | None) -> Calibration:
    """What is known of a model that is not at hand: its file if there is one, else one that learns."""
    return Calibration() if model_fingerprint is None else _from_folder(model_fingerprint)


def _from_folder(model_fingerprint: str) -> Calibration:
    path = _path_of(model_fingerprint)
    if not path.exists():
        return Calibration()
    try:
        return Calibration.load(path, model_fingerprint)
    except CalibrationError as error:
        if path not in _warned:
            _warned.add(path)
            message = f"kvarn: {error}. Going on without; `kvarn_rs.hf.calibrate(model)` makes it anew."
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        return Calibration()


def calibrate(
    model: Any,
    text_or_token_ids: str | Sequence[int] | torch.Tensor | None = None,
    *,
    tokenizer: Any = None,
    path: str | os.PathLike[str] | None = None,
    save: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Makes a model's calibration ahead, from the first 2,048 tokens of a text, and keeps it where caches find it.

    The text need not be like what the model will read. Caches made of this model object from now on use the result, and
    so do those of other processes, by the file.

    Args:
        model: a decoder on the CPU; its attention implementation is left as it was.
        text_or_token_ids: a text, or token ids `[T]` or `[1, T]`; None: a text that comes with the package.
        tokenizer: turns text into tokens; None: the one beside the model's files on this machine.
        path: the file; None: `calibration_path(model)`, whose folder is made.
        save: whether to keep it at all.
        progress: called with the number of tokens of each chunk that is done.

    Returns:
        The frozen calibration.

    Raises:
        ConfigError: a text of fewer than 128 tokens, tokens that the model does not have, no tokenizer, or no layer
            whose attention can be watched.
        CalibrationError: the file cannot be written; caches of this model object use the calibration all the same.
        DeviceError: a model that is not on the CPU.
    """
    from .cache import KvarnCache  # which needs `resolve`

    model_fingerprint = fingerprint(model)
    calibration = Calibration()
    with _attention_restored(model), torch.no_grad():
        cache = KvarnCache(model, "int8", calibration=calibration)
        token_ids = _token_ids(model, text_or_token_ids, tokenizer)
        options = _forward_options(model, cache)
        was_training = model.training
        model.eval()
        try:
            for chunk in token_ids.split(_CHUNK_TOKENS, dim=1):
                model(input_ids=chunk, **options)
                if progress is not None:
                    progress(chunk.shape[1])
        finally:
            model.train(was_training)
    if not calibration.layers():
        raise ConfigError(
            f"{type(model).__name__} has no layer whose attention kvarn sees: there is nothing to calibrate"
        )
    calibration.freeze()
    with _lock:
        _of_model[model] = calibration
    if save:
        file = _path_of(model_fingerprint) if path is None else Path(path)
        if path is None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CalibrationError(f"{file.parent}: cannot be made: {error.strerror}") from error
        calibration.save(file, model_fingerprint, _name(model))
    return calibration


def _forward_options(model: Any, cache: Any) -> dict[str, Any]:
    """How a forward is told of the cache, and not to make logits that nobody reads."""
    known = inspect.signature(model.forward).parameters
    options = {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}
    return {**options, "logits_to_keep": 1} if "logits_to_keep" in known else options


@contextmanager
def _attention_restored(model: Any) -> Iterator[None]:
    """Leaves the model's attention implementation as it was."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _token_ids(model: Any, given: str | Sequence[int] | torch.Tensor | None, tokenizer: Any) -> torch.Tensor:
    """Token ids [1, T], at most as many as a calibration takes and the model has positions for."""
    if given is None:
        given = Path(__file__).with_name("calibration_text.txt").read_text(encoding="utf-8")
    if isinstance(given, str):
        given = (tokenizer or _own_tokenizer(model))(given, verbose=False)["input_ids"]
    try:
        token_ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"expected a text or token ids, got {type(given).__name__}: {error}") from error
    shape = list(token_ids.shape)
    whole = token_ids.dtype in _WHOLE or not token_ids.numel()  # an empty list is made a float tensor
    if not whole or not shape or shape[:-1] not in ([], [1]):
        raise ConfigError(f"expected token ids [T] or [1, T], got {token_ids.dtype} {shape}")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or QUERY_TOKENS
    token_ids = token_ids.reshape(1, -1)[:, : min(limit, QUERY_TOKENS)].long()
    if token_ids.shape[1] < FIRST_TOKENS:
        raise ConfigError(f"{token_ids.shape[1]} tokens are too few to calibrate with: {FIRST_TOKENS} are needed")
    known = model.get_input_embeddings().num_embeddings
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= known:
        raise ConfigError(f"token ids from {lowest} to {highest}, the model knows {known}")
    return token_ids


def _own_tokenizer(model: Any) -> Any:
    """The tokenizer beside the model's files, if they are on this machine."""
    from transformers import AutoTokenizer

    name = model.config.name_or_path
    try:
        if not name:
            raise OSError("the model was not loaded from anywhere")
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"no tokenizer for the text: pass tokenizer=, or token ids ({reason})") from error


def _name(model: Any) -> str:
    """What to call a model in its file: without folders, which are of one machine."""
    name = model.config.name_or_path or type(model).__name__
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name
