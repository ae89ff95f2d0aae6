"""A minimal serving loop without a framework: prefill, fork, decode and rollback of several sequences in one cache.

Random keys, values and queries stand in for a model. Every output is compared with dense attention in float64 on the
same keys and values.
"""

import numpy as np

from kvarn_rs import PagedKvCache

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 64
rng = np.random.default_rng(0)


def tensor(heads: int, tokens: int) -> np.ndarray:
    """One step's q, k or v, `[1, heads, tokens, head_dim]`."""
    return rng.standard_normal((1, heads, tokens, HEAD_DIM)).astype(np.float32)


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of the last rows of a sequence, `q [heads, n, d]`, to all of it, `k, v [kv_heads, len, d]`."""
    k, v = (np.repeat(x, Q_HEADS // KV_HEADS, axis=0).astype(np.float64) for x in (k, v))
    scores = q.astype(np.float64) @ k.transpose(0, 2, 1) / np.sqrt(HEAD_DIM)
    n, length = scores.shape[1:]
    scores[:, np.arange(length) > np.arange(length - n, length)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def main() -> None:
    """Runs the loop, and prints statistics of the cache and the largest error."""
    cache = PagedKvCache(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, format="int8", block_size=16)
    history: dict[int, list[list[np.ndarray]]] = {}  # sequence -> layer -> its dense keys and values
    worst = 0.0

    def step(sequences: list[int], counts: list[int]) -> None:
        """Appends and attends in every layer, for all sequences at once; their rows are packed."""
        nonlocal worst
        with cache.begin_step(sequences, counts) as step:
            for layer in range(LAYERS):
                k, v, q = tensor(KV_HEADS, sum(counts)), tensor(KV_HEADS, sum(counts)), tensor(Q_HEADS, sum(counts))
                step.append(layer, k, v)
                out = step.attend(layer, q, k, v)
                start = 0
                for sequence, count in zip(sequences, counts, strict=True):
                    rows = slice(start, start + count)
                    dense = history[sequence][layer]
                    dense[0] = np.concatenate([dense[0], k[0, :, rows]], axis=1)
                    dense[1] = np.concatenate([dense[1], v[0, :, rows]], axis=1)
                    error = np.abs(out[0, :, rows] - dense_attention(q[0, :, rows], *dense))
                    worst = max(worst, float(error.max()))
                    start += count

    def nothing() -> list[list[np.ndarray]]:
        return [[np.zeros((KV_HEADS, 0, HEAD_DIM), np.float32)] * 2 for _ in range(LAYERS)]

    first, second = cache.new_sequence(), cache.new_sequence()
    history[first], history[second] = nothing(), nothing()
    step([first, second], [40, 23])  # two prompts, one batch
    third = cache.fork(first)  # shares all of first's blocks, until one of them writes
    history[third] = [list(layer) for layer in history[first]]
    for _ in range(20):
        step([first, second, third], [1, 1, 1])
    cache.truncate(third, 45)  # a rejected draft
    history[third] = [[x[:, :45] for x in layer] for layer in history[third]]
    step([third], [2])

    stats = cache.stats()
    print("lengths", [cache.seq_len(sequence) for sequence in (first, second, third)])
    print({name: stats[name] for name in ("blocks_in_use", "bytes_in_use", "bytes_per_token", "cow_copies")})
    print(f"largest difference to dense attention in float64: {worst:.4f}")
    assert worst < 0.05, "int8 keeps four digits of unit-variance values; this is far more"
    for sequence in (first, second, third):
        cache.free(sequence)


if __name__ == "__main__":
    main()
