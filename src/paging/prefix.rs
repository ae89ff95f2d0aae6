//! Which block already holds these tokens, after these tokens?
//!
//! A full block is named by a chain hash, which commits to every token up to its end:
//!
//! ```text
//! chain(0)      sha256(domain, block_size, salt)
//! chain(n + 1)  sha256(chain(n), the block_size token ids of block n)       (integers little-endian)
//! ```
//!
//! Invariant: `block_of[chain] = b  <=>  chain_of[b] = chain`, a bijection. Registering says that the block's content
//! is that of its chain; whoever writes into a block forgets it first. Two salts share nothing: a salt for each tenant
//! keeps tenants from learning each other's prefixes by timing.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use super::BlockId;

const DOMAIN: &[u8] = b"kvarn prefix chain";

/// Commits to all tokens up to the end of a full block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Chain([u8; 32]);

#[derive(Debug, Clone)]
pub(super) struct PrefixIndex {
    root: Chain,
    block_of: HashMap<Chain, BlockId>,
    chain_of: HashMap<BlockId, Chain>,
}

impl PrefixIndex {
    pub(super) fn new(block_size: usize, salt: &[u8]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(DOMAIN);
        hasher.update((block_size as u64).to_le_bytes());
        hasher.update(salt);
        Self { root: Chain(hasher.finalize().into()), block_of: HashMap::new(), chain_of: HashMap::new() }
    }

    /// The chain of no blocks.
    pub(super) fn root(&self) -> Chain {
        self.root
    }

    pub(super) fn clear(&mut self) {
        self.block_of.clear();
        self.chain_of.clear();
    }

    /// The chain that continues `parent` by one full block of `token_ids`.
    pub(super) fn extend(parent: Chain, token_ids: &[u32]) -> Chain {
        let mut hasher = Sha256::new();
        hasher.update(parent.0);
        for id in token_ids {
            hasher.update(id.to_le_bytes());
        }
        Chain(hasher.finalize().into())
    }

    pub(super) fn find(&self, chain: Chain) -> Option<BlockId> {
        self.block_of.get(&chain).copied()
    }

    pub(super) fn contains(&self, block: BlockId) -> bool {
        self.chain_of.contains_key(&block)
    }

    /// Names `block` by `chain`, unless one of the two is already registered; `true` if it was not.
    pub(super) fn register(&mut self, chain: Chain, block: BlockId) -> bool {
        if self.block_of.contains_key(&chain) || self.chain_of.contains_key(&block) {
            return false;
        }
        self.block_of.insert(chain, block);
        self.chain_of.insert(block, chain);
        true
    }

    /// The block's content is about to change.
    pub(super) fn forget(&mut self, block: BlockId) {
        if let Some(chain) = self.chain_of.remove(&block) {
            self.block_of.remove(&chain);
        }
    }

    /// Names the broken equation of the module documentation.
    pub(super) fn check(&self, num_known: usize) -> Result<(), String> {
        if self.block_of.len() != self.chain_of.len() {
            return Err(format!("prefix index: {} chains, {} blocks", self.block_of.len(), self.chain_of.len()));
        }
        for (block, chain) in &self.chain_of {
            if block.0 as usize >= num_known || self.block_of.get(chain) != Some(block) {
                return Err(format!("prefix index: block {block} is not the block of its chain"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_depends_on_salt_block_size_and_every_token() {
        let chain = |block_size, salt: &[u8], blocks: [&[u32]; 2]| {
            blocks.into_iter().fold(PrefixIndex::new(block_size, salt).root(), PrefixIndex::extend)
        };
        let base = chain(2, b"a", [&[1, 2], &[3, 4]]);
        assert_eq!(base, chain(2, b"a", [&[1, 2], &[3, 4]]));
        assert_ne!(base, chain(2, b"b", [&[1, 2], &[3, 4]]));
        assert_ne!(base, chain(3, b"a", [&[1, 2], &[3, 4]]));
        assert_ne!(base, chain(2, b"a", [&[9, 2], &[3, 4]]));
        assert_ne!(base, chain(2, b"a", [&[1, 2], &[4, 3]]));
    }

    #[test]
    fn a_known_chain_keeps_its_first_block() {
        let mut index = PrefixIndex::new(1, b"");
        let chain = PrefixIndex::extend(index.root(), &[7]);
        assert!(index.register(chain, BlockId(0)));
        assert!(!index.register(chain, BlockId(1)));
        assert_eq!(index.find(chain), Some(BlockId(0)));
        index.forget(BlockId(1));
        assert_eq!(index.find(chain), Some(BlockId(0)));
        index.forget(BlockId(0));
        assert_eq!(index.find(chain), None);
        index.check(2).unwrap();
    }
}
