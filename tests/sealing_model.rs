//! Sealing against a model that reads everything back: random operations on sequences that share blocks, two steps
//! open at once, and after each operation every token of every settled sequence is decoded again.
//!
//! A row never changes but when its block is sealed, which the model foresees from block tables and lengths alone; it is
//! then the tile that `kvarn::quant` makes of the rows before. Attention is compared with f64 on what can be decoded.

mod common;
#[path = "sealing_model/model.rs"]
mod model;
#[path = "sealing_model/rows.rs"]
mod rows;
#[path = "sealing_model/steps.rs"]
mod steps;

use common::Random;
use kvarn::format::Format;
use model::{Model, Setup};
use std::collections::BTreeMap;

const NUM_RUNS: u64 = 400;
const NUM_OPERATIONS: usize = 60;
/// Each must occur at least this often over all runs.
const AT_LEAST: usize = 20;

#[test]
fn random_operations_change_no_row_but_by_sealing_it() {
    let mut total = BTreeMap::<&'static str, usize>::new();
    for seed in 0..NUM_RUNS {
        let mut random = Random(seed);
        let setup = Setup {
            format: random.pick(&[Format::Int4, Format::Int3, Format::Int2]),
            calibrated: random.below(2) == 0,
            num_blocks: random.pick(&[None, Some(9), Some(24)]),
            num_open_pages: random.pick(&[None, Some(4), Some(9)]),
            window: random.pick(&[None, None, Some(20)]),
        };
        let mut model = Model::new(setup, Random(seed + 1_000_000));
        for operation in 0..NUM_OPERATIONS {
            let before = format!("{setup:?}, seed {seed}, operation {operation}");
            model.apply(random.below(100), &before);
        }
        for (what, times) in model.outcomes {
            *total.entry(what).or_default() += times;
        }
    }
    let rare: Vec<_> = total.iter().filter(|(_, times)| **times < AT_LEAST).collect();
    assert!(rare.is_empty() && total.len() == model::OUTCOMES, "an outcome is rare: {total:?}");
}
