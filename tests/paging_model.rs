//! Paging against a plain map: random operations, and after each one every token of every sequence is read back
//! through its block table.
//!
//! The model keeps the token ids of each sequence and a simulated memory of one id a slot, of pages and of tiles. Blocks taken are poisoned,
//! copies and writes are carried out, so a block that is shared, freed, copied or published wrongly shows as a wrong
//! token. Counts, errors and the longest match are predicted from block tables alone.

#[path = "paging_model/model.rs"]
mod model;
#[path = "paging_model/operation.rs"]
mod operation;
#[path = "paging_model/predict.rs"]
mod predict;
#[path = "paging_model/prefixes.rs"]
mod prefixes;

use std::cell::RefCell;
use std::ops::RangeInclusive;

use model::{Model, Outcomes};
use operation::{MAX_SEQUENCES, NO_SEQUENCE, Operation, Pages, Setup};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Of one run; short ones are for shrinking. There are 256 runs, or as many as `PROPTEST_CASES` says.
const OPERATIONS: RangeInclusive<usize> = 1..=250;
/// A run has 125 operations on average.
const MIN_OPERATIONS_PER_RUN: usize = 100;
fn any_setup() -> impl Strategy<Value = Setup> {
    let bound = prop_oneof![1 => Just(None), 2 => (2_usize..=40).prop_map(Some)];
    let window = prop_oneof![1 => Just(None), 2 => (1_usize..=12).prop_map(Some)];
    let bounded = (2_usize..=12).prop_map(Pages::Bounded);
    let pages = prop_oneof![1 => Just(Pages::OfEveryBlock), 1 => Just(Pages::Growing), 2 => bounded];
    (1_usize..=4, bound, window, pages).prop_map(|(block_size, num_blocks, window, pages)| Setup {
        block_size,
        num_blocks,
        window,
        pages,
    })
}

fn any_operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let pick = || 0..=NO_SEQUENCE;
    let picks = || prop::option::weighted(0.3, prop::collection::vec(0..MAX_SEQUENCES, 1..=2));
    let requests = prop::collection::vec((pick(), 0_usize..=9, any::<u32>()), 1..=4);
    prop_oneof![
        1 => prop_oneof![19 => Just(New), 1 => Just(Clear)],
        3 => pick().prop_map(|pick| Fork { pick }),
        4 => pick().prop_map(|pick| Free { pick }),
        3 => (pick(), 0_usize..=12).prop_map(|(pick, back)| Truncate { pick, back }),
        8 => (requests, prop::bool::weighted(0.1)).prop_map(|(requests, raw)| Begin { requests, raw }),
        6 => picks().prop_map(|picks| Commit { picks }),
        2 => picks().prop_map(|picks| Abort { picks }),
        3 => (prop::option::weighted(0.8, pick()), 0_usize..=24, any::<u32>())
            .prop_map(|(pick, len, bits)| Match { pick, len, bits }),
        3 => (pick(), prop::bool::weighted(0.1)).prop_map(|(pick, short)| Publish { pick, short }),
    ]
}

#[test]
fn random_operations_read_back_what_was_written() {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let num_runs = config.cases as usize;
    let runs = (any_setup(), prop::collection::vec(any_operation(), OPERATIONS));
    let total = RefCell::new(Outcomes::new());
    let result = TestRunner::new(config).run(&runs, |(setup, operations)| {
        let mut model = Model::new(setup);
        for operation in &operations {
            model.apply(operation);
            model.check();
        }
        model.count("operations", operations.len());
        for (outcome, times) in model.outcomes {
            *total.borrow_mut().entry(outcome).or_default() += times;
        }
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
    let total = total.into_inner();
    assert!(total["operations"] >= num_runs * MIN_OPERATIONS_PER_RUN, "too few operations: {total:?}");
    assert_eq!(total.len(), 19, "an outcome never occurred: {total:?}");
    assert!(total.values().all(|&times| times > num_runs / 10), "an outcome is rare: {total:?}");
}
