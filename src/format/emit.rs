//! Prints the layouts: what other languages and the golden file check themselves against. Places of values are printed as
//! bytes of their record, those of a tile's codes as bits.

use super::{
    Arrangement, BLOCK_SIZES, Dtype, FORMAT_VERSION, Format, Int8Page, Int8Parameter, Plane, RawPage, SealedTile,
    TileParameter, record_bytes,
};
use core::fmt::{self, Display, Formatter};

const HEAD_DIMS: [usize; 6] = [16, 64, 80, 96, 128, 256];

/// Every layout, offset and order probe as JSON; `Display` writes it.
#[derive(Debug, Clone, Copy)]
pub struct LayoutJson;

impl Display for LayoutJson {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(out, "{{\n  \"format_version\": {FORMAT_VERSION},\n  \"records\": [")?;
        let mut separator = "";
        for head_dim in HEAD_DIMS {
            for block_size in BLOCK_SIZES {
                for dtype in Dtype::ALL {
                    out.write_str(separator)?;
                    raw_record(out, RawPage { head_dim, block_size, dtype })?;
                    separator = ",\n";
                }
                out.write_str(separator)?;
                int8_record(out, Int8Page { head_dim, block_size })?;
                for format in Format::ALL {
                    if let Some(bits) = format.tile_bits() {
                        out.write_str(separator)?;
                        tile_record(out, format, SealedTile { head_dim, block_size, bits })?;
                    }
                }
            }
        }
        writeln!(out, "\n  ],\n  \"orders\": [")?;
        separator = "";
        for order in Arrangement::ALL {
            for head_dim in HEAD_DIMS {
                for (token, channel) in [(0, 0), (1, 0), (0, 1), (5, 7), (17, 19), (127, 63)] {
                    out.write_str(separator)?;
                    places(out, order, head_dim, token, channel % head_dim)?;
                    separator = ",\n";
                }
            }
        }
        writeln!(out, "\n  ]\n}}")
    }
}

/// The places of one token and channel in records of 128 tokens: codes of an INT8 page, the parameters of a token,
/// elements of a `raw` page, and codes of tiles in planes of 4, 2 and 1 bits.
fn places(out: &mut Formatter<'_>, order: Arrangement, head_dim: usize, token: usize, channel: usize) -> fmt::Result {
    let block_size = 128;
    let page = Int8Page { head_dim, block_size };
    let raw = RawPage { head_dim, block_size, dtype: Dtype::Bf16 };
    let planes = [4, 2, 1].map(|bits| {
        let tile = SealedTile { head_dim, block_size, bits: if bits == 1 { 3 } else { bits } };
        (tile, Plane { bits, shift: if bits == 1 { 2 } else { 0 } })
    });
    let tile = planes[0].0;
    write!(
        out,
        "    {{\"order\": \"{order:?}\", \"block_size\": {block_size}, \"head_dim\": {head_dim}, \"token\": {token}, \
         \"channel\": {channel}, \"k_code\": {}, \"v_code\": {}, \"v_token_scale\": {}, \"raw_k\": {}, \"raw_v\": {}, \
         \"tile_k\": {:?}, \"tile_v\": {:?}, \"tile_v_token_scale\": {}}}",
        order.k_code(page, token, channel),
        order.v_code(page, token, channel),
        order.parameter(page, Int8Parameter::VTokenScale, token),
        order.raw_k(raw, token, channel),
        order.raw_v(raw, token, channel),
        planes.map(|(tile, plane)| order.tile_k(tile, plane, token, channel)),
        planes.map(|(tile, plane)| order.tile_v(tile, plane, token, channel)),
        order.tile_parameter(tile, TileParameter::VTokenScale, token),
    )
}

fn raw_record(out: &mut Formatter<'_>, page: RawPage) -> fmt::Result {
    let RawPage { head_dim, block_size, dtype } = page;
    write!(
        out,
        "    {{\"format\": \"{}\", \"dtype\": \"{}\", \"head_dim\": {head_dim}, \"block_size\": {block_size}, \
         \"k\": {}, \"v\": {}, \"bytes\": {}}}",
        Format::Raw.name(),
        dtype.name(),
        page.k(),
        page.v(),
        record_bytes(Format::Raw, dtype, head_dim, block_size),
    )
}

fn int8_record(out: &mut Formatter<'_>, page: Int8Page) -> fmt::Result {
    let Int8Page { head_dim, block_size } = page;
    write!(
        out,
        "    {{\"format\": \"{}\", \"head_dim\": {head_dim}, \"block_size\": {block_size}, \"k_codes\": {}, \
         \"v_codes\": {}, \"k_token_scale\": {}, \"v_token_scale\": {}, \"v_token_zero_point\": {}, \
         \"k_channel_mean\": {}, \"k_channel_scale\": {}, \"bytes\": {}}}",
        Format::Int8.name(),
        page.k_codes(),
        page.v_codes(),
        page.k_token_scale(),
        page.v_token_scale(),
        page.v_token_zero_point(),
        page.k_channel_mean(),
        page.k_channel_scale(),
        record_bytes(Format::Int8, Dtype::F32, head_dim, block_size),
    )
}

fn tile_record(out: &mut Formatter<'_>, format: Format, tile: SealedTile) -> fmt::Result {
    let SealedTile { head_dim, block_size, bits } = tile;
    write!(
        out,
        "    {{\"format\": \"{}\", \"head_dim\": {head_dim}, \"block_size\": {block_size}, \"bits\": {bits}, \
         \"k_codes\": {}, \"v_codes\": {}, \"high_plane\": {}, \"k_channel_scale\": {}, \"k_channel_zero_point\": {}, \
         \"k_token_scale\": {}, \"v_token_scale\": {}, \"v_token_zero_point\": {}, \"first_v\": {}, \
         \"first_v_scale\": {}, \"first_v_zero_point\": {}, \"header\": {}, \"bytes\": {}}}",
        format.name(),
        tile.k_codes(),
        tile.v_codes(),
        tile.high_plane(),
        tile.k_channel_scale(),
        tile.k_channel_zero_point(),
        tile.k_token_scale(),
        tile.v_token_scale(),
        tile.v_token_zero_point(),
        tile.first_v(),
        tile.first_v_scale(),
        tile.first_v_zero_point(),
        tile.header(),
        record_bytes(format, Dtype::F32, head_dim, block_size),
    )
}
