//! What a step will take, copy and seal, told from block tables alone.

use std::collections::{BTreeMap, BTreeSet};

use kvarn::paging::{BlockId, PageId, Place, PlaceKind, SequenceId, StepRequest};

use super::model::{Model, POISON};

impl Model {
    /// The row of a sequence in the table of places.
    pub(super) fn places(&self, id: SequenceId) -> Vec<Place> {
        let len = self.paging.sequence(id).unwrap().blocks().len();
        self.paging.places().row(self.paging.row(id).unwrap())[..len].to_vec()
    }

    /// Where a token is, or will be.
    pub(super) fn slot(&mut self, id: SequenceId, position: usize) -> &mut u32 {
        let (index, offset) = (position / self.setup.block_size, position % self.setup.block_size);
        let block_size = self.setup.block_size;
        match self.places(id)[index].kind() {
            PlaceKind::Tile(block) => &mut self.tiles.entry(block).or_insert_with(|| vec![POISON; block_size])[offset],
            PlaceKind::Page(page) => &mut self.memory[page.0 as usize * block_size + offset],
        }
    }

    /// With a window, some requests keep a token too many, everything (`num_new` 9) or nothing (8).
    pub(super) fn request(&self, pick: usize, num_new: usize) -> StepRequest {
        let sequence = self.pick(pick);
        let len = self.sequences.get(&sequence).map_or(0, |tokens| tokens.committed.len());
        let first_seen = self.setup.window.map_or(0, |window| (len + 1).saturating_sub(window));
        let keep_from = match num_new {
            9 => 0,
            8 if self.setup.window.is_some() => usize::MAX,
            _ => first_seen.saturating_sub(num_new % 2),
        };
        // Some steps seal what they write whole, but the last.
        let num_full = (len + num_new) / self.setup.block_size;
        let sealed_to = if num_new > 4 { num_full.saturating_sub(1) } else { 0 };
        StepRequest { sequence, num_new, keep_from, sealed_to }
    }

    /// Pages that the new blocks of a step take.
    pub(super) fn new_pages(&self, step: &StepRequest) -> usize {
        let len = self.sequences[&step.sequence].committed.len();
        let new = len.div_ceil(self.setup.block_size)..(len + step.num_new).div_ceil(self.setup.block_size);
        new.filter(|&block| block >= step.sealed_to).count()
    }

    /// The page of every block that a sequence holds, and that has one.
    pub(super) fn paged(&self) -> BTreeMap<BlockId, PageId> {
        let of = |&id: &SequenceId| {
            let held = self.table(id).into_iter().zip(self.places(id)).filter(|held| held.0 != BlockId::RELEASED);
            held.filter_map(|(block, place)| place.as_page().map(|page| (block, page)))
        };
        self.sequences.keys().flat_map(of).collect()
    }

    pub(super) fn first_held_in(&self, step: &StepRequest) -> usize {
        let tokens = &self.sequences[&step.sequence];
        let keep_from = step.keep_from.min(tokens.committed.len());
        tokens.first_held.max(keep_from / self.setup.block_size * self.setup.block_size)
    }

    /// The open pages that must be copied, in order, and all blocks needed, from the tables after the release.
    pub(super) fn shared_pages(
        &self,
        steps: &[StepRequest],
        kept: &BTreeMap<SequenceId, Vec<BlockId>>,
    ) -> (Vec<BlockId>, usize) {
        let (mut tables, mut shared, mut needed) = (kept.clone(), Vec::new(), 0);
        for step in steps {
            let len = self.sequences[&step.sequence].committed.len();
            let blocks = tables[&step.sequence].len();
            needed += (len + step.num_new).div_ceil(self.setup.block_size) - blocks;
            if step.num_new == 0 || len.is_multiple_of(self.setup.block_size) {
                continue;
            }
            let page = tables[&step.sequence][blocks - 1];
            if tables.values().flatten().filter(|&&block| block == page).count() > 1 {
                tables.get_mut(&step.sequence).unwrap().pop();
                shared.push(page);
            }
        }
        needed += shared.len();
        (shared, needed)
    }

    /// The full blocks of committed tokens that a step of `ids` seals.
    pub(super) fn due(&self, ids: &[SequenceId]) -> Vec<BlockId> {
        let known = ids.iter().all(|id| self.sequences.get(id).is_some_and(|tokens| tokens.pending.is_some()));
        if !known || ids.iter().collect::<BTreeSet<_>>().len() < ids.len() {
            return Vec::new();
        }
        let full = |id: &SequenceId| {
            let num_full = self.sequences[id].committed.len() / self.setup.block_size;
            self.table(*id).into_iter().take(num_full)
        };
        let due: BTreeSet<BlockId> = ids.iter().flat_map(full).filter(|block| self.open.contains(block)).collect();
        due.into_iter().collect()
    }

    /// The entries of the step's tables that are these blocks, and full.
    pub(super) fn due_entries(&self, ids: &[SequenceId], due: &[BlockId]) -> Vec<(SequenceId, usize)> {
        let of = |&id: &SequenceId| {
            let num_full = self.sequences[&id].committed.len() / self.setup.block_size;
            let full = self.table(id).into_iter().take(num_full).enumerate();
            let entries = full.filter(|(_, block)| due.contains(block));
            entries.map(move |(index, _)| (id, index)).collect::<Vec<_>>()
        };
        if due.is_empty() { Vec::new() } else { ids.iter().flat_map(of).collect() }
    }

    /// The blocks that open steps hold other than that of `ids`.
    pub(super) fn read_elsewhere(&self, ids: &[SequenceId]) -> BTreeSet<BlockId> {
        let others = self.sequences.iter().filter(|(id, tokens)| tokens.pending.is_some() && !ids.contains(id));
        others.flat_map(|(&id, _)| self.table(id)).collect()
    }
}

pub(super) fn slots(page: PageId, block_size: usize) -> std::ops::Range<usize> {
    page.0 as usize * block_size..(page.0 as usize + 1) * block_size
}

pub(super) fn distinct_blocks(tables: &BTreeMap<SequenceId, Vec<BlockId>>) -> BTreeSet<BlockId> {
    tables.values().flatten().copied().filter(|&block| block != BlockId::RELEASED).collect()
}
