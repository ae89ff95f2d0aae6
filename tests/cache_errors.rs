//! Invalid input to the Rust API: a typed error with the numbers involved, and no change.

mod common;

use common::Random;
use kvarn::backend::{AttendOptions, Device, Fresh, TensorView, TensorViewMut};
use kvarn::format::{Dtype, Format};
use kvarn::paging::SequenceId;
use kvarn::plan::Rows;
use kvarn::{CacheConfig, Error, PagedKvCache, Step};

const HEADS: usize = 2;
const HEAD_DIM: usize = 32;

fn config() -> CacheConfig {
    CacheConfig { format: Format::Int8, block_size: 16, num_blocks: Some(4), ..CacheConfig::new(1, HEADS, HEAD_DIM) }
}

fn append(cache: &mut PagedKvCache, step: &Step, k: &[f32], v: &[f32]) -> Result<(), Error> {
    let shape = [1, HEADS, k.len() / (HEADS * HEAD_DIM), HEAD_DIM];
    let fresh = Fresh { k: TensorView::from_slice("k", k, shape)?, v: TensorView::from_slice("v", v, shape)? };
    cache.append(step, 0, fresh, None)
}

/// A cache in which one sequence holds twenty tokens of two blocks.
fn filled() -> (PagedKvCache, SequenceId) {
    let mut cache = PagedKvCache::new(config()).unwrap();
    let sequence = cache.new_sequence();
    let step = cache.begin_step(&[(sequence, Rows::All(20))], false).unwrap();
    let values = Random(1).normals(HEADS * 20 * HEAD_DIM);
    append(&mut cache, &step, &values, &values).unwrap();
    cache.commit(&step).unwrap();
    (cache, sequence)
}

fn contents(cache: &PagedKvCache, sequence: SequenceId) -> Vec<f32> {
    let count = cache.sequence(sequence).unwrap().len();
    let (mut k, mut v) = (vec![0.0; HEADS * count * HEAD_DIM], vec![0.0; HEADS * count * HEAD_DIM]);
    let shape = [1, HEADS, count, HEAD_DIM];
    let views = (
        TensorViewMut::from_slice("k", &mut k, shape).unwrap(),
        TensorViewMut::from_slice("v", &mut v, shape).unwrap(),
    );
    cache.dequantize(0, sequence, 0, views.0, views.1).unwrap();
    [k, v].concat()
}

#[test]
fn out_of_blocks_says_how_many_and_changes_nothing() {
    let (mut cache, held) = filled();
    let (before, stats) = (contents(&cache, held), cache.stats().unwrap());
    let other = cache.new_sequence();
    let error = cache.begin_step(&[(held, Rows::All(1)), (other, Rows::All(33))], false).unwrap_err();
    assert_eq!(error, Error::OutOfBlocks { needed: 3, free: 2 });
    assert_eq!((contents(&cache, held), cache.stats().unwrap().blocks_in_use), (before, stats.blocks_in_use));
    let step = cache.begin_step(&[(held, Rows::All(1)), (other, Rows::All(32))], false).unwrap();
    cache.abort(&step).unwrap();
}

#[test]
fn a_value_that_is_not_finite_is_named_and_nothing_is_written() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (mut cache, held) = filled();
        let before = contents(&cache, held);
        let step = cache.begin_step(&[(held, Rows::All(3))], false).unwrap();
        let good = Random(2).normals(HEADS * 3 * HEAD_DIM);
        let mut v = good.clone();
        v[(3 + 2) * HEAD_DIM + 7] = bad;
        match append(&mut cache, &step, &good, &v).unwrap_err() {
            Error::NonFinite { name, row, head, channel, .. } => {
                assert_eq!((name, row, head, channel), ("v", 2, 1, 7));
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(cache.commit(&step), Err(Error::IncompleteStep { .. })));
        cache.abort(&step).unwrap();
        assert_eq!(contents(&cache, held), before);
    }
}

#[test]
fn padding_may_have_any_value() {
    let mut cache = PagedKvCache::new(config()).unwrap();
    let sequence = cache.new_sequence();
    let step = cache.begin_step(&[(sequence, Rows::Masked(&[false, true]))], false).unwrap();
    let mut k = Random(3).normals(HEADS * 2 * HEAD_DIM);
    for head in 0..HEADS {
        k[head * 2 * HEAD_DIM] = f32::NAN;
    }
    append(&mut cache, &step, &k, &k).unwrap();
    cache.commit(&step).unwrap();
    assert_eq!(cache.sequence(sequence).unwrap().len(), 1);
}

#[test]
fn freed_sequences_and_ended_steps_are_refused() {
    let (mut cache, held) = filled();
    let gone = cache.new_sequence();
    cache.free(gone).unwrap();
    for unknown in [gone, SequenceId(u64::MAX)] {
        let error = Error::UnknownSequence { id: unknown.0 };
        assert_eq!(cache.fork(unknown).unwrap_err(), error);
        assert_eq!(cache.free(unknown).unwrap_err(), error);
        assert_eq!(cache.truncate(unknown, 0).unwrap_err(), error);
        assert_eq!(cache.begin_step(&[(unknown, Rows::All(1))], false).unwrap_err(), error);
    }
    let step = cache.begin_step(&[(held, Rows::All(1))], false).unwrap();
    assert_eq!(cache.fork(held).unwrap_err(), Error::OpenStep { id: held.0 });
    assert!(matches!(cache.try_clone(), Err(Error::OpenStep { .. })));
    cache.abort(&step).unwrap();
    assert!(matches!(cache.commit(&step), Err(Error::StaleStep(_))));
    assert!(matches!(cache.abort(&step), Err(Error::StaleStep(_))));
    let values = vec![0.0; HEADS * HEAD_DIM];
    assert!(matches!(append(&mut cache, &step, &values, &values), Err(Error::StaleStep(_))));
}

#[test]
fn a_rollback_too_far_names_the_stored_tokens() {
    let (mut cache, held) = filled();
    let error = cache.truncate(held, 21).unwrap_err();
    assert_eq!(error, Error::RollbackTooFar { id: held.0, requested: 21, floor: 0, len: 20 });
    cache.truncate(held, 3).unwrap();
    assert_eq!(cache.sequence(held).unwrap().len(), 3);
}

#[test]
fn tensors_of_the_wrong_shape_or_type_are_refused() {
    let (mut cache, held) = filled();
    let step = cache.begin_step(&[(held, Rows::All(2))], false).unwrap();
    let values = vec![0.0; 6 * HEADS * HEAD_DIM];
    assert!(matches!(append(&mut cache, &step, &values, &values), Err(Error::Shape { name: "k", .. })));
    assert!(matches!(TensorView::from_slice("k", &values, [1, 1, 1, 7]), Err(Error::Shape { .. })));
    // SAFETY: refused before anything is read.
    let strided = unsafe {
        TensorView::from_raw(
            "q",
            Device::Cpu,
            values.as_ptr().cast(),
            Dtype::F32,
            [1, HEADS, 2, HEAD_DIM],
            [0, 0, 0, 2],
        )
    };
    assert!(matches!(strided, Err(Error::Stride { name: "q", .. })));

    let good = &values[..2 * HEADS * HEAD_DIM];
    append(&mut cache, &step, good, good).unwrap();
    let attend = |heads: usize, rows: usize, options: AttendOptions<'_>| {
        let q = vec![0.0; heads * rows * HEAD_DIM];
        let mut out = q.clone();
        let shape = [1, heads, rows, HEAD_DIM];
        let q = TensorView::from_slice("q", &q, shape)?;
        cache.attend(&step, 0, q, None, options, TensorViewMut::from_slice("out", &mut out, shape)?)
    };
    let plain = AttendOptions::PLAIN;
    assert!(matches!(attend(3, 2, plain), Err(Error::Shape { name: "q", .. })));
    assert!(matches!(attend(4, 3, plain), Err(Error::Shape { name: "q", .. })));
    let sinks = [0.0; 3];
    let wrong = AttendOptions { sinks: Some(&sinks), ..plain };
    assert!(matches!(attend(4, 2, wrong), Err(Error::Shape { name: "sinks", .. })));
    assert!(matches!(
        attend(4, 2, AttendOptions { softcap: Some(0.0), ..plain }),
        Err(Error::InvalidSetting { name: "softcap", .. })
    ));
    assert!(matches!(
        attend(4, 2, AttendOptions { scale: Some(f32::NAN), ..plain }),
        Err(Error::InvalidSetting { name: "scale", .. })
    ));
    assert!(matches!(
        attend(4, 2, AttendOptions { window: Some(0), ..plain }),
        Err(Error::InvalidSetting { name: "window", .. })
    ));
    attend(4, 2, plain).unwrap();
}

#[test]
fn raw_pages_accept_only_their_own_dtype() {
    let config = CacheConfig { format: Format::Raw, dtype: Dtype::Bf16, ..config() };
    let mut cache = PagedKvCache::new(config).unwrap();
    let sequence = cache.new_sequence();
    let step = cache.begin_step(&[(sequence, Rows::All(1))], false).unwrap();
    let values = vec![0.0; HEADS * HEAD_DIM];
    let error = append(&mut cache, &step, &values, &values).unwrap_err();
    assert_eq!(error.to_string(), "k: expected dtype bfloat16, got float32");
}

#[test]
fn a_layer_that_does_not_exist_or_has_no_keys_is_refused() {
    let (mut cache, held) = filled();
    let step = cache.begin_step(&[(held, Rows::All(1))], false).unwrap();
    let q = vec![0.0; HEADS * HEAD_DIM];
    let shape = [1, HEADS, 1, HEAD_DIM];
    let mut out = q.clone();
    for (layer, message) in
        [(1, "layer 1: the cache has 1 layers"), (0, "the step is not complete: no keys and values yet for layers [0]")]
    {
        let q = TensorView::from_slice("q", &q, shape).unwrap();
        let out = TensorViewMut::from_slice("out", &mut out, shape).unwrap();
        let error = cache.attend(&step, layer, q, None, AttendOptions::PLAIN, out).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn a_step_of_another_cache_is_refused() {
    let ((mut one, sequence), (mut other, same)) = (filled(), filled());
    let step = one.begin_step(&[(sequence, Rows::All(1))], false).unwrap();
    let own = other.begin_step(&[(same, Rows::All(1))], false).unwrap();
    let values = vec![0.0; HEADS * HEAD_DIM];
    assert!(matches!(append(&mut other, &step, &values, &values), Err(Error::StaleStep(_))));
    assert!(matches!(other.commit(&step), Err(Error::StaleStep(_))));
    assert!(matches!(other.abort(&step), Err(Error::StaleStep(_))));
    assert!(!other.is_open(&step) && other.is_open(&own) && one.is_open(&step));
}
