//! What paging must do, from block tables and token ids alone.

use std::collections::{BTreeMap, BTreeSet};

use kvarn::error::Error;
use kvarn::paging::{BlockId, PageId, Paging, PlaceKind, Rollback, Room, SequenceId, StepRequest};

use super::operation::{MAX_SEQUENCES, NO_SEQUENCE, Operation, Pages, Setup};
use super::predict::{distinct_blocks, slots};

pub(super) const POISON: u32 = u32::MAX;

#[derive(Debug, Clone, Default)]
pub(super) struct Tokens {
    pub(super) committed: Vec<u32>,
    pub(super) pending: Option<Vec<u32>>,
    pub(super) first_held: usize,
    /// Full blocks matched or published: not published again.
    pub(super) chained: usize,
}

/// How often what happened.
pub(super) type Outcomes = BTreeMap<&'static str, usize>;

pub(super) struct Model {
    pub(super) setup: Setup,
    pub(super) paging: Paging,
    pub(super) sequences: BTreeMap<SequenceId, Tokens>,
    /// By page.
    pub(super) memory: Vec<u32>,
    /// By block, of those that are sealed.
    pub(super) tiles: BTreeMap<BlockId, Vec<u32>>,
    /// Blocks with a page, where blocks seal.
    pub(super) open: BTreeSet<BlockId>,
    /// The block that holds the last tokens of each published prefix.
    pub(super) published: BTreeMap<Vec<u32>, BlockId>,
    num_copies: usize,
    peak: usize,
    pub(super) outcomes: Outcomes,
}

impl Model {
    pub(super) fn new(setup: Setup) -> Self {
        let Setup { block_size, num_blocks, .. } = setup;
        let paging = match setup.pages {
            Pages::OfEveryBlock => Paging::new(block_size, num_blocks, b"model"),
            Pages::Growing => Paging::sealing(block_size, num_blocks, None, b"model"),
            Pages::Bounded(bound) => Paging::sealing(block_size, num_blocks, Some(bound), b"model"),
        };
        let paging = paging.unwrap();
        Self {
            setup,
            paging,
            sequences: BTreeMap::new(),
            memory: Vec::new(),
            tiles: BTreeMap::new(),
            open: BTreeSet::new(),
            published: BTreeMap::new(),
            num_copies: 0,
            peak: 0,
            outcomes: Outcomes::new(),
        }
    }

    /// Below `MAX_SEQUENCES` any sequence, then one without an open step; `NO_SEQUENCE`, and any pick when there are
    /// none, an id never given out.
    pub(super) fn pick(&self, pick: usize) -> SequenceId {
        let candidates = self.sequences.iter().filter(|(_, tokens)| pick < MAX_SEQUENCES || tokens.pending.is_none());
        let candidates: Vec<SequenceId> = candidates.map(|(&id, _)| id).collect();
        if pick == NO_SEQUENCE || candidates.is_empty() {
            return SequenceId(u64::MAX);
        }
        candidates[pick % candidates.len()]
    }

    /// The sequences of a step to close: those picked, or all that are open.
    fn pick_open(&self, picks: Option<&[usize]>) -> Vec<SequenceId> {
        let open = || self.sequences.iter().filter(|(_, tokens)| tokens.pending.is_some()).map(|(&id, _)| id);
        picks.map_or_else(|| open().collect(), |picks| picks.iter().map(|&pick| self.pick(pick)).collect())
    }

    pub(super) fn count(&mut self, outcome: &'static str, times: usize) {
        *self.outcomes.entry(outcome).or_default() += times;
    }

    pub(super) fn table(&self, id: SequenceId) -> Vec<BlockId> {
        self.paging.sequence(id).unwrap().blocks().to_vec()
    }

    fn tables(&self) -> BTreeMap<SequenceId, Vec<BlockId>> {
        self.sequences.keys().map(|&id| (id, self.table(id))).collect()
    }

    fn refuses_open(&self, id: SequenceId) -> Option<Error> {
        match self.sequences.get(&id) {
            None => Some(Error::UnknownSequence { id: id.0 }),
            Some(tokens) if tokens.pending.is_some() => Some(Error::OpenStep { id: id.0 }),
            Some(_) => None,
        }
    }

    pub(super) fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::New if self.sequences.len() < MAX_SEQUENCES => {
                self.sequences.insert(self.paging.new_sequence(), Tokens::default());
            }
            Operation::Fork { pick } if self.sequences.len() < MAX_SEQUENCES => self.fork(self.pick(*pick)),
            Operation::New | Operation::Fork { .. } => {}
            Operation::Clear => self.clear(),
            Operation::Free { pick } => self.free(self.pick(*pick)),
            Operation::Truncate { pick, back } => self.truncate(self.pick(*pick), *back),
            Operation::Begin { requests, raw } => self.begin(requests, *raw),
            Operation::Commit { picks } => self.close(&self.pick_open(picks.as_deref()), true),
            Operation::Abort { picks } => self.close(&self.pick_open(picks.as_deref()), false),
            Operation::Match { pick, len, bits } => self.match_prefix(*pick, *len, *bits),
            Operation::Publish { pick, short } => self.publish(self.pick(*pick), *short),
        }
        // An open block that nobody holds any more has lost its page, and is not found.
        let held = distinct_blocks(&self.tables());
        for block in std::mem::take(&mut self.open) {
            if held.contains(&block) {
                self.open.insert(block);
            } else {
                self.forget(block);
            }
        }
    }

    fn is_sealed(&self, block: BlockId) -> bool {
        self.setup.pages.seals() && !self.open.contains(&block)
    }

    fn clear(&mut self) {
        self.paging.clear();
        self.sequences.clear();
        self.published.clear();
        self.open.clear();
        self.peak = 0;
        self.count("cleared", 1);
    }

    fn fork(&mut self, id: SequenceId) {
        let result = self.paging.fork(id);
        if let Some(error) = self.refuses_open(id) {
            return assert_eq!(result, Err(error));
        }
        let fork = result.unwrap();
        assert_eq!(self.table(fork), self.table(id));
        self.count("forked", 1);
        self.sequences.insert(fork, self.sequences[&id].clone());
    }

    fn free(&mut self, id: SequenceId) {
        let result = self.paging.free(id);
        if let Some(error) = self.refuses_open(id) {
            return assert_eq!(result, Err(error));
        }
        result.unwrap();
        self.count("freed", 1);
        self.sequences.remove(&id);
    }

    /// `back` 12 asks for one token more than there are.
    fn truncate(&mut self, id: SequenceId, back: usize) {
        let committed = self.sequences.get(&id).map_or(0, |tokens| tokens.committed.len());
        let len = if back == 12 { committed + 1 } else { committed.saturating_sub(back) };
        let first_seen = self.setup.window.map_or(0, |window| (len + 1).saturating_sub(window));
        let rollback = Rollback { sequence: id, len, first_seen };
        let foreseen = self.paging.check_rollbacks(&[rollback]);
        let result = self.paging.truncate(rollback);
        if let Some(error) = self.refuses_open(id) {
            return assert_eq!(result, Err(error));
        }
        let block_size = self.setup.block_size;
        let within = len < committed && !len.is_multiple_of(block_size);
        let sealed = within.then(|| self.table(id)[len / block_size]).is_some_and(|block| self.is_sealed(block));
        let tokens = self.sequences.get_mut(&id).unwrap();
        if len > committed || len < committed && first_seen < tokens.first_held {
            let too_far = Error::RollbackTooFar { id: id.0, requested: len, floor: tokens.first_held, len: committed };
            self.count("rollback refused", usize::from(len < committed));
            assert_eq!(foreseen, Err(too_far.clone()));
            return assert_eq!(result, Err(too_far));
        }
        let (requested, start) = (len, len - len % block_size);
        let len = if sealed { start } else { len };
        if sealed {
            assert_eq!(result, Err(Error::Sealed { id: id.0, requested, start, end: start + block_size }));
            self.paging.reopen(rollback).unwrap();
            // What was foreseen is what the step finds that writes the rest of the block again.
            let again = StepRequest { sequence: id, num_new: requested - start, keep_from: 0, sealed_to: 0 };
            let room = self.paging.room(&[again]).map(|room| (room.num_blocks(), room.num_pages()));
            assert_eq!(foreseen, room);
            *self.outcomes.entry("unsealed").or_default() += 1;
        } else {
            result.unwrap();
        }
        tokens.committed.truncate(len);
        if tokens.chained > len / block_size {
            tokens.chained = 0;
        }
        self.count("rolled back", usize::from(len < committed));
    }

    fn begin(&mut self, requests: &[(usize, usize, u32)], raw: bool) {
        let block_size = self.setup.block_size;
        let (mut steps, mut new_bits) = (Vec::<StepRequest>::new(), Vec::new());
        for &(pick, num_new, bits) in requests {
            let step = self.request(pick, num_new);
            if raw || steps.iter().all(|other| other.sequence != step.sequence) {
                steps.push(step);
                new_bits.push(bits);
            }
        }
        let before = self.tables();
        let result = self.paging.room(&steps).map(Room::begin);
        let distinct: BTreeSet<_> = steps.iter().map(|step| step.sequence).collect();
        if distinct.len() < steps.len() || steps.iter().any(|step| self.refuses_open(step.sequence).is_some()) {
            let error = result.unwrap_err();
            let known = [matches!(error, Error::Config(_)), matches!(error, Error::OpenStep { .. })];
            assert!(known.contains(&true) || matches!(error, Error::UnknownSequence { .. }), "{error}");
            return assert_eq!(self.tables(), before);
        }

        let mut kept = before.clone();
        for step in &steps {
            let first_held = self.first_held_in(step);
            kept.get_mut(&step.sequence).unwrap()[..first_held / block_size].fill(BlockId::RELEASED);
        }
        let (shared, needed) = self.shared_pages(&steps, &kept);
        let in_use = distinct_blocks(&kept).len();
        if let Some(bound) = self.setup.num_blocks
            && needed > bound - in_use
        {
            self.count("out of blocks", 1);
            assert_eq!(result, Err(Error::OutOfBlocks { needed, free: bound - in_use }));
            return assert_eq!(self.tables(), before);
        }

        if let Pages::Bounded(bound) = self.setup.pages {
            let needed = steps.iter().map(|step| self.new_pages(step)).sum::<usize>() + shared.len();
            let held = distinct_blocks(&kept);
            let free = bound - self.open.iter().filter(|block| held.contains(block)).count();
            if needed > free {
                self.count("out of pages", 1);
                assert_eq!(result, Err(Error::OutOfOpenPages { needed, free }));
                return assert_eq!(self.tables(), before);
            }
        }

        let copies = result.unwrap();
        assert_eq!(copies.len(), shared.len());
        self.num_copies += copies.len();
        self.count("begun", 1);
        self.count("copied", copies.len());
        self.count("released", usize::from(kept != before));
        let room = self.paging.room(&[]).unwrap();
        let (num_blocks, num_pages) = (room.num_blocks(), room.num_pages());
        assert_eq!(num_blocks, self.paging.num_blocks());
        self.memory.resize(self.memory.len().max(num_pages * block_size), POISON);
        let used = distinct_blocks(&kept);
        let paged: BTreeMap<BlockId, PageId> = self.paged();
        for block in distinct_blocks(&self.tables()).difference(&used) {
            self.forget(*block);
            self.tiles.remove(block);
            self.open.remove(block);
            if let Some(&page) = paged.get(block) {
                self.memory[slots(page, block_size)].fill(POISON);
                if self.setup.pages.seals() {
                    self.open.insert(*block);
                }
            }
        }
        for (&(source, destination), block) in copies.iter().zip(shared) {
            if !self.setup.pages.seals() {
                assert_eq!(source.0, block.0);
            }
            self.memory.copy_within(slots(source, block_size), destination.0 as usize * block_size);
        }
        for (step, bits) in steps.iter().zip(new_bits) {
            self.write(step, bits);
        }
    }

    fn forget(&mut self, block: BlockId) {
        self.published.retain(|_, &mut published| published != block);
    }

    fn write(&mut self, step: &StepRequest, bits: u32) {
        let block_size = self.setup.block_size;
        let first_held = self.first_held_in(step);
        let table = self.table(step.sequence);
        let tokens = self.sequences.get_mut(&step.sequence).unwrap();
        tokens.first_held = first_held;
        let new: Vec<u32> = (0..step.num_new).map(|i| (bits >> i) & 1).collect();
        let start = tokens.committed.len();
        tokens.pending = Some(new.clone());
        for (position, &token) in (start..).zip(&new) {
            *self.slot(step.sequence, position) = token;
        }
        if step.num_new > 0 {
            for &block in &table[start / block_size..] {
                self.forget(block);
            }
        }
    }

    fn close(&mut self, ids: &[SequenceId], commit: bool) {
        let sealed = self.due(ids);
        let contents: Vec<Vec<u32>> = {
            let paged = self.paged();
            let page = |block: &BlockId| self.memory[slots(paged[block], self.setup.block_size)].to_vec();
            sealed.iter().map(page).collect()
        };
        let ends_within: BTreeSet<BlockId> = self
            .sequences
            .iter()
            .filter(|(_, tokens)| !tokens.committed.len().is_multiple_of(self.setup.block_size))
            .map(|(&id, tokens)| self.table(id)[tokens.committed.len() / self.setup.block_size])
            .collect();
        for (id, index) in self.due_entries(ids, &sealed) {
            self.paging.seal(self.paging.row(id).unwrap(), index);
        }
        let read_elsewhere = self.read_elsewhere(ids);
        let result = if commit { self.paging.commit(ids) } else { self.paging.abort(ids).map(|()| 0) };
        let open: BTreeSet<_> =
            ids.iter().filter(|id| self.sequences.get(id).is_some_and(|tokens| tokens.pending.is_some())).collect();
        if open.len() < ids.len() {
            return assert!(
                matches!(result, Err(Error::Config(_) | Error::StaleStep(_) | Error::UnknownSequence { .. })),
                "{result:?}"
            );
        }
        let num_due = sealed.len();
        let may_be_sealed = |block: &BlockId| commit && !ends_within.contains(block) && !read_elsewhere.contains(block);
        let sealed: Vec<_> = sealed.into_iter().zip(contents).filter(|(block, _)| may_be_sealed(block)).collect();
        assert_eq!(result, Ok(sealed.len()));
        self.count("seal undone", num_due - sealed.len());
        for (block, content) in sealed {
            *self.outcomes.entry("sealed").or_default() += 1;
            self.open.remove(&block);
            self.tiles.insert(block, content);
        }
        self.count(if commit { "committed" } else { "aborted" }, ids.len());
        for id in ids {
            let tokens = self.sequences.get_mut(id).unwrap();
            let pending = tokens.pending.take().unwrap();
            if commit {
                tokens.committed.extend(pending);
            }
        }
    }

    pub(super) fn check(&mut self) {
        self.paging.check().unwrap();
        assert!(self.paging.is_valid());
        let block_size = self.setup.block_size;
        let mut open_pages = BTreeSet::new();
        for (&id, tokens) in &self.sequences {
            let sequence = self.paging.sequence(id).unwrap();
            assert_eq!(sequence.len(), tokens.committed.len());
            assert_eq!(sequence.first_held(), tokens.first_held);
            assert_eq!(sequence.pending(), tokens.pending.as_ref().map(Vec::len));
            let written = tokens.committed.iter().chain(tokens.pending.iter().flatten());
            let places = self.places(id);
            for (position, &token) in written.enumerate().skip(tokens.first_held) {
                let block = sequence.blocks()[position / block_size];
                let read = match places[position / block_size].kind() {
                    PlaceKind::Tile(tile) => {
                        assert_eq!(tile, block);
                        self.tiles[&tile][position % block_size]
                    }
                    PlaceKind::Page(page) => self.memory[page.0 as usize * block_size + position % block_size],
                };
                assert_eq!(read, token, "sequence {id}, position {position}, block {block}");
            }
            if tokens.committed.len() % block_size > 0 {
                open_pages.insert(sequence.blocks()[tokens.committed.len() / block_size]);
            }
        }
        let in_use = distinct_blocks(&self.tables()).len();
        self.peak = self.peak.max(in_use);
        let paging = &self.paging;
        assert_eq!(paging.blocks_in_use(), in_use);
        assert_eq!(paging.num_free(), self.setup.num_blocks.map(|bound| bound - in_use));
        assert_eq!(paging.num_blocks(), self.setup.num_blocks.unwrap_or(self.peak), "grows only when it must");
        assert_eq!(paging.peak_blocks(), self.peak);
        assert_eq!(paging.num_sequences(), self.sequences.len());
        assert_eq!(paging.partial_blocks(), open_pages.len());
        assert_eq!(paging.cow_copies(), self.num_copies);
        let open_pages = self.setup.pages.seals().then_some(self.open.len());
        assert_eq!(paging.open_pages().map(|pages| pages.0), open_pages);
    }
}
