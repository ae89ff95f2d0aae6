//! Elements of a record: little-endian floats at a byte.

use crate::format::Dtype;
use half::{bf16, f16};

pub(super) fn read_f16(record: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([record[at], record[at + 1]])
}

pub(super) fn write_f16(record: &mut [u8], at: usize, value: f16) {
    record[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

#[inline(always)]
/// The element of this type at a byte.
pub(crate) fn read(record: &[u8], dtype: Dtype, at: usize) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]),
        Dtype::F16 => read_f16(record, at).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes([record[at], record[at + 1]]).to_f32(),
    }
}

#[inline(always)]
pub(super) fn write(record: &mut [u8], dtype: Dtype, at: usize, value: f32) {
    match dtype {
        Dtype::F32 => record[at..at + 4].copy_from_slice(&value.to_le_bytes()),
        Dtype::F16 => write_f16(record, at, f16::from_f32(value)),
        Dtype::Bf16 => record[at..at + 2].copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
    }
}
