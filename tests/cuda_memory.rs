//! The memory of the CUDA backend: records stay where they are, whatever is done to others. Without a driver the tests say
//! that they are skipped.
#![cfg(feature = "cuda")]

use kvarn::CacheConfig;
use kvarn::backend::cuda::{Cuda, start};
use kvarn::backend::memory::{LayerMemory, Records};
use kvarn::backend::{Backend, Device, Stream};
use kvarn::config::Shape;
use kvarn::format::{Arrangement, Format};
use kvarn::paging::{BlockId, PageId, Place};
use kvarn::{Error, paging};
use std::io::Write;

fn shape(format: Format) -> Shape {
    CacheConfig { format, ..CacheConfig::new(3, 2, 64) }.shape()
}

/// A backend, or `None` where there is no driver.
fn backend(format: Format) -> Option<Cuda> {
    if let Err(error) = start() {
        // Not `eprintln!`, which the harness keeps to itself.
        writeln!(std::io::stderr(), "SKIPPED: {error}").expect("stderr");
        return None;
    }
    Some(Cuda::new(shape(format), 0).expect("a backend on the first device"))
}

fn bytes(backend: &Cuda, layer: usize, place: Place) -> Vec<u8> {
    backend.read_records(layer, place).expect("records")
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed * 97) as u8).collect()
}

fn page(id: u32) -> Place {
    Place::page(PageId(id))
}

fn tile(id: u32) -> Place {
    Place::tile(BlockId(id))
}

#[test]
fn records_stay_as_memory_grows_and_new_ones_are_zero() {
    let Some(mut backend) = backend(Format::Int4) else { return };
    assert_eq!((backend.device(), backend.arrangement()), (Device::Cuda(0), Arrangement::Cuda));
    backend.grow(2, 3).unwrap();
    let places = [page(0), page(2), tile(1)];
    let mut written = Vec::new();
    for layer in 0..3 {
        for (seed, &place) in places.iter().enumerate() {
            let found = bytes(&backend, layer, place);
            assert!(found.iter().all(|&byte| byte == 0));
            let records = pattern(found.len(), layer * 3 + seed);
            backend.write_records(layer, place, &records).unwrap();
            written.push((layer, place, records));
        }
    }
    for num in [100, 1_000, 3_000] {
        backend.grow(num, num).unwrap();
        assert!(backend.capacity().num_pages >= num && backend.capacity().num_tiles >= num);
        let last = page(backend.capacity().num_pages as u32 - 1);
        assert!(bytes(&backend, 2, last).iter().all(|&byte| byte == 0));
        for (layer, place, records) in &written {
            assert!(bytes(&backend, *layer, *place) == *records);
        }
    }
    let copy = backend.try_clone().unwrap();
    backend.write_records(1, page(0), &vec![9; written[0].2.len()]).unwrap();
    for (layer, place, records) in &written {
        assert!(copy.read_records(*layer, *place).unwrap() == *records);
    }
    assert!(backend.allocated_bytes() > 3_000 * 3 * 2 * shape(Format::Int4).page().bytes());
}

#[test]
fn pages_are_copied_in_order_in_every_layer() {
    let Some(mut backend) = backend(Format::Int8) else { return };
    backend.grow(0, 300).unwrap();
    for layer in 0..3 {
        let len = bytes(&backend, layer, page(0)).len();
        backend.write_records(layer, page(0), &pattern(len, layer)).unwrap();
    }
    let chain: Vec<(PageId, PageId)> = (0..150).map(|id| (paging::PageId(id), PageId(id + 1))).collect();
    backend.copy_pages(&chain, Stream::default()).unwrap();
    for layer in 0..3 {
        let last = bytes(&backend, layer, page(150));
        assert!(last == pattern(last.len(), layer));
        assert!(bytes(&backend, layer, page(151)).iter().all(|&byte| byte == 0));
    }
}

#[test]
fn lent_memory_does_not_grow() {
    let Some(mut own) = backend(Format::Int8) else { return };
    own.grow(0, 4).unwrap();
    let shape = shape(Format::Int8);
    let layers: Vec<LayerMemory> =
        (0..3).map(|_| LayerMemory { pages: Records::packed(4_096, 0, 2, shape.page()), tiles: None }).collect();
    // SAFETY: memory of no records.
    let mut lent = unsafe { Cuda::lent(shape, 0, &layers) }.unwrap();
    assert!(matches!(lent.grow(0, 1), Err(Error::Unsupported(_))));
    assert!(matches!(lent.try_clone(), Err(Error::Unsupported(_))));
    assert_eq!(lent.allocated_bytes(), 0);
}

#[test]
fn counters_begin_at_nothing() {
    let Some(mut backend) = backend(Format::Int4) else { return };
    backend.forget_health().unwrap();
    let health = backend.health(2).unwrap();
    assert_eq!((health.drift(), health.saturation(), health.out_of_range_tokens()), (None, None, 0));
}
