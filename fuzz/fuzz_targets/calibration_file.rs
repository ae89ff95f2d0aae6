//! Any bytes as a calibration file: a calibration that tiles can be sealed with, or a refusal.

#![no_main]

use kvarn::Error;
use kvarn::calibration::{Calibration, State};
use kvarn::quant::{decode_tile_k, decode_tile_v, encode_tile};
use libfuzzer_sys::fuzz_target;

/// Tokens of the tile that a calibration is tried with.
const TOKENS: usize = 16;

fuzz_target!(|data: &[u8]| {
    read(data);
    if let Some(file) = kvarn_fuzz::repaired(data) {
        read(&file);
    }
});

fn read(bytes: &[u8]) {
    let calibration = match Calibration::from_bytes(bytes, None) {
        Ok(calibration) => calibration,
        Err(error) => return assert!(matches!(error, Error::Calibration(_)), "{error:?}"),
    };
    let origin = calibration.origin().expect("that of its file").clone();
    let written = |read: &Calibration| read.to_bytes(&origin.fingerprint, &origin.model).expect("loaded layers");
    let again = Calibration::from_bytes(&written(&calibration), Some(&origin.fingerprint)).expect("what was written");
    assert_eq!((calibration.layers(), &origin), (again.layers(), again.origin().expect("that of its file")));
    assert!(written(&calibration) == written(&again), "what is read is written alike");
    assert_eq!(calibration.state(), State::File);

    for summary in calibration.layers() {
        let layer = calibration.for_seal(summary.layer).expect("loaded").expect("loaded");
        assert_eq!(layer.heads().len(), summary.num_kv_heads);
        let k: Vec<f32> = (0..TOKENS * summary.head_dim).map(|i| (i as f32 * 0.7).sin() + (i % 3) as f32).collect();
        let head = &layer.heads()[0];
        for bits in [4, 3, 2] {
            let tile = encode_tile(&k, &k, summary.head_dim, bits, &head.feedback, Some(0));
            let mut decoded = vec![f32::NAN; k.len()];
            decode_tile_k(&tile, &mut decoded);
            assert!(decoded.iter().all(|x| x.is_finite()), "K of {bits} bits: {decoded:?}");
            decode_tile_v(&tile, &mut decoded);
            assert!(decoded.iter().all(|x| x.is_finite()), "V of {bits} bits: {decoded:?}");
        }
    }
}
