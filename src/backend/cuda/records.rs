//! Where the records are: in regions of the backend's own, or in memory that a caller lends.

use super::driver::{Context, call};
use super::launch::raw;
use super::memory::{Buffer, Region};
use super::params;
use crate::backend::memory::{LayerMemory, Records};
use crate::config::Shape;
use crate::error::{Error, Result};
use crate::format::RecordLayout;
use crate::paging::{Place, PlaceKind};
use crate::plan::Bounds;
use cudarc::driver::sys;
use std::ptr;
use std::sync::Arc;

/// The records of all layers, and the same list on the device.
#[derive(Debug)]
pub(super) struct Memory {
    context: Arc<Context>,
    shape: Shape,
    /// Of its own: pages and tiles, in each id by id, layer by layer, head by head.
    regions: Option<(Region, Option<Region>)>,
    layers: Vec<LayerMemory>,
    /// `LayerRecords [num_layers]`; own records never move, so it is written once.
    list: Buffer,
}

impl Memory {
    /// Memory of its own, without room for any record.
    pub fn new(context: &Arc<Context>, shape: Shape) -> Result<Self> {
        let pages = Region::new(Arc::clone(context))?;
        let tiles = shape.tile().map(|_| Region::new(Arc::clone(context))).transpose()?;
        let records = |region: &Region, layout: RecordLayout, layer: usize| {
            let of_layer = shape.num_kv_heads * layout.bytes();
            let base = region.base() + (layer * of_layer) as u64;
            Records { base, num: 0, stride: shape.num_layers * of_layer, head_stride: layout.bytes() }
        };
        let of_layer = |layer| LayerMemory {
            pages: records(&pages, shape.page(), layer),
            tiles: tiles.as_ref().zip(shape.tile()).map(|(region, layout)| records(region, layout, layer)),
        };
        let layers = (0..shape.num_layers).map(of_layer).collect();
        Self::over(context, shape, Some((pages, tiles)), layers)
    }

    /// A caller's memory, that [`crate::backend::memory::check`] has accepted.
    pub fn lent(context: &Arc<Context>, shape: Shape, layers: &[LayerMemory]) -> Result<Self> {
        Self::over(context, shape, None, layers.to_vec())
    }

    fn over(
        context: &Arc<Context>,
        shape: Shape,
        regions: Option<(Region, Option<Region>)>,
        layers: Vec<LayerMemory>,
    ) -> Result<Self> {
        let list = Buffer::new(context, layers.len() * size_of::<params::LayerRecords>())?;
        let words = |records: Option<Records>| {
            records.map_or([0; 3], |records| [records.base, records.stride as u64, records.head_stride as u64])
        };
        let words = layers.iter().flat_map(|layer| [words(Some(layer.pages)), words(layer.tiles)]).flatten();
        list.write(&words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>())?;
        Ok(Self { context: Arc::clone(context), shape, regions, layers, list })
    }

    /// Address of the list of layers, from one of them on.
    pub fn list(&self, first_layer: usize) -> u64 {
        self.list.address + (first_layer * size_of::<params::LayerRecords>()) as u64
    }

    pub fn bytes(&self) -> usize {
        let tiles = |tiles: &Option<Region>| tiles.as_ref().map_or(0, Region::bytes);
        self.regions.as_ref().map_or(0, |(pages, of_tiles)| pages.bytes() + tiles(of_tiles))
    }

    pub fn capacity(&self) -> Bounds {
        self.layers.first().map_or_else(Bounds::default, |layer| Bounds {
            num_pages: layer.pages.num,
            num_tiles: layer.tiles.map_or(0, |tiles| tiles.num),
        })
    }

    pub fn grow(&mut self, num_blocks: usize, num_pages: usize) -> Result<()> {
        let num_tiles = if self.shape.tile().is_some() { num_blocks } else { 0 };
        let now = self.capacity();
        if num_pages <= now.num_pages && num_tiles <= now.num_tiles {
            return Ok(());
        }
        let Some((pages, tiles)) = &mut self.regions else {
            let why = format!(
                "records for {num_pages} pages and {num_tiles} tiles in lent memory of {} and {}",
                now.num_pages, now.num_tiles
            );
            return Err(Error::Unsupported(why));
        };
        let of_id = self.shape.num_layers * self.shape.num_kv_heads;
        let too_many = Error::OutOfMemory { bytes: usize::MAX, what: "pages on the device" };
        let bytes = |num: usize, layout: RecordLayout| num.checked_mul(of_id * layout.bytes()).ok_or(too_many.clone());
        pages.grow(bytes(num_pages, self.shape.page())?)?;
        let num_pages = pages.bytes() / (of_id * self.shape.page().bytes());
        self.layers.iter_mut().for_each(|layer| layer.pages.num = num_pages);
        if let (Some(region), Some(layout)) = (tiles, self.shape.tile()) {
            region.grow(bytes(num_tiles, layout)?)?;
            let num = region.bytes() / (of_id * layout.bytes());
            self.layers.iter_mut().filter_map(|layer| layer.tiles.as_mut()).for_each(|tiles| tiles.num = num);
        }
        Ok(())
    }

    /// A copy in memory of its own; waits for all work.
    pub fn try_clone(&self) -> Result<Self> {
        let Some((pages, tiles)) = &self.regions else {
            return Err(Error::Unsupported("lent memory cannot be copied into memory of its own".to_owned()));
        };
        let mut copy = Self::new(&self.context, self.shape)?;
        let Bounds { num_pages, num_tiles } = self.capacity();
        copy.grow(num_tiles, num_pages)?;
        self.context.wait()?;
        let _entered = self.context.enter()?;
        if let Some((to_pages, to_tiles)) = &copy.regions {
            let pairs = [(Some(pages), Some(to_pages)), (tiles.as_ref(), to_tiles.as_ref())];
            for (from, to) in pairs.into_iter().filter_map(|(from, to)| from.zip(to)) {
                let bytes = from.bytes().min(to.bytes());
                // SAFETY: both are backed that far, apart from each other.
                unsafe { call!(cuMemcpyDtoD_v2(to.base(), from.base(), bytes)) }?;
            }
        }
        self.context.wait()?;
        Ok(copy)
    }

    /// Copies the records of all heads at a place from or to the host, and waits.
    fn copy(&self, layer: usize, place: Place, host: *mut u8, to_device: bool) -> Result<()> {
        let layer = &self.layers[layer];
        let (records, id, layout) = match place.kind() {
            PlaceKind::Page(page) => (layer.pages, page.0, self.shape.page()),
            PlaceKind::Tile(block) => (layer.tiles.unwrap_or(layer.pages), block.0, self.shape.at_rest()),
        };
        let address = records.base + u64::from(id) * records.stride as u64;
        let device = (address, records.head_stride);
        self.context.wait()?;
        let _entered = self.context.enter()?;
        let heads = self.shape.num_kv_heads;
        // SAFETY: the records are there, and as many bytes here.
        unsafe { copy_rows(host, device, layout.bytes(), heads, to_device) }?;
        self.context.wait()
    }

    pub fn read(&self, layer: usize, place: Place) -> Result<Vec<u8>> {
        let layout = if place.as_page().is_some() { self.shape.page() } else { self.shape.at_rest() };
        let mut bytes = vec![0; self.shape.num_kv_heads * layout.bytes()];
        self.copy(layer, place, bytes.as_mut_ptr(), false)?;
        Ok(bytes)
    }

    pub fn write(&self, layer: usize, place: Place, bytes: &[u8]) -> Result<()> {
        self.copy(layer, place, bytes.as_ptr().cast_mut(), true)
    }
}

/// Copies `height` rows of `width` bytes between contiguous memory of the host and rows of the device that are so far
/// apart.
///
/// # Safety
/// Both are there, and no work of the device writes them.
pub(super) unsafe fn copy_rows(
    host: *mut u8,
    (device, pitch): (u64, usize),
    width: usize,
    height: usize,
    to_device: bool,
) -> Result<()> {
    use sys::CUmemorytype::{CU_MEMORYTYPE_DEVICE as DEVICE, CU_MEMORYTYPE_HOST as HOST};
    let (from, to) = if to_device { (HOST, DEVICE) } else { (DEVICE, HOST) };
    let pitches = if to_device { [width, pitch] } else { [pitch, width] };
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: from,
        srcHost: host.cast_const().cast(),
        srcDevice: device,
        srcArray: ptr::null_mut(),
        srcPitch: pitches[0],
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: to,
        dstHost: host.cast(),
        dstDevice: device,
        dstArray: ptr::null_mut(),
        dstPitch: pitches[1],
        WidthInBytes: width,
        Height: height,
    };
    // SAFETY: the caller's word. Unaligned: the driver takes any pitch of at least the width here.
    unsafe {
        call!(cuMemcpy2DUnaligned_v2(&raw const copy))?;
        call!(cuStreamSynchronize(raw(0)))
    }
}
