"""The golden INT8 page, computed with numpy from the format's description alone. Prints its sha256 and first bytes.

The first page of a sequence, 128 tokens and 64 channels that one append writes whole, in canonical order:

    K[t,d] = sin(0.37 t + 1.3 d) * (1 + d % 5) + (d - 32) / 4        V[t,d] = cos(0.11 t * (1 + d % 7)) * (0.5 + t / 64)

each rounded to multiples of 1/1024, so that float32 holds it exactly. Run: python tests/golden/make_int8_page.py
"""

import hashlib

import numpy as np

TOKENS, CHANNELS = 128, 64
t, d = np.arange(TOKENS)[:, None].astype(np.float64), np.arange(CHANNELS)[None, :].astype(np.float64)
k = np.rint((np.sin(0.37 * t + 1.3 * d) * (1 + d % 5) + (d - 32) / 4) * 1024) / 1024
v = np.rint(np.cos(0.11 * t * (1 + d % 7)) * (0.5 + t / 64) * 1024) / 1024

mean = k.mean(0).astype(np.float32).astype(np.float16)
about = k - mean.astype(np.float64)
squares = (about**2).sum(0)
weight = 4 / TOKENS  # rows that the deviation of all channels counts as
deviation = np.sqrt((squares + weight * (squares / (TOKENS - 1)).mean()) / (weight + TOKENS - 1))
scale = np.maximum(deviation, max(1e-6 * deviation.max(), 6e-8)).astype(np.float32).astype(np.float16)

k, v = k.astype(np.float32), v.astype(np.float32)
z = (k - mean.astype(np.float32)) / scale.astype(np.float32)
k_token_scale = (np.abs(z).max(1) / np.float32(127)).astype(np.float16)
k_codes = np.clip(np.rint(z / k_token_scale.astype(np.float32)[:, None]), -127, 127).astype(np.int8)

low, high = v.min(1), v.max(1)
v_token_scale = ((high - low) / np.float32(255)).astype(np.float16)
v_zero_point = low.astype(np.float16)
divisor = np.where(v_token_scale == 0, np.float16(1), v_token_scale).astype(np.float32)
steps = (v - v_zero_point.astype(np.float32)[:, None]) / divisor[:, None]
v_codes = np.where(v_token_scale[:, None] == 0, 0, np.clip(np.rint(steps), 0, 255)).astype(np.uint8)

page = b"".join(
    field.tobytes() for field in (k_codes, v_codes, k_token_scale, v_token_scale, v_zero_point, mean, scale)
)
assert len(page) == 136 * TOKENS
print(hashlib.sha256(page).hexdigest())
print([int(x) for x in k_codes[0, :8]], [int(x) for x in v_codes[0, :8]])
