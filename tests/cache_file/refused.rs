//! What is not such a file is refused, typed, whatever its bytes; and what is not refused is a cache.

use super::{Format, KV_HEADS, LAYERS, PagedKvCache, config, contents, filled, step, to_bytes};
use crate::common::seal_file;
use kvarn::format::{Dtype, Int8Page, SealedTile};
use kvarn::{CacheConfig, Error};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::OnceLock;

const CHANNELS: usize = 16;
const BLOCK: usize = 16;

pub fn valid(format: Format) -> &'static [u8] {
    static FILES: [OnceLock<Vec<u8>>; 5] = [const { OnceLock::new() }; 5];
    let index = Format::ALL.into_iter().position(|known| known == format).expect("a format");
    FILES[index].get_or_init(|| {
        let dtype = if format == Format::Raw { Dtype::F16 } else { Dtype::F32 };
        to_bytes(&filled(CacheConfig { dtype, window: Some(30), ..config(format, CHANNELS, BLOCK) }))
    })
}

/// A file taken apart: its header as JSON, its data as bytes.
pub struct Parts {
    pub header: Value,
    pub data: Vec<u8>,
}

impl Parts {
    pub fn new(format: Format) -> Self {
        let valid = valid(format);
        let length = usize::try_from(u64::from_le_bytes(valid[..8].try_into().expect("8 bytes"))).expect("small");
        let header = serde_json::from_slice(&valid[8..8 + length]).expect("JSON");
        Self { header, data: valid[8 + length..].to_vec() }
    }

    /// The file, under the checksum that was written.
    pub fn unsealed(&self) -> Vec<u8> {
        let header = self.header.to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &self.data].concat()
    }

    /// The file, under a checksum of its own.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.unsealed();
        seal_file(&mut bytes);
        bytes
    }

    fn refusal(&self) -> String {
        refusal(&self.bytes())
    }

    /// The bytes of a tensor of the cache.
    pub fn tensor(&mut self, name: &str) -> &mut [u8] {
        let [start, end] = [0, 1].map(|i| {
            let offset = &self.header[format!("caches.0.{name}")]["data_offsets"][i];
            usize::try_from(offset.as_u64().expect("an offset")).expect("small")
        });
        &mut self.data[start..end]
    }
}

pub fn refusal(bytes: &[u8]) -> String {
    match PagedKvCache::from_bytes(bytes).expect_err("not a cache") {
        Error::CacheFile(message) => message,
        other => panic!("{other:?}"),
    }
}

pub fn assert_says(message: &str, expected: &str) {
    assert!(message.contains(expected), "{message:?} does not say {expected:?}");
}

#[test]
fn a_file_that_is_not_a_cache_is_refused() {
    let whole = valid(Format::Int4);
    for (bytes, expected) in [
        (&b""[..], "not a safetensors file of 0 bytes"),
        (&b"{\"not\": \"safetensors\"}"[..], "not a safetensors file of 22 bytes"),
        (&u64::MAX.to_le_bytes()[..], "a header of 18446744073709551615 bytes"),
        (&whole[..whole.len() - 1], "not a safetensors file"),
        (&[whole, &[0]].concat(), "not a safetensors file"),
    ] {
        assert_says(&refusal(bytes), expected);
    }
}

/// A change of a file's metadata.
type Alter = fn(&mut Value);

fn remove(metadata: &mut Value, key: &str) {
    metadata.as_object_mut().expect("an object").remove(key).expect("an entry");
}

#[test]
fn metadata_that_no_cache_has_is_refused() {
    let altered: [(Alter, &str); 26] = [
        (
            |m| m["kind"] = json!("kvarn calibration"),
            "not a file of kind \"kvarn cache\": its kind is \"kvarn calibration\"",
        ),
        (|m| *m = json!({"format": "pt"}), "a safetensors file without a kind"),
        (|m| m["version"] = json!("3"), "version 3, this release reads version 2"),
        (|m| m["format_version"] = json!("99"), "format version 99, this release reads"),
        (|m| m["format_version"] = json!(""), "format_version is \"\""),
        (|m| remove(m, "note"), "no \"note\""),
        (|m| remove(m, "caches"), "no \"caches\""),
        (|m| m["caches"] = json!("2"), "no \"caches.1.format\""),
        (|m| m["caches"] = json!("0"), "an unknown tensor \"caches.0.sequences\""),
        (|m| m["caches.0.format"] = json!("int5"), "format \"int5\", dtype \"float32\""),
        (|m| m["caches.0.dtype"] = json!("int8"), "dtype \"int8\""),
        (|m| m["caches.0.num_layers"] = json!("0"), "num_layers"),
        (|m| m["caches.0.num_layers"] = json!("1"), "an unknown tensor \"caches.0.layers.1.tiles\""),
        (|m| m["caches.0.num_layers"] = json!("3"), "caches.0.layers.2.tiles is missing"),
        (|m| m["caches.0.num_layers"] = json!("1152921504606846976"), "beyond what this machine can count"),
        (|m| m["caches.0.num_kv_heads"] = json!("3"), "expected shape [2, 3,"),
        (|m| m["caches.0.num_kv_heads"] = json!("18446744073709551615"), "beyond what this machine can count"),
        (|m| m["caches.0.head_dim"] = json!("24"), "head_dim 24"),
        (|m| m["caches.0.head_dim"] = json!("32"), "expected shape"),
        (|m| m["caches.0.block_size"] = json!("32"), "entries of block tables are no sequence's"),
        (|m| m["caches.0.block_size"] = json!("-16"), "block_size is \"-16\", not a number"),
        (|m| m["caches.0.num_blocks"] = json!("2"), "blocks in a pool of 2"),
        (|m| m["caches.0.num_open_pages"] = json!("1"), "open blocks, pages for 1"),
        (|m| m["caches.0.window"] = json!("0"), "window must be at least 1"),
        (|m| m["caches.0.next_sequence"] = json!("1"), "of which the next would be 1"),
        (|m| m["caches.0.next_sequence"] = json!("18446744073709551615"), "ids are below"),
    ];
    for (alter, expected) in altered {
        let mut parts = Parts::new(Format::Int4);
        alter(&mut parts.header["__metadata__"]);
        assert_says(&parts.refusal(), expected);
    }
}

#[test]
fn a_bound_that_no_machine_could_have_takes_no_memory() {
    let mut parts = Parts::new(Format::Int4);
    for key in ["num_blocks", "num_open_pages"] {
        parts.header["__metadata__"][format!("caches.0.{key}")] = json!("134217727");
    }
    let read = PagedKvCache::from_bytes(&parts.bytes()).expect("bounds are only bounds");
    assert!(read.stats().unwrap().allocated_bytes < 16 << 20);
}

#[test]
fn missing_or_malformed_tensors_are_refused() {
    let rename = |from: &str, to: &str| {
        let mut parts = Parts::new(Format::Int4);
        let tensors = parts.header.as_object_mut().expect("an object");
        let moved = tensors.remove(&format!("caches.0.{from}")).expect("a tensor");
        tensors.insert(to.to_owned(), moved);
        parts.refusal()
    };
    for tensor in ["sequences", "block_tables", "open", "layers.1.tiles", "layers.0.pages"] {
        assert_says(&rename(tensor, "other"), &format!("caches.0.{tensor} is missing"));
    }
    let reshape = |tensor: &str, dtype: &str, shape: Value| {
        let mut parts = Parts::new(Format::Int4);
        parts.header[format!("caches.0.{tensor}")]["dtype"] = json!(dtype);
        parts.header[format!("caches.0.{tensor}")]["shape"] = shape;
        parts.refusal()
    };
    assert_says(&reshape("sequences", "I64", json!([3, 3])), "expected dtype U64, got I64");
    assert_says(&reshape("sequences", "U64", json!([9])), "shape [9] is not [sequences, 3]");
    assert_says(&reshape("open", "U8", json!([1, 5])), "shape [1, 5] is not [blocks]");
    assert_says(&reshape("layers.0.tiles", "I8", json!([2, 2, 448])), "expected dtype U8, got I8");
    assert_says(&reshape("layers.0.tiles", "U8", json!([4, 1, 448])), "expected shape [2, 2, 448], got [4, 1, 448]");
    assert_says(&reshape("sequences", "U64", json!([1u64 << 62, 1 << 10])), "not a safetensors file");
}

#[test]
fn numbers_that_do_not_fit_are_refused() {
    let number = |row: usize, column: usize, value: u64| {
        let mut parts = Parts::new(Format::Int4);
        parts.tensor("sequences")[(row * 3 + column) * 8..][..8].copy_from_slice(&value.to_le_bytes());
        parts.refusal()
    };
    assert_says(&number(1, 0, 1), "sequence 1 a second time");
    assert_says(&number(1, 0, 77), "sequence 77, of which the next would be 4");
    assert_says(&number(0, 1, u64::MAX), "tokens, and 9 entries left of block tables");
    assert_says(&number(2, 1, 0), "1 entries of block tables are no sequence's");
    assert_says(&number(0, 2, 0), "first_held 0");
    assert_says(&number(0, 2, 7), "first_held 7");
    assert_says(&number(0, 2, 1 << 40), "first_held 1099511627776");
    let block = |entry: usize, value: u32| {
        let mut parts = Parts::new(Format::Int4);
        parts.tensor("block_tables")[entry * 4..][..4].copy_from_slice(&value.to_le_bytes());
        parts.refusal()
    };
    assert_says(&block(2, 5), "block 5 of 5");
    assert_says(&block(2, u32::MAX), "table entry 2 is released");
    assert_says(&block(8, 0), "block 4 is held by no sequence");
    let open = |block: usize, value: u8| {
        let mut parts = Parts::new(Format::Int4);
        parts.tensor("open")[block] = value;
        parts.refusal()
    };
    assert_says(&open(0, 2), "open: block 0 is 2, not 0 or 1");
    assert_says(&open(0, 1), "expected shape");
    let mut parts = Parts::new(Format::Int8);
    parts.tensor("block_tables")[4 * 2..][..4].copy_from_slice(&1_000_000_000u32.to_le_bytes());
    assert_says(&parts.refusal(), "block 1000000000 in tables of 9 entries");
}

#[test]
fn records_that_nothing_writes_are_refused() {
    let set = |format: Format, tensor: &str, at: usize, bytes: &[u8]| {
        let mut parts = Parts::new(format);
        parts.tensor(tensor)[at..at + bytes.len()].copy_from_slice(bytes);
        parts.refusal()
    };
    let infinite = half::f16::INFINITY.to_le_bytes();
    let tile = SealedTile { head_dim: CHANNELS, block_size: BLOCK, bits: 4 };
    let second = tile.bytes(); // head 1 of the first block
    for (field, at) in [
        ("k_channel_scale", tile.k_channel_scale()),
        ("k_channel_zero_point", tile.k_channel_zero_point()),
        ("k_token_scale", tile.k_token_scale()),
        ("v_token_scale", tile.v_token_scale()),
        ("v_token_zero_point", tile.v_token_zero_point()),
        ("first_v scale", tile.first_v_scale()),
        ("first_v zero point", tile.first_v_zero_point()),
    ] {
        let said = set(Format::Int4, "layers.1.tiles", second + at, &infinite);
        assert_says(&said, "caches.0.layers.1.tiles: block 0, head 1: ");
        assert_says(&said, &format!("{field}: element 0 is not finite"));
    }
    for (offset, byte) in [(0, 2), (1, 2), (2, BLOCK as u8), (3, 1)] {
        assert_says(&set(Format::Int4, "layers.0.tiles", tile.header() + offset, &[byte]), "not one of version 1");
    }
    assert_says(&set(Format::Int4, "layers.0.tiles", tile.first_v(), &[1]), "first_v: not zero");
    assert_says(&set(Format::Int4, "layers.0.tiles", tile.header() + 2, &[3]), "element 3, of the first row");
    assert_says(&set(Format::Int4, "layers.0.tiles", tile.header() + 4, &[1]), "after the header");
    let page = Int8Page { head_dim: CHANNELS, block_size: BLOCK };
    for format in [Format::Int4, Format::Int8] {
        assert_says(&set(format, "layers.0.pages", page.k_codes() + 5, &[0x80]), "k_codes: code 5 is -128");
        for (field, at) in [
            ("k_token_scale", page.k_token_scale()),
            ("v_token_scale", page.v_token_scale()),
            ("v_token_zero_point", page.v_token_zero_point()),
            ("k_channel_mean", page.k_channel_mean()),
            ("k_channel_scale", page.k_channel_scale()),
        ] {
            let said = set(format, "layers.0.pages", at + 2 * 7, &infinite);
            assert_says(&said, &format!("{field}: element 7 is not finite"));
        }
        let minus_one = half::f16::NEG_ONE.to_le_bytes();
        let said = set(format, "layers.0.pages", page.k_token_scale() + 2, &minus_one);
        assert_says(&said, "k_token_scale: -1 at token 1");
    }
    assert_says(&set(Format::Raw, "layers.0.pages", 2 * 9, &infinite), "k: element 9 is not finite");
    assert_says(&set(Format::Raw, "layers.0.pages", 2 * BLOCK * CHANNELS, &infinite), "v: element 0 is not finite");
}

/// What was not refused can be used: its tokens are had, it goes on, and it is saved and read again.
fn assert_is_a_cache(mut cache: PagedKvCache) {
    let again = PagedKvCache::from_bytes(&to_bytes(&cache)).expect("what is accepted can be written and read");
    let of_one_shape = cache.config().num_kv_heads == KV_HEADS && cache.config().num_layers == LAYERS;
    assert!(of_one_shape && again.sequences() == cache.sequences());
    for id in cache.sequences() {
        assert!(contents(&cache, id).len() == contents(&again, id).len());
        if cache.config().num_blocks.is_none() && cache.config().num_open_pages.is_none() {
            step(&mut cache, id, 1, 1);
            step(&mut cache, id, 17, 2);
        }
    }
    let last = cache.sequences().pop();
    last.into_iter().for_each(|id| cache.free(id).expect("settled"));
}

fn formats() -> impl Strategy<Value = Format> {
    proptest::sample::select(Format::ALL.to_vec())
}

proptest! {
    #[test]
    fn no_byte_changed_makes_a_panic((format, at, by) in (formats(), 0..1usize << 20, 1u8..=255)) {
        let mut bytes = valid(format).to_vec();
        let len = bytes.len();
        bytes[at % len] ^= by;
        seal_file(&mut bytes);
        match PagedKvCache::from_bytes(&bytes) {
            Ok(cache) => assert_is_a_cache(cache),
            Err(error) => prop_assert!(matches!(error, Error::CacheFile(_)), "{error:?}"),
        }
    }

    #[test]
    fn no_byte_of_the_header_or_the_tables_changed_makes_a_panic(
        (format, at, by) in (formats(), 0..3000usize, 1u8..=255)
    ) {
        let mut bytes = valid(format).to_vec();
        bytes[at] ^= by;
        seal_file(&mut bytes);
        match PagedKvCache::from_bytes(&bytes) {
            Ok(cache) => assert_is_a_cache(cache),
            Err(error) => prop_assert!(matches!(error, Error::CacheFile(_)), "{error:?}"),
        }
    }

    #[test]
    fn a_file_cut_short_is_refused((format, len) in (formats(), 0..1usize << 20)) {
        let bytes = &valid(format)[..len % valid(format).len()];
        prop_assert!(matches!(PagedKvCache::from_bytes(bytes), Err(Error::CacheFile(_))));
    }
}
