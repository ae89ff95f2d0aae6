//! What an executor refuses, whatever the device: plans, layers, places, tensors, options and calibrations that do not
//! fit. A refused call changes nothing.

mod common;

use kvarn::backend::cpu::{Cpu, Level};
use kvarn::backend::memory::{LayerMemory, Records};
use kvarn::backend::{
    AttendOptions, Backend, Device, DevicePlan, Executor, Fresh, Launch, Output, Plan, Stream, TensorView,
    TensorViewMut,
};
use kvarn::config::Shape;
use kvarn::format::{Dtype, Format};
use kvarn::paging::{BlockId, PageId, Place, Places};
use kvarn::plan::{Bounds, Rows, Sealing, SequenceInput, StepPlan};
use kvarn::quant::{HeadCalibration, HeadFeedback, LayerCalibration, ModelChannels};
use kvarn::{CacheConfig, Error};
use std::sync::Arc;

const HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const SHAPE: Shape = Shape {
    format: Format::Int8,
    dtype: Dtype::F32,
    num_layers: 1,
    num_kv_heads: HEADS,
    head_dim: HEAD_DIM,
    block_size: 16,
};

fn executor(shape: Shape) -> Executor {
    let mut executor = Executor::new(Cpu::new(shape, Level::best()).unwrap());
    executor.grow(1, 1).unwrap();
    executor
}

/// The plan of the first token of a sequence.
fn one_token(block_size: usize, blocks: &[BlockId], places: &[Place]) -> StepPlan {
    let rows = Rows::All(1);
    let input = SequenceInput { row: 0, blocks, places, num_tiles: 0, context_len: 0, first_held: 0, rows };
    StepPlan::new(block_size, None, &[input], Sealing::Never).unwrap()
}

/// Appends one token of zeros by a plan for one block.
fn append(executor: &mut Executor, block_size: usize, page: u32, layer: usize) -> Result<(), Error> {
    let places = [Place::page(PageId(page))];
    let plan = one_token(block_size, &[BlockId(page)], &places);
    let launch = Launch::host(plan.over(Places::new(&places, 1)));
    let values = vec![0.0; HEADS * HEAD_DIM];
    let view = TensorView::from_slice("k", &values, [1, HEADS, 1, HEAD_DIM]).unwrap();
    executor.begin(launch, layer..layer + 1, &[None])?;
    executor.append(launch, layer, Fresh { k: view, v: view }, &None)
}

#[test]
fn a_foreign_block_table_beyond_the_memory_is_refused() {
    let error = append(&mut executor(SHAPE), 16, 1_000_000, 0).unwrap_err();
    assert!(matches!(error, Error::UnknownBlock { id: 1_000_000, .. }), "{error:?}");
    let mut executor = executor(SHAPE);
    let beyond = executor.read_records(0, Place::page(PageId(1 << 20))).unwrap_err();
    assert!(matches!(beyond, Error::UnknownBlock { .. }), "{beyond:?}");
    let beyond = executor.copy_pages(&[(PageId(0), PageId(1 << 20))], Stream::default()).unwrap_err();
    assert!(matches!(beyond, Error::UnknownBlock { .. }), "{beyond:?}");
}

#[test]
fn a_backend_is_built_for_records_that_exist_and_used_with_plans_of_its_blocks() {
    let refused = |shape| Cpu::new(shape, Level::best()).unwrap_err();
    assert!(matches!(refused(Shape { head_dim: 24, ..SHAPE }), Error::Unsupported(_)));
    assert!(matches!(refused(Shape { block_size: 20, ..SHAPE }), Error::InvalidSetting { name: "block_size", .. }));
    assert!(matches!(refused(Shape { num_kv_heads: 0, ..SHAPE }), Error::InvalidSetting { name: "num_kv_heads", .. }));
    let mut executor = executor(SHAPE);
    for (block_size, layer) in [(32, 0), (16, 1)] {
        assert!(matches!(append(&mut executor, block_size, 0, layer), Err(Error::Config(_))));
    }
    assert!(append(&mut executor, 16, 0, 0).is_ok());
    assert!(matches!(executor.write_records(0, Place::page(PageId(0)), &[0; 7]), Err(Error::Config(_))));
    assert!(matches!(executor.read_records(1, Place::page(PageId(0))), Err(Error::Config(_))));
    assert!(matches!(TensorView::from_slice("k", &[], [1 << 33, 1 << 31, 1, 1]), Err(Error::Shape { .. })));
}

#[test]
fn tensors_and_plans_of_another_device_are_refused() {
    let places = [Place::page(PageId(0))];
    let plan = one_token(16, &[BlockId(0)], &places);
    let launch = Launch::host(plan.over(Places::new(&places, 1)));
    let values = vec![0.0; HEADS * HEAD_DIM];
    let shape = [1, HEADS, 1, HEAD_DIM];
    let view = TensorView::from_slice("k", &values, shape).unwrap();
    let strides = [32, 16, 16, 1];
    // SAFETY: the memory is there; that it is of another device is what is refused before it is read.
    let elsewhere =
        unsafe { TensorView::from_raw("v", Device::Cuda(1), values.as_ptr().cast(), Dtype::F32, shape, strides) }
            .unwrap();
    let mut executor = executor(SHAPE);
    executor.begin(launch, 0..1, &[None]).unwrap();
    let error = executor.append(launch, 0, Fresh { k: view, v: elsewhere }, &None).unwrap_err();
    assert_eq!(error.to_string(), "v: expected a tensor on cpu, got one on cuda:1");
    let mut out = values.clone();
    let output = Output::from(TensorViewMut::from_slice("out", &mut out, shape).unwrap());
    let error = executor.attend(launch, 0, elsewhere, None, AttendOptions::PLAIN, &output).unwrap_err();
    assert!(matches!(error, Error::Device { name: "q", .. }), "{error:?}");
    let on_device = DevicePlan {
        device: Device::Cuda(0),
        words: 0,
        layout: *plan.layout(),
        places: 0,
        places_stride: 1,
        block_size: 16,
        window: None,
        bounds: Bounds::default(),
    };
    let launch = Launch { plan: Plan::Device(on_device), stream: Stream(0) };
    let error = executor.append(launch, 0, Fresh { k: view, v: view }, &None).unwrap_err();
    assert_eq!(error.to_string(), "plan: expected a tensor on cpu, got one on cuda:0");
}

#[test]
fn the_log_sum_exp_is_f32_of_one_value_a_row_and_head() {
    let places = [Place::page(PageId(0))];
    let plan = one_token(16, &[BlockId(0)], &places);
    let launch = Launch::host(plan.over(Places::new(&places, 1)));
    let values = vec![0.0; HEADS * HEAD_DIM];
    let shape = [1, HEADS, 1, HEAD_DIM];
    let view = TensorView::from_slice("q", &values, shape).unwrap();
    let mut executor = executor(SHAPE);
    executor.begin(launch, 0..1, &[None]).unwrap();
    executor.append(launch, 0, Fresh { k: view, v: view }, &None).unwrap();
    let (mut out, mut lse) = (values.clone(), vec![9.0; HEADS + 1]);
    let mut attend = |shape_of_lse: [usize; 4], lse: &mut [f32]| {
        let output = Output {
            out: TensorViewMut::from_slice("out", &mut out, shape).unwrap(),
            lse: Some(TensorViewMut::from_slice("lse", lse, shape_of_lse).unwrap()),
        };
        executor.attend(launch, 0, view, None, AttendOptions::PLAIN, &output)
    };
    assert!(matches!(attend([1, HEADS + 1, 1, 1], &mut lse), Err(Error::Shape { name: "lse", .. })));
    assert_eq!(lse, [9.0; HEADS + 1], "nothing is written");
    attend([1, HEADS, 1, 1], &mut lse[..HEADS]).unwrap();
    assert_eq!(lse[..HEADS], [0.0; HEADS], "one token of score 0");
}

#[test]
fn a_calibration_of_other_heads_is_refused() {
    let model = |heads: usize, head_dim: usize| {
        let channels =
            ModelChannels { mean: vec![0.0; head_dim], deviation: vec![1.0; head_dim], query_rms: vec![1.0; head_dim] };
        let head = HeadCalibration { feedback: HeadFeedback::none(head_dim), channels };
        Some(Arc::new(LayerCalibration::new(vec![head; heads])))
    };
    let places = [Place::page(PageId(0))];
    let plan = one_token(16, &[BlockId(0)], &places);
    let launch = Launch::host(plan.over(Places::new(&places, 1)));
    let mut executor = executor(SHAPE);
    executor.begin(launch, 0..1, &[model(HEADS, HEAD_DIM)]).unwrap();
    for other in [model(HEADS + 1, HEAD_DIM), model(HEADS, 2 * HEAD_DIM)] {
        assert!(matches!(executor.begin(launch, 0..1, &[other]), Err(Error::Config(_))));
    }
    assert!(matches!(executor.begin(launch, 0..1, &[]), Err(Error::Config(_))), "a model for each layer");
}

#[test]
fn lent_memory_that_cannot_be_a_layer_is_refused() {
    let shape = CacheConfig { block_size: 16, ..CacheConfig::new(1, HEADS, HEAD_DIM) }.shape();
    let (page, tile) = (shape.page(), shape.at_rest());
    let good = LayerMemory {
        pages: Records::packed(1 << 20, 4, HEADS, page),
        tiles: Some(Records::packed(1 << 24, 4, HEADS, tile)),
    };
    // SAFETY: nothing is read or written.
    let lent = |memory: &[LayerMemory]| unsafe { Cpu::lent(shape, Level::best(), memory) };
    let mut backend = lent(&[good]).unwrap();
    assert_eq!(backend.capacity(), Bounds { num_pages: 4, num_tiles: 4 });
    assert_eq!(backend.allocated_bytes(), 0);
    assert!(backend.grow(4, 4).is_ok() && backend.try_clone().is_err());
    assert!(matches!(backend.grow(5, 4), Err(Error::Unsupported(_))));
    let pages = good.pages;
    let bad = [
        Records { base: pages.base + 8, ..pages },
        Records { stride: pages.stride + 4, ..pages },
        Records { stride: pages.stride - 16, ..pages },
        Records { head_stride: pages.head_stride - 16, ..pages },
        Records { num: usize::MAX / 2, ..pages },
    ];
    for pages in bad {
        let error = lent(&[LayerMemory { pages, ..good }]).unwrap_err();
        assert!(matches!(error, Error::Config(_)), "{pages:?}: {error}");
    }
    let by_head = Records { stride: page.bytes(), head_stride: 4 * page.bytes(), ..pages };
    assert!(lent(&[LayerMemory { pages: by_head, ..good }]).is_ok(), "heads before blocks");
    assert!(matches!(lent(&[]), Err(Error::Config(_))));
    assert!(matches!(lent(&[LayerMemory { tiles: None, ..good }]), Err(Error::Config(_))));
}
