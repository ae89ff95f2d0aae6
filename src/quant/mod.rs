//! The quantizer, in scalar f32: values to codes and parameters, one token or one tile at a time, and to the bytes of
//! records ([`record`]). It is the specification that every backend is tested against.
//!
//! A page, token by token ([`int8_page`], under the statistics of [`statistics`]):
//!
//! ```text
//! K^[t,d] = k_channel_mean[d] + k_channel_scale[d] * k_token_scale[t] * code      code in [-127, 127]
//! V^[t,d] = v_token_scale[t] * code + v_token_zero_point[t]                       code in [0, 255]
//! ```
//!
//! A sealed tile of b bits, whole ([`tile`]): K or `K H` ([`hadamard`]), scaled by [`mod@dual_scale`], each channel rounded
//! ([`round`]) so that errors cancel where the queries look ([`feedback`]); `V' = V H`:
//!
//! ```text
//! K^'[d,t] = (code * k_channel_scale[d] + k_channel_zero_point[d]) * k_token_scale[t]      code in [0, 2^b - 1]
//! V^'[t,d] =  code * v_token_scale[t] + v_token_zero_point[t]                              code in [0, 2^b - 1]
//! ```
//!
//! [`codec`] has the schemes to compare with, [`mod@reference`] the one that this one comes from.
//!
//! Parameters are computed in f32 and stored as f16; codes are `rint_even` of the value under the *stored* parameters,
//! clamped. A scale that underflows f16 gives code 0; one that overflows is 65504 ([`range`] says of which tokens).

pub mod calibrated;
pub mod codec;
pub mod dual_scale;
pub mod feedback;
pub mod hadamard;
pub mod int8_page;
mod lanes;
pub mod range;
pub mod record;
pub mod reference;
pub mod round;
pub mod statistics;
pub mod tile;

pub use calibrated::{HeadCalibration, LayerCalibration, ModelChannels};
pub use codec::Codec;
pub use dual_scale::{DualScale, DualScaleOptions, dual_scale};
pub use feedback::{Feedback, HeadFeedback};
pub use hadamard::{rotate, rotate_channels, rotate_moment};
pub use int8_page::{decode_k, decode_k_low, decode_v, encode_k, encode_k_low, encode_v};
pub use statistics::ChannelStatistics;
pub use tile::{FirstV, Frame, Tile, decode_tile_k, decode_tile_v, encode_tile, rotate_v};

use half::f16;

/// The nearest f16, clamped to the finite ones: a stored parameter is never infinite.
#[must_use]
pub fn to_f16_clamped(x: f32) -> f16 {
    f16::from_f32(x.clamp(-65504.0, 65504.0))
}

/// 1.5 * 2^23: the last bit of a sum with it is the unit.
const SHIFT: f32 = 12_582_912.0;

/// The nearest integer, ties to even, for `|x| < 2^22`; larger values keep their sign and stay at least 2^22 - 1 large,
/// which every caller clamps. The addition rounds, so that scalar and vector code agree to the bit on any machine.
#[inline(always)]
#[must_use]
pub fn rint_even(x: f32) -> f32 {
    let bounded = x.clamp(-4_194_303.0, 4_194_303.0);
    (bounded + SHIFT) - SHIFT
}

/// The low eight bits of a whole number from -128 to 255; unlike a cast this has no range to check, so it vectorizes.
#[inline(always)]
fn to_byte(code: f32) -> u8 {
    (code + SHIFT).to_bits() as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_parameter_beyond_f16_is_clamped() {
        assert_eq!(to_f16_clamped(1e9).to_f32(), 65504.0);
        assert_eq!(to_f16_clamped(-1e9).to_f32(), -65504.0);
    }

    proptest! {
        #[test]
        fn rint_even_is_the_library_s(x in -4_000_000f32..4_000_000.0) {
            prop_assert_eq!(rint_even(x), x.round_ties_even());
        }

        #[test]
        fn rint_even_breaks_ties_to_even(n in -100_000i32..100_000) {
            let tie = n as f32 + 0.5;
            prop_assert_eq!(rint_even(tie), tie.round_ties_even());
        }
    }
}
