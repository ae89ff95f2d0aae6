//! Record bytes: after each verb of random steps, the records of every backend are, in canonical order, those of an oracle
//! that carries the plan out with `kvarn::quant` alone, and decoded tokens are the oracle's to the bit.

#[path = "record_bytes/backends.rs"]
mod backends;
mod common;
#[path = "record_bytes/oracle.rs"]
mod oracle;
#[path = "record_bytes/tables.rs"]
mod tables;
#[path = "record_bytes/values.rs"]
mod values;

use backends::Compared;
use common::Random;
use kvarn::backend::{Model, Source, Stream};
use kvarn::config::Shape;
use kvarn::format::{Dtype, Format, first_page_tokens};
use kvarn::paging::{PageId, Place, Places};
use kvarn::plan::{Bounds, DECODE_TOKENS, Rows, Sealing, SequenceInput, StepPlan, StepView};
use oracle::Oracle;
use std::collections::BTreeMap;
use tables::{Sequence, Tables};
use values::{Tensors, Values, models};

const LAYERS: usize = 2;
const HEADS: usize = 2;
const MAX_SEQUENCES: usize = 4;
/// Tokens of the longest sequences: more than statistics are taken over.
const MAX_LEN: usize = 640;
/// Of blocks of 128 tokens, and of smaller ones, whose records take less time.
const NUM_STEPS: [usize; 2] = [6, 9];
/// Each kind of work must occur at least this often in the cases of a format.
const AT_LEAST: usize = 5;

#[derive(Debug, Clone, Copy)]
enum Verb {
    Seal,
    Open,
    Write,
    Refit,
}

/// The steps of one shape on all backends.
struct Run {
    name: String,
    shape: Shape,
    models: Vec<Model>,
    oracle: Oracle,
    backends: Vec<Compared>,
    tables: Tables,
    random: Random,
    /// How often each kind of work occurred.
    tally: BTreeMap<&'static str, usize>,
}

impl Run {
    fn new(shape: Shape, models: Vec<Model>, seed: u64) -> Self {
        let mut random = Random(seed);
        let window = random.pick(&[None, None, Some(1), Some(shape.block_size + 5)]);
        let calibrated = if models[0].is_some() { "calibrated" } else { "not calibrated" };
        let name = format!("{shape:?}, window {window:?}, {calibrated}, seed {seed}");
        let seals = shape.tile().is_some();
        let num_blocks = (MAX_SEQUENCES + 1) * MAX_LEN.div_ceil(shape.block_size);
        let room = if seals {
            Bounds { num_pages: num_blocks.min(8 * MAX_SEQUENCES), num_tiles: num_blocks }
        } else {
            Bounds { num_pages: num_blocks, num_tiles: 0 }
        };
        Self {
            name,
            shape,
            models,
            oracle: Oracle::new(shape),
            backends: backends::all(shape, room),
            tables: Tables::new(shape.block_size, seals, window, room, &mut random),
            random,
            tally: BTreeMap::new(),
        }
    }

    fn count(&mut self, what: &'static str, times: usize) {
        *self.tally.entry(what).or_default() += times;
    }

    /// Sequences come, go, and go on from where another is.
    fn change_sequences(&mut self) {
        let num = self.tables.sequences.len();
        match self.random.below(6) {
            0 if num == MAX_SEQUENCES => self.tables.leave(self.random.below(num)),
            1 if (1..MAX_SEQUENCES).contains(&num) => {
                let copy = self.tables.fork(self.random.below(num));
                self.copy_page(copy);
            }
            _ if num < MAX_SEQUENCES => {
                let (blocks, places) = (Vec::new(), Vec::new());
                let is_slow = self.random.below(3) == 0;
                self.tables.sequences.push(Sequence { blocks, places, len: 0, released: 0, is_slow });
            }
            _ => {}
        }
    }

    fn copy_page(&mut self, copy: Option<(PageId, PageId)>) {
        let copies: Vec<_> = copy.into_iter().collect();
        self.count("page copied", copies.len());
        let written = self.oracle.copy_pages(&copies);
        for one in &mut self.backends {
            one.backend.copy_pages(&copies, Stream::default()).unwrap();
            one.compare(&self.oracle, &written, &format!("after copy_pages of {}", self.name));
        }
    }

    /// New tokens of a sequence: decode, drafts, up to a block's end, past the first page's middle, a prefill.
    fn num_new(&mut self, index: usize) -> usize {
        let Sequence { len, is_slow, .. } = self.tables.sequences[index];
        let (block_size, half) = (self.shape.block_size, first_page_tokens(self.shape.block_size));
        let num_new = match self.random.below(10) {
            0 => 0,
            _ if is_slow && len < half => 1 + self.random.below(2),
            1..=3 => 1,
            4 | 5 => 2 + self.random.below(DECODE_TOKENS - 1),
            _ if len > 0 && len.is_multiple_of(block_size) => self.random.pick(&[1, 5]),
            6 => block_size - len % block_size + self.random.pick(&[0, 0, 1]),
            7 if (1..half).contains(&len) => half - len + self.random.below(half + 4),
            7 | 8 => block_size * 2 + self.random.below(block_size),
            _ => block_size * 3 + self.random.below(4),
        };
        num_new.min(MAX_LEN - len)
    }

    /// Rows of which `num_new` are tokens.
    fn mask(&mut self, num_new: usize) -> Vec<bool> {
        let mut mask = vec![true; num_new];
        for _ in 0..self.random.pick(&[0, 0, 1, 3]) {
            mask.insert(self.random.below(mask.len() + 1), false);
        }
        mask
    }

    fn step(&mut self, number: usize) {
        self.change_sequences();
        let mut of_step: Vec<usize> = (0..self.tables.sequences.len()).collect();
        (1..of_step.len()).rev().for_each(|i| of_step.swap(i, self.random.below(i + 1)));
        let counts: Vec<usize> = of_step.iter().map(|&index| self.num_new(index)).collect();
        let masks: Vec<Vec<bool>> = counts.iter().map(|&count| self.mask(count)).collect();
        of_step.iter().zip(&counts).for_each(|(&index, &count)| self.tables.reserve(index, count));
        let plan = self.plan(&of_step, &masks);
        self.count_work(&plan);
        let free = self.tables.seal(&plan, &of_step);
        // A table of the step's rows, the last sequence first.
        let stride = of_step.iter().map(|&index| self.tables.sequences[index].places.len()).max().unwrap_or(0);
        let mut table = vec![Place::page(PageId(0)); stride * of_step.len()];
        for (at, &index) in of_step.iter().rev().enumerate() {
            let places = &self.tables.sequences[index].places;
            table[at * stride..][..places.len()].copy_from_slice(places);
        }
        let values: Vec<Values> = (0..LAYERS).map(|_| Values::of_step(&self.shape, &plan, &mut self.random)).collect();
        let view = plan.over(Places::new(&table, stride));
        self.backends.iter_mut().for_each(|one| one.load(view));
        self.carry_out(Verb::Seal, None, view, &values, number);
        self.carry_out(Verb::Open, None, view, &values, number);
        for layer in 0..LAYERS {
            self.carry_out(Verb::Open, Some(layer), view, &values, number);
            self.carry_out(Verb::Write, Some(layer), view, &values, number);
            self.carry_out(Verb::Seal, Some(layer), view, &values, number);
        }
        self.backends.iter_mut().for_each(Compared::unload);
        self.tables.free_pages(free);
        let kept: Vec<bool> = of_step.iter().zip(&counts).map(|(&index, &count)| self.accept(index, count)).collect();
        let plan = plan.with_refits(&|refit| kept[refit.sequence]);
        let view = plan.over(Places::new(&table, stride));
        self.backends.iter_mut().for_each(|one| one.load(view));
        self.carry_out(Verb::Refit, None, view, &values, number);
        self.backends.iter_mut().for_each(Compared::unload);
        self.compare_values(&of_step, number);
    }

    fn plan(&self, of_step: &[usize], masks: &[Vec<bool>]) -> StepPlan {
        let input = |at: usize| {
            let (index, mask) = (of_step[at], &masks[at]);
            let Sequence { blocks, places, len, .. } = &self.tables.sequences[index];
            let (row, first_held) = (of_step.len() - 1 - at, self.tables.first_held(index));
            let is_all = mask.iter().all(|&is_token| is_token);
            SequenceInput {
                row,
                blocks,
                places,
                num_tiles: 0,
                context_len: *len,
                first_held,
                rows: if is_all { Rows::All(mask.len()) } else { Rows::Masked(mask) },
            }
        };
        let inputs: Vec<SequenceInput<'_>> = (0..of_step.len()).map(input).collect();
        let is_partial = |_| false; // a fork copies them
        let sealing = if self.tables.seals { Sealing::FullBlocks { is_partial: &is_partial } } else { Sealing::Never };
        StepPlan::new(self.shape.block_size, self.tables.window, &inputs, sealing).unwrap()
    }

    /// One verb on the oracle and all backends, and their records after it. Of one layer from the step's tokens, or of all
    /// layers from what is stored.
    fn carry_out(&mut self, verb: Verb, layer: Option<usize>, step: StepView<'_>, values: &[Values], number: usize) {
        let layers = layer.map_or(0..LAYERS, |layer| layer..layer + 1);
        let new = layer.map(|layer| &values[layer]);
        let models = &self.models[layers.clone()];
        let written = match (verb, new) {
            (Verb::Seal, _) => self.oracle.seal(step, layers.clone(), new, models),
            (Verb::Open, _) => self.oracle.open(step, layers.clone(), new, models),
            (Verb::Write, Some(new)) => self.oracle.write(step, layers.start, new),
            (Verb::Refit, None) => self.oracle.refit(step, layers.clone(), models),
            _ => unreachable!("writes are of a layer, refits of all"),
        };
        let after = format!("after {verb:?} in {layers:?} of step {number} of {}", self.name);
        for one in &mut self.backends {
            let tensors = new.map(|new| Tensors::new(one.backend.device(), self.shape.dtype, &self.shape, new));
            let fresh = tensors.as_ref().map(Tensors::fresh);
            let source = fresh.map_or(Source::Stored, Source::New);
            let launch = one.launch(step);
            let done = match (verb, fresh) {
                (Verb::Seal, _) => one.backend.seal(launch, layers.clone(), source, models),
                (Verb::Open, _) => one.backend.open(launch, layers.clone(), source, models),
                (Verb::Write, Some(fresh)) => one.backend.write(launch, layers.start, fresh),
                (Verb::Refit, _) => one.backend.refit(launch, layers.clone(), models),
                (Verb::Write, None) => unreachable!("writes are of a layer"),
            };
            done.unwrap();
            one.compare(&self.oracle, &written, &after);
        }
    }

    /// Keeps the tokens of a sequence, or some of its drafts. All of them?
    fn accept(&mut self, index: usize, num_new: usize) -> bool {
        let is_draft = (2..=DECODE_TOKENS).contains(&num_new);
        let rejects = is_draft && self.random.below(4) == 0;
        let accepted = if rejects { self.random.below(num_new) } else { num_new };
        self.count("drafts rejected", usize::from(rejects));
        self.tables.truncate(index, self.tables.sequences[index].len + accepted);
        self.tables.release(index);
        !rejects
    }

    fn compare_values(&mut self, of_step: &[usize], number: usize) {
        let after = format!("after step {number} of {}", self.name);
        for &index in of_step {
            let Sequence { places, len, .. } = &self.tables.sequences[index];
            let first = self.tables.first_held(index);
            let tokens = first + self.random.below(len - first + 1)..*len;
            for layer in 0..LAYERS {
                let expected = self.oracle.values(layer, places, &tokens);
                self.backends.iter().for_each(|one| one.compare_values(layer, places, &tokens, &expected, &after));
            }
        }
    }

    fn count_work(&mut self, plan: &StepPlan) {
        let (block_size, seals) = (self.shape.block_size, self.tables.seals);
        for index in 0..plan.num_sequences() {
            let what = match plan.num_new(index) {
                0 => "no token",
                1 => "decode",
                2..=DECODE_TOKENS => "drafts",
                _ => "prefill",
            };
            self.count(what, 1);
        }
        self.count("padding", plan.num_rows() - plan.num_tokens());
        self.count("first page refitted", plan.refits().len());
        for open in plan.opens() {
            let context_len = plan.context_len(open.sequence);
            let what = match open.block {
                0 if open.is_again(context_len) => "first page opened again",
                0 => "first page opened",
                _ if open.is_of_stored(context_len) => "page opened with statistics of stored tokens",
                block if open.start == block * block_size => "page opened with its own rows",
                _ if open.start < context_len => "page opened with statistics of stored and new tokens",
                _ => "page opened with statistics of new tokens before it",
            };
            self.count(what, 1);
        }
        for seal in plan.seals() {
            let what = match (seal.page, seal.first_row) {
                (Some(_), None) => "page sealed",
                (Some(_), Some(_)) => "first page sealed",
                (None, None) => "rows sealed",
                (None, Some(_)) => "first rows sealed",
            };
            self.count(what, 1);
        }
        assert!(seals || plan.seals().len() == 0);
    }
}

fn drive(format: Format, kinds: usize) {
    let mut total = BTreeMap::<&'static str, usize>::new();
    let mut seed = 100 * format as u64;
    for head_dim in [16, 64, 96, 128] {
        let calibrated = models(LAYERS, HEADS, head_dim);
        for block_size in [16, 32, 128] {
            for models in [vec![None; LAYERS], calibrated.clone()] {
                seed += 1;
                let dtype = Dtype::ALL[seed as usize % 3];
                let shape = Shape { format, dtype, num_layers: LAYERS, num_kv_heads: HEADS, head_dim, block_size };
                let mut run = Run::new(shape, models, seed);
                (0..NUM_STEPS[usize::from(block_size < 128)]).for_each(|number| run.step(number));
                run.backends.iter().for_each(|one| one.assert_nothing_else_changed(&run.name));
                run.tally.iter().for_each(|(what, times)| *total.entry(what).or_default() += times);
            }
        }
    }
    assert!(total.len() == kinds && total.values().all(|&times| times >= AT_LEAST), "some work is rare: {total:#?}");
}

/// Kinds of work of every format, and of those that seal.
const KINDS: usize = 14;
const KINDS_OF_SEALING: usize = KINDS + 4;

#[test]
fn raw_records_are_the_oracle_s_after_each_verb() {
    drive(Format::Raw, KINDS);
}

#[test]
fn int8_records_are_the_oracle_s_after_each_verb() {
    drive(Format::Int8, KINDS);
}

#[test]
fn int4_records_are_the_oracle_s_after_each_verb() {
    drive(Format::Int4, KINDS_OF_SEALING);
}

#[test]
fn int3_records_are_the_oracle_s_after_each_verb() {
    drive(Format::Int3, KINDS_OF_SEALING);
}

#[test]
fn int2_records_are_the_oracle_s_after_each_verb() {
    drive(Format::Int2, KINDS_OF_SEALING);
}
