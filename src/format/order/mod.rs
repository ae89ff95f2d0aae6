//! Where each value sits in a record. An [`Arrangement`] gives the byte of every value of every field, by its token and
//! channel; of the codes of a tile, the bit.
//!
//! *Canonical* is the order of the oracle and of files. Every field is whole, at the offset that [`Int8Page`],
//! [`RawPage`] and [`SealedTile`] give it. K and V are `[token][channel]`, in tiles K `[channel][token]`. Codes of tiles
//! follow each other from the low bits of a byte up: code `i` of a 4-bit plane is in byte `i/2` at bit `4 (i mod 2)`, of a
//! 2-bit plane in byte `i/4` at bit `2 (i mod 4)`, of a 1-bit plane in byte `i/8` at bit `i mod 8`.
//!
//! *Cpu* ([`cpu`]) and *Cuda* ([`cuda`]) are what those kernels read. The second does not keep fields whole: a page is
//! groups of tokens, each its K, its V and its parameters.
//!
//! # Another arrangement
//!
//! It is a variant here, and each method says where it keeps that field; nothing else that writes, reads, saves or checks
//! records (`quant::record`) knows of it. The tests below hold of every arrangement: values do not overlap and lie within
//! the record, whose length is the same in all; a code's place is the sum of one part for its token and one for its
//! channel, which encoders tabulate (but see [`Arrangement::wraps`]). Kernels that read whole fields use the offsets of the
//! layouts, and are tied to arrangements that keep them so.

pub mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;

pub use cpu::{DEPTH, LANES, word_codes};

use super::F16_BYTES;
use super::page::{Int8Page, Int8Parameter, RawPage};
use super::tile::{Plane, SealedTile, TileParameter};

/// An arrangement of the values of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// That of files.
    Canonical,
    /// What the CPU kernels read.
    Cpu,
    /// What the CUDA kernels read.
    Cuda,
}

impl Arrangement {
    /// Every arrangement.
    pub const ALL: [Self; 3] = [Self::Canonical, Self::Cpu, Self::Cuda];

    /// Byte of an INT8 K code.
    #[must_use]
    pub const fn k_code(self, page: Int8Page, token: usize, channel: usize) -> usize {
        match self {
            Self::Canonical => page.k_codes() + token * page.head_dim + channel,
            Self::Cpu => page.k_codes() + cpu::int8(token, channel, page.head_dim),
            Self::Cuda => cuda::k_code(page, token, channel),
        }
    }

    /// Byte of an INT8 V code.
    #[must_use]
    pub const fn v_code(self, page: Int8Page, token: usize, channel: usize) -> usize {
        match self {
            Self::Canonical => page.v_codes() + token * page.head_dim + channel,
            Self::Cpu => page.v_codes() + cpu::int8(channel, token, page.block_size),
            Self::Cuda => cuda::v_code(page, token, channel),
        }
    }

    /// First byte of a parameter of an INT8 page; `index` is its token or its channel.
    #[must_use]
    pub const fn parameter(self, page: Int8Page, parameter: Int8Parameter, index: usize) -> usize {
        match self {
            Self::Canonical | Self::Cpu => parameter.offset(page) + F16_BYTES * index,
            Self::Cuda => cuda::parameter(page, parameter, index),
        }
    }

    /// First byte of a `raw` K element.
    #[must_use]
    pub const fn raw_k(self, page: RawPage, token: usize, channel: usize) -> usize {
        match self {
            Self::Canonical => page.k() + page.dtype.bytes() * (token * page.head_dim + channel),
            Self::Cpu => page.k() + page.dtype.bytes() * cpu::raw(token, channel, page.head_dim),
            Self::Cuda => cuda::raw_k(page, token, channel),
        }
    }

    /// First byte of a `raw` V element.
    #[must_use]
    pub const fn raw_v(self, page: RawPage, token: usize, channel: usize) -> usize {
        match self {
            Self::Canonical => page.v() + page.dtype.bytes() * (token * page.head_dim + channel),
            Self::Cpu => page.v() + page.dtype.bytes() * cpu::raw(channel, token, page.block_size),
            Self::Cuda => cuda::raw_v(page, token, channel),
        }
    }

    /// Lowest bit, counted from the record's first, of what `plane` has of a tile's K code.
    #[must_use]
    pub const fn tile_k(self, tile: SealedTile, plane: Plane, token: usize, channel: usize) -> usize {
        let index = match self {
            Self::Canonical => channel * tile.block_size + token,
            Self::Cpu => cpu::in_words(plane.bits, token, channel, tile.head_dim),
            Self::Cuda => cuda::k_spot(tile.head_dim, token, channel).tile(plane.bits),
        };
        8 * (tile.k_codes() + tile.plane(plane)) + plane.bits as usize * index
    }

    /// Lowest bit, counted from the record's first, of what `plane` has of a tile's V code.
    #[must_use]
    pub const fn tile_v(self, tile: SealedTile, plane: Plane, token: usize, channel: usize) -> usize {
        let index = match self {
            Self::Canonical => token * tile.head_dim + channel,
            Self::Cpu => cpu::in_words(plane.bits, channel, token, tile.block_size),
            Self::Cuda => cuda::v_spot(tile.head_dim, token, channel).tile(plane.bits),
        };
        8 * (tile.v_codes() + tile.plane(plane)) + plane.bits as usize * index
    }

    /// Is a tile's plane words of 32 bits, and a code's bit within its word the sum of two parts only modulo 32? Its word
    /// is the sum of two parts in any case.
    #[must_use]
    pub const fn wraps(self, tile: SealedTile, plane: Plane) -> bool {
        match self {
            Self::Canonical | Self::Cpu => false,
            Self::Cuda => cuda::wraps(plane.bits, tile.head_dim),
        }
    }

    /// First byte of a parameter of a tile; `index` is its token, its channel, or 0.
    #[must_use]
    pub const fn tile_parameter(self, tile: SealedTile, parameter: TileParameter, index: usize) -> usize {
        let is_of_tokens = matches!(
            parameter,
            TileParameter::KTokenScale | TileParameter::VTokenScale | TileParameter::VTokenZeroPoint
        );
        let index = match self {
            Self::Cuda if is_of_tokens => cuda::token_index(tile.block_size, index),
            _ => index,
        };
        parameter.offset(tile) + F16_BYTES * index
    }

    /// Byte of a V code of the sequence's first token, in a tile; the same in all arrangements.
    #[must_use]
    pub const fn first_v(self, tile: SealedTile, channel: usize) -> usize {
        tile.first_v() + channel
    }

    /// First of the four bytes of a tile's header; the same in all arrangements.
    #[must_use]
    pub const fn header(self, tile: SealedTile) -> usize {
        tile.header()
    }
}
