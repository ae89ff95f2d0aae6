//! Which page holds the tokens of an open block, and which pages are free?
//!
//! In a pool that seals, an *open* block has a page of its own and a *sealed* one has none: its tile goes by the block's
//! id. In a pool that does not, every block is its own page.
//!
//! ```text
//! page_of[b] = p, p != SEALED   <=>  p is not on the free list
//! num_open + num_listed          =   num_known  <=  limit
//! page_of[b]                     =   SEALED where nobody holds b
//! ```

use super::{BlockId, PageId, Place};

#[derive(Debug, Clone)]
pub(super) enum OpenPages {
    /// Blocks never seal: the page of a block has the block's number.
    OfEveryBlock,
    /// Blocks seal: pages are few.
    Pool(PagePool),
}

#[derive(Debug, Clone)]
pub(super) struct PagePool {
    page_of: Vec<PageId>,
    free: Vec<PageId>,
    num_known: usize,
    /// `None`: grows as needed.
    bound: Option<usize>,
    /// Most pages that there can be, bounded or not.
    most: usize,
    peak: usize,
}

impl PagePool {
    pub(super) fn new(bound: Option<usize>, most: usize) -> Self {
        Self { page_of: Vec::new(), free: Vec::new(), num_known: 0, bound, most, peak: 0 }
    }

    fn limit(&self) -> usize {
        self.bound.unwrap_or(self.most)
    }

    fn num_open(&self) -> usize {
        self.num_known - self.free.len()
    }
}

impl OpenPages {
    /// An empty pool with the same bound.
    pub(super) fn emptied(&self) -> Self {
        match self {
            Self::OfEveryBlock => Self::OfEveryBlock,
            Self::Pool(pool) => Self::Pool(PagePool::new(pool.bound, pool.most)),
        }
    }

    /// Do blocks seal?
    pub(super) fn seals(&self) -> bool {
        matches!(self, Self::Pool(_))
    }

    /// The page of a block, `None` if it is sealed.
    pub(super) fn page_of(&self, block: BlockId) -> Option<PageId> {
        match self {
            Self::OfEveryBlock => Some(PageId(block.0)),
            Self::Pool(pool) => pool.page_of.get(block.0 as usize).copied().filter(|&page| page != PageId::SEALED),
        }
    }

    /// Where a block is read that no open step seals.
    pub(super) fn place_of(&self, block: BlockId) -> Place {
        self.page_of(block).map_or(Place::tile(block), Place::page)
    }

    /// Gives a page to a block that has none; `None` when all are taken.
    pub(super) fn open(&mut self, block: BlockId) -> Option<PageId> {
        let Self::Pool(pool) = self else { return Some(PageId(block.0)) };
        let page = match pool.free.pop() {
            Some(page) => page,
            None if pool.num_known < pool.limit() => {
                pool.num_known += 1;
                PageId((pool.num_known - 1) as u32)
            }
            None => return None,
        };
        let block = block.0 as usize;
        if pool.page_of.len() <= block {
            pool.page_of.resize(block + 1, PageId::SEALED);
        }
        pool.page_of[block] = page;
        pool.peak = pool.peak.max(pool.num_open());
        Some(page)
    }

    /// Takes the page of a block back: it was sealed, or is free. Was there one?
    pub(super) fn close(&mut self, block: BlockId) -> bool {
        let (Some(page), Self::Pool(pool)) = (self.page_of(block), self) else { return false };
        pool.page_of[block.0 as usize] = PageId::SEALED;
        pool.free.push(page);
        true
    }

    /// Pages that [`Self::open`] could still give; `usize::MAX` where every block is its own.
    pub(super) fn num_available(&self) -> usize {
        match self {
            Self::OfEveryBlock => usize::MAX,
            Self::Pool(pool) => pool.limit() - pool.num_open(),
        }
    }

    /// Pages that there are once `needed` more have been opened and `freed` closed before; `None` where every block is
    /// its own.
    pub(super) fn num_known_after(&self, needed: usize, freed: usize) -> Option<usize> {
        match self {
            Self::OfEveryBlock => None,
            Self::Pool(pool) => {
                let grown = needed.saturating_sub(pool.free.len() + freed);
                Some(pool.bound.unwrap_or(pool.num_known + grown))
            }
        }
    }

    /// Pages of open blocks, and the most that there were; `None` where every block is its own.
    pub(super) fn num_open(&self) -> Option<(usize, usize)> {
        match self {
            Self::OfEveryBlock => None,
            Self::Pool(pool) => Some((pool.num_open(), pool.peak)),
        }
    }

    /// Names the equation of the module documentation that does not hold; `holders[b]` counts table entries.
    pub(super) fn check(&self, holders: &[u32]) -> Result<(), String> {
        let Self::Pool(pool) = self else { return Ok(()) };
        let mut taken = vec![false; pool.num_known];
        let of_blocks = pool.page_of.iter().filter(|&&page| page != PageId::SEALED);
        for page in of_blocks.chain(&pool.free) {
            match taken.get_mut(page.0 as usize) {
                Some(taken) if !*taken => *taken = true,
                Some(_) => return Err(format!("page {} is taken twice", page.0)),
                None => return Err(format!("page {} of {}", page.0, pool.num_known)),
            }
        }
        if let Some(lost) = taken.iter().position(|taken| !taken) {
            return Err(format!("page {lost} is neither of a block nor free"));
        }
        if pool.num_known > pool.limit() || pool.num_open() > pool.peak {
            return Err(format!("{} pages, {} open, at most {} at once", pool.num_known, pool.num_open(), pool.peak));
        }
        let held = |block: usize| holders.get(block).is_some_and(|&holders| holders > 0);
        match (0..pool.page_of.len()).find(|&block| pool.page_of[block] != PageId::SEALED && !held(block)) {
            Some(block) => Err(format!("block {block} is held by nobody and has a page")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounded_pool_gives_its_pages_and_takes_them_back() {
        let mut pages = OpenPages::Pool(PagePool::new(Some(2), 9));
        let first = pages.open(BlockId(7)).unwrap();
        assert_ne!(pages.open(BlockId(3)).unwrap(), first);
        assert_eq!((pages.open(BlockId(1)), pages.num_available()), (None, 0));
        assert!(pages.close(BlockId(7)));
        assert_eq!((pages.page_of(BlockId(7)), pages.num_open()), (None, Some((1, 2))));
        assert_eq!(pages.open(BlockId(1)), Some(first));
    }

    #[test]
    fn without_sealing_a_block_is_its_own_page() {
        let mut pages = OpenPages::OfEveryBlock;
        assert_eq!((pages.page_of(BlockId(5)), pages.open(BlockId(6))), (Some(PageId(5)), Some(PageId(6))));
        assert!(!pages.close(BlockId(5)));
    }
}
