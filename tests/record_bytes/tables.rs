//! Sequences and their tables, with an allocator of the test's own: pages and blocks are taken in no order, and a page
//! that was sealed is the next to be written.

use crate::common::Random;
use kvarn::paging::{BlockId, PageId, Place};
use kvarn::plan::{Bounds, StepPlan, first_seen, sealed_to};

#[derive(Clone)]
pub struct Sequence {
    pub blocks: Vec<BlockId>,
    pub places: Vec<Place>,
    pub len: usize,
    /// Blocks that a window has released.
    pub released: usize,
    /// Does it begin token by token?
    pub is_slow: bool,
}

pub struct Tables {
    pub block_size: usize,
    pub seals: bool,
    pub window: Option<usize>,
    free_blocks: Vec<BlockId>,
    free_pages: Vec<PageId>,
    /// Sequences that hold a block.
    users: Vec<usize>,
    pub sequences: Vec<Sequence>,
}

impl Tables {
    pub fn new(block_size: usize, seals: bool, window: Option<usize>, room: Bounds, random: &mut Random) -> Self {
        let num_blocks = if seals { room.num_tiles } else { room.num_pages };
        let mut shuffled = |num: usize| {
            let mut ids: Vec<u32> = (0..num as u32).collect();
            (1..num).rev().for_each(|i| ids.swap(i, random.below(i + 1)));
            ids
        };
        Self {
            block_size,
            seals,
            window,
            free_blocks: shuffled(num_blocks).into_iter().map(BlockId).collect(),
            free_pages: shuffled(room.num_pages).into_iter().map(PageId).collect(),
            users: vec![0; num_blocks],
            sequences: Vec::new(),
        }
    }

    fn block(&mut self) -> BlockId {
        let block = self.free_blocks.pop().expect("a free block");
        self.users[block.0 as usize] = 1;
        block
    }

    pub fn first_held(&self, index: usize) -> usize {
        first_seen(self.sequences[index].len, self.window) / self.block_size * self.block_size
    }

    /// Blocks and places for `num_new` more tokens.
    pub fn reserve(&mut self, index: usize, num_new: usize) {
        let len = self.sequences[index].len;
        let first = len.div_ceil(self.block_size);
        let tiles = if self.seals { sealed_to(self.block_size, len, num_new) } else { first };
        for at in first..(len + num_new).div_ceil(self.block_size) {
            let block = self.block();
            let place =
                if at < tiles { Place::tile(block) } else { Place::page(self.free_pages.pop().expect("a free page")) };
            self.sequences[index].blocks.push(block);
            self.sequences[index].places.push(place);
        }
    }

    /// The places of blocks that a step seals from pages, in all sequences; gives their pages, which are read yet.
    pub fn seal(&mut self, plan: &StepPlan, of_step: &[usize]) -> Vec<PageId> {
        let mut pages = Vec::new();
        for seal in plan.seals() {
            let id = self.sequences[of_step[seal.sequence]].blocks[seal.block];
            for sequence in &mut self.sequences {
                let held = sequence.blocks.iter().zip(&mut sequence.places).skip(sequence.released);
                for (block, place) in held {
                    *place = if *block == id { Place::tile(id) } else { *place };
                }
            }
            pages.extend(seal.page);
        }
        pages
    }

    pub fn free_pages(&mut self, pages: Vec<PageId>) {
        self.free_pages.extend(pages);
    }

    /// Drops the blocks beyond the first tokens.
    pub fn truncate(&mut self, index: usize, len: usize) {
        let sequence = &mut self.sequences[index];
        sequence.len = len;
        let kept = len.div_ceil(self.block_size).max(sequence.released);
        let (blocks, places) = (sequence.blocks.split_off(kept), sequence.places.split_off(kept));
        blocks.into_iter().zip(places).for_each(|(block, place)| self.drop(block, place));
    }

    /// Drops the blocks that the window hides.
    pub fn release(&mut self, index: usize) {
        let first = self.first_held(index) / self.block_size;
        for at in self.sequences[index].released..first {
            self.drop(self.sequences[index].blocks[at], self.sequences[index].places[at]);
        }
        self.sequences[index].released = first;
    }

    fn drop(&mut self, block: BlockId, place: Place) {
        self.users[block.0 as usize] -= 1;
        if self.users[block.0 as usize] == 0 {
            self.free_blocks.push(block);
            self.free_pages.extend(place.as_page());
        }
    }

    pub fn leave(&mut self, index: usize) {
        self.truncate(index, 0);
        self.sequences.swap_remove(index);
    }

    /// A sequence with the tokens of another: whole blocks are shared; gives the copy of a page that is not.
    pub fn fork(&mut self, index: usize) -> Option<(PageId, PageId)> {
        let mut fork = self.sequences[index].clone();
        let whole = fork.len / self.block_size;
        fork.blocks[fork.released..whole].iter().for_each(|block| self.users[block.0 as usize] += 1);
        let mut copy = None;
        if let Some(last) = fork.places.get_mut(whole) {
            let (from, to) = (last.as_page().expect("a block of few tokens"), self.free_pages.pop().expect("a page"));
            (fork.blocks[whole], *last) = (self.block(), Place::page(to));
            copy = Some((from, to));
        }
        self.sequences.push(fork);
        copy
    }
}
