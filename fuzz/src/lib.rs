//! What the fuzz targets share: making a mutated file one whose faults lie behind its length, its size and its checksum.
//!
//! A target that hands mutated bytes to a reader of files that end with a CRC-32 tests the CRC-32. [`repaired`] sets what
//! the outermost checks compare, so that mutations reach the checks behind them.

use serde_json::Value;

/// Bytes of the length that a file starts with.
const LENGTH_BYTES: usize = 8;
/// Bytes of the checksum that it ends with.
const CHECKSUM_BYTES: usize = 4;
/// Tensors that say they are larger are left as they are: the size check refuses them.
const MAX_DATA_BYTES: usize = 1 << 16;

/// The file with the length of its header, the bytes of its tensors (cut, or zeros added) and its checksum made right,
/// as far as its header can be read; `None` where there is no header.
pub fn repaired(file: &[u8]) -> Option<Vec<u8>> {
    let text = file.get(LENGTH_BYTES..)?;
    let mut headers = serde_json::Deserializer::from_slice(text).into_iter::<Value>();
    let header = headers.next()?.ok()?;
    let mut end = headers.byte_offset();
    end += text[end..].iter().take_while(|&&byte| byte == b' ').count();

    let (header_text, data) = text.split_at(end);
    let mut data = data.to_vec();
    let num_bytes = data_bytes(&header);
    if num_bytes <= MAX_DATA_BYTES {
        data.resize(num_bytes, 0);
    }
    let mut out = [&(header_text.len() as u64).to_le_bytes()[..], header_text, &data].concat();
    let end = out.len() - CHECKSUM_BYTES.min(data.len());
    let (rest, sum) = out.split_at_mut(end);
    sum.copy_from_slice(&crc32fast::hash(rest).to_le_bytes()[..sum.len()]);
    Some(out)
}

/// Where the last tensor of a header ends.
fn data_bytes(header: &Value) -> usize {
    let ends = header.as_object().into_iter().flatten().filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64());
    ends.max().map_or(0, |end| usize::try_from(end).unwrap_or(usize::MAX))
}
