//! A step over a caller's tables.

use super::pages::OpenPages;
use super::{Engine, Progress, Tables};
use crate::error::{Error, Result};
use crate::paging::{BlockId, PageId, Place, Places};
use crate::plan::{Rows, Sealing, SequenceInput, StepPlan, first_seen, sealed_to};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

#[derive(Debug)]
pub(super) struct OpenStep {
    pub(super) progress: Progress,
    pub(super) places: Vec<Place>,
    pub(super) stride: usize,
    /// Blocks that got a page for the step.
    pub(super) allocated: Vec<BlockId>,
    /// Blocks that are tiles once the step is committed.
    pub(super) sealed: Vec<BlockId>,
}

impl OpenStep {
    pub(super) fn places(&self) -> Places<'_> {
        Places::new(&self.places, self.stride)
    }
}

/// A sequence of a step.
pub(super) struct Sequence {
    blocks: Vec<BlockId>,
    context_len: usize,
    num_new: usize,
    first_held: usize,
    /// Index of the block that the first new token is in.
    within: usize,
    /// Indices of the blocks that the step seals from its rows: they never have a page.
    at_once: Range<usize>,
}

impl Sequence {
    /// Blocks that the step begins and writes to pages.
    pub(super) fn opened(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.blocks[self.at_once.end..].iter().copied()
    }

    /// Blocks that the step writes to pages: new ones, and the one that the sequence is within.
    fn written(&self) -> impl Iterator<Item = BlockId> + '_ {
        let is_within = self.num_new > 0 && self.within < self.at_once.start;
        self.opened().chain(is_within.then(|| self.blocks[self.within]))
    }

    fn input<'a>(&'a self, row: usize, places: &'a [Place]) -> SequenceInput<'a> {
        let &Self { ref blocks, context_len, first_held, num_new, .. } = self;
        SequenceInput { row, blocks, places, num_tiles: 0, context_len, first_held, rows: Rows::All(num_new) }
    }
}

/// Where the record of a block is.
pub(super) fn place(pages: Option<&OpenPages>, block: BlockId) -> Place {
    pages.map_or(Place::page(PageId(block.0)), |pages| pages.place(block))
}

impl Engine {
    pub(super) fn sequence(&self, tables: &Tables<'_>, index: usize) -> Result<Sequence> {
        let block_size = self.shape().block_size;
        let (context_len, num_new) = (tables.context_len(index), tables.num_new(index));
        let end = (context_len + num_new).div_ceil(block_size);
        let first_held = first_seen(context_len, self.window) / block_size * block_size;
        let blocks = tables.blocks(index, first_held / block_size, end, self.num_blocks)?;
        let (within, new) = (context_len / block_size, context_len.div_ceil(block_size));
        let sealed_to = if self.pages.is_some() { sealed_to(block_size, context_len, num_new) } else { new };
        Ok(Sequence { blocks, context_len, num_new, first_held, within, at_once: new..sealed_to })
    }

    pub(super) fn plan_step(&mut self, sequences: &[Sequence], seals: bool) -> Result<OpenStep> {
        let stride = sequences.iter().map(|sequence| sequence.blocks.len()).max().unwrap_or(0);
        let mut places = vec![Place::page(PageId(0)); sequences.len() * stride];
        for (sequence, places) in sequences.iter().zip(places.chunks_exact_mut(stride.max(1))) {
            for (index, (&block, entry)) in sequence.blocks.iter().zip(places).enumerate() {
                if sequence.at_once.contains(&index) {
                    *entry = Place::tile(block);
                } else if block != BlockId::RELEASED {
                    *entry = place(self.pages.as_ref(), block);
                }
            }
        }
        let of_row = |row: usize| &places[row * stride..][..stride];
        let inputs: Vec<_> = sequences.iter().enumerate().map(|(row, one)| one.input(row, of_row(row))).collect();
        // One sequence may read, as its prefix, blocks that another fills in this very step.
        let written: HashSet<BlockId> = sequences.iter().flat_map(Sequence::written).collect();
        let is_partial = |block| !seals || written.contains(&block);
        let sealing =
            if self.pages.is_some() { Sealing::FullBlocks { is_partial: &is_partial } } else { Sealing::Never };
        let plan = Arc::new(StepPlan::new(self.shape().block_size, self.window, &inputs, sealing)?);
        plan.changes().for_each(|change| places[change.row * stride + change.block] = change.place);
        let sealed = plan.seals().map(|seal| sequences[seal.sequence].blocks[seal.block]).collect();
        let progress = self.layers.begin(plan, Places::new(&places, stride))?;
        Ok(OpenStep { progress, places, stride, allocated: Vec::new(), sealed })
    }
}

/// Can each sequence keep so many of its new tokens?
pub(super) fn check_accepted(plan: &StepPlan, counts: &[usize]) -> Result<()> {
    if counts.len() != plan.num_sequences() {
        let (given, sequences) = (counts.len(), plan.num_sequences());
        return Err(Error::Config(format!("accepted tokens of {given} sequences for a step of {sequences}")));
    }
    for (sequence, &count) in counts.iter().enumerate() {
        let at_once = plan.seals().filter(|seal| seal.sequence == sequence && seal.page.is_none());
        let sealed_to = at_once.map(|seal| (seal.block + 1) * plan.block_size()).max().unwrap_or(0);
        let least = sealed_to.saturating_sub(plan.context_len(sequence));
        let num_new = plan.num_new(sequence);
        if !(least..=num_new).contains(&count) {
            return Err(Error::Config(format!(
                "sequence {sequence}: {count} of {num_new} new tokens accepted, of which the first {least} are sealed"
            )));
        }
    }
    Ok(())
}
