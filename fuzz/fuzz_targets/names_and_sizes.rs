//! Any text as the name of a format, dtype, codec, SIMD level or storage; any numbers as the shape of a cache.

#![no_main]

use arbitrary::Arbitrary;
use kvarn::backend::cpu::Level;
use kvarn::config::capacity::{LayerGroup, Storage, capacity};
use kvarn::format::{Dtype, Format};
use kvarn::quant::Codec;
use kvarn::{CacheConfig, Error};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    groups: Vec<Group>,
    block_size: usize,
    context: usize,
    memory_bytes: u64,
    max_sequences: Option<u64>,
    num_blocks: Option<usize>,
    num_open_pages: Option<usize>,
    name: &'a str,
}

#[derive(Debug, Arbitrary)]
struct Group {
    num_layers: usize,
    num_kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    storage: u8,
}

/// Small numbers that are allowed, as often as any others: half of all inputs are beyond the first check.
fn likely(number: usize, allowed: &[usize]) -> usize {
    if number % 2 == 0 { allowed[number / 2 % allowed.len()] } else { number }
}

fuzz_target!(|input: Input| {
    names(input.name);
    let block_size = likely(input.block_size, &[16, 32, 64, 128]);
    let storages: Vec<Storage> = Format::ALL
        .into_iter()
        .map(|format| Storage::Pages(format, Dtype::Bf16))
        .chain([1, 2].map(|element_bytes| Storage::Dense { element_bytes }))
        .collect();
    let groups = input.groups.iter().map(|group| LayerGroup {
        num_layers: likely(group.num_layers, &[1, 2, 30]),
        num_kv_heads: likely(group.num_kv_heads, &[1, 3, 8]),
        head_dim: likely(group.head_dim, &[16, 64, 96, 256]),
        window: group.window,
        storage: storages[usize::from(group.storage) % storages.len()],
    });
    let groups: Vec<LayerGroup> = groups.collect();
    match capacity(&groups, block_size, input.context, input.memory_bytes, input.max_sequences) {
        Ok(fits) => {
            assert!(fits.open_bytes <= fits.sequence_bytes && fits.open_page_bytes <= fits.open_bytes, "{fits:?}");
            assert!(input.max_sequences.is_none_or(|most| u128::from(most) >= u128::from(fits.sequences)), "{fits:?}");
        }
        Err(error) => assert!(matches!(error, Error::Config(_) | Error::InvalidSetting { .. } | Error::Unsupported(_)), "{error:?}"),
    }
    for group in groups {
        let config = CacheConfig {
            block_size,
            num_blocks: input.num_blocks,
            num_open_pages: input.num_open_pages,
            window: group.window,
            ..CacheConfig::new(group.num_layers, group.num_kv_heads, group.head_dim)
        };
        for format in Format::ALL {
            let config = CacheConfig { format, ..config.clone() };
            match config.validate() {
                Ok(()) => assert!(config.block_bytes() <= config.open_page_bytes(), "{config:?}"),
                Err(error) => assert!(matches!(error, Error::Config(_) | Error::InvalidSetting { .. } | Error::Unsupported(_)), "{error:?}"),
            }
        }
    }
});

fn names(name: &str) {
    assert!(Format::parse(name).is_none_or(|format| format.name() == name));
    assert!(Dtype::parse(name).is_none_or(|dtype| dtype.name() == name));
    assert!(Codec::parse(name).is_none_or(|codec| codec.name() == name));
    if let Ok(level) = Level::parse(name) {
        assert_eq!(level.name(), name);
    }
    match Storage::parse(name) {
        Ok(Storage::Pages(format, _)) => assert_eq!(format.name(), name),
        Ok(Storage::Dense { element_bytes }) => assert_eq!(name, ["fp8", "bf16"][element_bytes - 1]),
        Err(error) => assert!(error.to_string().contains("raw"), "{error}"),
    }
}
