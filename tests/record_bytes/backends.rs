//! Every backend that is compared, and the memory that it works on.

use crate::oracle::{Oracle, Written};
use kvarn::backend::cpu::{Cpu, Level};
use kvarn::backend::memory::{LayerMemory, Records};
use kvarn::backend::{Backend, DevicePlan, Launch, Plan, Stream, TensorViewMut};
use kvarn::config::Shape;
use kvarn::format::{Arrangement, RecordLayout};
use kvarn::paging::{BlockId, PageId, Place};
use kvarn::plan::{Bounds, StepView};
use kvarn::quant::record::{clear_rows, reorder};
use std::collections::HashMap;
use std::ops::Range;

/// Bytes between records of lent memory.
const PADDING: usize = 32;
/// What lent memory holds: a NaN in every float type.
const GARBAGE: u8 = 0xff;

/// Every backend of this machine, with memory for so many pages and tiles.
pub fn all(shape: Shape, room: Bounds) -> Vec<Compared> {
    let levels = || Level::ALL.into_iter().filter(|level| level.is_available());
    let own = levels().map(|level| {
        let mut backend = Cpu::new(shape, level).unwrap();
        backend.grow(room.num_tiles, room.num_pages).unwrap();
        Compared::new(format!("cpu {}", level.name()), Box::new(backend), Vec::new())
    });
    let lent = levels().map(|level| {
        let mut slabs = vec![Slab::new(shape, shape.page(), room.num_pages)];
        slabs.extend(shape.tile().map(|tile| Slab::new(shape, tile, room.num_tiles)));
        let of_layer = |layer| LayerMemory {
            pages: slabs[0].records(layer),
            tiles: slabs.get(1).map(|tiles| tiles.records(layer)),
        };
        let memory: Vec<LayerMemory> = (0..shape.num_layers).map(of_layer).collect();
        // SAFETY: the slabs hold the records and are kept beside the backend; nothing else writes them.
        let backend = unsafe { Cpu::lent(shape, level, &memory) }.unwrap();
        Compared::new(format!("cpu {} over lent memory", level.name()), Box::new(backend), slabs)
    });
    own.chain(lent).collect()
}

/// Records of one kind: layer by layer, head by head, one after the other, with room between them.
struct Slab {
    base: usize,
    words: usize,
    shape: Shape,
    layout: RecordLayout,
    num: usize,
}

impl Slab {
    fn new(shape: Shape, layout: RecordLayout, num: usize) -> Self {
        let words = shape.num_records() * num * (layout.bytes() + PADDING) / 16;
        let memory = Box::leak(vec![u128::from_ne_bytes([GARBAGE; 16]); words].into_boxed_slice());
        Self { base: memory.as_mut_ptr().expose_provenance(), words, shape, layout, num }
    }

    fn records(&self, layer: usize) -> Records {
        let stride = self.layout.bytes() + PADDING;
        let head_stride = self.num * stride;
        let base = (self.base + layer * self.shape.num_kv_heads * head_stride) as u64;
        Records { base, num: self.num, stride, head_stride }
    }

    fn padding_is_untouched(&self) -> bool {
        let start = std::ptr::with_exposed_provenance::<u8>(self.base);
        // SAFETY: so many words were leaked, and no call of the backend is running.
        let bytes = unsafe { std::slice::from_raw_parts(start, self.words * 16) };
        let mut records = bytes.chunks_exact(self.layout.bytes() + PADDING);
        records.all(|record| record[self.layout.bytes()..].iter().all(|&byte| byte == GARBAGE))
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut::<u128>(self.base);
        // SAFETY: so many words were leaked, and the backend over them is dropped.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(start, self.words)) });
    }
}

/// A backend that is compared with the oracle.
pub struct Compared {
    name: String,
    pub backend: Box<dyn Backend>,
    loaded: Option<DevicePlan>,
    /// All records, as they are while nothing is written to them.
    seen: HashMap<(usize, Place), Vec<u8>>,
    /// Dropped after the backend.
    slabs: Vec<Slab>,
}

impl Compared {
    fn new(name: String, backend: Box<dyn Backend>, slabs: Vec<Slab>) -> Self {
        let Bounds { num_pages, num_tiles } = backend.capacity();
        let pages = (0..num_pages as u32).map(|page| Place::page(PageId(page)));
        let places: Vec<Place> = pages.chain((0..num_tiles as u32).map(|block| Place::tile(BlockId(block)))).collect();
        let mut seen = HashMap::new();
        for layer in 0..backend.shape().num_layers {
            seen.extend(places.iter().map(|&place| ((layer, place), backend.read_records(layer, place).unwrap())));
        }
        Self { name, backend, loaded: None, seen, slabs }
    }

    pub fn load(&mut self, step: StepView<'_>) {
        self.loaded = self.backend.load(step, Stream::default()).unwrap();
    }

    pub fn launch<'a>(&self, step: StepView<'a>) -> Launch<'a> {
        let plan = self.loaded.map_or(Plan::Host(step), Plan::Device);
        Launch { plan, stream: Stream::default() }
    }

    pub fn unload(&mut self) {
        self.loaded.take().into_iter().for_each(|plan| self.backend.unload(plan));
    }

    /// Are the records that a verb wrote those of the oracle?
    pub fn compare(&mut self, oracle: &Oracle, written: &[Written], after: &str) {
        let order = self.backend.arrangement();
        for &Written { layer, place, used, is_first, is_clear } in written {
            let found = self.backend.read_records(layer, place).unwrap();
            let layout = oracle.layout(place);
            let bytes = layout.bytes();
            let heads = found.chunks_exact(bytes).zip(oracle.records(layer, place).chunks_exact(bytes));
            for (head, (found, expected)) in heads.enumerate() {
                let (mut canonical, mut expected) = (vec![0; bytes], expected.to_vec());
                reorder(layout, [order, Arrangement::Canonical], found, &mut canonical);
                let at = || format!("head {head} of {:?} in layer {layer}, {after}, by {}", place.kind(), self.name);
                let all = if is_clear { canonical.clone() } else { Vec::new() };
                clear_rows(layout, &mut canonical, used, is_first);
                assert!(!is_clear || canonical == all, "rows without a token are not zero: {}", at());
                clear_rows(layout, &mut expected, used, is_first);
                let first = || canonical.iter().zip(&expected).position(|(x, y)| x != y).unwrap_or(0);
                assert!(canonical == expected, "byte {} of {bytes} differs: {}", first(), at());
            }
            self.seen.insert((layer, place), found);
        }
    }

    /// Is everything that no verb should have written as it was?
    pub fn assert_nothing_else_changed(&self, after: &str) {
        for (&(layer, place), seen) in &self.seen {
            let found = self.backend.read_records(layer, place).unwrap();
            let place = place.kind();
            assert!(found == *seen, "{place:?} in layer {layer} was written to, {after}, by {}", self.name);
        }
        assert!(self.slabs.iter().all(Slab::padding_is_untouched), "{after}, by {}", self.name);
    }

    /// Are these tokens of a sequence, decoded, these values to the bit?
    pub fn compare_values(
        &self,
        layer: usize,
        places: &[Place],
        tokens: &Range<usize>,
        expected: &[Vec<f32>; 2],
        after: &str,
    ) {
        let &Shape { num_kv_heads, head_dim, .. } = self.backend.shape();
        let shape = [1, num_kv_heads, tokens.len(), head_dim];
        let mut found = [(); 2].map(|()| vec![f32::NAN; shape.iter().product()]);
        let [k, v] = &mut found;
        let k = TensorViewMut::from_slice("k", k, shape).unwrap();
        let v = TensorViewMut::from_slice("v", v, shape).unwrap();
        self.backend.dequantize(layer, places, tokens.start, &k, &v, Stream::default()).unwrap();
        for (name, (found, expected)) in ["k", "v"].iter().zip(found.iter().zip(expected)) {
            let differs = found.iter().zip(expected).position(|(x, y)| x.to_bits() != y.to_bits());
            let at = differs.unwrap_or(0);
            let (found, expected) = (found.get(at), expected.get(at));
            let of =
                || format!("element {at} of {name} of tokens {tokens:?}, layer {layer}, {after}, by {}", self.name);
            assert!(differs.is_none(), "{found:?}, not {expected:?}: {}", of());
        }
    }
}
