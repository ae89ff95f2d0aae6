use super::*;
use crate::error::{Error, Result};
use crate::paging::{BlockId, PageId};

/// The plan of one sequence whose blocks do not seal: each is the page of its number.
pub(super) fn pages_of_blocks(
    block_size: usize,
    blocks: &[u32],
    context_len: usize,
    first_held: usize,
    num_new: usize,
) -> Result<StepPlan> {
    plan(block_size, blocks, context_len, first_held, Rows::All(num_new), None)
}

fn plan(
    block_size: usize,
    blocks: &[u32],
    context_len: usize,
    first_held: usize,
    rows: Rows<'_>,
    window: Option<usize>,
) -> Result<StepPlan> {
    let (ids, places) = tables(blocks);
    let input = SequenceInput { row: 0, blocks: &ids, places: &places, num_tiles: 0, context_len, first_held, rows };
    StepPlan::new(block_size, window, &[input], Sealing::Never)
}

fn tables(blocks: &[u32]) -> (Vec<BlockId>, Vec<Place>) {
    blocks.iter().map(|&block| (BlockId(block), Place::page(PageId(block)))).unzip()
}

#[test]
fn padding_has_no_slot_and_takes_no_position() {
    let mask = [false, true, true];
    let plan = plan(16, &[7, 2], 15, 0, Rows::Masked(&mask), None).unwrap();
    assert_eq!(plan.slots(), [-1, 7 * 16 + 15, 2 * 16]);
    assert_eq!(plan.positions(), [-1, 15, 16]);
    assert_eq!(plan.token_rows(), [1, 2]);
    assert_eq!((plan.num_rows(), plan.num_new(0), plan.num_tokens()), (3, 2, 2));
}

#[test]
fn a_query_sees_its_window_and_nothing_released() {
    let (_, places) = tables(&[0, 1, 2]);
    let table = Places::new(&places, 3);
    let free = plan(16, &[0, 1, 2], 40, 16, Rows::All(1), None).unwrap();
    assert_eq!(free.over(table).sequence(0).visible(40, None), (16, 41));
    assert_eq!(free.over(table).sequence(0).visible(40, Some(8)), (33, 41));
    let windowed = plan(16, &[0, 1, 2], 40, 16, Rows::All(1), Some(4)).unwrap();
    assert_eq!(windowed.over(table).sequence(0).visible(40, None), (37, 41));
    assert_eq!(windowed.over(table).sequence(0).visible(40, Some(2)), (39, 41));
    assert_eq!(
        (first_seen(40, None), first_seen(40, Some(50)), first_seen(usize::MAX, Some(1))),
        (0, 0, usize::MAX - 1)
    );
}

#[test]
fn a_decode_is_split_where_its_first_query_sees() {
    let blocks: Vec<u32> = (0..10).collect();
    let splits = |context_len, window| {
        let plan = plan(128, &blocks, context_len, 0, Rows::All(2), window).unwrap();
        plan.splits().map(|split| (split.start, split.end)).collect::<Vec<_>>()
    };
    assert_eq!(splits(1030, None), [(0, 512), (512, 1024), (1024, 1032)]);
    assert_eq!(splits(1030, Some(20)), [(1011, 1024), (1024, 1032)]);
    assert_eq!(splits(3, None), [], "a prefill is not split");
}

#[test]
fn two_sequences_cannot_write_one_block_or_page() {
    let ([first, second], places) = ([[BlockId(0)], [BlockId(1)]], [Place::page(PageId(0))]);
    let input = |blocks| SequenceInput {
        row: 0,
        blocks,
        places: &places,
        num_tiles: 0,
        context_len: 0,
        first_held: 0,
        rows: Rows::All(1),
    };
    let refused = |inputs: &[SequenceInput<'_>]| match StepPlan::new(16, None, inputs, Sealing::Never) {
        Err(Error::Config(why)) => why,
        other => panic!("{other:?}"),
    };
    assert!(refused(&[input(&first), input(&first)]).contains("block 0 would be written through two sequences"));
    assert!(refused(&[input(&first), input(&second)]).contains("page 0 would be written for two blocks"));
    let (blocks, places) = ([BlockId(0), BlockId(1)], [Place::page(PageId(0)); 2]);
    let one = SequenceInput { rows: Rows::All(17), context_len: 15, places: &places, ..input(&blocks) };
    assert!(refused(&[one]).contains("page 0 would be written for two blocks"));
}

#[test]
fn tables_that_cannot_hold_the_tokens_are_refused() {
    let refused = |context_len, first_held, num_new| {
        matches!(pages_of_blocks(16, &[3], context_len, first_held, num_new), Err(Error::Config(_)))
    };
    assert!(refused(10, 0, 7) && refused(10, 5, 1) && refused(10, 16, 1) && refused(0, 0, usize::MAX));
    assert!(!refused(10, 0, 6));
    let rows = [Rows::All(1 << 30), Rows::All(1 << 30)];
    assert!(matches!(num_rows(rows.into_iter()), Err(Error::Config(_))));
}

#[test]
fn a_plan_is_one_buffer_that_its_layout_describes() {
    let blocks: Vec<u32> = (5..9).collect();
    let plan = plan(16, &blocks, 20, 0, Rows::All(20), None).unwrap();
    assert_eq!(plan.words().len(), plan.layout().words());
    let opens = plan.array(PlanArray::Opens);
    assert_eq!(opens, [0, 2, 0, 32, 0]);
    assert_eq!(plan.opens().collect::<Vec<_>>(), [PageOpen { sequence: 0, block: 2, start: 0, end: 32, of: 0 }]);
    assert_eq!((plan.array(PlanArray::QueryStartLoc), plan.array(PlanArray::IsPrefill)), (&[0, 20][..], &[1][..]));
    assert_eq!(plan.bounds(), Bounds { num_pages: 8, num_tiles: 0 });
}

#[test]
fn a_page_that_opens_within_a_window_of_another_sequence_s_new_tokens_takes_those_tokens() {
    // Both read blocks 0 and 1, which the first writes from its beginning and the second sees from block 1 on.
    let ((writer, writes), (reader, reads)) = (tables(&[0, 1, 2]), tables(&[0, 1, 3]));
    let of_writer = SequenceInput {
        row: 0,
        blocks: &writer,
        places: &writes,
        num_tiles: 0,
        context_len: 0,
        first_held: 0,
        rows: Rows::All(40),
    };
    let of_reader = SequenceInput {
        row: 1,
        blocks: &reader,
        places: &reads,
        context_len: 32,
        first_held: 16,
        rows: Rows::All(1),
        ..of_writer
    };
    let plan = StepPlan::new(16, Some(10), &[of_writer, of_reader], Sealing::Never).unwrap();
    let opened = plan.opens().find(|open| open.sequence == 1);
    assert_eq!(opened, Some(PageOpen { sequence: 1, block: 2, start: 16, end: 32, of: 0 }));
}
