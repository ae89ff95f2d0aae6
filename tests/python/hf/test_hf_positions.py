"""`Positions`, the map from transformers' positions to stored tokens, against one that counts them one by one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from kvarn_rs._core import first_seen
from kvarn_rs.hf.positions import Positions

RUNS = 300


class Counted:
    """A list of bools for each row: True = token."""

    def __init__(self, rows: list[list[bool]]) -> None:
        self.rows = rows

    def num_tokens(self, row: int, position: int) -> int:
        return sum(self.rows[row][:position])

    def has_inner_padding(self) -> bool:
        def inner(row: list[bool]) -> bool:
            return any(not is_token and any(row[:at]) and any(row[at:]) for at, is_token in enumerate(row))

        return any(map(inner, self.rows))


def grown(rng: random.Random, num_rows: int) -> tuple[Positions, Counted]:
    """Positions after some forwards, crops and selections, and the same counted."""
    positions, rows = Positions(), [[] for _ in range(num_rows)]
    for _ in range(rng.randint(1, 6)):
        num_new = rng.randint(1, 5)
        tokens = [[rng.random() < 0.7 for _ in range(num_new)] for _ in rows]
        if rng.random() < 0.4:
            tokens = [[True] * num_new for _ in rows]
        some_padding = not all(map(all, tokens))
        positions = positions.extended(num_new, torch.tensor(tokens) if some_padding else None)
        rows = [row + new for row, new in zip(rows, tokens, strict=True)]
        if rng.random() < 0.3:
            length = rng.randint(0, positions.length)
            positions, rows = positions.cropped(length), [row[:length] for row in rows]
        if rng.random() < 0.3:
            chosen = [rng.randrange(num_rows) for _ in rows]
            positions, rows = positions.selected(chosen), [rows[row] for row in chosen]
    return positions, Counted(rows)


@pytest.fixture(scope="module")
def runs() -> list[tuple[Positions, Counted]]:
    rng = random.Random(0)
    return [grown(rng, rng.randint(1, 3)) for _ in range(RUNS)]


def test_positions_say_what_counting_says(runs: list[tuple[Positions, Counted]]) -> None:
    for positions, counted in runs:
        num_rows, length = len(counted.rows), len(counted.rows[0])
        assert positions.length == length
        for start in range(length + 1):
            tokens = positions.tokens(start)
            expected = [row[start:] for row in counted.rows]
            assert expected == ([[True] * (length - start)] * num_rows if tokens is None else tokens.tolist())
            for row in range(num_rows):
                assert positions.num_tokens(row, start) == counted.num_tokens(row, start)


def test_inner_padding_is_padding_between_two_tokens(runs: list[tuple[Positions, Counted]]) -> None:
    found = [positions.has_inner_padding() for positions, _ in runs]
    assert found == [counted.has_inner_padding() for _, counted in runs]
    assert {True, False} == set(found)


def test_padding_ends_with_its_last_column_that_has_some(runs: list[tuple[Positions, Counted]]) -> None:
    for positions, counted in runs:
        last = max((at for row in counted.rows for at, is_token in enumerate(row) if not is_token), default=None)
        assert (None if positions.padding is None else positions.padding.shape[1] - 1) == last


@pytest.mark.parametrize(
    "change",
    [
        lambda positions: positions.extended(2),
        lambda positions: positions.extended(1, torch.tensor([[False], [True]])),
        lambda positions: positions.cropped(1),
        lambda positions: positions.selected([1, 1]),
    ],
    ids=["extended", "extended with padding", "cropped", "selected"],
)
def test_a_change_leaves_the_value_as_it_was(change: Callable[[Positions], Positions]) -> None:
    padding = torch.tensor([[True, False, True], [False, False, True]])
    positions = Positions(5, padding.clone())
    change(positions)
    assert positions.length == 5
    assert positions.padding is not None
    assert torch.equal(positions.padding, padding)


@pytest.mark.parametrize(
    ("position", "window", "expected"),
    [(0, None, 0), (9, None, 0), (0, 4, 0), (3, 4, 0), (4, 4, 1), (9, 4, 6), (9, 2, 8)],
)
def test_a_window_counts_the_query_itself(position: int, window: int | None, expected: int) -> None:
    assert first_seen(position, window) == expected
