//! The bytes of one INT8 page, against those that `tests/golden/make_int8_page.py` computes from the description alone.

use kvarn::format::{CodeOrder, Int8Page};
use kvarn::quant::{self, ChannelStatistics};
use sha2::{Digest, Sha256};

const TOKENS: usize = 128;
const CHANNELS: usize = 64;
const GOLDEN: &str = "32eb2022230ca06c283850a354976712b1f70eebcdeface16705a4401c3659c5";

fn inputs() -> (Vec<f32>, Vec<f32>) {
    let round = |x: f64| ((x * 1024.0).round_ties_even() / 1024.0) as f32;
    let mut k = vec![0.0; TOKENS * CHANNELS];
    let mut v = k.clone();
    for i in 0..TOKENS * CHANNELS {
        let (t, d) = ((i / CHANNELS) as f64, (i % CHANNELS) as f64);
        k[i] = round((0.37 * t + 1.3 * d).sin() * (1.0 + d % 5.0) + (d - 32.0) / 4.0);
        v[i] = round((0.11 * t * (1.0 + d % 7.0)).cos() * (0.5 + t / 64.0));
    }
    (k, v)
}

fn page() -> Vec<u8> {
    let (k, v) = inputs();
    let page = Int8Page { head_dim: CHANNELS, block_size: TOKENS };
    let mut record = vec![0u8; page.bytes()];
    let statistics = ChannelStatistics::of_rows(&k, CHANNELS, None, true);
    let put = |record: &mut [u8], offset: usize, index: usize, value: half::f16| {
        record[offset + 2 * index..][..2].copy_from_slice(&value.to_le_bytes());
    };
    for d in 0..CHANNELS {
        put(&mut record, page.k_channel_mean(), d, half::f16::from_f32(statistics.mean[d]));
        put(&mut record, page.k_channel_scale(), d, half::f16::from_f32(statistics.scale[d]));
    }
    for t in 0..TOKENS {
        let (mut k_codes, mut v_codes) = ([0i8; CHANNELS], [0u8; CHANNELS]);
        let row = t * CHANNELS..(t + 1) * CHANNELS;
        let k_scale = quant::encode_k(&k[row.clone()], &statistics, &mut k_codes);
        let (v_scale, zero_point) = quant::encode_v(&v[row], &mut v_codes);
        for d in 0..CHANNELS {
            let order = CodeOrder::Canonical;
            record[page.k_codes() + order.k_code([TOKENS, CHANNELS], t, d)] = k_codes[d].cast_unsigned();
            record[page.v_codes() + order.v_code([TOKENS, CHANNELS], t, d)] = v_codes[d];
        }
        put(&mut record, page.k_token_scale(), t, k_scale);
        put(&mut record, page.v_token_scale(), t, v_scale);
        put(&mut record, page.v_token_zero_point(), t, zero_point);
    }
    record
}

fn hex(digest: &[u8]) -> String {
    let half = |bytes: &[u8]| bytes.iter().fold(0u128, |number, &byte| number << 8 | u128::from(byte));
    format!("{:032x}{:032x}", half(&digest[..16]), half(&digest[16..]))
}

#[test]
fn a_page_has_the_golden_bytes() {
    let digest = Sha256::digest(page());
    assert_eq!(hex(&digest), GOLDEN, "bytes of INT8 pages changed: if they were meant to, raise FORMAT_VERSION");
}
