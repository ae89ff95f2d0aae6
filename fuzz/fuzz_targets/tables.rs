//! Any block tables, lengths and blocks given to an engine in any order: each call works or is refused with a typed
//! error, and once all blocks are released there are no open pages.
//!
//! The memory is lent, so that the address sanitizer sees its ends. Arrays are whole vectors of any `i32`s, and as often
//! ones that fit each other, which reach the plan.

#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use kvarn::Error;
use kvarn::backend::cpu::{Cpu, Level};
use kvarn::backend::memory::{LayerMemory, Records};
use kvarn::backend::{AttendOptions, Executor, Fresh, TensorView, TensorViewMut};
use kvarn::config::Shape;
use kvarn::engine::{Engine, Tables};
use kvarn::format::{Dtype, Format, RecordLayout};
use kvarn::paging::BlockId;
use libfuzzer_sys::fuzz_target;

const LAYERS: usize = 2;
const HEAD_DIM: usize = 16;
const BLOCK_SIZE: usize = 16;
const BLOCKS: usize = 6;
/// Fewer than blocks: they run out.
const PAGES: usize = 4;
/// Tokens before a step, of arrays that fit: a table of all blocks is full.
const MAX_CONTEXT: usize = BLOCKS * BLOCK_SIZE;

/// The arrays of [`Tables`].
#[derive(Debug, Arbitrary)]
struct Arrays {
    block_tables: Vec<i32>,
    width: usize,
    stride: usize,
    context_lens: Vec<i32>,
    query_start_loc: Vec<i32>,
}

#[derive(Debug, Arbitrary)]
enum Call {
    BeginAny(Arrays),
    Begin(Vec<Request>),
    /// Sequences of which each begins with so many full blocks of the first.
    BeginShared { num_shared: u8, requests: Vec<Request> },
    Append { layer: u8 },
    Attend { layer: u8 },
    /// What is missing of a step, and its end.
    Complete { accepted: Option<Vec<u8>> },
    Commit { accepted: Option<Vec<u8>> },
    Abort,
    Release { blocks: Vec<u8> },
    Copy { source: u8, destination: u8 },
    Records { layer: u8, block: u8, used: u8, is_first: bool },
}

/// A sequence of arrays that fit.
#[derive(Debug, Arbitrary)]
struct Request {
    blocks: [u8; BLOCKS],
    context_len: u8,
    num_new: u8,
}

fuzz_target!(|data: &[u8]| {
    let _ = drive(&mut Unstructured::new(data));
});

fn drive(input: &mut Unstructured) -> Result<()> {
    let format = if input.arbitrary()? { Format::Int4 } else { Format::Int8 };
    let window: Option<usize> = if input.arbitrary()? { Some(input.int_in_range(1..=40)?) } else { None };
    let shape = Shape {
        format,
        dtype: Dtype::F32,
        num_layers: LAYERS,
        num_kv_heads: 1,
        head_dim: HEAD_DIM,
        block_size: BLOCK_SIZE,
    };
    let mut pages: Vec<Slab> = (0..LAYERS).map(|_| Slab::new(shape.page(), pages_of(&shape))).collect();
    let mut tiles: Vec<Option<Slab>> =
        (0..LAYERS).map(|_| shape.tile().map(|layout| Slab::new(layout, BLOCKS))).collect();
    let memory: Vec<LayerMemory> = pages
        .iter_mut()
        .zip(&mut tiles)
        .map(|(pages, tiles)| LayerMemory { pages: pages.records(), tiles: tiles.as_mut().map(Slab::records) })
        .collect();
    // SAFETY: the slabs hold the records and outlive the engine; nothing else reads or writes them.
    let backend = unsafe { Cpu::lent(shape, Level::Scalar, &memory) }.expect("memory of the shape");
    let mut engine = Engine::new(Executor::new(backend), window).expect("a window of tokens");
    while !input.is_empty()
        && let Ok(call) = input.arbitrary()
    {
        make(&mut engine, window, call);
    }
    if engine.plan().is_some() {
        engine.abort().expect("an open step");
    }
    let all: Vec<BlockId> = (0..BLOCKS as u32).map(BlockId).collect();
    engine.release(&all).expect("blocks of the engine");
    assert_eq!(engine.stats().expect("figures").open_pages, 0);
    Ok(())
}

fn pages_of(shape: &Shape) -> usize {
    if shape.tile().is_some() { PAGES } else { BLOCKS }
}

/// Records of one kind in one layer.
struct Slab {
    /// Aligned as records are.
    words: Vec<u128>,
    layout: RecordLayout,
    num: usize,
}

impl Slab {
    fn new(layout: RecordLayout, num: usize) -> Self {
        Self { words: vec![0; (num * layout.bytes()).div_ceil(size_of::<u128>())], layout, num }
    }

    fn records(&mut self) -> Records {
        Records::packed(self.words.as_mut_ptr().expose_provenance() as u64, self.num, 1, self.layout)
    }
}

fn make(engine: &mut Engine, window: Option<usize>, call: Call) {
    let open_before = engine.stats().expect("figures").open_pages;
    let had_step = engine.plan().is_some();
    let made = match call {
        Call::BeginAny(arrays) => begin(engine, &arrays),
        Call::Begin(requests) => begin(engine, &arrays_of(&requests)),
        Call::BeginShared { num_shared, requests } => {
            begin(engine, &share(arrays_of(&requests), usize::from(num_shared) % BLOCKS, window))
        }
        Call::Append { layer } => append(engine, usize::from(layer)),
        Call::Attend { layer } => attend(engine, usize::from(layer)),
        Call::Complete { accepted } => {
            for layer in 0..LAYERS {
                let _ = typed(append(engine, layer));
                let _ = typed(attend(engine, layer));
            }
            commit(engine, accepted)
        }
        Call::Commit { accepted } => commit(engine, accepted),
        Call::Abort => engine.abort(),
        Call::Release { blocks } => {
            let blocks: Vec<BlockId> = blocks.into_iter().map(|block| BlockId(block.into())).collect();
            engine.release(&blocks)
        }
        Call::Copy { source, destination } => engine.copy_block(BlockId(source.into()), BlockId(destination.into())),
        Call::Records { layer, block, used, is_first } => {
            engine.records(layer.into(), BlockId(block.into()), used.into(), is_first).map(|_| ())
        }
    };
    if typed(made).is_none() {
        assert_eq!(engine.plan().is_some(), had_step, "a refused call leaves the step as it is");
        assert_eq!(engine.stats().expect("figures").open_pages, open_before, "and the pages");
    }
}

/// What a call made, unless it was refused as documented.
fn typed<T>(made: kvarn::Result<T>) -> Option<T> {
    made.map_err(|error| match error {
        Error::Config(_)
        | Error::Shape { .. }
        | Error::Unsupported(_)
        | Error::UnknownBlock { .. }
        | Error::OutOfOpenPages { .. }
        | Error::StaleStep(_)
        | Error::IncompleteStep { .. } => {}
        error => panic!("{error:?}"),
    })
    .ok()
}

/// Arrays that fit each other; blocks are at times unknown, and more tokens come than a table has room for.
fn arrays_of(requests: &[Request]) -> Arrays {
    let block = |&block: &u8| i32::from(block) % (BLOCKS as i32 + 1);
    let mut query_start_loc = vec![0];
    for request in requests {
        let num_new = i32::from(request.num_new) % (3 * BLOCK_SIZE as i32);
        query_start_loc.push(query_start_loc[query_start_loc.len() - 1] + num_new);
    }
    Arrays {
        block_tables: requests.iter().flat_map(|request| request.blocks.iter().map(block)).collect(),
        width: BLOCKS,
        stride: BLOCKS,
        context_lens: requests.iter().map(|request| i32::from(request.context_len) % MAX_CONTEXT as i32).collect(),
        query_start_loc,
    }
}

/// The same with a prefix of full blocks that all have in common. Blocks that the window hides are not named.
fn share(mut arrays: Arrays, num_shared: usize, window: Option<usize>) -> Arrays {
    let prefix: Vec<i32> = arrays.block_tables.iter().take(num_shared).copied().collect();
    for (table, context_len) in arrays.block_tables.chunks_exact_mut(BLOCKS).zip(&mut arrays.context_lens) {
        table[..num_shared].copy_from_slice(&prefix);
        *context_len = (*context_len).max((num_shared * BLOCK_SIZE) as i32);
        let num_hidden = window.map_or(0, |window| (*context_len as usize + 1).saturating_sub(window) / BLOCK_SIZE);
        table[..num_hidden].fill(-1);
    }
    arrays
}

fn begin(engine: &mut Engine, arrays: &Arrays) -> kvarn::Result<()> {
    engine.begin(&Tables {
        block_tables: &arrays.block_tables,
        width: arrays.width,
        stride: arrays.stride,
        context_lens: &arrays.context_lens,
        query_start_loc: &arrays.query_start_loc,
        seals: true,
    })
}

fn commit(engine: &mut Engine, accepted: Option<Vec<u8>>) -> kvarn::Result<()> {
    let accepted: Option<Vec<usize>> = accepted.map(|counts| counts.into_iter().map(usize::from).collect());
    engine.commit(accepted.as_deref())
}

/// Rows of the open step; one where there is none.
fn num_rows(engine: &Engine) -> usize {
    engine.plan().map_or(1, kvarn::plan::StepPlan::num_rows)
}

fn append(engine: &mut Engine, layer: usize) -> kvarn::Result<()> {
    let rows = num_rows(engine);
    let (zeros, shape) = (vec![0.0; rows * HEAD_DIM], [1, 1, rows, HEAD_DIM]);
    let [k, v] = ["k", "v"].map(|name| TensorView::from_slice(name, &zeros, shape));
    engine.append(layer, Fresh { k: k?, v: v? }, None)
}

/// Attends to what is stored, be it garbage: blocks may be of other sequences.
fn attend(engine: &Engine, layer: usize) -> kvarn::Result<()> {
    let rows = num_rows(engine);
    let (q, mut out) = (vec![0.5; rows * HEAD_DIM], vec![f32::NAN; rows * HEAD_DIM]);
    let shape = [1, 1, rows, HEAD_DIM];
    let q = TensorView::from_slice("q", &q, shape)?;
    engine.attend(layer, q, None, AttendOptions::PLAIN, TensorViewMut::from_slice("out", &mut out, shape)?)?;
    assert!(out.iter().all(|x| x.is_finite()), "{out:?}");
    Ok(())
}
