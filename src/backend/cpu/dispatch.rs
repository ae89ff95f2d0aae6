//! The one door to the kernels: a table of entry points a level, chosen once.

use super::ORDER;
use super::generic::{RecordView, Rows, Scratch, attend_record};
use super::scalar::Scalar;
use super::unpack::unpack;
use crate::config::env;
use crate::error::{Error, Result};
use crate::format::{Int8Page, RecordLayout};
use crate::quant::record::int8::{self, WrittenK};
use crate::quant::tile::{Tile, encode_tile};
use crate::quant::{ChannelStatistics, HeadFeedback};

/// An instruction set that the kernels are built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Any machine.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL, beside AVX2.
    Avx512,
}

impl Level {
    /// Every level, the fastest last.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The name used in every interface.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Does this machine have it?
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// The fastest level of this machine.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.into_iter().rfind(|level| level.is_available()).unwrap_or(Self::Scalar)
    }

    /// The fastest level of this machine, unless `KVARN_SIMD` names another.
    ///
    /// # Errors
    /// Those of [`parse`](Self::parse).
    pub fn chosen() -> Result<Self> {
        env::simd().map_or_else(|| Ok(Self::best()), |name| Self::parse(&name))
    }

    /// The level called `name`.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown name, [`Error::Unsupported`] for one that this machine lacks.
    pub fn parse(name: &str) -> Result<Self> {
        let Some(level) = Self::ALL.into_iter().find(|level| level.name() == name) else {
            let known = Self::ALL.map(Self::name).join(", ");
            return Err(Error::Config(format!("unknown SIMD level {name:?}; known levels: {known}")));
        };
        if level.is_available() {
            Ok(level)
        } else {
            Err(Error::Unsupported(format!("this machine does not have SIMD level {name}")))
        }
    }
}

/// The statistics that a token's page was opened with, its K and V, and whether K has low bytes.
type Int8Token<'a> = (&'a ChannelStatistics, &'a [f32], &'a [f32], bool);
type WriteToken = unsafe fn(Int8Page, &mut [u8], usize, Int8Token<'_>) -> (WrittenK, bool);
type EncodeTile = unsafe fn(&[f32], &[f32], usize, u32, &HeadFeedback, Option<usize>) -> Tile;

/// The entry points of a level. Calling one is sound on a machine that has the level.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    /// See [`attend_record`].
    pub attend_record: unsafe fn(&RecordView<'_>, &mut Rows<'_>, Option<f32>, &mut Scratch),
    /// See [`unpack`].
    pub unpack: unsafe fn(RecordLayout, &[u8], &mut [f32]),
    /// See [`write_token`]: the same bits at every level.
    pub write_token: WriteToken,
    /// See [`encode_tile`]: the same bits at every level.
    pub encode_tile: EncodeTile,
}

/// Writes one token of an INT8 page; gives what [`int8::write_k`] and [`int8::write_v`] say of it.
#[inline(always)]
fn write_token(
    page: Int8Page,
    record: &mut [u8],
    token: usize,
    (statistics, k, v, low): Int8Token<'_>,
) -> (WrittenK, bool) {
    let of_k = int8::write_k(page, ORDER, record, token, statistics, k, low);
    (of_k, int8::write_v(page, ORDER, record, token, v))
}

/// The kernels of an available level.
pub fn kernels(level: Level) -> Kernels {
    assert!(level.is_available(), "the level was checked when it was chosen");
    match level {
        Level::Scalar => {
            Kernels { attend_record: attend_record::<Scalar>, unpack: unpack::<Scalar>, write_token, encode_tile }
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => Kernels {
            attend_record: x86::attend_record_avx2,
            unpack: x86::unpack_avx2,
            write_token: x86::write_token_avx2,
            encode_tile: x86::encode_tile_avx2,
        },
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => Kernels {
            attend_record: x86::attend_record_avx512,
            unpack: x86::unpack_avx512,
            write_token: x86::write_token_avx512,
            encode_tile: x86::encode_tile_avx512,
        },
        #[cfg(not(target_arch = "x86_64"))]
        Level::Avx2 | Level::Avx512 => unreachable!("not available here"),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::avx2::Avx2;
    use super::super::avx512::Avx512;
    use super::{
        HeadFeedback, Int8Page, Int8Token, RecordLayout, RecordView, Rows, Scratch, Tile, WrittenK, attend_record,
        encode_tile, unpack, write_token,
    };

    /// The entry points of a level: its instructions are on for the kernels, without fused multiply-add in those that
    /// write, so that every level rounds alike.
    macro_rules! entry_points {
        ($level:ty, $reads:literal, $writes:literal: $attend:ident, $unpack:ident, $write:ident, $encode:ident) => {
            #[target_feature(enable = $reads)]
            pub unsafe fn $attend(
                view: &RecordView<'_>,
                rows: &mut Rows<'_>,
                softcap: Option<f32>,
                scratch: &mut Scratch,
            ) {
                // SAFETY: the instructions are on.
                unsafe { attend_record::<$level>(view, rows, softcap, scratch) }
            }

            #[target_feature(enable = $reads)]
            pub unsafe fn $unpack(layout: RecordLayout, record: &[u8], out: &mut [f32]) {
                // SAFETY: the instructions are on.
                unsafe { unpack::<$level>(layout, record, out) }
            }

            #[target_feature(enable = $writes)]
            pub unsafe fn $write(
                page: Int8Page,
                record: &mut [u8],
                token: usize,
                of_token: Int8Token<'_>,
            ) -> (WrittenK, bool) {
                write_token(page, record, token, of_token)
            }

            #[target_feature(enable = $writes)]
            pub unsafe fn $encode(
                k: &[f32],
                v: &[f32],
                head_dim: usize,
                bits: u32,
                feedback: &HeadFeedback,
                first_row: Option<usize>,
            ) -> Tile {
                encode_tile(k, v, head_dim, bits, feedback, first_row)
            }
        };
    }

    entry_points!(Avx2, "avx2,fma,f16c", "avx2":
        attend_record_avx2, unpack_avx2, write_token_avx2, encode_tile_avx2);
    entry_points!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c", "avx512f,avx512bw,avx512dq,avx512vl":
        attend_record_avx512, unpack_avx512, write_token_avx512, encode_tile_avx512);
}
