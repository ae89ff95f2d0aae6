//! Whether everything that paging keeps agrees.

use std::collections::HashMap;

use super::{BlockId, Paging, PlaceKind};

impl Paging {
    /// Do all invariants hold? Visits everything.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.check().is_ok()
    }

    /// Like [`is_valid`](Self::is_valid), naming an equation that does not hold.
    #[doc(hidden)]
    pub fn check(&self) -> std::result::Result<(), String> {
        let mut holders = vec![0_u32; self.pool.num_known()];
        let mut ends = vec![0_u32; self.pool.num_known()];
        let mut index_of: HashMap<BlockId, usize> = HashMap::new();
        for (id, row, sequence) in self.sequences.iter() {
            let named = |broken| format!("sequence {id}: {broken}");
            sequence.check(self.block_size).map_err(named)?;
            for (index, &block) in sequence.blocks.iter().enumerate().skip(sequence.first_held / self.block_size) {
                let count = holders.get_mut(block.0 as usize);
                *count.ok_or_else(|| format!("sequence {id}: block {block} was never handed out"))? += 1;
                let first = *index_of.entry(block).or_insert(index);
                if first != index {
                    return Err(format!("sequence {id}: block {block} is entry {index}, and {first} of another one"));
                }
                let is_tile = self.pages.page_of(block).is_none() || sequence.sealing.contains(&index);
                let place = self.places.view().row(row)[index].kind();
                let expected = match self.pages.page_of(block) {
                    Some(page) if !is_tile => PlaceKind::Page(page),
                    _ => PlaceKind::Tile(block),
                };
                if place != expected {
                    return Err(named(format!("entry {index} is at {place:?}, not at {expected:?}")));
                }
                if index < sequence.num_tiles && self.pages.page_of(block).is_some() {
                    return Err(named(format!("block {block} has a page, and entry {index} is one of the tiles")));
                }
            }
            if let Some(block) = sequence.partial_block(self.block_size) {
                ends[block.0 as usize] += 1;
                if sequence.owns_partial_block && (self.pool.refcount(block) != 1 || self.prefix.contains(block)) {
                    return Err(format!("sequence {id}: block {block} is shared or published, and not known to be"));
                }
                if self.pages.page_of(block).is_none() {
                    return Err(format!("sequence {id}: block {block} is partly filled and sealed"));
                }
            }
        }
        self.pool.check(&holders)?;
        self.pages.check(&holders)?;
        self.partial.check(&ends)?;
        self.prefix.check(self.pool.num_known())?;
        for (id, _, sequence) in self.sequences.iter().filter(|(.., sequence)| sequence.pending > Some(0)) {
            for &block in &sequence.blocks[sequence.len / self.block_size..] {
                if self.pool.refcount(block) != 1 || self.prefix.contains(block) {
                    return Err(format!("sequence {id} writes block {block}, which is shared or published"));
                }
            }
        }
        Ok(())
    }
}
