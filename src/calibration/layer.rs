//! One layer's way from the first tokens to what is frozen.
//!
//! ```text
//! observing --128 tokens, about to seal--> observing, with the prompt's own --2,048 tokens, or `freeze`--> done
//!                                          (again, when the tokens have doubled)
//!                                                                           loaded from a file ----------> done
//! ```

use super::moments::Moments;
use super::{FIRST_TOKENS, HeadShape, LayerCalibration, QUERY_TOKENS, State};
use crate::error::{Error, Result};
use crate::format;
use std::sync::Arc;

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Takes tokens. `own` is what was factored last when a page was about to seal, and of how many tokens.
    Observing { moments: Moments, own: Option<(Arc<LayerCalibration>, usize)> },
    /// Changes no more.
    Done { ready: Arc<LayerCalibration>, query_tokens: usize, state: State },
}

impl Layer {
    /// A layer that has seen nothing.
    pub(super) fn new(shape: HeadShape) -> Self {
        let HeadShape { num_kv_heads, head_dim, .. } = shape;
        let phase = Phase::Observing { moments: Moments::new(num_kv_heads, head_dim), own: None };
        Self { num_kv_heads, head_dim, phase }
    }

    /// A layer out of a file.
    pub(super) fn loaded(ready: LayerCalibration, head_dim: usize, query_tokens: usize) -> Self {
        let num_kv_heads = ready.heads.len();
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
            Phase::Observing { own: None, .. } => State::No,
            Phase::Observing { own: Some(_), .. } => State::OwnPrompt,
            Phase::Done { state, .. } => *state,
        }
    }

    pub(super) fn ready(&self) -> Option<Arc<LayerCalibration>> {
        match &self.phase {
            Phase::Observing { own, .. } => own.as_ref().map(|(ready, _)| Arc::clone(ready)),
            Phase::Done { ready, .. } => Some(Arc::clone(ready)),
        }
    }

    /// What is frozen, if this is.
    pub(super) fn frozen(&self) -> Option<Arc<LayerCalibration>> {
        match &self.phase {
            Phase::Observing { .. } => None,
            Phase::Done { ready, .. } => Some(Arc::clone(ready)),
        }
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

    /// Takes what it wants of token rows of its shape; freezes when it has all.
    pub(super) fn observe(&mut self, shape: HeadShape, q: &[f32], k: &[f32]) {
        let wanted = self.wanted();
        let Phase::Observing { moments, .. } = &mut self.phase else { return };
        moments.add(shape, q, k, wanted);
        if moments.num_tokens() == QUERY_TOKENS {
            self.freeze();
        }
    }

    /// What a page that is about to seal uses: factored of the first [`FIRST_TOKENS`] tokens or more, and of all since
    /// when they have doubled.
    pub(super) fn for_seal(&mut self) -> Option<Arc<LayerCalibration>> {
        if let Phase::Observing { moments, own } = &mut self.phase {
            let due = own.as_ref().map_or(FIRST_TOKENS, |(_, num_tokens)| 2 * num_tokens);
            if moments.num_tokens() >= due {
                *own = Some((Arc::new(LayerCalibration { heads: moments.factor() }), moments.num_tokens()));
            }
        }
        self.ready()
    }

    /// Factors what it has seen, and takes no more.
    pub(super) fn freeze(&mut self) {
        if let Phase::Observing { moments, .. } = &self.phase {
            let ready = Arc::new(LayerCalibration { heads: moments.factor() });
            self.phase = Phase::Done { ready, query_tokens: moments.num_tokens(), state: State::Frozen };
        }
    }
}

impl HeadShape {
    /// Are q and k token rows of this shape? Says how many.
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
