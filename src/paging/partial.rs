//! Partly filled blocks: how many sequences end within each.
//!
//! ```text
//! ends[b]  =  sequences with len % block_size > 0 and blocks[len / block_size] = b
//! num      =  blocks with ends[b] > 0
//! ```
//!
//! The next token of such a sequence goes into the block, so the block cannot be sealed, though another sequence may
//! have filled it.

use super::BlockId;

#[derive(Debug, Clone, Default)]
pub(super) struct PartialBlocks {
    ends: Vec<u32>,
    num: usize,
}

impl PartialBlocks {
    /// A sequence ends within the block from now on.
    pub(super) fn add(&mut self, block: Option<BlockId>) {
        let Some(BlockId(block)) = block else { return };
        let block = block as usize;
        if self.ends.len() <= block {
            self.ends.resize(block + 1, 0);
        }
        self.num += usize::from(self.ends[block] == 0);
        self.ends[block] += 1;
    }

    /// A sequence that ended within the block does so no more.
    pub(super) fn remove(&mut self, block: Option<BlockId>) {
        let Some(BlockId(block)) = block else { return };
        self.ends[block as usize] -= 1;
        self.num -= usize::from(self.ends[block as usize] == 0);
    }

    pub(super) fn contains(&self, block: BlockId) -> bool {
        self.ends.get(block.0 as usize).is_some_and(|&ends| ends > 0)
    }

    pub(super) fn len(&self) -> usize {
        self.num
    }

    /// Names the equation of the module documentation that does not hold; `counted[b]` is the right side of the first.
    pub(super) fn check(&self, counted: &[u32]) -> Result<(), String> {
        let ends = |block: usize| self.ends.get(block).copied().unwrap_or(0);
        if let Some(block) = (0..counted.len().max(self.ends.len()))
            .find(|&block| ends(block) != counted.get(block).copied().unwrap_or(0))
        {
            return Err(format!("block {block}: {} sequences end within it", ends(block)));
        }
        let num = counted.iter().filter(|&&counted| counted > 0).count();
        if num == self.num { Ok(()) } else { Err(format!("{num} partly filled blocks, counted {}", self.num)) }
    }
}
