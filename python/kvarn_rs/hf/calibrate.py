"""`calibrate`, which makes a model's calibration file from a text."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvarn_rs import Calibration
from kvarn_rs._core import FIRST_TOKENS, QUERY_TOKENS
from kvarn_rs.errors import CalibrationError, ConfigError
from kvarn_rs.identity import path_of

from .cache import KvarnCache
from .calibration import remember
from .compat import attention_of
from .fingerprint import fingerprint

_CHUNK_TOKENS = 512  # of a calibration's forward: bounds what its activations take
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def calibrate(
    model: Any,
    text_or_token_ids: str | Sequence[int] | torch.Tensor | None = None,
    *,
    tokenizer: Any = None,
    path: str | os.PathLike[str] | None = None,
    save: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Makes a model's calibration from the first 2,048 tokens of a text, and saves it where caches look for it.

    The text need not resemble what the model will process. Later caches of this model object use the result, and so do
    caches in other processes, which load the file.

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
    remember(model, calibration)
    if save:
        file = path_of(model_fingerprint) if path is None else Path(path)
        if path is None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CalibrationError(f"{file.parent}: cannot be made: {error.strerror}") from error
        calibration.save(file, model_fingerprint, _name(model))
    return calibration


def _forward_options(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword arguments of a forward: the cache, and only one position's logits, since nobody reads them."""
    known = inspect.signature(model.forward).parameters
    options = {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}
    return {**options, "logits_to_keep": 1} if "logits_to_keep" in known else options


@contextmanager
def _attention_restored(model: Any) -> Iterator[None]:
    """Leaves the model's attention implementation as it was."""
    before = attention_of(model.config.get_text_config(decoder=True))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _token_ids(model: Any, text: str | Sequence[int] | torch.Tensor | None, tokenizer: Any) -> torch.Tensor:
    """Token ids [1, T], at most as many as a calibration takes and the model has positions for."""
    if text is None:
        text = Path(__file__).with_name("calibration_text.txt").read_text(encoding="utf-8")
    if isinstance(text, str):
        text = (tokenizer or _tokenizer_of(model))(text, verbose=False)["input_ids"]
    try:
        token_ids = torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"expected a text or token ids, got {type(text).__name__}: {error}") from error
    shape = list(token_ids.shape)
    whole = token_ids.dtype in _WHOLE or not token_ids.numel()  # an empty list is made a float tensor
    if not whole or not shape or shape[:-1] not in ([], [1]):
        raise ConfigError(f"expected token ids [T] or [1, T], got {token_ids.dtype} {shape}")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or QUERY_TOKENS
    token_ids = token_ids.reshape(1, -1)[:, : min(limit, QUERY_TOKENS)].long()
    if token_ids.shape[1] < FIRST_TOKENS:
        raise ConfigError(f"{token_ids.shape[1]} tokens are too few to calibrate with: {FIRST_TOKENS} are needed")
    num_known = model.get_input_embeddings().num_embeddings
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= num_known:
        raise ConfigError(f"token ids from {lowest} to {highest}, the model knows {num_known}")
    return token_ids


def _tokenizer_of(model: Any) -> Any:
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
    """The model's name for its file, without folders."""
    name = model.config.name_or_path or type(model).__name__
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name
