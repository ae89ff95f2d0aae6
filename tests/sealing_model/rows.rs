//! Rows of tokens, how steps take them, and what sealing must make of them.

use crate::common::{Random, Reference};
use kvarn::PagedKvCache;
use kvarn::backend::{Fresh, TensorView, TensorViewMut};
use kvarn::calibration::{Calibration, HeadShape};
use kvarn::format::Format;
use kvarn::paging::SequenceId;
use kvarn::quant::LayerCalibration;
use kvarn::quant::{HeadFeedback, decode_tile_k, decode_tile_v, encode_tile, rotate};
use std::sync::Arc;

pub const LAYERS: usize = 2;
pub const HEADS: usize = 2;
pub const GROUP: usize = 2;
pub const HEAD_DIM: usize = 16;
pub const BLOCK: usize = 16;
/// Of INT8 rows of unit normals, K under the statistics of 16 tokens and more.
const INT8_ERROR: f32 = 0.12;
/// Rows of V come back un-rotated: turned again, their last bits differ, and now and then a code.
const TURNED_TWICE: f64 = 1.02;

/// K and V of one token: `[LAYERS, 2, HEADS, HEAD_DIM]`.
pub type Row = Vec<f32>;

pub fn part(layer: usize, value: usize, head: usize) -> std::ops::Range<usize> {
    let at = ((layer * 2 + value) * HEADS + head) * HEAD_DIM;
    at..at + HEAD_DIM
}

pub fn new_row(random: &mut Random) -> Row {
    let mut row = random.normals(LAYERS * 2 * HEADS * HEAD_DIM);
    row.iter_mut().enumerate().for_each(|(i, x)| *x += ((i % HEAD_DIM) % 5) as f32 - 2.0);
    row
}

pub fn calibration() -> Arc<Calibration> {
    let shape = HeadShape { num_q_heads: HEADS, num_kv_heads: HEADS, head_dim: HEAD_DIM };
    let (calibration, mut random) = (Calibration::new(), Random(5));
    for layer in 0..LAYERS {
        let mut q = random.normals(200 * HEADS * HEAD_DIM);
        q.iter_mut().enumerate().for_each(|(i, x)| *x *= if i % HEAD_DIM < 3 { 4.0 } else { 0.5 });
        calibration.observe(layer, shape, &q, &random.normals(200 * HEADS * HEAD_DIM)).unwrap();
    }
    calibration.freeze().unwrap();
    Arc::new(calibration)
}

/// `[HEADS, rows, HEAD_DIM]` of a layer's K (0) or V (1).
pub fn pack(rows: &[&Row], layer: usize, value: usize) -> Vec<f32> {
    (0..HEADS).flat_map(|head| rows.iter().flat_map(move |row| row[part(layer, value, head)].to_vec())).collect()
}

pub fn fresh<'a>(k: &'a [f32], v: &'a [f32], rows: usize) -> Fresh<'a> {
    let view = |name, of| TensorView::from_slice(name, of, [1, HEADS, rows, HEAD_DIM]).unwrap();
    Fresh { k: view("k", k), v: view("v", v) }
}

/// Tokens `from..to` as they are stored.
pub fn stored(cache: &PagedKvCache, sequence: SequenceId, from: usize, to: usize) -> Vec<Row> {
    let mut rows = vec![vec![f32::NAN; LAYERS * 2 * HEADS * HEAD_DIM]; to - from];
    let shape = [1, HEADS, to - from, HEAD_DIM];
    for layer in 0..LAYERS {
        let mut values = [vec![0.0; shape.iter().product()], vec![0.0; shape.iter().product()]];
        let [k, v] = &mut values;
        let views =
            (TensorViewMut::from_slice("k", k, shape).unwrap(), TensorViewMut::from_slice("v", v, shape).unwrap());
        cache.dequantize(layer, sequence, from, views.0, views.1).unwrap();
        for (value, of) in values.iter().enumerate() {
            for head in 0..HEADS {
                for (t, row) in rows.iter_mut().enumerate() {
                    row[part(layer, value, head)]
                        .copy_from_slice(&of[(head * (to - from) + t) * HEAD_DIM..][..HEAD_DIM]);
                }
            }
        }
    }
    rows
}

/// Are these the rows, but for INT8 rounding?
pub fn are_near(rows: &[Row], exact: &[Row]) -> bool {
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= INT8_ERROR;
    rows.iter().zip(exact).all(|(row, exact)| row.iter().zip(exact).all(near))
}

/// Is V the same to the bit?
pub fn same_v(rows: &[Row], others: &[Row]) -> bool {
    let values = |row: &Row| -> Vec<f32> {
        (0..LAYERS * HEADS).flat_map(|i| row[part(i / HEADS, 1, i % HEADS)].to_vec()).collect()
    };
    rows.iter().zip(others).all(|(row, other)| values(row) == values(other))
}

/// What sealing makes of a block's rows. `as_given`: they are the step's own, not decoded from a page.
pub fn is_tile_of(
    tile: &[Row],
    rows: &[Row],
    format: Format,
    layers: Option<&[Arc<LayerCalibration>]>,
    first: bool,
    as_given: bool,
) -> bool {
    let mut turned_twice = [0.0, 0.0];
    for layer in 0..LAYERS {
        for head in 0..HEADS {
            let gather = |rows: &[Row], value| -> Vec<f32> {
                rows.iter().flat_map(|row| row[part(layer, value, head)].to_vec()).collect()
            };
            let (k, v) = (gather(rows, 0), gather(rows, 1));
            let mut v_rotated = v.clone();
            v_rotated.chunks_exact_mut(HEAD_DIM).for_each(rotate);
            let none = HeadFeedback::none(HEAD_DIM);
            let feedback = layers.map_or(&none, |layers| &layers[layer].heads()[head].feedback);
            let bits = format.tile_bits().unwrap();
            let expected = encode_tile(&k, &v_rotated, HEAD_DIM, bits, feedback, first.then_some(0));
            let (mut expected_k, mut expected_v) = (k.clone(), v.clone());
            decode_tile_k(&expected, &mut expected_k);
            decode_tile_v(&expected, &mut expected_v);
            expected_v.chunks_exact_mut(HEAD_DIM).for_each(rotate);
            let (found_k, found_v) = (gather(tile, 0), gather(tile, 1));
            if found_k != expected_k || as_given && found_v != expected_v {
                return false;
            }
            turned_twice[0] += squared_distance(&found_v, &v);
            turned_twice[1] += squared_distance(&expected_v, &v);
        }
    }
    turned_twice[0] <= TURNED_TWICE * turned_twice[1]
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// Relative error of the output `out` of query `q` of one head, at the last of `rows`, of which the first is at
/// position `first`.
pub fn attention_error(rows: &[Row], layer: usize, head: usize, first_seen: usize, q: &[f32], out: &[f32]) -> f64 {
    let gather = |value| -> Vec<f32> { rows.iter().flat_map(|row| row[part(layer, value, head)].to_vec()).collect() };
    let (k, v) = (gather(0), gather(1));
    let reference = Reference { k: &k, v: &v, scale: 0.25, softcap: None, sink: None };
    let expected = reference.attend(q, first_seen, rows.len());
    let error: f64 = expected.iter().zip(out).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum();
    (error / expected.iter().map(|x| x * x).sum::<f64>().max(1e-9)).sqrt()
}
