//! How well do the stored statistics and grids of a layer fit what is written to it?

use crate::quant::range::TokenSet;

/// Tokens over which the drift forgets.
const MEMORY_TOKENS: f64 = 128.0;

/// Figures of one layer; see [`crate::cache::LayerStats`].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LayerHealth {
    /// Mean square of K in units of the frozen channel deviations, over the latest tokens of pages.
    squares: Option<f64>,
    /// K codes of tiles.
    num_codes: u64,
    /// Those of them that the grid clamped.
    num_clamped: u64,
    /// Tokens whose K or V f16 does not hold.
    num_out_of_range: u64,
}

impl LayerHealth {
    /// What a device has counted since it last forgot: over `num_rows` rows the sum of squares of `head_dim` values each.
    #[cfg(feature = "cuda")]
    pub(super) fn counted(
        squares: f64,
        num_rows: u64,
        head_dim: usize,
        codes: [u64; 2],
        num_out_of_range: u64,
    ) -> Self {
        let [num_codes, num_clamped] = codes;
        let squares = (num_rows > 0).then(|| squares / (num_rows * head_dim as u64) as f64);
        Self { squares, num_codes, num_clamped, num_out_of_range }
    }

    /// Takes in `num_tokens` more whose mean square is `squares`.
    pub(super) fn wrote(&mut self, num_tokens: usize, squares: f64) {
        let before = self.squares.unwrap_or(squares);
        let weight = 1.0 - (-(num_tokens as f64) / MEMORY_TOKENS).exp();
        self.squares = Some(before + (squares - before) * weight);
    }

    /// Takes in the tokens of a block that are out of range, of each of its heads.
    pub(super) fn out_of_range(&mut self, heads: impl Iterator<Item = TokenSet>) {
        self.num_out_of_range += u64::from(heads.fold(0, |all, head| all | head).count_ones());
    }

    /// Takes in tiles.
    pub(super) fn sealed(&mut self, num_codes: usize, num_clamped: usize) {
        self.num_codes += num_codes as u64;
        self.num_clamped += num_clamped as u64;
    }

    /// Actual over frozen deviation of the K channels, about the frozen mean, of the latest 128 or so tokens of pages:
    /// 1 where they fit. `None` before there are any.
    #[must_use]
    pub fn drift(&self) -> Option<f64> {
        self.squares.map(f64::sqrt)
    }

    /// Tokens out of range, where they were written to a page and where they were sealed. See [`crate::quant::range`].
    #[must_use]
    pub fn out_of_range_tokens(&self) -> u64 {
        self.num_out_of_range
    }

    /// Share of the K codes of tiles that the ends of their grid cut off. `None` before there are any.
    #[must_use]
    pub fn saturation(&self) -> Option<f64> {
        (self.num_codes > 0).then(|| self.num_clamped as f64 / self.num_codes as f64)
    }
}
