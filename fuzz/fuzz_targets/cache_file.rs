//! Any bytes as a cache file: caches that work, or a refusal.
//!
//! Caches that were read are written again to the same bytes twice, take a token more in
//! every sequence, and what attention makes of quantized ones is finite.

#![no_main]

use kvarn::backend::{AttendOptions, Fresh, TensorView, TensorViewMut};
use kvarn::cache::file;
use kvarn::format::{Dtype, Format};
use kvarn::plan::Rows;
use kvarn::{CacheConfig, Error, PagedKvCache, Result};
use libfuzzer_sys::fuzz_target;

/// Larger caches are read, but not stepped: a run stays short.
const MAX_HEADS: usize = 16;

fuzz_target!(|data: &[u8]| {
    read(data);
    if let Some(file) = kvarn_fuzz::repaired(data) {
        read(&file);
    }
});

fn read(bytes: &[u8]) {
    let (mut caches, note) = match file::from_bytes(bytes) {
        Ok(read) => read,
        Err(error) => return assert!(matches!(error, Error::CacheFile(_) | Error::OutOfMemory { .. }), "{error:?}"),
    };
    let written = written(&caches, &note);
    let (again, note_again) = file::from_bytes(&written).expect("what was written is read");
    assert_eq!(note, note_again);
    assert!(written == self::written(&again, &note), "what is read is written alike");
    for (cache, other) in caches.iter().zip(&again) {
        assert_eq!((cache.config(), cache.sequences()), (other.config(), other.sequences()));
    }
    caches.iter_mut().for_each(step);
}

fn written(caches: &[PagedKvCache], note: &str) -> Vec<u8> {
    file::to_bytes(&caches.iter().collect::<Vec<_>>(), note).expect("caches without a step or a codec")
}

/// A token more in every sequence, or what there is no room for.
fn step(cache: &mut PagedKvCache) {
    let CacheConfig { num_layers, num_kv_heads, head_dim, format, dtype, .. } = *cache.config();
    let sequences = cache.sequences();
    if num_layers * num_kv_heads > MAX_HEADS || format == Format::Raw && dtype != Dtype::F32 {
        return;
    }
    for sequence in sequences {
        let open = match cache.begin_step(&[(sequence, Rows::All(1))], false) {
            Ok(open) => open,
            Err(error) => {
                let full = matches!(error, Error::OutOfBlocks { .. } | Error::OutOfOpenPages { .. });
                return assert!(full || matches!(error, Error::OutOfMemory { .. } | Error::Config(_)), "{error:?}");
            }
        };
        let rows = vec![0.5; num_kv_heads * head_dim];
        let shape = [1, num_kv_heads, 1, head_dim];
        let made = (0..num_layers).try_for_each(|layer| -> Result<()> {
            let fresh =
                Fresh { k: TensorView::from_slice("k", &rows, shape)?, v: TensorView::from_slice("v", &rows, shape)? };
            let mut out = vec![f32::NAN; num_kv_heads * head_dim];
            cache.append(&open, layer, fresh, None)?;
            let (q, out_view) = (fresh.k, TensorViewMut::from_slice("out", &mut out, shape)?);
            cache.attend(&open, layer, q, Some(fresh), AttendOptions::PLAIN, out_view)?;
            // `raw` pages hold any finite number: those near the largest have sums beyond it.
            assert!(format == Format::Raw || out.iter().all(|x| x.is_finite()), "{out:?}");
            Ok(())
        });
        made.and_then(|()| cache.commit(&open)).expect("a step that has begun");
    }
    let _ = written(std::slice::from_ref(cache), "");
}
