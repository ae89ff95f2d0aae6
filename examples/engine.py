"""Attention for a serving engine that owns the memory and the block tables: two requests that share a prefix.

The memory of all layers is one numpy array; blocks are handed out by a list. Random keys, values and queries stand in
for a model, and outputs are compared with dense attention in float64 on the same keys and values.
"""

import numpy as np

from kvarn_rs import Engine
from kvarn_rs._core import block_bytes

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK = 2, 8, 2, 64, 16
NUM_BLOCKS, NUM_PAGES = 32, 8
rng = np.random.default_rng(0)


def tensor(heads: int, tokens: int) -> np.ndarray:
    """One step's q, k or v, `[tokens, heads, head_dim]`."""
    return rng.standard_normal((tokens, heads, HEAD_DIM)).astype(np.float32)


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of one query, `[q_heads, head_dim]`, to all tokens, `k, v [tokens, kv_heads, head_dim]`."""
    k, v = (np.repeat(x, Q_HEADS // KV_HEADS, axis=1).astype(np.float64) for x in (k, v))
    scores = np.einsum("hd,thd->ht", q, k) / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(axis=-1, keepdims=True), v)


class Request:
    """A block table, and its keys and values, which are those of every layer here."""

    def __init__(self, prefix: "Request | None" = None, num_tokens: int = 0) -> None:
        """An empty request, or one with the first tokens of another: whole blocks."""
        self.blocks: list[int] = [] if prefix is None else prefix.blocks[: num_tokens // BLOCK]
        self.k = tensor(KV_HEADS, 0) if prefix is None else prefix.k[:num_tokens]
        self.v = tensor(KV_HEADS, 0) if prefix is None else prefix.v[:num_tokens]


def main() -> None:
    """Serves the requests, and prints what the engine did and the largest error."""
    # A block is a tile when it is full, and until then one of a few pages. Blocks of all layers lie side by side.
    tiles = np.zeros((NUM_BLOCKS, LAYERS, KV_HEADS, block_bytes("int4", HEAD_DIM, BLOCK)), np.uint8)
    pages = np.zeros((NUM_PAGES, LAYERS, KV_HEADS, block_bytes("int8", HEAD_DIM, BLOCK)), np.uint8)
    engine = Engine(
        format="int4",
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=BLOCK,
        pages=[pages[:, layer] for layer in range(LAYERS)],
        tiles=[tiles[:, layer] for layer in range(LAYERS)],
    )
    free = [int(block) for block in rng.permutation(NUM_BLOCKS)]
    worst = 0.0

    def step(requests: list[Request], counts: list[int]) -> None:
        """Takes requests forward by some tokens each, laid end to end."""
        nonlocal worst
        for request, count in zip(requests, counts, strict=True):
            while len(request.blocks) * BLOCK < len(request.k) + count:
                request.blocks.append(free.pop())
        width = max(len(request.blocks) for request in requests)
        tables = np.array([request.blocks + [-1] * (width - len(request.blocks)) for request in requests], np.int32)
        lengths = np.array([len(request.k) for request in requests], np.int32)
        starts = np.cumsum([0, *counts], dtype=np.int32)
        engine.begin(tables, lengths, starts)
        q, k, v, out = (tensor(heads, sum(counts)) for heads in (Q_HEADS, KV_HEADS, KV_HEADS, Q_HEADS))
        for layer in range(LAYERS):  # a model has others in each; here they are the same
            engine.forward(layer, q, k, v, out)
        engine.commit()
        for request, start, end in zip(requests, starts[:-1], starts[1:], strict=True):
            request.k, request.v = np.concatenate([request.k, k[start:end]]), np.concatenate([request.v, v[start:end]])
            expected = dense_attention(q[end - 1], request.k, request.v)
            worst = max(worst, float(np.abs(out[end - 1] - expected).max()))

    first = Request()
    step([first], [40])
    # The second request begins with two whole blocks of the first. The step seals the one of them that is still a page.
    second = Request(first, 2 * BLOCK)
    for _ in range(30):
        step([first, second], [1, 1])
    stats = engine.stats()
    print({name: stats[name] for name in ("sealed", "open_pages", "peak_open_pages")})
    print(f"largest difference to dense attention in float64: {worst:.3f}")
    assert worst < 0.2, "4 bits of unit-variance values in random directions; a mistake would be of the order of 1"
    for request in (first, second):
        engine.release(request.blocks)  # the pages of blocks that are not sealed; tiles serve the next prefix hit
    assert engine.stats()["open_pages"] == 0


if __name__ == "__main__":
    main()
