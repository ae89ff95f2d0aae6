//! Any operations on paging, against the model of `tests/paging_model.rs`; then the tables that are left, as a file
//! would hold them.

#![no_main]

#[path = "../../tests/paging_model/model.rs"]
mod model;
#[path = "../../tests/paging_model/operation.rs"]
mod operation;
#[path = "../../tests/paging_model/predict.rs"]
mod predict;
#[path = "../../tests/paging_model/prefixes.rs"]
mod prefixes;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use model::Model;
use operation::{MAX_SEQUENCES, NO_SEQUENCE, Operation, Pages, Setup};

fuzz_target!(|data: &[u8]| {
    let mut input = Unstructured::new(data);
    let Ok(setup) = setup(&mut input) else { return };
    let mut model = Model::new(setup);
    while !input.is_empty()
        && let Ok(operation) = operation(&mut input)
    {
        model.apply(&operation);
        model.check();
    }
});

fn setup(input: &mut Unstructured) -> Result<Setup> {
    Ok(Setup {
        block_size: input.int_in_range(1..=4)?,
        num_blocks: optional(input, 2..=40)?,
        window: optional(input, 1..=12)?,
        pages: match input.int_in_range(0..=3_u8)? {
            0 => Pages::OfEveryBlock,
            1 => Pages::Growing,
            _ => Pages::Bounded(input.int_in_range(2..=12)?),
        },
    })
}

fn optional(input: &mut Unstructured, range: std::ops::RangeInclusive<usize>) -> Result<Option<usize>> {
    let some = input.ratio(2, 3)?;
    some.then(|| input.int_in_range(range)).transpose()
}

fn pick(input: &mut Unstructured) -> Result<usize> {
    input.int_in_range(0..=NO_SEQUENCE)
}

fn picks(input: &mut Unstructured) -> Result<Option<Vec<usize>>> {
    let count = input.int_in_range(0..=5_usize)?;
    // Mostly all that are open.
    let some = (count == 1 || count == 2).then_some(count);
    some.map(|count| (0..count).map(|_| input.int_in_range(0..=MAX_SEQUENCES - 1)).collect()).transpose()
}

fn operation(input: &mut Unstructured) -> Result<Operation> {
    Ok(match input.int_in_range(0..=15_u8)? {
        0 => Operation::New,
        1 => Operation::Clear,
        2 => Operation::Fork { pick: pick(input)? },
        3 => Operation::Free { pick: pick(input)? },
        4 => Operation::Truncate { pick: pick(input)?, back: input.int_in_range(0..=12)? },
        5..=8 => {
            let count = input.int_in_range(1..=4_usize)?;
            let request = |_| Ok((pick(input)?, input.int_in_range(0..=9)?, input.arbitrary::<u8>()?.into()));
            let requests = (0..count).map(request).collect::<Result<_>>()?;
            Operation::Begin { requests, raw: input.ratio(1, 10)? }
        }
        9..=11 => Operation::Commit { picks: picks(input)? },
        12 => Operation::Abort { picks: picks(input)? },
        13 => {
            let pick = optional(input, 0..=NO_SEQUENCE)?;
            Operation::Match { pick, len: input.int_in_range(0..=24)?, bits: input.arbitrary()? }
        }
        _ => Operation::Publish { pick: pick(input)?, short: input.ratio(1, 10)? },
    })
}
