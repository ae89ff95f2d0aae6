//! Steps: what they seal, when, and what they attend to.

use super::model::{Model, Open};
use super::rows::{self, BLOCK, GROUP, HEAD_DIM, HEADS, LAYERS, Row};
use kvarn::Error;
use kvarn::backend::{AttendOptions, TensorView, TensorViewMut};
use kvarn::paging::{BlockId, SequenceId};
use kvarn::plan::{DECODE_TOKENS, Rows, is_prefill};
use std::collections::HashSet;

const MAX_TOKENS: usize = 110;
const COUNTS: [usize; 12] = [0, 1, 1, 2, 5, 11, 15, 16, 17, 18, 33, 50];
/// Of attention in f32 over at most `MAX_TOKENS` tokens, against f64.
const ATTENTION_ERROR: f64 = 2e-5;

impl Model {
    pub(super) fn begin(&mut self) {
        let mut parts: Vec<(SequenceId, Vec<u32>)> = Vec::new();
        for _ in 0..=self.random.below(3) {
            let (Some(index), count) = (self.pick(), self.random.pick(&COUNTS)) else { return };
            let tokens = &self.sequences[index];
            if parts.iter().all(|part| part.0 != tokens.id) && tokens.ids.len() + count <= MAX_TOKENS {
                parts.push((tokens.id, vec![0; count]));
            }
        }
        if parts.is_empty() {
            return;
        }
        let tables: Vec<Vec<BlockId>> = parts.iter().map(|part| self.table(part.0)).collect();
        let requests: Vec<_> = parts.iter().map(|(id, new)| (*id, Rows::All(new.len()))).collect();
        let stats = self.cache.stats().unwrap();
        let step = match self.cache.begin_step(&requests, self.random.below(4) == 0) {
            Ok(step) => step,
            Err(Error::OutOfBlocks { needed, free }) => {
                assert!(needed > free && self.cache.stats().unwrap() == stats);
                return self.count("out of blocks");
            }
            Err(Error::OutOfOpenPages { needed, free }) => {
                assert!(needed > free && self.cache.stats().unwrap() == stats);
                return self.count("out of open pages");
            }
            Err(other) => panic!("{other}"),
        };
        let mut due = HashSet::new();
        for ((id, new), before) in parts.iter_mut().zip(tables) {
            for token in new.iter_mut() {
                *token = self.given.len() as u32;
                self.given.push(rows::new_row(&mut self.random));
            }
            let (id, len) = (*id, self.tokens(*id).ids.len());
            let table = self.table(id);
            for (i, &block) in table.iter().enumerate() {
                if block != BlockId::RELEASED && before.get(i) != Some(&block) {
                    if sealed_at_once(len, new.len()).contains(&i) {
                        self.sealed.insert(block);
                    } else {
                        self.sealed.remove(&block);
                    }
                }
            }
            due.extend(table[..len / BLOCK].iter().copied());
        }
        let partly = self.partly_used();
        due.retain(|block| *block != BlockId::RELEASED && !self.sealed.contains(block) && !partly.contains(block));
        for (id, _) in &parts {
            self.tokens_mut(*id).pending = true;
        }
        self.steps.push(Open { step, parts, due, appended: false });
        if self.steps.len() == 2 {
            self.count("two steps");
        }
        if self.random.below(3) > 0 {
            self.append(self.steps.len() - 1);
        }
    }

    /// Writes every layer of a step, and compares what it attends to.
    pub(super) fn append(&mut self, index: usize) {
        let Open { step, parts, .. } = &self.steps[index];
        let (step, parts) = (step.clone(), parts.clone());
        let new: Vec<&Row> = parts.iter().flat_map(|part| part.1.iter().map(|&id| &self.given[id as usize])).collect();
        let with_fresh = self.random.below(2) == 0;
        for layer in 0..LAYERS {
            let (k, v) = (rows::pack(&new, layer, 0), rows::pack(&new, layer, 1));
            let q = self.random.normals(HEADS * GROUP * new.len() * HEAD_DIM);
            let mut out = vec![f32::NAN; q.len()];
            let shape = [1, HEADS * GROUP, new.len(), HEAD_DIM];
            let fresh = rows::fresh(&k, &v, new.len());
            self.cache.append(&step, layer, fresh, None).unwrap();
            let view_q = TensorView::from_slice("q", &q, shape).unwrap();
            let view_out = TensorViewMut::from_slice("out", &mut out, shape).unwrap();
            let options = AttendOptions { scale: Some(0.25), ..AttendOptions::PLAIN };
            self.cache.attend(&step, layer, view_q, with_fresh.then_some(fresh), options, view_out).unwrap();
            if layer + 1 < LAYERS {
                continue; // the last layer's tokens can all be read
            }
            let mut row = 0;
            for (id, ids) in &parts {
                let len = self.tokens(*id).ids.len();
                let first = self.cache.sequence(*id).unwrap().first_held();
                let mut seen = rows::stored(&self.cache, *id, first, len + ids.len());
                if with_fresh && is_prefill(BLOCK, len, ids.len()) {
                    let own = ids.iter().map(|&id| self.given[id as usize].clone());
                    seen.splice(len - first.., own);
                }
                for token in [0, ids.len().saturating_sub(1)].into_iter().filter(|&token| token < ids.len()) {
                    let end = len - first + token + 1;
                    let start = self.setup.window.map_or(0, |window| end.saturating_sub(window));
                    for head in 0..HEADS * GROUP {
                        let at = (head * new.len() + row + token) * HEAD_DIM
                            ..(head * new.len() + row + token + 1) * HEAD_DIM;
                        let (q, out) = (&q[at.clone()], &out[at]);
                        let error = rows::attention_error(&seen[..end], layer, head / GROUP, start, q, out);
                        assert!(error <= ATTENTION_ERROR, "attention is off by {error}");
                    }
                }
                row += ids.len();
            }
        }
        self.steps[index].appended = true;
    }

    pub(super) fn abort(&mut self) {
        let open = self.steps.remove(self.random.below(self.steps.len()));
        self.cache.abort(&open.step).unwrap();
        for (id, _) in &open.parts {
            self.tokens_mut(*id).pending = false;
        }
        self.count(if open.due.is_empty() { "aborted" } else { "aborted before sealing" });
    }

    /// Gives the blocks that are tiles from now on.
    pub(super) fn commit(&mut self, context: &str) -> HashSet<BlockId> {
        let index = self.random.below(self.steps.len());
        if !self.steps[index].appended {
            self.append(index);
        }
        let Open { step, parts, mut due, .. } = self.steps.remove(index);
        let partly = self.partly_used();
        let elsewhere: HashSet<BlockId> =
            self.steps.iter().flat_map(|open| &open.parts).flat_map(|part| self.held(part.0)).collect();
        let num_due = due.len();
        due.retain(|block| !partly.contains(block) && !elsewhere.contains(block));
        if due.len() < num_due {
            self.count("sealing put off");
        }
        self.cache.commit(&step).unwrap();
        self.num_sealed += due.len();
        for (id, new) in parts {
            let len = self.tokens(id).ids.len();
            let at_once = sealed_at_once(len, new.len());
            self.num_sealed += at_once.len();
            self.refit(id, new.len(), context);
            let found = rows::stored(&self.cache, id, len, len + new.len());
            let given: Vec<Row> = new.iter().map(|&id| self.given[id as usize].clone()).collect();
            for block in len / BLOCK..(len + new.len()).div_ceil(BLOCK) {
                let (from, to) = ((block * BLOCK).max(len) - len, ((block + 1) * BLOCK - len).min(new.len()));
                if at_once.contains(&block) {
                    let (found, given) = (&found[from..to], &given[from..to]);
                    let layers = self.layers.as_deref();
                    assert!(rows::is_tile_of(found, given, self.setup.format, layers, block == 0, true), "{context}");
                    self.count("sealed at once");
                } else {
                    assert!(rows::are_near(&found[from..to], &given[from..to]), "{context}: new rows");
                }
            }
            let tokens = self.tokens_mut(id);
            tokens.pending = false;
            tokens.ids.extend(new);
            tokens.rows.extend(found);
        }
        due
    }
}

impl Model {
    /// A first page that was not half written is rounded anew: K stays near what it was, V is what it was.
    fn refit(&mut self, id: SequenceId, num_new: usize, context: &str) {
        let len = self.tokens(id).ids.len();
        if !(1..BLOCK / 2).contains(&len) || num_new == 0 || self.cache.sequence(id).unwrap().first_held() > 0 {
            return;
        }
        let now = rows::stored(&self.cache, id, 0, len);
        assert!(rows::are_near(&now, &self.tokens(id).rows), "{context}: a refitted page");
        assert!(rows::same_v(&now, &self.tokens(id).rows), "{context}: V of a refitted page");
        self.tokens_mut(id).rows = now;
        self.count("refitted");
    }
}

/// Blocks that a step of `num_new` tokens after `len` seals from its own rows: a prefill, and all that it writes whole
/// but the last full one.
fn sealed_at_once(len: usize, num_new: usize) -> std::ops::Range<usize> {
    let first = len.div_ceil(BLOCK);
    let last_full = ((len + num_new) / BLOCK).saturating_sub(1);
    if num_new > DECODE_TOKENS { first..last_full.max(first) } else { first..first }
}
