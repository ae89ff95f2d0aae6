//! The order of the CPU kernels: fields are whole, at the offsets of the layouts, and within them
//!
//! * INT8 codes are sixteen lanes of four values, what a vector unit multiplies without a shuffle or a sum across lanes. A
//!   lane of K is a token, `[token/16][channel/4][16 tokens][4 channels]`; a lane of V is a channel,
//!   `[channel/16][token/4][16 channels][4 tokens]`.
//! * Codes of tiles are in the same lanes, each a word of [`word_codes`] codes: 32 bits of eight 4-bit or sixteen 2-bit
//!   codes, or 16 bits of sixteen 1-bit ones. Shifted by a multiple of the code's width and masked, a word is four codes
//!   in four bytes (1-bit codes: in four nibbles), as an INT8 lane. K `[token/16][channel/codes][16 tokens][codes]`,
//!   V `[channel/16][token/codes][16 channels][codes]`.
//! * `raw` elements are K `[token/16][channel][16 tokens]`, V `[channel/16][token][16 channels]`.
//!
//! The kernels take K panel by panel and V channel group by channel group: both are read front to back.

/// Lanes of a panel: tokens side by side in K, channels side by side in V.
pub const LANES: usize = 16;

/// Values of one lane side by side, in INT8 fields.
pub const DEPTH: usize = 4;

/// Codes of one lane's word in a plane of a tile, for planes of 4, 2 or 1 bits.
#[must_use]
pub const fn word_codes(plane_bits: u32) -> usize {
    if plane_bits == 4 { 8 } else { 16 }
}

/// Index of an INT8 code; `lane` is its token in K and its channel in V, `depth` the other.
pub(super) const fn int8(lane: usize, depth: usize, depth_len: usize) -> usize {
    lane / LANES * LANES * depth_len + depth / DEPTH * (LANES * DEPTH) + lane % LANES * DEPTH + depth % DEPTH
}

/// Index of a `raw` element.
pub(super) const fn raw(lane: usize, depth: usize, depth_len: usize) -> usize {
    lane / LANES * LANES * depth_len + depth * LANES + lane % LANES
}

/// Index of a tile's code in a plane: values of a lane lie in words, four of them a quarter of a word apart.
pub(super) const fn in_words(plane_bits: u32, lane: usize, depth: usize, depth_len: usize) -> usize {
    let word = word_codes(plane_bits);
    let first = (lane / LANES * (depth_len / word) + depth / word) * (LANES * word) + lane % LANES * word;
    let within = depth % word;
    first + within % DEPTH * (word / DEPTH) + within / DEPTH
}
