"""Random operations on `raw` pages against a simple model, a dictionary of lists of tensors."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarn_rs import OutOfBlocksError, Step
from paged_reference import BLOCK_SIZE, HEAD_DIM, KV_HEADS, attention, contents, distance, make_cache, normal

NUM_LAYERS = 2
MOST_SEQUENCES = 5
# Sums of at most 192 products of unit normals, in another order than the reference.
FLOAT32_TOLERANCE = 1e-5

index = st.integers(0, 1 << 30)
# Around a block, and around the end of decode, more often than elsewhere.
counts = st.sampled_from([0, 1, 2, 15, 16, 17, 33]) | st.integers(0, 40)


class Cache(RuleBasedStateMachine):
    """Sequences are tensors [2 * NUM_LAYERS, KV_HEADS, length, HEAD_DIM]: keys and values of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for tensors as small as the model's, threads wait longer than they work

    def teardown(self) -> None:
        torch.set_num_threads(self.torch_threads)

    @initialize(num_blocks=st.sampled_from([4, 7, None]), num_tokens=st.sampled_from([5, 16, 33]))
    def start(self, num_blocks: int | None, num_tokens: int) -> None:
        self.cache = make_cache("raw", num_layers=NUM_LAYERS, num_blocks=num_blocks)
        self.held: dict[int, torch.Tensor] = {}
        self.seed = 0
        self.new()
        self.append(0, num_tokens)
        self.fork(0)

    def values(self, num_tokens: int) -> torch.Tensor:
        self.seed += 1
        return normal(2 * NUM_LAYERS, KV_HEADS, num_tokens, HEAD_DIM, seed=self.seed)

    def pick(self, index: int) -> int:
        return list(self.held)[index % len(self.held)]

    def begin(self, chosen: list[int], rows: list[int]) -> Step | None:
        before = self.cache.stats()
        try:
            return self.cache.begin_step(chosen, rows)
        except OutOfBlocksError as error:
            needed, free = error.needed, error.free
        assert needed > free == before["free_blocks"]
        assert self.cache.stats() == before
        return None

    @precondition(lambda self: len(self.held) < MOST_SEQUENCES)
    @rule()
    def new(self) -> None:
        self.held[self.cache.new_sequence()] = self.values(0)

    @precondition(lambda self: len(self.held) < MOST_SEQUENCES)
    @rule(index=index)
    def fork(self, index: int) -> None:
        parent = self.pick(index)
        self.held[self.cache.fork(parent)] = self.held[parent]

    @precondition(lambda self: len(self.held) > 2)
    @rule(index=index)
    def free(self, index: int) -> None:
        sequence = self.pick(index)
        self.cache.free(sequence)
        del self.held[sequence]

    @rule(index=index, share=st.integers(2, 8))
    def truncate(self, index: int, share: int) -> None:
        sequence = self.pick(index)
        length = self.held[sequence].shape[2] * share // 8
        self.cache.truncate(sequence, length)
        self.held[sequence] = self.held[sequence][:, :, :length]

    @rule(index=index, num_new=counts)
    def append(self, index: int, num_new: int) -> None:
        self.run_step([(index, num_new)], True)

    @rule(chosen=st.lists(st.tuples(index, counts), min_size=2, max_size=3))
    def append_to_several(self, chosen: list[tuple[int, int]]) -> None:
        self.run_step(chosen, True)

    @rule(chosen=st.lists(st.tuples(index, counts), min_size=1, max_size=3))
    def append_and_abort(self, chosen: list[tuple[int, int]]) -> None:
        self.run_step(chosen, False)

    @rule(index=index, num_new=counts)
    def fork_and_append(self, index: int, num_new: int) -> None:
        if len(self.held) < MOST_SEQUENCES:
            self.fork(index)
        self.run_step([(index, num_new), (-1, 1)], True)

    def run_step(self, chosen: list[tuple[int, int]], commit: bool) -> None:
        rows = {self.pick(index): num_new for index, num_new in chosen}
        step = self.begin(list(rows), list(rows.values()))
        if step is None:
            return
        fresh = self.values(sum(rows.values()))
        q = normal(1, 2 * KV_HEADS, fresh.shape[2], HEAD_DIM, seed=self.seed)
        after = {
            sequence: torch.cat([self.held[sequence], own], 2)
            for sequence, own in zip(rows, fresh.split(list(rows.values()), 2), strict=True)
        }
        for layer in range(NUM_LAYERS):
            k, v = fresh[2 * layer, None], fresh[2 * layer + 1, None]
            step.append(layer, k, v)
            out = step.attend(layer, q, k, v)
            for sequence, own_q, own_out in zip(
                rows, q.split(list(rows.values()), 2), out.split(list(rows.values()), 2), strict=True
            ):
                whole = after[sequence]
                expected = attention(own_q, whole[2 * layer, None], whole[2 * layer + 1, None])
                assert distance(own_out, expected) <= FLOAT32_TOLERANCE
        if commit:
            step.commit()
            self.held |= after
        else:
            step.abort()

    @rule()
    def go_on_with_a_copy(self) -> None:
        self.cache = self.cache.copy()

    @invariant()
    def every_sequence_holds_exactly_its_tokens(self) -> None:
        for sequence, tokens in self.held.items():
            assert self.cache.seq_len(sequence) == tokens.shape[2]
            assert len(self.cache.block_table(sequence)) == -(-tokens.shape[2] // BLOCK_SIZE)
            for layer in range(NUM_LAYERS):
                k, v = contents(self.cache, sequence, layer)
                assert torch.equal(k[0], tokens[2 * layer])
                assert torch.equal(v[0], tokens[2 * layer + 1])

    @invariant()
    def blocks_are_counted_once(self) -> None:
        stats = self.cache.stats()
        blocks = {block for sequence in self.held for block in self.cache.block_table(sequence)}
        assert stats["blocks_in_use"] == len(blocks)
        assert stats["num_sequences"] == len(self.held)
        if self.cache.num_blocks is not None:
            assert stats["free_blocks"] == self.cache.num_blocks - len(blocks)


TestCache = Cache.TestCase
TestCache.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
