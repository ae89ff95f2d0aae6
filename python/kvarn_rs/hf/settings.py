"""The settings that all pages of a cache have in common."""

from __future__ import annotations

from dataclasses import dataclass

import kvarn_rs
from kvarn_rs.errors import ConfigError, UnknownFormatError


@dataclass(frozen=True)
class PageSettings:
    """How a cache stores tokens; `KvarnCache` says what each setting means. Checked when it is made.

    Raises:
        UnknownFormatError: no such format or codec.
        ConfigError, UnsupportedError: a setting, or two together, that no model can use.
    """

    format: str
    block_size: int
    num_blocks: int | None
    num_open_pages: int | None
    codec: str | None = None

    def __post_init__(self) -> None:
        if self.format not in kvarn_rs.FORMATS:
            raise UnknownFormatError(f"unknown format {self.format!r}; known: {', '.join(kvarn_rs.FORMATS)}")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(f"num_blocks is {self.num_blocks}; it must be at least 1, or None")
        # The core knows the rest: ask it with the smallest shape there is, and without the blocks, which take memory.
        kvarn_rs.PagedKvCache(
            num_layers=1,
            num_kv_heads=1,
            head_dim=16,
            format=self.format,
            block_size=self.block_size,
            num_open_pages=self.num_open_pages,
            codec=self.codec,
        )
