//! Lent memory: an engine with an allocator, block tables and strides of its own gets the bytes and the outputs of
//! [`PagedKvCache`].

mod common;

use common::Random;
use kvarn::backend::cpu::{Cpu, Level};
use kvarn::backend::memory::{LayerMemory, Records};
use kvarn::backend::{AttendOptions, Executor, Fresh, Output, TensorView, TensorViewMut};
use kvarn::calibration::{Calibration, HeadShape};
use kvarn::config::Shape;
use kvarn::engine::{Engine, Tables};
use kvarn::format::{Format, RecordLayout};
use kvarn::paging::{BlockId, SequenceId};
use kvarn::plan::Rows;
use kvarn::{CacheConfig, PagedKvCache};
use std::sync::Arc;

const LAYERS: usize = 2;
const HEADS: usize = 2;
const GROUP: usize = 3;
const HEAD_DIM: usize = 32;
const BLOCK: usize = 16;
const NUM_BLOCKS: usize = 96;
const NUM_PAGES: usize = 64;
/// Bytes between the records of two heads, and of two blocks, beyond the records themselves.
const PADDING: usize = 48;
/// What padding and unused records hold: a NaN in every float type.
const GARBAGE: u8 = 0xff;

/// One allocation for all layers: block by block, layer by layer, head by head.
struct Slab {
    bytes: Vec<u128>,
    layout: RecordLayout,
    num: usize,
}

impl Slab {
    fn new(layout: RecordLayout, num: usize) -> Self {
        let bytes = num * LAYERS * (HEADS * (layout.bytes() + PADDING) + PADDING);
        Self { bytes: vec![u128::MAX; bytes / 16 + 1], layout, num }
    }

    fn head_stride(&self) -> usize {
        self.layout.bytes() + PADDING
    }

    fn layer_stride(&self) -> usize {
        HEADS * self.head_stride() + PADDING
    }

    fn records(&mut self, layer: usize) -> Records {
        let base = self.bytes.as_mut_ptr().expose_provenance() + layer * self.layer_stride();
        let (stride, head_stride) = (LAYERS * self.layer_stride(), self.head_stride());
        Records { base: base as u64, num: self.num, stride, head_stride }
    }

    /// Is everything between the records as it was?
    fn padding_is_untouched(&self) -> bool {
        // SAFETY: a vector of u128 is so many initialized bytes.
        let bytes = unsafe { std::slice::from_raw_parts(self.bytes.as_ptr().cast::<u8>(), self.bytes.len() * 16) };
        (0..self.num * LAYERS).all(|record| {
            let start = record * self.layer_stride();
            let heads = (0..HEADS).all(|head| {
                let end = start + head * self.head_stride() + self.layout.bytes();
                bytes[end..end + PADDING].iter().all(|&byte| byte == GARBAGE)
            });
            let end = start + HEADS * self.head_stride();
            heads && bytes[end..end + PADDING].iter().all(|&byte| byte == GARBAGE)
        })
    }
}

/// A sequence of the engine, and its twin in the cache.
#[derive(Clone)]
struct Request {
    blocks: Vec<BlockId>,
    len: usize,
    twin: SequenceId,
    /// The first token of each row is known to this: equal prefixes are equal keys and values.
    seeds: Vec<u64>,
}

/// Blocks of the engine: reference counts, and a free list in no order.
struct Allocator {
    free: Vec<BlockId>,
    users: Vec<usize>,
}

impl Allocator {
    fn new(random: &mut Random) -> Self {
        let mut free: Vec<BlockId> = (0..NUM_BLOCKS as u32).map(BlockId).collect();
        (1..free.len()).rev().for_each(|i| free.swap(i, random.below(i + 1)));
        Self { free, users: vec![0; NUM_BLOCKS] }
    }

    fn allocate(&mut self) -> BlockId {
        let block = self.free.pop().expect("a free block");
        self.users[block.0 as usize] = 1;
        block
    }

    fn share(&mut self, block: BlockId) {
        self.users[block.0 as usize] += 1;
    }

    /// Is the block nobody's now?
    fn drop(&mut self, block: BlockId) -> bool {
        self.users[block.0 as usize] -= 1;
        let is_free = self.users[block.0 as usize] == 0;
        if is_free {
            self.free.insert(0, block);
        }
        is_free
    }
}

struct Pair {
    cache: PagedKvCache,
    engine: Engine,
    pages: Slab,
    tiles: Option<Slab>,
    allocator: Allocator,
    requests: Vec<Request>,
    window: Option<usize>,
}

fn rows(seeds: &[u64], layer: usize, what: u64, heads: usize) -> Vec<f32> {
    let mut values = vec![0.0; heads * seeds.len() * HEAD_DIM];
    for (t, seed) in seeds.iter().enumerate() {
        let row = Random(seed ^ (layer as u64) << 40 ^ what << 50).normals(heads * HEAD_DIM);
        for head in 0..heads {
            let at = (head * seeds.len() + t) * HEAD_DIM;
            values[at..at + HEAD_DIM].copy_from_slice(&row[head * HEAD_DIM..][..HEAD_DIM]);
        }
    }
    values
}

fn calibration() -> Arc<Calibration> {
    let shape = HeadShape { num_q_heads: HEADS * GROUP, num_kv_heads: HEADS, head_dim: HEAD_DIM };
    let (calibration, mut random) = (Calibration::new(), Random(77));
    for layer in 0..LAYERS {
        let (q, k) = (random.normals(300 * HEADS * GROUP * HEAD_DIM), random.normals(300 * HEADS * HEAD_DIM));
        calibration.observe(layer, shape, &q, &k).unwrap();
    }
    calibration.freeze().unwrap();
    Arc::new(calibration)
}

impl Pair {
    fn new(format: Format, window: Option<usize>, level: Level, calibrated: bool, random: &mut Random) -> Self {
        let config = CacheConfig { format, block_size: BLOCK, window, ..CacheConfig::new(LAYERS, HEADS, HEAD_DIM) };
        let shape: Shape = config.shape();
        let num_pages = if shape.tile().is_some() { NUM_PAGES } else { NUM_BLOCKS };
        let mut pages = Slab::new(shape.page(), num_pages);
        let mut tiles = shape.tile().map(|layout| Slab::new(layout, NUM_BLOCKS));
        let memory: Vec<LayerMemory> = (0..LAYERS)
            .map(|layer| LayerMemory {
                pages: pages.records(layer),
                tiles: tiles.as_mut().map(|tiles| tiles.records(layer)),
            })
            .collect();
        // SAFETY: the slabs hold the records and live as long as the engine; nothing else writes them.
        let backend = unsafe { Cpu::lent(shape, level, &memory) }.unwrap();
        let mut engine = Engine::new(Executor::new(backend), window).unwrap();
        let mut cache = PagedKvCache::with_level(config, level).unwrap();
        if calibrated {
            let calibration = calibration();
            engine.set_calibration(Arc::clone(&calibration), (0..LAYERS).collect()).unwrap();
            cache.set_calibration(calibration, (0..LAYERS).collect()).unwrap();
        }
        Self { cache, engine, pages, tiles, allocator: Allocator::new(random), requests: Vec::new(), window }
    }

    fn arrive(&mut self) {
        let twin = self.cache.new_sequence();
        self.requests.push(Request { blocks: Vec::new(), len: 0, twin, seeds: Vec::new() });
    }

    /// A request with the prefix of another: its whole blocks are shared, as a prefix cache would.
    fn arrive_with_prefix_of(&mut self, index: usize) {
        let source = &self.requests[index];
        let len = source.len / BLOCK * BLOCK;
        let twin = self.cache.fork(source.twin).unwrap();
        self.cache.truncate_unsealing(twin, len).unwrap();
        let (blocks, seeds) = (source.blocks[..len / BLOCK].to_vec(), source.seeds[..len].to_vec());
        blocks.iter().for_each(|&block| self.allocator.share(block));
        self.requests.push(Request { blocks, len, twin, seeds });
    }

    /// A request that goes on from where another is: whole blocks are shared, the last one is copied.
    fn fork(&mut self, index: usize) {
        let source = self.requests[index].clone();
        let mut blocks = source.blocks[..source.len.div_ceil(BLOCK)].to_vec();
        let whole = source.len / BLOCK;
        blocks[..whole].iter().for_each(|&block| self.allocator.share(block));
        if let Some(last) = blocks.get_mut(whole) {
            let copy = self.allocator.allocate();
            self.engine.copy_block(*last, copy).unwrap();
            *last = copy;
        }
        let twin = self.cache.fork(source.twin).unwrap();
        self.requests.push(Request { blocks, twin, ..source });
    }

    fn leave(&mut self, index: usize) {
        let request = self.requests.swap_remove(index);
        self.cache.free(request.twin).unwrap();
        let free: Vec<BlockId> = request.blocks.into_iter().filter(|&block| self.allocator.drop(block)).collect();
        // A block that comes back with a page that was not released has its page written anew.
        if !free.len().is_multiple_of(3) {
            self.engine.release(&free).unwrap();
        }
    }

    fn drop_drafts(&mut self, index: usize, kept: usize) {
        let request = &mut self.requests[index];
        self.cache.truncate(request.twin, kept).unwrap();
        request.len = kept;
        request.seeds.truncate(kept);
        for block in request.blocks.split_off(kept.div_ceil(BLOCK)) {
            if self.allocator.drop(block) {
                self.engine.release(&[block]).unwrap();
            }
        }
    }

    /// Takes the requests forward in both, and compares outputs and records.
    fn step(&mut self, random: &mut Random, counts: &[(usize, usize)], accept: bool) {
        let mut query_start_loc = vec![0];
        let mut seeds = Vec::new();
        for &(index, count) in counts {
            let request = &mut self.requests[index];
            let new: Vec<u64> = (0..count).map(|_| random.next_u64() >> 30).collect();
            request.seeds.extend(&new);
            seeds.extend(new);
            while request.blocks.len() < (request.len + count).div_ceil(BLOCK) {
                request.blocks.push(self.allocator.allocate());
            }
            query_start_loc.push(seeds.len() as i32);
        }
        let stride = counts.iter().map(|&(index, _)| self.requests[index].blocks.len()).max().unwrap_or(0) + 3;
        let mut block_tables = vec![-1; counts.len() * stride];
        for (row, &(index, _)) in block_tables.chunks_exact_mut(stride).zip(counts) {
            let blocks = &self.requests[index].blocks;
            row.iter_mut().zip(blocks).for_each(|(entry, block)| *entry = block.0 as i32);
        }
        let context_lens: Vec<i32> = counts.iter().map(|&(index, _)| self.requests[index].len as i32).collect();
        let tables = Tables {
            block_tables: &block_tables[..block_tables.len() - 2],
            width: stride - 2,
            stride,
            context_lens: &context_lens,
            query_start_loc: &query_start_loc,
            seals: true,
        };
        self.engine.begin(&tables).unwrap();
        let asked: Vec<_> =
            counts.iter().map(|&(index, count)| (self.requests[index].twin, Rows::All(count))).collect();
        let step = self.cache.begin_step(&asked, false).unwrap();
        for layer in 0..LAYERS {
            let (k, v) = (rows(&seeds, layer, 0, HEADS), rows(&seeds, layer, 1, HEADS));
            let q = rows(&seeds, layer, 2, HEADS * GROUP);
            let shape = |heads: usize| [1, heads, seeds.len(), HEAD_DIM];
            let new = Fresh {
                k: TensorView::from_slice("k", &k, shape(HEADS)).unwrap(),
                v: TensorView::from_slice("v", &v, shape(HEADS)).unwrap(),
            };
            let q_view = TensorView::from_slice("q", &q, shape(HEADS * GROUP)).unwrap();
            let mut outs = [vec![f32::NAN; q.len()], vec![f32::NAN; q.len()]];
            let mut lses = [vec![f32::NAN; q.len() / HEAD_DIM], vec![f32::NAN; q.len() / HEAD_DIM]];
            for (which, (out, lse)) in outs.iter_mut().zip(&mut lses).enumerate() {
                let output = Output {
                    out: TensorViewMut::from_slice("out", out, shape(HEADS * GROUP)).unwrap(),
                    lse: Some(TensorViewMut::from_slice("lse", lse, [1, HEADS * GROUP, seeds.len(), 1]).unwrap()),
                };
                if which == 0 {
                    self.cache.forward(&step, layer, q_view, new, AttendOptions::PLAIN, output).unwrap();
                } else {
                    self.engine.forward(layer, q_view, new, AttendOptions::PLAIN, output).unwrap();
                }
            }
            assert!(outs[0] == outs[1] && lses[0] == lses[1], "layer {layer} of {counts:?}");
            assert!(outs[0].iter().chain(&lses[0]).all(|x| x.is_finite()));
            for (row, &(index, count)) in counts.iter().enumerate() {
                let (twin, end) = (self.requests[index].twin, self.requests[index].len + count);
                let start = self.cache.sequence(twin).unwrap().first_held();
                let shape = [1, HEADS, end - start, HEAD_DIM];
                let mut tokens = [0; 4].map(|_| vec![f32::NAN; shape.iter().product()]);
                let [k, v, twin_k, twin_v] = tokens.each_mut().map(|all| TensorViewMut::from_slice("k", all, shape));
                self.engine.dequantize(layer, row, start, &k.unwrap(), &v.unwrap()).unwrap();
                self.cache.dequantize(layer, twin, start, twin_k.unwrap(), twin_v.unwrap()).unwrap();
                assert!(tokens[..2] == tokens[2..], "tokens {start}..{end} in layer {layer}"); // unequal where not written
            }
        }
        if accept {
            self.engine.commit(None).unwrap();
            self.cache.commit(&step).unwrap();
            counts.iter().for_each(|&(index, count)| self.requests[index].len += count);
        } else {
            self.engine.abort().unwrap();
            self.cache.abort(&step).unwrap();
            for &(index, _) in counts {
                let len = self.requests[index].len;
                self.requests[index].seeds.truncate(len);
            }
        }
        counts.iter().for_each(|&(index, _)| self.compare(index));
        assert!(self.pages.padding_is_untouched());
        assert!(self.tiles.as_ref().is_none_or(Slab::padding_is_untouched));
    }

    /// Are the records of a request the same bytes in both?
    fn compare(&self, index: usize) {
        let request = &self.requests[index];
        let first = self.cache.sequence(request.twin).unwrap().first_held() / BLOCK;
        for (block, &id) in request.blocks.iter().enumerate().take(request.len.div_ceil(BLOCK)).skip(first) {
            let used = (request.len - block * BLOCK).min(BLOCK);
            for layer in 0..LAYERS {
                let records = self.engine.records(layer, id, used, block == 0).unwrap();
                assert!(
                    records == self.cache.records(layer, request.twin, block).unwrap(),
                    "block {block} of {} tokens in layer {layer}, window {:?}",
                    request.len,
                    self.window
                );
            }
        }
    }
}

fn drive(format: Format, window: Option<usize>, level: Level, calibrated: bool, seed: u64) {
    let mut random = Random(seed);
    let mut pair = Pair::new(format, window, level, calibrated, &mut random);
    for _ in 0..60 {
        let num = pair.requests.len();
        match random.below(10) {
            0 | 1 if num < 5 => pair.arrive(),
            2 if (1..5).contains(&num) && window.is_none() => {
                let index = random.below(num);
                pair.arrive_with_prefix_of(index);
            }
            3 if (1..5).contains(&num) => {
                let index = random.below(num);
                pair.fork(index);
            }
            4 if num > 2 => pair.leave(random.below(num)),
            _ => {}
        }
        let mut counts = Vec::new();
        for index in 0..pair.requests.len() {
            let room = 12 * BLOCK - pair.requests[index].len.min(12 * BLOCK);
            let count = random.pick(&[0, 1, 1, 1, 3, 7, 40, 75]).min(room);
            if count > 0 || random.below(4) == 0 {
                counts.push((index, count));
            }
        }
        if counts.iter().all(|count| count.1 == 0) {
            continue;
        }
        (1..counts.len()).rev().for_each(|i| counts.swap(i, random.below(i + 1)));
        let accept = random.below(8) != 0;
        pair.step(&mut random, &counts, accept);
        let longest = counts.iter().max_by_key(|count| pair.requests[count.0].len).copied();
        if let Some((index, count @ 2..=16)) = longest
            && window.is_none()
        {
            let len = pair.requests[index].len;
            if len > count {
                pair.drop_drafts(index, len - 1);
            }
        }
    }
    while !pair.requests.is_empty() {
        pair.leave(0);
    }
    let all: Vec<BlockId> = (0..NUM_BLOCKS as u32).map(BlockId).collect();
    pair.engine.release(&all).unwrap();
    let stats = pair.engine.stats().unwrap();
    assert_eq!(stats.open_pages, 0);
    assert_eq!(stats.sealed > 20, format.tile_bits().is_some(), "{} sealed", stats.sealed);
    assert_eq!(pair.allocator.free.len(), NUM_BLOCKS);
}

#[test]
fn an_engine_over_lent_memory_stores_and_gives_what_a_cache_does() {
    for format in [Format::Raw, Format::Int8, Format::Int4, Format::Int2] {
        for (seed, level) in Level::ALL.into_iter().filter(|level| level.is_available()).enumerate() {
            for window in [None, Some(40)] {
                for calibrated in [false, true] {
                    drive(format, window, level, calibrated, 100 + seed as u64);
                }
            }
        }
    }
}
