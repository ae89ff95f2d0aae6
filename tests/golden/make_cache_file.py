"""A golden cache file, written from the descriptions in `src/archive`, `src/cache/file/mod.rs` and `src/format` alone.

An int4 cache of 1 layer, 2 key/value heads h, 32 channels d, blocks of 16 tokens t. Sequence 1 has 20 tokens in blocks
0 and 1, sequence 4 has 18 in blocks 0 and 2; block 0 is sealed, the others are open, their rows after the last token
zero. Every value is a small multiple of a power of two, so that float32 decodes it exactly.

Writes cache_file.safetensors and prints its sha256. Run: python tests/golden/make_cache_file.py
"""

import hashlib
import json
import struct
import zlib
from pathlib import Path

HERE = Path(__file__).parent
HEADS, CHANNELS, TOKENS = 2, 32, 16
RELEASED = 2**32 - 1


def halves(values):
    return b"".join(struct.pack("<e", value) for value in values)


def nibbles(codes):
    return bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))


def tile(h):
    """Codes of K [channel][token], of V [token][channel]; the sequence's first token is row 0. Head 1 is rotated."""
    k = [(3 * t + 5 * d + h) % 16 for d in range(CHANNELS) for t in range(TOKENS)]
    v = [(7 * t + d + h) % 16 if t else 0 for t in range(TOKENS) for d in range(CHANNELS)]
    record = nibbles(k) + nibbles(v)
    record += halves((1 + d % 4) / 8 for d in range(CHANNELS)) + halves(-(d % 5) / 4 for d in range(CHANNELS))
    record += halves((1 + t % 3) / 2 for t in range(TOKENS))
    record += halves((1 + t % 2) / 4 if t else 0 for t in range(TOKENS)) + halves(-1 if t else 0 for t in range(TOKENS))
    record += bytes(3 * d % 256 for d in range(CHANNELS)) + halves([1 / 16, -4])
    record += bytes([1, h, 0, 0])  # version, flags, first row
    return record.ljust(-(-len(record) // 16) * 16, b"\0")


def page(block, h, used):
    """Codes of K and of V [token][channel]."""

    def rows(value):
        return [value(t, d) if t < used else 0 for t in range(TOKENS) for d in range(CHANNELS)]

    def each(value):
        return halves(value(t) if t < used else 0 for t in range(TOKENS))

    record = struct.pack(f"{TOKENS * CHANNELS}b", *rows(lambda t, d: (5 * t + 3 * d + h + block) % 255 - 127))
    record += bytes(rows(lambda t, d: (11 * t + d + h + block) % 256))
    record += each(lambda t: (1 + t) / 64) + each(lambda t: (1 + t % 2) / 128) + each(lambda t: -t / 2)
    record += halves(d % 3 - 1 for d in range(CHANNELS)) + halves((1 + d % 2) / 2 for d in range(CHANNELS))
    return record


def main():
    prefix = "caches.0."
    metadata = {"kind": "kvarn cache", "version": "2", "format_version": "2", "caches": "1", "note": 'a "golden" note'}
    settings = {"format": "int4", "dtype": "float32", "num_layers": 1, "num_kv_heads": HEADS, "head_dim": CHANNELS}
    settings |= {"block_size": TOKENS, "num_blocks": 64, "window": 4096, "next_sequence": 5}
    metadata |= {prefix + key: str(value) for key, value in settings.items()}
    tiles, pages = [tile(h) for h in range(HEADS)], [page(1, h, 4) for h in range(HEADS)]
    pages += [page(2, h, 2) for h in range(HEADS)]
    tensors = [
        ("sequences", "U64", [2, 3], struct.pack("<6Q", 1, 20, 0, 4, 18, 0)),
        ("block_tables", "U32", [4], struct.pack("<4I", 0, 1, 0, 2)),
        ("open", "U8", [3], bytes([0, 1, 1])),
        ("layers.0.tiles", "U8", [1, HEADS, len(tiles[0])], b"".join(tiles)),
        ("layers.0.pages", "U8", [2, HEADS, len(pages[0])], b"".join(pages)),
    ]
    header, data = '{"__metadata__":' + json.dumps(metadata, separators=(",", ":")), b""
    for name, dtype, shape, content in tensors:
        start, data = len(data), data + content
        header += f',"{prefix}{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{len(data)}]}}'
    header += f',"checksum":{{"dtype":"U8","shape":[4],"data_offsets":[{len(data)},{len(data) + 4}]}}'
    text = (header + "}").encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    file = struct.pack("<Q", len(text)) + text + data
    file += struct.pack("<I", zlib.crc32(file))
    (HERE / "cache_file.safetensors").write_bytes(file)
    print(len(file), hashlib.sha256(file).hexdigest())


if __name__ == "__main__":
    main()
