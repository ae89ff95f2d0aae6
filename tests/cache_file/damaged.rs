//! A file whose bytes are not those that were written is refused, whichever of them changed.

use super::refused::{Parts, assert_says, refusal, valid};
use super::{config, contents, filled, to_bytes};
use crate::common::{assert_damage_is_refused, folder, seal_file};
use kvarn::cache::file;
use kvarn::format::Format;
use kvarn::{CacheConfig, Error, PagedKvCache};
use std::fs;

fn is_refused(bytes: &[u8]) -> bool {
    matches!(PagedKvCache::from_bytes(bytes), Err(Error::CacheFile(_)))
}

#[test]
fn every_bit_flip_is_detected() {
    for format in [Format::Raw, Format::Int8, Format::Int4] {
        let small = CacheConfig { num_layers: 1, num_kv_heads: 1, ..config(format, 16, 16) };
        assert_damage_is_refused(&to_bytes(&filled(small)), is_refused);
    }
}

#[test]
fn a_file_of_nothing_is_checked_as_well() {
    let bytes = file::to_bytes(&[], "").expect("none");
    assert_damage_is_refused(&bytes, |bytes| matches!(file::from_bytes(bytes), Err(Error::CacheFile(_))));
}

#[test]
fn tensors_that_changed_places_are_refused_though_each_is_valid() {
    for tensor in ["pages", "tiles"] {
        let mut parts = Parts::new(Format::Int4);
        let first = parts.tensor(&format!("layers.0.{tensor}")).to_vec();
        let second = parts.tensor(&format!("layers.1.{tensor}")).to_vec();
        parts.tensor(&format!("layers.0.{tensor}")).copy_from_slice(&second);
        parts.tensor(&format!("layers.1.{tensor}")).copy_from_slice(&first);
        assert_says(&refusal(&parts.unsealed()), "damaged: the checksum of its bytes is");
        let [was, is] = [valid(Format::Int4), &parts.bytes()]
            .map(|bytes| PagedKvCache::from_bytes(bytes).expect("tensors of a cache"));
        let id = was.sequences()[0];
        assert!(contents(&was, id) != contents(&is, id), "nothing but the checksum tells them from each other");
    }
}

#[test]
fn a_file_on_disk_is_checked_piece_by_piece() {
    const PIECE: usize = 1 << 18; // what is summed at once
    let path = folder("cache_damaged").join("x");
    let config = CacheConfig { num_layers: 6, ..config(Format::Raw, 128, 128) };
    let written = to_bytes(&filled(config));
    assert!(written.len() > 3 * PIECE, "{} bytes", written.len());
    let ends = [0, 7, 8, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE - 1];
    for at in ends.into_iter().chain((1..=5).map(|back| written.len() - back)) {
        let mut bytes = written.clone();
        bytes[at] ^= 0x10;
        fs::write(&path, &bytes).expect("a file");
        for error in [PagedKvCache::load(&path).map(drop), file::inspect(&path).map(drop)] {
            let Err(Error::CacheFile(message)) = error else { panic!("byte {at}: {error:?}") };
            assert!(message.starts_with(&path.display().to_string()), "{message}");
        }
    }
    fs::write(&path, &written).expect("a file");
    assert!(PagedKvCache::load(&path).is_ok() && file::inspect(&path).is_ok());
}

#[test]
fn a_checksum_that_is_missing_or_elsewhere_is_refused() {
    let altered = |alter: &dyn Fn(&mut Parts)| {
        let mut parts = Parts::new(Format::Int8);
        alter(&mut parts);
        refusal(&parts.bytes())
    };
    let rename = |parts: &mut Parts| {
        let tensors = parts.header.as_object_mut().expect("an object");
        let moved = tensors.remove("checksum").expect("a tensor");
        tensors.insert("check".to_owned(), moved);
    };
    assert_says(&altered(&rename), "checksum is missing");
    let exchange = |parts: &mut Parts| {
        let first = &parts.header["caches.0.sequences"]["data_offsets"];
        let [start, end] = [0, 1].map(|i| first[i].as_u64().expect("an offset"));
        let len = parts.data.len() as u64;
        parts.header["check"] = serde_json::json!({"dtype": "U8", "shape": [4], "data_offsets": [len - 4, len]});
        parts.header["checksum"]["data_offsets"] = serde_json::json!([start, start + 4]);
        parts.header["caches.0.sequences"] =
            serde_json::json!({"dtype": "U8", "shape": [end - start - 4], "data_offsets": [start + 4, end]});
    };
    assert_says(&altered(&exchange), "checksum is not the last tensor");
    let reshape = |parts: &mut Parts| parts.header["checksum"]["dtype"] = serde_json::json!("I8");
    assert_says(&altered(&reshape), "checksum: expected dtype U8, got I8");
}

#[test]
fn a_file_of_the_version_before_is_refused_naming_both() {
    let mut parts = Parts::new(Format::Int4);
    parts.header.as_object_mut().expect("an object").remove("checksum");
    parts.header["__metadata__"]["version"] = serde_json::json!("1");
    parts.data.truncate(parts.data.len() - 4);
    assert_says(&refusal(&parts.unsealed()), "a kvarn cache of version 1, this release reads version 2");
    let mut sealed = parts.unsealed();
    seal_file(&mut sealed);
    assert!(is_refused(&sealed));
}
