"""Run in an environment that holds the wheel and what it asks for, and nothing else: does the package start there?"""

import importlib.util
import sys

import kvarn_rs

installed = [name for name in ("numpy", "torch", "transformers") if importlib.util.find_spec(name)]
assert not installed, f"this environment is not empty: {installed}"

cache = kvarn_rs.PagedKvCache(num_layers=2, num_kv_heads=3, head_dim=64, block_size=16, num_blocks=4)
assert cache.seq_len(cache.new_sequence()) == 0
assert cache.stats()["free_blocks"] == 4
try:
    kvarn_rs.PagedKvCache(num_layers=1, num_kv_heads=1, head_dim=64, format="int5")
except kvarn_rs.UnknownFormatError as error:
    print(f"kvarn_rs {kvarn_rs.__version__} starts on Python {sys.version.split()[0]} alone; it says: {error}")
else:
    raise SystemExit("an unknown format was accepted")
