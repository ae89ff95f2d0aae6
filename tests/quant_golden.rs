//! The bytes of one INT8 page, against those that `tests/golden/make_int8_page.py` computes from the description alone.

use kvarn::format::{Arrangement, Int8Page, RecordLayout};
use kvarn::quant::ChannelStatistics;
use kvarn::quant::record::{int8, reorder};
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

/// The record as it is written in an arrangement.
fn record(page: Int8Page, order: Arrangement) -> Vec<u8> {
    let (k, v) = inputs();
    let mut record = vec![0; page.bytes()];
    let statistics = ChannelStatistics::of_rows(&k, CHANNELS, None, true);
    int8::write_statistics(page, order, &mut record, &statistics);
    for (t, (k, v)) in k.chunks_exact(CHANNELS).zip(v.chunks_exact(CHANNELS)).enumerate() {
        int8::write_k(page, order, &mut record, t, &statistics, k, false);
        int8::write_v(page, order, &mut record, t, v);
    }
    record
}

fn hex(digest: &[u8]) -> String {
    let half = |bytes: &[u8]| bytes.iter().fold(0u128, |number, &byte| number << 8 | u128::from(byte));
    format!("{:032x}{:032x}", half(&digest[..16]), half(&digest[16..]))
}

#[test]
fn a_page_has_the_golden_bytes() {
    let page = Int8Page { head_dim: CHANNELS, block_size: TOKENS };
    for order in Arrangement::ALL {
        let mut canonical = vec![0xa5; page.bytes()];
        let written = record(page, order);
        reorder(RecordLayout::Int8(page), [order, Arrangement::Canonical], &written, &mut canonical);
        let digest = hex(&Sha256::digest(&canonical));
        assert_eq!(digest, GOLDEN, "{order:?}: if bytes of INT8 pages were meant to change, raise FORMAT_VERSION");
    }
}
