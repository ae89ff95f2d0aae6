"""Golden sealed tiles and feedback matrices, computed with numpy in float64 from the formats' description alone.

Inputs, i = r * D + d for query r:

    q[r,d] = ((31 i^2 + 7 i) mod 1009) / 1009 * 2 - 1       S = 4 / rank * Q' Q + 0.3 I
    K[t,d] = sin(0.37 t + 1.3 d) (1 + d % 5) + sin(1.9 t (1 + d % 3) + 0.7 d) + (d % 4 = 0 ? (d - D / 2) / 4 : 0)
    V[t,d] = cos(0.11 t (1 + d % 7) + 0.2 d) (0.5 + t / 64)          (rotated already)

K and V rounded to multiples of 1/1024, so that float32 holds them exactly. "Loud" K: every 16th channel times 24.
s is the deviation of K's channels over the tile itself.

Writes feedback.json (losses) and feedback.bin, and prints the sha256 of the tiles. feedback.bin holds, for each case:
the order p (u16), F's upper triangle row by row (f32), error_scale (f32), then the K codes of 4, 3 and 2 bits in
canonical order. Run: python tests/golden/make_sealed_tiles.py
"""

import hashlib
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TILE_VERSION = 1
K_SHRINK = {4: 1.0, 3: 0.95, 2: 0.85}
V_SHRINKS = {4: (1.0,), 3: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7), 2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)}


def f16(x):
    return np.clip(x, -65504, 65504).astype(np.float32).astype(np.float16)


def hadamard(channels):
    size = channels & -channels
    h = np.array([[1.0]])
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(channels // size), h / np.sqrt(size))


def keys(channels, tokens, loud=False):
    t, d = np.arange(tokens)[:, None].astype(np.float64), np.arange(channels)[None, :]
    k = np.sin(0.37 * t + 1.3 * d) * (1 + d % 5) + np.sin(1.9 * t * (1 + d % 3) + 0.7 * d)
    k = k + (d - channels / 2) / 4 * (d % 4 == 0)
    return np.rint(k * np.where(loud & (d % 16 == 0), 24, 1) * 1024) / 1024


def values(channels, tokens):
    t, d = np.arange(tokens)[:, None].astype(np.float64), np.arange(channels)[None, :]
    return np.rint(np.cos(0.11 * t * (1 + d % 7) + 0.2 * d) * (0.5 + t / 64) * 1024) / 1024


def query_moment(channels, rank):
    i = np.arange(rank * channels).reshape(rank, channels)
    q = ((31 * i * i + 7 * i) % 1009) / 1009 * 2 - 1
    return 4 / rank * q.T @ q + 0.3 * np.eye(channels)


def dual_scale(m, iterations=2):
    unit = np.sqrt((m**2).mean()) / 4
    m = m / (unit if unit > 0 else 1.0)

    def over_channels(x):
        return np.clip(x.std(0, ddof=1), 1e-3, 1e3)

    def over_tokens(x):
        return np.clip(x.std(1, ddof=1), 1e-3, 1e3)

    def imbalance(x):
        return sum(s.max() / s.min() for s in (over_channels(x), over_tokens(x)))

    log_c, log_r = np.zeros(m.shape[1]), np.zeros(m.shape[0])
    now = m
    best = (imbalance(m), np.exp(log_c))
    for _ in range(iterations):
        log_c = np.clip(log_c + np.log(over_channels(now)), -0.3, 10)
        now = m / np.exp(log_r[:, None] + log_c)
        log_r = np.clip(log_r + np.log(over_tokens(now)), -0.3, 10)
        now = m / np.exp(log_r[:, None] + log_c)
        if imbalance(now) <= best[0]:
            best = (imbalance(now), np.exp(log_c))
    return best[1]


def factor(s_moment, deviation):
    s = np.maximum(deviation, 1e-6 * deviation.max())
    a = s[:, None] * s_moment * s
    scale = a.diagonal().mean()
    a = a / scale + 0.05 * np.eye(len(s))
    p = np.argsort(-a.diagonal(), kind="stable")
    u = np.linalg.cholesky(np.linalg.inv(a[np.ix_(p, p)])).T
    f = np.triu(u / u.diagonal()[:, None] * s[p][None, :] / s[p][:, None], 1)
    return {"p": p, "F": f, "error_scale": s[p] * u.diagonal(), "loss_scale": scale}


def no_feedback(channels):
    return {
        "p": np.arange(channels),
        "F": np.zeros((channels, channels)),
        "error_scale": np.ones(channels),
        "loss_scale": 1.0,
    }


def round_k(m, bits, feedback):
    """Codes, stored parameters and the running loss of one frame."""
    top = 2**bits - 1
    c = dual_scale(m)
    low, high = (m / c).min(1), (m / c).max(1)
    margin = (high - low) * (1 - K_SHRINK[bits]) / 2
    low, high = low + margin, high - margin
    scale, zero_point, token_scale = f16((high - low) / top), f16(low), f16(c)
    a, z, c = (x.astype(np.float64) for x in (scale, zero_point, token_scale))
    w, codes, loss = m.copy(), np.zeros(m.shape, np.uint8), 0.0
    for d, channel in enumerate(feedback["p"]):
        code = np.clip(np.rint((w[channel] / c - z[channel]) / a[channel]), 0, top)
        error = w[channel] - (code * a[channel] + z[channel]) * c
        codes[channel] = code
        loss += ((error / feedback["error_scale"][d]) ** 2).sum()
        w[feedback["p"][d + 1 :]] -= feedback["F"][d, d + 1 :, None] * error
    return {
        "codes": codes,
        "parameters": (scale, zero_point, token_scale),
        "decoded": (codes * a[:, None] + z[:, None]) * c,
        "loss": feedback["loss_scale"] * loss,
    }


def round_v(row, bits):
    """Codes, scale and zero point of one token."""
    low, high, best = row.min(), row.max(), None
    for shrink in V_SHRINKS[bits]:
        margin = (high - low) * (1 - shrink) / 2
        scale, zero_point = f16((high - low - 2 * margin) / (2**bits - 1)), f16(low + margin)
        a, z = np.float64(scale), np.float64(zero_point)
        codes = np.clip(np.rint((row - z) / a), 0, 2**bits - 1) if a > 0 else np.zeros(len(row))
        error = ((row - codes * a - z) ** 2).sum()
        if best is None or error < best[0]:
            best = (error, codes.astype(np.uint8), scale, zero_point)
    return best[1:]


def pack(codes, bits):
    codes = codes.reshape(-1)

    def plane(x, width):
        return np.packbits((x[:, None] >> np.arange(width)) & 1, bitorder="little")

    if bits == 3:
        return plane(codes & 3, 2).tobytes() + plane(codes >> 2, 1).tobytes()
    return plane(codes, bits).tobytes()


def tile(k, v, bits, feedback_of_frames, first_row):
    channels = k.shape[1]
    plain = round_k(k.T, bits, feedback_of_frames[0])
    rotated = round_k((k @ hadamard(channels)).T, bits, feedback_of_frames[1])
    is_rotated = rotated["loss"] <= plain["loss"]
    best = rotated if is_rotated else plain
    v_codes = np.zeros(v.shape, np.uint8)
    v_scale, v_zero_point = np.zeros(len(v), np.float16), np.zeros(len(v), np.float16)
    first = np.zeros(channels, np.uint8).tobytes() + bytes(4)
    for t, row in enumerate(v):
        if t == first_row:
            codes, scale, zero_point = round_v_8(row)
            first = codes.tobytes() + scale.tobytes() + zero_point.tobytes()
        else:
            v_codes[t], v_scale[t], v_zero_point[t] = round_v(row, bits)
    header = bytes([TILE_VERSION, int(is_rotated), 255 if first_row is None else first_row, 0])
    fields = [pack(best["codes"], bits), pack(v_codes, bits)]
    fields += [x.tobytes() for x in (*best["parameters"], v_scale, v_zero_point)]
    record = b"".join([*fields, first, header])
    return record + bytes(-len(record) % 16), is_rotated


def round_v_8(row):
    scale, zero_point = f16((row.max() - row.min()) / 255), f16(row.min())
    codes = np.clip(np.rint((row - np.float64(zero_point)) / np.float64(scale)), 0, 255)
    return codes.astype(np.uint8), scale, zero_point


def feedback_of(k, moment):
    h = hadamard(k.shape[1])
    turned = k @ h
    return factor(moment, k.std(0, ddof=1)), factor(h @ moment @ h, turned.std(0, ddof=1))


def write_feedback():
    listing, blob = [], b""
    for channels, rank, frame in ((64, 16, "plain"), (64, 16, "rotated"), (128, 32, "rotated")):
        turn = hadamard(channels) if frame == "rotated" else np.eye(channels)
        m, moment = (keys(channels, 128) @ turn).T, turn @ query_moment(channels, rank) @ turn
        deviation = m.std(1, ddof=1)
        feedback = factor(moment, deviation)
        blob += feedback["p"].astype("<u2").tobytes()
        blob += feedback["F"][np.triu_indices(channels, 1)].astype("<f4").tobytes()
        blob += feedback["error_scale"].astype("<f4").tobytes()
        case = {"head_dim": channels, "rank": rank, "frame": frame, "loss_scale": feedback["loss_scale"], "bits": []}
        for bits in (4, 3, 2):
            rounded = round_k(m, bits, feedback)
            blob += pack(rounded["codes"], bits)
            assert np.isclose(rounded["loss"], loss_of(m - rounded["decoded"], moment, deviation), rtol=1e-12)
            plain = loss_of(m - round_k(m, bits, no_feedback(channels))["decoded"], moment, deviation)
            case["bits"].append({"bits": bits, "loss": rounded["loss"], "plain_loss": plain})
        listing.append(case)
    (HERE / "feedback.bin").write_bytes(blob)
    (HERE / "feedback.json").write_text(json.dumps(listing, indent=1) + "\n")
    for case in listing:
        ratios = [round(float(b["loss"] / b["plain_loss"]), 4) for b in case["bits"]]
        print(case["head_dim"], case["frame"], "loss over plain rounding's:", ratios)


def loss_of(error, moment, deviation):
    """e' (S + damping) e over a tile: what the running loss must come to."""
    damping = 0.05 * (deviation * moment.diagonal() * deviation).mean() / deviation**2
    return np.einsum("it,ij,jt", error, moment + np.diag(damping), error)


def print_tiles():
    k, v = keys(64, 128), values(64, 128)
    feedback = feedback_of(k, query_moment(64, 16))
    loud, short_v = keys(96, 32, loud=True), values(96, 32)
    for bits in (4, 3, 2):
        record, rotated = tile(k, v, bits, feedback, 0)
        print(bits, "bits, D=64, feedback, first row 0:", len(record), rotated, hashlib.sha256(record).hexdigest())
        record, rotated = tile(loud, short_v, bits, [no_feedback(96)] * 2, None)
        print(bits, "bits, D=96, none, no first row:", len(record), rotated, hashlib.sha256(record).hexdigest())


if __name__ == "__main__":
    write_feedback()
    print_tiles()
