//! Prints the layouts: what other languages and the golden file check themselves against.

use super::{BLOCK_SIZES, CodeOrder, Dtype, FORMAT_VERSION, Format, Int8Page, RawPage, SealedTile, record_bytes};
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
        for order in CodeOrder::ALL {
            for (token, channel) in [(0, 0), (1, 0), (0, 1), (5, 7), (17, 19), (127, 63)] {
                write!(
                    out,
                    "{separator}    {{\"order\": \"{order:?}\", \"block_size\": 128, \"head_dim\": 64, \"token\": {token}, \"channel\": {channel}, \
                     \"k_code\": {}, \"v_code\": {}, \"raw_k\": {}, \"raw_v\": {}, \
                     \"tile_k\": {:?}, \"tile_v\": {:?}}}",
                    order.k_code([128, 64], token, channel),
                    order.v_code([128, 64], token, channel),
                    order.raw_k([128, 64], token, channel),
                    order.raw_v([128, 64], token, channel),
                    [4, 2, 1].map(|bits| order.tile_k([128, 64], bits, token, channel)),
                    [4, 2, 1].map(|bits| order.tile_v([128, 64], bits, token, channel)),
                )?;
                separator = ",\n";
            }
        }
        writeln!(out, "\n  ]\n}}")
    }
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
