"""Models made once per session. Tests may change nothing of them but the attention implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hf.families import make_model


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Any]:
    """A family's model, shared by all tests of the session."""
    models: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in models:
            models[family] = make_model(family)
        return models[family]

    return get
