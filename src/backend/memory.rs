//! Memory that a caller lends to a backend: where the records of each layer are.

use crate::config::Shape;
use crate::error::{Error, Result};
use crate::format::{RECORD_ALIGNMENT, RecordLayout};

/// Records of one kind in one layer: record `(i, head)` is at `base + i * stride + head * head_stride`.
///
/// Strides are free, so that records may be parts of larger blocks, layers may be interleaved in one tensor, and heads
/// may lie before or within blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Records {
    /// Address of the first record.
    pub base: u64,
    /// Pages, or blocks.
    pub num: usize,
    /// Bytes from one to the next.
    pub stride: usize,
    /// Bytes from one key/value head to the next.
    pub head_stride: usize,
}

/// The records of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerMemory {
    /// By page.
    pub pages: Records,
    /// By block, in formats that seal.
    pub tiles: Option<Records>,
}

impl Records {
    /// Contiguous records.
    #[must_use]
    pub const fn packed(base: u64, num: usize, num_kv_heads: usize, layout: RecordLayout) -> Self {
        let head_stride = layout.bytes();
        Self { base, num, stride: num_kv_heads * head_stride, head_stride }
    }

    /// Bytes from the first byte to the last.
    #[must_use]
    pub fn extent(&self, num_kv_heads: usize, layout: RecordLayout) -> Option<usize> {
        if self.num == 0 {
            return Some(0);
        }
        let last = (self.num - 1).checked_mul(self.stride)?;
        last.checked_add((num_kv_heads - 1).checked_mul(self.head_stride)?)?.checked_add(layout.bytes())
    }

    /// The strides, of a dimension of one record that it is as far to the next as the records reach.
    fn strides(&self, num_kv_heads: usize, layout: RecordLayout) -> (usize, usize) {
        let head_stride = if num_kv_heads > 1 { self.head_stride } else { layout.bytes() };
        let reach = (num_kv_heads - 1).saturating_mul(head_stride).saturating_add(layout.bytes());
        (if self.num > 1 { self.stride } else { reach }, head_stride)
    }

    fn check(&self, name: &str, num_kv_heads: usize, layout: RecordLayout) -> Result<()> {
        let &Self { base, num, .. } = self;
        let refuse = |why: String| Err(Error::Config(format!("{name}: {why}")));
        let (stride, head_stride) = self.strides(num_kv_heads, layout);
        if !base.is_multiple_of(RECORD_ALIGNMENT as u64)
            || !stride.is_multiple_of(RECORD_ALIGNMENT)
            || !head_stride.is_multiple_of(RECORD_ALIGNMENT)
        {
            return refuse(format!(
                "address {base:#x}, strides {stride} and {head_stride}: records start on multiples of {RECORD_ALIGNMENT} \
                 bytes"
            ));
        }
        // The inner of two dimensions has to fit a stride of the outer.
        let mut dimensions = [(num, stride), (num_kv_heads, head_stride)];
        dimensions.sort_by_key(|dimension| dimension.1);
        let mut inner = layout.bytes();
        for (count, stride) in dimensions.into_iter().filter(|dimension| dimension.0 > 1) {
            if stride < inner {
                return refuse(format!(
                    "{num} records of {num_kv_heads} heads and {} bytes overlap at strides {} and {head_stride}",
                    layout.bytes(),
                    self.stride
                ));
            }
            inner = stride.saturating_mul(count - 1).saturating_add(inner);
        }
        match self.extent(num_kv_heads, layout) {
            Some(bytes) if usize::try_from(base).is_ok_and(|base| base.checked_add(bytes).is_some()) => Ok(()),
            _ => {
                refuse(format!("{num} records at strides {stride} and {head_stride} are beyond what can be addressed"))
            }
        }
    }
}

/// Records of one layer that other records of the same strides may lie among.
struct Group {
    name: String,
    records: Records,
    layout: RecordLayout,
}

impl Group {
    /// May the records of two groups overlap? Those of different strides must not even reach each other.
    fn overlaps(&self, other: &Self, num_kv_heads: usize) -> bool {
        let reach = |group: &Self| {
            let bytes = group.records.extent(num_kv_heads, group.layout).unwrap_or(usize::MAX);
            (i128::from(group.records.base), i128::from(group.records.base) + bytes as i128)
        };
        let ((start, end), (other_start, other_end)) = (reach(self), reach(other));
        if end <= other_start || other_end <= start {
            return false;
        }
        let (a, b) = (self.records, other.records);
        let (stride, head_stride) = a.strides(num_kv_heads, self.layout);
        if (stride, head_stride) != b.strides(num_kv_heads, other.layout) || stride == 0 {
            return true;
        }
        let between = other_start - start;
        let (bytes, other_bytes) = (self.layout.bytes() as i128, other.layout.bytes() as i128);
        let heads = num_kv_heads as i128 - 1;
        (-heads..=heads).any(|heads_apart| {
            let from = between + heads_apart * head_stride as i128;
            let nearest = -from.div_euclid(stride as i128);
            // The record of `b` that is as many further on as makes it lie next to one of `a`, before or behind.
            [nearest, nearest - 1].into_iter().any(|apart| {
                let is_there = -(a.num as i128) < apart && apart < b.num as i128;
                let offset = from + apart * stride as i128;
                is_there && -other_bytes < offset && offset < bytes
            })
        })
    }
}

/// Can these be the layers of a shape?
///
/// # Errors
/// [`Error::Config`] for another number of layers, tiles that are missing or too many, records that are not aligned or
/// overlap.
pub fn check(shape: &Shape, memory: &[LayerMemory]) -> Result<()> {
    if memory.len() != shape.num_layers {
        return Err(Error::Config(format!("memory of {} layers for a shape of {}", memory.len(), shape.num_layers)));
    }
    let mut groups: Vec<Group> = Vec::new();
    for (index, layer) in memory.iter().enumerate() {
        let name = |kind: &str| format!("{kind} of layer {index}");
        groups.push(Group { name: name("pages"), records: layer.pages, layout: shape.page() });
        match (layer.tiles, shape.tile()) {
            (Some(records), Some(layout)) => groups.push(Group { name: name("tiles"), records, layout }),
            (None, None) => {}
            (tiles, _) => {
                let (given, format) = (if tiles.is_some() { "given" } else { "missing" }, shape.format.name());
                return Err(Error::Config(format!("memory for tiles is {given}, and {format} is the format")));
            }
        }
    }
    let nums = |layer: &LayerMemory| (layer.pages.num, layer.tiles.map(|tiles| tiles.num));
    if let Some(layer) = (1..memory.len()).find(|&layer| nums(&memory[layer]) != nums(&memory[0])) {
        let (first, other) = (nums(&memory[0]), nums(&memory[layer]));
        return Err(Error::Config(format!("pages and tiles of layer 0: {first:?}, of layer {layer}: {other:?}")));
    }
    for (index, group) in groups.iter().enumerate() {
        group.records.check(&group.name, shape.num_kv_heads, group.layout)?;
        if let Some(other) = groups[..index].iter().find(|other| group.overlaps(other, shape.num_kv_heads)) {
            return Err(Error::Config(format!(
                "the {} and the {} overlap, or lie among each other at other strides",
                other.name, group.name
            )));
        }
    }
    Ok(())
}
