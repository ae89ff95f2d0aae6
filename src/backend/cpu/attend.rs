//! Attend: decode cuts the history into splits and merges them by their log-sum-exp; prefill is in [`super::prefill`].

use super::generic::{RecordView, Rows, Scratch};
use super::{Cpu, ORDER, PARALLEL_VALUES};
use crate::backend::{AttendOptions, Fresh, Output, Over, TensorView};
use crate::error::Result;
use crate::format::{MAX_HEAD_DIM, RecordLayout};
use crate::plan::{SequencePlan, Split, StepView};
use crate::quant;
use crate::quant::record::tile;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One call of attend, checked: what every job reads.
pub(super) struct Attention<'a> {
    pub cpu: &'a Cpu,
    pub layer: usize,
    pub step: StepView<'a>,
    pub q: TensorView<'a>,
    pub options: AttendOptions<'a>,
    pub output: &'a Output<'a>,
    /// Query heads that share a key/value head.
    pub group: usize,
    pub scale: f32,
}

/// Query rows of one (sequence, head): all of them in decode, a chunk in prefill. Row `r` is query head `r % group` of
/// the head's group at the sequence's new token `r / group`.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowRange {
    pub sequence: usize,
    pub head: usize,
    pub first: usize,
    pub count: usize,
}

/// What one thread keeps from job to job.
#[derive(Default)]
struct Worker {
    scratch: Scratch,
    q: Vec<f32>,
    q_rotated: Vec<f32>,
    visible: Vec<(usize, usize)>,
}

/// One (sequence, head) whose history is split.
struct Pair {
    rows: RowRange,
    /// Its splits among those of the step.
    splits: Range<usize>,
    /// Splits that are not attended to yet.
    left: AtomicUsize,
}

impl Cpu {
    pub(super) fn attend_step(
        &self,
        layer: usize,
        step: StepView<'_>,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: &Output<'_>,
    ) -> Result<()> {
        let group = q.shape()[1] / self.shape.num_kv_heads;
        let scale = options.scale.unwrap_or(1.0 / (self.shape.head_dim as f32).sqrt());
        let attention = Attention { cpu: self, layer, step, q, options, output, group, scale };
        attention.clear_unseen();
        attention.decode();
        attention.prefill(new)
    }
}

impl Attention<'_> {
    pub(super) fn sequence(&self, index: usize) -> SequencePlan<'_> {
        self.step.sequence(index)
    }

    /// The sequences that are attended for.
    pub(super) fn sequences(&self) -> impl Iterator<Item = usize> {
        let most = self.options.max_query_len.unwrap_or(usize::MAX);
        (0..self.step.num_sequences()).filter(move |&index| self.step.num_new(index) <= most)
    }

    /// Writes the rows that see nothing: those of padding, and those of sequences without a history if that is asked for.
    fn clear_unseen(&self) {
        let padding = self.step.positions().iter().enumerate().filter(|(_, position)| **position < 0);
        padding.for_each(|(row, _)| self.clear(row, None));
        for index in self.sequences() {
            let sequence = self.sequence(index);
            let (start, end) = self.visible(&sequence, sequence.context_len);
            if start >= end {
                sequence.token_rows.iter().for_each(|&row| self.clear(row as usize, self.options.sinks));
            }
        }
    }

    fn clear(&self, row: usize, sinks: Option<&[f32]>) {
        for head in 0..self.q.shape()[1] {
            let lse = sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head]);
            self.write(row, head, &[0f32; MAX_HEAD_DIM][..self.cpu.shape.head_dim], lse);
        }
    }

    fn write(&self, row: usize, head: usize, values: &[f32], lse: f32) {
        // SAFETY: each (row, head) belongs to padding or to one row of one job.
        unsafe {
            self.output.out.write_row(row, head, values);
            if let Some(out) = &self.output.lse {
                out.write_row(row, head, &[lse]);
            }
        }
    }

    /// The positions that a query sees and attends to.
    fn visible(&self, sequence: &SequencePlan<'_>, position: usize) -> (usize, usize) {
        let (start, end) = sequence.visible(position, self.options.window);
        match self.options.over {
            Over::All => (start, end),
            Over::History => (start, end.min(sequence.context_len)),
        }
    }

    /// (row of the step, query head) of row `r`.
    fn row_of(&self, rows: RowRange, r: usize) -> (usize, usize) {
        let (token, member) = ((rows.first + r) / self.group, (rows.first + r) % self.group);
        (self.sequence(rows.sequence).token_rows[token] as usize, rows.head * self.group + member)
    }

    /// Gathers the scaled queries of `rows`, also rotated where a record may be, and what each of them sees.
    pub(super) fn gather(
        &self,
        rows: RowRange,
        q: &mut [f32],
        q_rotated: &mut Vec<f32>,
        visible: &mut Vec<(usize, usize)>,
    ) {
        let sequence = self.sequence(rows.sequence);
        visible.clear();
        for (r, q) in q.chunks_exact_mut(self.cpu.shape.head_dim).enumerate() {
            let (row, head) = self.row_of(rows, r);
            self.q.read_row(row, head, q);
            q.iter_mut().for_each(|x| *x *= self.scale);
            let position = sequence.context_len + (rows.first + r) / self.group;
            visible.push(self.visible(&sequence, position));
        }
        q_rotated.clear();
        if self.cpu.rotates_v() {
            q_rotated.extend_from_slice(q);
            q_rotated.chunks_exact_mut(self.cpu.shape.head_dim).for_each(quant::hadamard::rotate);
        }
    }

    /// The record of a block, as the sequence's positions see it.
    pub(super) fn record(&self, sequence: &SequencePlan<'_>, block: usize, head: usize) -> RecordView<'_> {
        let (layout, record) = self.cpu.record(self.layer, sequence.places[block], head);
        let k_rotated = match layout {
            RecordLayout::Tile(layout) => tile::k_is_rotated(layout, ORDER, record),
            _ => false,
        };
        RecordView {
            first: block * self.cpu.shape.block_size,
            tokens: self.cpu.shape.block_size,
            record,
            layout,
            k_rotated,
        }
    }

    pub(super) fn attend_record(&self, view: &RecordView<'_>, rows: &mut Rows<'_>, scratch: &mut Scratch) {
        // SAFETY: the kernels' level is available (`dispatch::kernels` checked it).
        unsafe { (self.cpu.kernels.attend_record)(view, rows, self.options.softcap, scratch) };
    }

    /// Writes a row's output from its final state. A sink logit takes part in the softmax and has no value.
    pub(super) fn finish(&self, rows: RowRange, r: usize, max: f32, sum: f32, acc: &mut [f32]) {
        let (row, head) = self.row_of(rows, r);
        let mut total = sum;
        let mut rescale = 1.0;
        let mut top = max;
        if let Some(sinks) = self.options.sinks {
            top = max.max(sinks[head]);
            rescale = (max - top).exp();
            total = sum * rescale + (sinks[head] - top).exp();
        }
        if top == f32::NEG_INFINITY {
            return self.write(row, head, acc, top);
        }
        let factor = rescale / total;
        acc.iter_mut().for_each(|x| *x *= factor);
        if self.cpu.rotates_v() {
            quant::hadamard::rotate(acc);
        }
        self.write(row, head, acc, top + total.ln());
    }

    /// The splits of each sequence that decodes, without what the options' window hides.
    fn visible_splits(&self) -> Vec<Vec<Split>> {
        let mut of_sequence: Vec<Vec<Split>> = vec![Vec::new(); self.step.num_sequences()];
        let most = self.options.max_query_len.unwrap_or(usize::MAX);
        for split in self.step.splits().filter(|split| self.step.num_new(split.sequence) <= most) {
            let sequence = self.sequence(split.sequence);
            let (start, _) = self.visible(&sequence, sequence.context_len);
            let (_, end) = self.visible(&sequence, sequence.seq_len() - 1);
            let split = Split { start: start.max(split.start), end: end.min(split.end), ..split };
            if split.start < split.end {
                of_sequence[split.sequence].push(split);
            }
        }
        of_sequence
    }

    fn decode(&self) {
        let part_len = |rows: RowRange| rows.count * (self.cpu.shape.head_dim + 2);
        let mut pairs: Vec<Pair> = Vec::new();
        let mut splits: Vec<(usize, Split)> = Vec::new();
        let (mut len, mut num_tokens) = (0, 0);
        for (sequence, cuts) in self.visible_splits().into_iter().enumerate().filter(|(_, cuts)| !cuts.is_empty()) {
            let count = self.sequence(sequence).num_new() * self.group;
            for head in 0..self.cpu.shape.num_kv_heads {
                let (rows, first) = (RowRange { sequence, head, first: 0, count }, splits.len());
                splits.extend(cuts.iter().map(|&split| (pairs.len(), split)));
                pairs.push(Pair { rows, splits: first..splits.len(), left: AtomicUsize::new(cuts.len()) });
                len += cuts.len() * part_len(rows);
                num_tokens += cuts.iter().map(|split| split.end - split.start).sum::<usize>();
            }
        }
        let mut values = vec![0f32; len];
        let mut rest = values.as_mut_slice();
        let mut part = |&(pair, _): &(usize, Split)| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(part_len(pairs[pair].rows));
            rest = tail;
            Mutex::new(part)
        };
        let parts: Vec<Mutex<&mut [f32]>> = splits.iter().map(&mut part).collect();
        // Who attends to the last split of a pair merges them.
        let attend = |worker: &mut Worker, index: usize, &mut (pair, split): &mut (usize, Split)| {
            let pair = &pairs[pair];
            self.decode_split(pair.rows, split, &mut lock(&parts[index]), worker);
            if pair.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                let mut parts: Vec<_> = parts[pair.splits.clone()].iter().map(lock).collect();
                self.combine(pair.rows, &mut parts);
            }
        };
        if num_tokens * self.cpu.shape.head_dim >= PARALLEL_VALUES && splits.len() > 1 {
            self.cpu.threads.for_each(&mut splits, Worker::default, attend);
        } else {
            let mut worker = Worker::default();
            splits.iter_mut().enumerate().for_each(|(index, split)| attend(&mut worker, index, split));
        }
    }

    fn decode_split(&self, rows: RowRange, split: Split, part: &mut [f32], worker: &mut Worker) {
        let Worker { scratch, q, q_rotated, visible } = worker;
        let sequence = self.sequence(rows.sequence);
        q.resize(rows.count * self.cpu.shape.head_dim, 0.0);
        self.gather(rows, q, q_rotated, visible);
        for (start, end) in visible.iter_mut() {
            (*start, *end) = ((*start).max(split.start), (*end).min(split.end));
        }
        let (max, part) = part.split_at_mut(rows.count);
        let (sum, acc) = part.split_at_mut(rows.count);
        max.fill(f32::NEG_INFINITY);
        let mut state = Rows { head_dim: self.cpu.shape.head_dim, q, q_rotated, visible, max, sum, acc };
        let block_size = self.cpu.shape.block_size;
        for block in split.start / block_size..split.end.div_ceil(block_size) {
            self.attend_record(&self.record(&sequence, block, rows.head), &mut state, scratch);
        }
    }

    /// Merges the splits of one (sequence, head), in order.
    fn combine(&self, rows: RowRange, parts: &mut [MutexGuard<'_, &mut [f32]>]) {
        let (count, head_dim) = (rows.count, self.cpu.shape.head_dim);
        let Some((first, others)) = parts.split_first_mut() else { return };
        for r in 0..count {
            let acc_of_row = 2 * count + r * head_dim..2 * count + (r + 1) * head_dim;
            let top = others.iter().map(|part| part[r]).fold(first[r], f32::max);
            if top == f32::NEG_INFINITY {
                self.finish(rows, r, top, 0.0, &mut first[acc_of_row]);
                continue;
            }
            let rescale = (first[r] - top).exp();
            let mut sum = first[count + r] * rescale;
            let acc = &mut first[acc_of_row.clone()];
            acc.iter_mut().for_each(|x| *x *= rescale);
            for part in &*others {
                let weight = (part[r] - top).exp();
                sum += weight * part[count + r];
                for (x, y) in acc.iter_mut().zip(&part[acc_of_row.clone()]) {
                    *x += weight * y;
                }
            }
            self.finish(rows, r, top, sum, acc);
        }
    }
}

fn lock<'a, 'b>(part: &'b Mutex<&'a mut [f32]>) -> MutexGuard<'b, &'a mut [f32]> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}
