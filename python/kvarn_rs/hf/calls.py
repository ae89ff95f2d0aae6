"""The calls of a model: whether the one that brought K and V has returned, has raised, or still runs.

A cache receives K and V but is not told how the forward ends: one that raised after layer 2 of 4 looks like one of a
model of two layers. Two hooks on the model note when a call begins and when it returns. A call that began, did not
return and is not on the stack any more has raised (hooks do not run on a KeyboardInterrupt).
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from .compat import CALL_CODE, PreTrainedModel, has_pre_hook


class Call:
    """One call of a module.

    Attributes:
        returned: whether it returned.
    """

    __slots__ = ("_is_watched", "_module", "_thread", "_was_left", "returned")

    def __init__(self, module: torch.nn.Module, is_watched: bool) -> None:
        self._module = weakref.ref(module)
        self._is_watched = is_watched
        self._thread = threading.get_ident()
        self._was_left = False
        self.returned = False

    def is_of(self, module: torch.nn.Module) -> bool:
        """Whether it is a call of this module."""
        return self._module() is module

    @property
    def is_running(self) -> bool:
        """Whether the module still computes."""
        return not (self.returned or self._was_left) and any(map(self.is_of, _modules_on_stack(self._thread)))

    @property
    def has_raised(self) -> bool:
        """Whether an exception ended it. Not known of a call that began before its module was watched: False."""
        return self._is_watched and not self.returned and not self.is_running

    def leave(self) -> None:
        """Marks it as ended: if the module is on the stack after this, it is in another call."""
        self._was_left = True


class _Calls(threading.local):
    """The calls of watched modules that run in a thread, the innermost last; among them, some that have raised."""

    def __init__(self) -> None:
        self.open: list[Call] = []


_calls = _Calls()


def watch(model: torch.nn.Module) -> None:
    """Notes the calls of a model, and of the models within it, from the next one on."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not has_pre_hook(module, _begin):
            module.register_forward_pre_hook(_begin)
            module.register_forward_hook(_end)


def is_innermost(call: Call) -> bool:
    """Whether no call of a model has begun or returned in this thread since this one began."""
    return bool(_calls.open) and _calls.open[-1] is call


def innermost() -> Call | None:
    """The innermost call of a model that runs in this thread; its model is watched from now on. None outside of one."""
    while _calls.open and not _calls.open[-1].is_running:
        _calls.open.pop().leave()
    if _calls.open:
        return _calls.open[-1]
    on_stack = _modules_on_stack(threading.get_ident())
    module = next((module for module in on_stack if isinstance(module, PreTrainedModel)), None)
    if module is None:
        return None
    watch(module)
    call = Call(module, is_watched=False)
    _calls.open.append(call)
    return call


def _begin(module: torch.nn.Module, args: Any) -> None:
    earlier = [call for call in _calls.open if call.is_of(module)]
    if earlier:  # this one is within them, or an exception ended them
        num_outer = sum(other is module for other in _modules_on_stack(threading.get_ident())) - 1
        for call in earlier[num_outer:]:
            call.leave()
            _calls.open.remove(call)
    _calls.open.append(Call(module, is_watched=True))


def _end(module: torch.nn.Module, args: Any, output: Any) -> None:
    for index in reversed(range(len(_calls.open))):
        if _calls.open[index].is_of(module):
            _calls.open[index].returned = True
            for call in _calls.open[index:]:
                call.leave()
            del _calls.open[index:]
            return


def _modules_on_stack(thread: int) -> Iterator[torch.nn.Module]:
    """The modules whose calls a thread is within, from the innermost."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is CALL_CODE:
            yield frame.f_locals["self"]
        frame = frame.f_back
