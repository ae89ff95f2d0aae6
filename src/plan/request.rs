//! Plans of steps over the sequences of a pool: what each step asks of the pool, and the plan once it has begun.

use super::build::Builder;
use super::open::Writers;
use super::{Bounds, Rows, Sealing, SequenceInput, StepPlan, first_seen, sealed_to};
use crate::error::Result;
use crate::paging::{Paging, Room, SequenceId, StepRequest};

/// What a backend must have memory for, for a step that there is room for.
#[must_use]
pub fn bounds_of(room: &Room<'_>) -> Bounds {
    let num_tiles = if room.seals() { room.num_blocks() } else { 0 };
    Bounds { num_pages: room.num_pages(), num_tiles }
}

impl StepPlan {
    /// What a step asks of the pool: rows for each sequence, in the order of the step's tensors. Queries see `window`
    /// tokens at most; what no later query sees is released, unless it is to be retained for a rollback.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`].
    pub fn requests(
        paging: &Paging,
        window: Option<usize>,
        rows: &[(SequenceId, Rows<'_>)],
        retain: bool,
    ) -> Result<Vec<StepRequest>> {
        let request = |&(sequence, rows): &(SequenceId, Rows<'_>)| {
            let (len, num_new) = (paging.sequence(sequence)?.len(), rows.num_tokens());
            let keep_from = if retain { 0 } else { first_seen(len, window) };
            let sealed_to = if paging.seals() { sealed_to(paging.block_size(), len, num_new) } else { 0 };
            Ok(StepRequest { sequence, num_new, keep_from, sealed_to })
        };
        rows.iter().map(request).collect()
    }

    /// The plan of a step that has begun with the [`requests`](Self::requests) of these rows; tells the pool what it
    /// seals. `bounds` are those that there was found to be [room](bounds_of) for.
    ///
    /// # Panics
    /// When the step has not begun.
    #[must_use]
    pub fn begin(paging: &mut Paging, window: Option<usize>, rows: &[(SequenceId, Rows<'_>)], bounds: Bounds) -> Self {
        let is_partial = |block| paging.is_partial(block);
        let sealing = if paging.seals() { Sealing::FullBlocks { is_partial: &is_partial } } else { Sealing::Never };
        let mut builder = push_all(paging, window, rows, sealing);
        for tile in std::mem::take(&mut builder.sealed.tiles) {
            paging.seal(tile.row, tile.block);
        }
        builder.finish(bounds, &paging.take_place_changes())
    }

    /// The plan of a step that has begun and seals nothing: `num_tokens` tokens of a sealed block, written again.
    ///
    /// # Panics
    /// When the step has not begun.
    #[must_use]
    pub fn begin_rewriting(paging: &mut Paging, sequence: SequenceId, num_tokens: usize, bounds: Bounds) -> Self {
        let builder = push_all(paging, None, &[(sequence, Rows::All(num_tokens))], Sealing::Never);
        builder.finish(bounds, &paging.take_place_changes())
    }
}

fn push_all(paging: &Paging, window: Option<usize>, rows: &[(SequenceId, Rows<'_>)], sealing: Sealing<'_>) -> Builder {
    let mut builder = Builder::new(paging.block_size(), window);
    for &(sequence, rows) in rows {
        let row = paging.row(sequence).expect("the step has begun");
        let sequence = paging.at(row);
        let input = SequenceInput {
            row,
            blocks: sequence.blocks(),
            places: paging.places().row(row),
            num_tiles: sequence.num_tiles(),
            context_len: sequence.len(),
            first_held: sequence.first_held(),
            rows,
        };
        let seals = matches!(sealing, Sealing::FullBlocks { .. });
        debug_assert_eq!(super::check::check(paging.block_size(), &input, seals), Ok(()));
        // Sequences of a pool share blocks that are committed.
        builder.push(&input, sealing, &Writers::default());
    }
    builder
}
