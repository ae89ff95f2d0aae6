//! What a cache holds, and how well it fits.

use crate::backend::LayerHealth;
use crate::calibration::State;

/// What a cache holds; bytes are those of whole blocks, every layer together.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheStats {
    /// Blocks that a sequence holds.
    pub blocks_in_use: usize,
    /// Most blocks ever in use.
    pub peak_blocks: usize,
    /// Blocks left; `None` when the pool grows.
    pub free_blocks: Option<usize>,
    /// Blocks that some sequence ends within.
    pub partial_blocks: usize,
    /// Pages in use: those of blocks that are not sealed, in formats that seal, else 0.
    pub open_pages: usize,
    /// Most such pages ever in use.
    pub peak_open_pages: usize,
    /// Bytes of the blocks in use: tiles and open pages, or pages. The tile of an open block is counted too.
    pub bytes_in_use: usize,
    /// Bytes of the most blocks, and of the most open pages, ever in use.
    pub peak_bytes: usize,
    /// Bytes of address space held; a page takes memory when it is first used.
    pub allocated_bytes: usize,
    /// Bytes of one block at rest: a page, or in formats that seal a tile.
    pub bytes_per_block: usize,
    /// Bytes of one open page in formats that seal, else 0.
    pub bytes_per_open_page: usize,
    /// `bytes_per_block` over the tokens of a block.
    pub bytes_per_token: f64,
    /// Sequences alive.
    pub num_sequences: usize,
    /// Blocks copied because a fork wrote into a shared one.
    pub cow_copies: usize,
    /// Blocks sealed so far.
    pub sealed: usize,
    /// Sealed blocks that a truncation decoded into a page again.
    pub unsealed: usize,
    /// Tokens that the statistics of the first page opened or refitted last were taken over; `None` before there is one.
    pub first_page_tokens: Option<usize>,
    /// How the calibration came about, the least of this cache's layers; [`State::No`] without one.
    pub calibrated: State,
    /// One entry a layer.
    pub layers: Vec<LayerStats>,
}

/// How well the statistics and grids of a layer fit what was appended to it, in steps that were aborted too.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerStats {
    /// Share of the K codes of tiles that the ends of their grid cut off; `None` before there are any.
    pub saturation: Option<f64>,
    /// Actual over frozen deviation of the K channels, over the latest 128 or so tokens written to pages: 1 where they
    /// fit, more after a change of domain, until pages are opened that know it. `None` before there are any.
    pub drift: Option<f64>,
    /// Tokens whose K or V is stored wrong because f16 does not hold its scale or zero point (see
    /// [`crate::quant::range`]); counted where they are written to a page and where they are sealed.
    pub out_of_range_tokens: u64,
}

impl From<LayerHealth> for LayerStats {
    fn from(health: LayerHealth) -> Self {
        let out_of_range_tokens = health.out_of_range_tokens();
        Self { saturation: health.saturation(), drift: health.drift(), out_of_range_tokens }
    }
}
