//! Borrowed tensors of any outer strides: what the caller's memory looks like, checked once. A view says which device its
//! memory belongs to; only that device's backend reads it.

use super::Device;
use crate::error::{Error, Result};
use crate::format::Dtype;
use half::{bf16, f16};
use std::marker::PhantomData;

/// A read-only tensor `[B, heads, T, head_dim]`, last dimension contiguous. Row `r` of a step is `(b, t) = (r / T, r % T)`.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    raw: RawView,
    data: PhantomData<&'a [u8]>,
}

/// Like [`TensorView`], written to.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    raw: RawView,
    data: PhantomData<&'a mut [u8]>,
}

#[derive(Debug, Clone, Copy)]
struct RawView {
    device: Device,
    base: *mut u8,
    dtype: Dtype,
    shape: [usize; 4],
    /// Of the first three dimensions, in elements.
    strides: [isize; 3],
}

// SAFETY: a view is a borrowed slice with strides; sharing it is sharing `&[u8]`.
unsafe impl Send for TensorView<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorView<'_> {}
// SAFETY: a view is an exclusively borrowed slice with strides.
unsafe impl Send for TensorViewMut<'_> {}
// SAFETY: writes through `&self` go through an unsafe function whose caller keeps rows apart.
unsafe impl Sync for TensorViewMut<'_> {}

impl RawView {
    fn new(
        name: &'static str,
        device: Device,
        base: *mut u8,
        dtype: Dtype,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        if strides[3] != 1 && shape[3] > 1 {
            return Err(Error::Stride { name, strides: strides.to_vec() });
        }
        let is_empty = shape.contains(&0); // its address means nothing
        if !is_empty && !(base as usize).is_multiple_of(dtype.bytes()) {
            let (dtype, bytes) = (dtype.name(), dtype.bytes());
            return Err(Error::Unsupported(format!(
                "{name}: {dtype} elements at an address that is no multiple of {bytes}"
            )));
        }
        Ok(Self { device, base, dtype, shape, strides: [strides[0], strides[1], strides[2]] })
    }

    fn from_slice(name: &'static str, len: usize, base: *mut u8, dtype: Dtype, shape: [usize; 4]) -> Result<Self> {
        let count = shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n));
        if count != Some(len) {
            return Err(Error::Shape { name, expected: format!("{len} elements"), got: shape.to_vec() });
        }
        let [_, heads, rows, width] = shape.map(|n| n as isize);
        Self::new(name, Device::Cpu, base, dtype, shape, [heads * rows * width, rows * width, width, 1])
    }

    fn check_device(&self, name: &'static str, device: Device) -> Result<()> {
        if self.device == device {
            return Ok(());
        }
        Err(Error::Device { name, expected: device.to_string(), got: self.device.to_string() })
    }

    fn check(&self, name: &'static str, heads: usize, num_rows: usize, head_dim: usize) -> Result<()> {
        let [batch, own_heads, rows, width] = self.shape;
        if own_heads == heads && batch.checked_mul(rows) == Some(num_rows) && width == head_dim {
            return Ok(());
        }
        Err(Error::Shape {
            name,
            expected: format!("[B, {heads}, T, {head_dim}] with B * T = {num_rows} rows"),
            got: self.shape.to_vec(),
        })
    }

    fn check_dtype(&self, name: &'static str, dtype: Dtype) -> Result<()> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(Error::Dtype { name, expected: dtype.name().to_owned(), got: self.dtype.name().to_owned() })
    }

    fn all_strides(&self) -> [i64; 4] {
        let [batch, heads, rows] = self.strides.map(|stride| stride as i64);
        [batch, heads, rows, 1]
    }

    /// First element of (row, head).
    #[inline(always)]
    fn at(&self, row: usize, head: usize) -> *mut u8 {
        let (b, t) = (row / self.shape[2], row % self.shape[2]);
        assert!(b < self.shape[0] && head < self.shape[1]);
        let elements = b as isize * self.strides[0] + head as isize * self.strides[1] + t as isize * self.strides[2];
        self.base.wrapping_offset(elements * self.dtype.bytes() as isize)
    }
}

impl<'a> TensorView<'a> {
    /// A view of a caller's memory; strides in elements.
    ///
    /// # Safety
    /// Every element that `shape` and `strides` reach is initialized, aligned memory of `device` and `dtype`, not written
    /// during `'a`.
    ///
    /// # Errors
    /// [`Error::Stride`] when the last dimension is not contiguous, [`Error::Unsupported`] when elements are not aligned.
    pub unsafe fn from_raw(
        name: &'static str,
        device: Device,
        base: *const u8,
        dtype: Dtype,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        Ok(Self { raw: RawView::new(name, device, base.cast_mut(), dtype, shape, strides)?, data: PhantomData })
    }

    /// A contiguous f32 tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] when the slice has another number of elements.
    pub fn from_slice(name: &'static str, data: &'a [f32], shape: [usize; 4]) -> Result<Self> {
        let base = data.as_ptr().cast_mut().cast();
        Ok(Self { raw: RawView::from_slice(name, data.len(), base, Dtype::F32, shape)?, data: PhantomData })
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.raw.shape
    }

    /// Address of the first element.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.raw.base as u64
    }

    /// The strides, in elements.
    #[must_use]
    pub fn strides(&self) -> [i64; 4] {
        self.raw.all_strides()
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.raw.dtype
    }

    /// Checks the device.
    ///
    /// # Errors
    /// [`Error::Device`] naming both.
    pub fn check_device(&self, name: &'static str, device: Device) -> Result<()> {
        self.raw.check_device(name, device)
    }

    /// Checks heads, rows and channels.
    ///
    /// # Errors
    /// [`Error::Shape`] naming both.
    pub fn check(&self, name: &'static str, heads: usize, num_rows: usize, head_dim: usize) -> Result<()> {
        self.raw.check(name, heads, num_rows, head_dim)
    }

    /// Checks queries of a layer of `num_kv_heads`; gives their own number of heads, a multiple of it.
    ///
    /// # Errors
    /// [`Error::Shape`] naming both.
    pub fn check_queries(&self, num_kv_heads: usize, num_rows: usize, head_dim: usize) -> Result<usize> {
        let num_q_heads = self.shape()[1];
        if num_q_heads == 0 || !num_q_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a multiple of {num_kv_heads} heads in dimension 1");
            return Err(Error::Shape { name: "q", expected, got: self.shape().to_vec() });
        }
        self.check("q", num_q_heads, num_rows, head_dim)?;
        Ok(num_q_heads)
    }

    /// Checks the element type.
    ///
    /// # Errors
    /// [`Error::Dtype`] naming both.
    pub fn check_dtype(&self, name: &'static str, dtype: Dtype) -> Result<()> {
        self.raw.check_dtype(name, dtype)
    }

    /// Copies one token row of one head into `out` (`head_dim` values), widened to f32. The view is of host memory:
    /// [`check_device`](Self::check_device) has been called.
    #[inline(always)]
    pub(crate) fn read_row(&self, row: usize, head: usize, out: &mut [f32]) {
        let at = self.raw.at(row, head);
        let len = out.len().min(self.raw.shape[3]);
        match self.raw.dtype {
            // SAFETY: `from_raw`'s caller vouched for every element that shape and strides reach.
            Dtype::F32 => out[..len].copy_from_slice(unsafe { std::slice::from_raw_parts(at.cast::<f32>(), len) }),
            Dtype::F16 => {
                // SAFETY: as above.
                let row = unsafe { std::slice::from_raw_parts(at.cast::<f16>(), len) };
                half::slice::HalfFloatSliceExt::convert_to_f32_slice(row, &mut out[..len]);
            }
            Dtype::Bf16 => {
                // SAFETY: as above.
                let row = unsafe { std::slice::from_raw_parts(at.cast::<bf16>(), len) };
                out.iter_mut().zip(row).for_each(|(x, y)| *x = f32::from_bits(u32::from(y.to_bits()) << 16));
            }
        }
    }
}

impl<'a> TensorViewMut<'a> {
    /// A view of a caller's memory; strides in elements.
    ///
    /// # Safety
    /// Every element that `shape` and `strides` reach is memory of `device` and `dtype`, aligned, reached once, and neither
    /// read nor written by anyone else during `'a`.
    ///
    /// # Errors
    /// [`Error::Stride`] when the last dimension is not contiguous, [`Error::Unsupported`] when elements are not aligned.
    pub unsafe fn from_raw(
        name: &'static str,
        device: Device,
        base: *mut u8,
        dtype: Dtype,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        Ok(Self { raw: RawView::new(name, device, base, dtype, shape, strides)?, data: PhantomData })
    }

    /// A contiguous f32 tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] when the slice has another number of elements.
    pub fn from_slice(name: &'static str, data: &'a mut [f32], shape: [usize; 4]) -> Result<Self> {
        let base = data.as_mut_ptr().cast();
        Ok(Self { raw: RawView::from_slice(name, data.len(), base, Dtype::F32, shape)?, data: PhantomData })
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.raw.shape
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.raw.dtype
    }

    /// Checks the device.
    ///
    /// # Errors
    /// [`Error::Device`] naming both.
    pub fn check_device(&self, name: &'static str, device: Device) -> Result<()> {
        self.raw.check_device(name, device)
    }

    /// Checks heads, rows and channels.
    ///
    /// # Errors
    /// [`Error::Shape`] naming both.
    pub fn check(&self, name: &'static str, heads: usize, num_rows: usize, head_dim: usize) -> Result<()> {
        self.raw.check(name, heads, num_rows, head_dim)
    }

    /// Checks the element type.
    ///
    /// # Errors
    /// [`Error::Dtype`] naming both.
    pub fn check_dtype(&self, name: &'static str, dtype: Dtype) -> Result<()> {
        self.raw.check_dtype(name, dtype)
    }

    /// Writes one token row of one head from f32, rounding to the tensor's type.
    ///
    /// # Safety
    /// No other thread writes the same (row, head) at the same time.
    #[inline(always)]
    pub(crate) unsafe fn write_row(&self, row: usize, head: usize, values: &[f32]) {
        let at = self.raw.at(row, head);
        let len = values.len().min(self.raw.shape[3]);
        match self.raw.dtype {
            // SAFETY: `from_raw`'s caller vouched for every element; the row is ours by this function's contract.
            Dtype::F32 => unsafe {
                std::slice::from_raw_parts_mut(at.cast::<f32>(), len).copy_from_slice(&values[..len]);
            },
            Dtype::F16 => {
                // SAFETY: as above.
                let row = unsafe { std::slice::from_raw_parts_mut(at.cast::<f16>(), len) };
                half::slice::HalfFloatSliceExt::convert_from_f32_slice(row, &values[..len]);
            }
            Dtype::Bf16 => {
                // SAFETY: as above.
                let row = unsafe { std::slice::from_raw_parts_mut(at.cast::<bf16>(), len) };
                row.iter_mut().zip(values).for_each(|(y, x)| *y = bf16::from_f32(*x));
            }
        }
    }
}
