//! In which bits of a plane does a code sit? Canonical order, low bits first.
//!
//! ```text
//! 4 bits   code i in byte i/2, at bit 4 (i mod 2)
//! 2 bits   code i in byte i/4, at bit 2 (i mod 4)
//! 3 bits   its low two bits as above, in the first n/4 bytes; then its high bit in byte i/8, at bit i mod 8
//! ```

/// Bytes of `num_codes` codes of `bits` bits (2, 3 or 4); each plane starts at a whole byte.
#[must_use]
pub const fn plane_bytes(num_codes: usize, bits: u32) -> usize {
    match bits {
        3 => num_codes.div_ceil(4) + num_codes.div_ceil(8),
        _ => (num_codes * bits as usize).div_ceil(8),
    }
}

/// Packs codes of `bits` bits (2, 3 or 4); `out` has [`plane_bytes`] bytes.
pub fn pack(codes: &[u8], bits: u32, out: &mut [u8]) {
    if bits == 3 {
        let (low, high) = out.split_at_mut(codes.len().div_ceil(4));
        pack_plane::<4>(codes, 0, low);
        pack_plane::<8>(codes, 2, high);
    } else if bits == 2 {
        pack_plane::<4>(codes, 0, out);
    } else {
        pack_plane::<2>(codes, 0, out);
    }
}

/// Unpacks what [`pack`] packed.
pub fn unpack(bytes: &[u8], bits: u32, codes: &mut [u8]) {
    codes.fill(0);
    if bits == 3 {
        let (low, high) = bytes.split_at(codes.len().div_ceil(4));
        unpack_plane::<4>(low, 0, codes);
        unpack_plane::<8>(high, 2, codes);
    } else if bits == 2 {
        unpack_plane::<4>(bytes, 0, codes);
    } else {
        unpack_plane::<2>(bytes, 0, codes);
    }
}

/// One plane, of `PER_BYTE` codes a byte: their bits from `shift` on.
fn pack_plane<const PER_BYTE: usize>(codes: &[u8], shift: u32, out: &mut [u8]) {
    let width = 8 / PER_BYTE;
    let mask = ((1u16 << width) - 1) as u8;
    for (byte, codes) in out.iter_mut().zip(codes.chunks(PER_BYTE)) {
        *byte = codes.iter().enumerate().fold(0, |byte, (i, code)| byte | (((code >> shift) & mask) << (width * i)));
    }
}

fn unpack_plane<const PER_BYTE: usize>(bytes: &[u8], shift: u32, codes: &mut [u8]) {
    let width = 8 / PER_BYTE;
    let mask = ((1u16 << width) - 1) as u8;
    for (byte, codes) in bytes.iter().zip(codes.chunks_mut(PER_BYTE)) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code |= ((byte >> (width * i)) & mask) << shift;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn packed(codes: &[u8], bits: u32) -> Vec<u8> {
        let mut out = vec![0xff; plane_bytes(codes.len(), bits)];
        pack(codes, bits, &mut out);
        out
    }

    #[test]
    fn golden_bytes() {
        assert_eq!(packed(&[1, 15, 8, 0], 4), [0xf1, 0x08]);
        assert_eq!(packed(&[1, 2, 3, 0, 3, 0, 0, 2], 2), [0b00_11_10_01, 0b10_00_00_11]);
        // 5 = 1 + 4, 7 = 3 + 4: the low bits of all eight, then the high ones
        assert_eq!(packed(&[5, 2, 7, 0, 3, 4, 0, 6], 3), [0b00_11_10_01, 0b10_00_00_11, 0b1010_0101]);
    }

    #[test]
    fn a_code_lies_where_the_table_says() {
        for place in [0usize, 1, 3, 7, 8, 15, 17, 127] {
            for bits in [2, 3, 4] {
                let mut codes = [0u8; 128];
                codes[place] = (1 << bits) - 1;
                let bytes = packed(&codes, bits);
                let ones: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
                assert_eq!(ones, bits, "a code touches its own bits alone");
                match bits {
                    4 => assert_eq!(bytes[place / 2] >> (4 * (place % 2)), 15),
                    2 => assert_eq!(bytes[place / 4] >> (2 * (place % 4)), 3),
                    _ => {
                        assert_eq!(bytes[place / 4] >> (2 * (place % 4)), 3);
                        assert_eq!(bytes[128 / 4 + place / 8] >> (place % 8), 1);
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_have_the_bytes_of_their_codes() {
        for bits in [2u32, 3, 4] {
            assert_eq!(plane_bytes(128 * 64, bits), 128 * 64 * bits as usize / 8);
        }
    }

    proptest! {
        #[test]
        fn codes_of_any_number_come_back(codes in vec(0u8..16, 0..150), bits in 2u32..=4) {
            let codes: Vec<u8> = codes.into_iter().map(|code| code & ((1 << bits) - 1)).collect();
            let mut back = vec![0xff; codes.len()];
            unpack(&packed(&codes, bits), bits, &mut back);
            prop_assert_eq!(codes, back);
        }
    }
}
