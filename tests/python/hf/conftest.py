"""Models are made once per session; tests leave them as they found them, but for the attention implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf.families import make_model


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Any]:
    """A family's model, shared by all tests of the session."""
    models: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in models:
            models[family] = make_model(family)
        return models[family]

    return get
