//! The state machine of one layer's calibration.
//!
//! ```text
//! observing --first seal after 128 tokens--> observing, factored --2,048 tokens, or `freeze`--> done
//!                                            (again when the tokens have doubled)
//!                                                                    loaded from a file -----> done
//! ```

use super::moments::Moments;
use super::{FIRST_TOKENS, HeadShape, QUERY_TOKENS, State};
use crate::error::{Error, Result};
use crate::format;
use crate::quant::LayerCalibration;
use std::sync::Arc;

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Accumulating tokens. `factored` is the latest factorization for a seal, and its number of tokens.
    Observing { moments: Moments, factored: Option<(Arc<LayerCalibration>, usize)> },
    /// Final.
    Done { ready: Arc<LayerCalibration>, query_tokens: usize, state: State },
}

impl Layer {
    /// A layer that has observed nothing.
    pub(super) fn new(shape: HeadShape) -> Self {
        let HeadShape { num_kv_heads, head_dim, .. } = shape;
        let phase = Phase::Observing { moments: Moments::new(num_kv_heads, head_dim), factored: None };
        Self { num_kv_heads, head_dim, phase }
    }

    /// A layer loaded from a file.
    pub(super) fn loaded(ready: LayerCalibration, head_dim: usize, query_tokens: usize) -> Self {
        let num_kv_heads = ready.heads().len();
        Self { num_kv_heads, head_dim, phase: Phase::Done { ready: Arc::new(ready), query_tokens, state: State::File } }
    }

    pub(super) fn wanted(&self) -> usize {
        match &self.phase {
            Phase::Observing { moments, .. } => QUERY_TOKENS - moments.num_tokens(),
            Phase::Done { .. } => 0,
        }
    }

    pub(super) fn query_tokens(&self) -> usize {
        match &self.phase {
            Phase::Observing { moments, .. } => moments.num_tokens(),
            Phase::Done { query_tokens, .. } => *query_tokens,
        }
    }

    pub(super) fn state(&self) -> State {
        match &self.phase {
            Phase::Observing { factored: None, .. } => State::No,
            Phase::Observing { factored: Some(_), .. } => State::OwnPrompt,
            Phase::Done { state, .. } => *state,
        }
    }

    pub(super) fn ready(&self) -> Option<Arc<LayerCalibration>> {
        match &self.phase {
            Phase::Observing { factored, .. } => factored.as_ref().map(|(ready, _)| Arc::clone(ready)),
            Phase::Done { ready, .. } => Some(Arc::clone(ready)),
        }
    }

    /// The calibration, if it is final.
    pub(super) fn frozen(&self) -> Option<Arc<LayerCalibration>> {
        match &self.phase {
            Phase::Observing { .. } => None,
            Phase::Done { ready, .. } => Some(Arc::clone(ready)),
        }
    }

    /// The heads of one rank of tensor parallelism. `layer` is for the error.
    pub(super) fn shard(&self, layer: usize, rank: usize, num_ranks: usize) -> Result<Self> {
        let Phase::Done { ready, query_tokens, state } = &self.phase else {
            return Err(Error::Config(format!("layer {layer} still learns: only a final calibration has parts")));
        };
        let num_heads = self.num_kv_heads;
        if !num_heads.is_multiple_of(num_ranks) && !num_ranks.is_multiple_of(num_heads) {
            return Err(Error::Config(format!(
                "layer {layer} has {num_heads} kv heads, which {num_ranks} ranks cannot share evenly"
            )));
        }
        let count = (num_heads / num_ranks).max(1);
        let heads = ready.heads()[rank * num_heads / num_ranks..][..count].to_vec();
        let phase =
            Phase::Done { ready: Arc::new(LayerCalibration::new(heads)), query_tokens: *query_tokens, state: *state };
        Ok(Self { num_kv_heads: count, head_dim: self.head_dim, phase })
    }

    pub(super) fn check(&self, layer: usize, num_kv_heads: usize, head_dim: usize) -> Result<()> {
        if (num_kv_heads, head_dim) == (self.num_kv_heads, self.head_dim) {
            return Ok(());
        }
        Err(Error::Config(format!(
            "layer {layer} has {num_kv_heads} kv heads of head_dim {head_dim}, its calibration has {} of head_dim {}: \
             it is of another model",
            self.num_kv_heads, self.head_dim
        )))
    }

    /// Accumulates as many of the token rows as it still needs; freezes with the last.
    pub(super) fn observe(&mut self, shape: HeadShape, q: &[f32], k: &[f32]) {
        let wanted = self.wanted();
        let Phase::Observing { moments, .. } = &mut self.phase else { return };
        moments.add(shape, q, k, wanted);
        if moments.num_tokens() == QUERY_TOKENS {
            self.freeze();
        }
    }

    /// The calibration to seal with; factors the moments if there are [`FIRST_TOKENS`] tokens for the first time, or
    /// twice as many as were factored last.
    pub(super) fn for_seal(&mut self) -> Option<Arc<LayerCalibration>> {
        if let Phase::Observing { moments, factored } = &mut self.phase {
            let due = factored.as_ref().map_or(FIRST_TOKENS, |(_, num_tokens)| 2 * num_tokens);
            if moments.num_tokens() >= due {
                *factored = Some((Arc::new(LayerCalibration::new(moments.factor())), moments.num_tokens()));
            }
        }
        self.ready()
    }

    /// Factors the tokens observed so far, and observes no more.
    pub(super) fn freeze(&mut self) {
        if let Phase::Observing { moments, .. } = &self.phase {
            let ready = Arc::new(LayerCalibration::new(moments.factor()));
            self.phase = Phase::Done { ready, query_tokens: moments.num_tokens(), state: State::Frozen };
        }
    }
}

impl HeadShape {
    /// The number of token rows in q and k, checked against this shape.
    pub(super) fn num_rows(self, q: &[f32], k: &[f32]) -> Result<usize> {
        let Self { num_q_heads, num_kv_heads, head_dim } = self;
        if !format::supports_head_dim(head_dim) {
            return Err(Error::Unsupported(format!(
                "head_dim {head_dim}: calibration takes multiples of {} up to {}",
                format::HEAD_DIM_MULTIPLE,
                format::MAX_HEAD_DIM
            )));
        }
        if num_kv_heads == 0 || num_q_heads == 0 || !num_q_heads.is_multiple_of(num_kv_heads) {
            return Err(Error::Config(format!("{num_q_heads} query heads are no multiple of {num_kv_heads} kv heads")));
        }
        let rows = |name, len: usize, heads: usize| match heads.checked_mul(head_dim) {
            Some(width) if len.is_multiple_of(width) => Ok(len / width),
            _ => Err(Error::Shape { name, expected: format!("[n, {heads}, {head_dim}]"), got: vec![len] }),
        };
        let num_rows = rows("k", k.len(), num_kv_heads)?;
        if rows("q", q.len(), num_q_heads)? != num_rows {
            return Err(Error::Shape {
                name: "q",
                expected: format!("[{num_rows}, {num_q_heads}, {head_dim}]"),
                got: vec![q.len()],
            });
        }
        Ok(num_rows)
    }
}
