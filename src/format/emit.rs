//! Prints the layouts: what other languages and the golden file check themselves against.

use super::{BLOCK_SIZES, CodeOrder, Dtype, FORMAT_VERSION, Format, RawPage, TokenPage, record_bytes};
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
                int8_record(out, TokenPage { head_dim, block_size })?;
            }
        }
        writeln!(out, "\n  ],\n  \"orders\": [")?;
        separator = "";
        for order in CodeOrder::ALL {
            for (token, channel) in [(0, 0), (1, 0), (0, 1), (5, 7), (17, 19), (127, 63)] {
                write!(
                    out,
                    "{separator}    {{\"order\": \"{order:?}\", \"block_size\": 128, \"head_dim\": 64, \"token\": {token}, \"channel\": {channel}, \
                     \"k_code\": {}, \"v_code\": {}, \"raw_k\": {}, \"raw_v\": {}}}",
                    order.k_code([128, 64], token, channel),
                    order.v_code([128, 64], token, channel),
                    order.raw_k([128, 64], token, channel),
                    order.raw_v([128, 64], token, channel),
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

fn int8_record(out: &mut Formatter<'_>, page: TokenPage) -> fmt::Result {
    let TokenPage { head_dim, block_size } = page;
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
