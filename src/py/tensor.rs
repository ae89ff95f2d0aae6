//! Zero-copy views of torch tensors and numpy arrays.

use crate::backend::memory::Records;
use crate::backend::{Device, TensorView, TensorViewMut};
use crate::format::Dtype;
use crate::{Error, Result};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The address and layout of a tensor. The Python object must outlive the views made from it.
pub struct Tensor {
    name: &'static str,
    device: Device,
    base: usize,
    dtype: String,
    shape: Vec<usize>,
    /// In elements.
    strides: Vec<isize>,
    writable: bool,
}

impl Tensor {
    pub fn new(name: &'static str, tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        if tensor.hasattr("data_ptr")? {
            Self::of_torch(name, tensor)
        } else if let Ok(interface) = tensor.getattr("__array_interface__") {
            Self::of_array(name, &interface.cast_into::<PyDict>()?)
        } else {
            let got = tensor.get_type().fully_qualified_name()?.to_string();
            Err(Error::Dtype { name, expected: "a torch tensor or a numpy array".to_owned(), got }.into())
        }
    }

    fn of_torch(name: &'static str, tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let device = tensor.getattr("device")?.str()?.to_string();
        let Some(device) = Device::parse(&device) else {
            return Err(Error::Device { name, expected: "cpu or cuda:N".to_owned(), got: device }.into());
        };
        let dtype = tensor.getattr("dtype")?.str()?.to_string();
        if tensor.call_method0("is_neg")?.extract()? {
            return Err(Error::Unsupported(format!("{name}: a negated view; pass {name}.resolve_neg()")).into());
        }
        // Sparse and other layouts without strides raise here, in torch's words.
        let strided = |method: &str| {
            let refused = |error: PyErr| Error::Unsupported(format!("{name}: not a strided tensor: {error}"));
            tensor.call_method0(method).map_err(refused)
        };
        let host = Self {
            name,
            device,
            base: strided("data_ptr")?.extract()?,
            dtype: dtype.trim_start_matches("torch.").to_owned(),
            shape: tensor.getattr("shape")?.extract()?,
            strides: strided("stride")?.extract()?,
            writable: true,
        };
        let storage = strided("untyped_storage")?;
        let start: usize = storage.call_method0("data_ptr")?.extract()?;
        let bytes: usize = storage.call_method0("nbytes")?.extract()?;
        host.check_within(start, bytes)?;
        Ok(host)
    }

    fn of_array(name: &'static str, interface: &Bound<'_, PyDict>) -> PyResult<Self> {
        let get = |key: &str| interface.get_item(key).map(|item| item.filter(|item| !item.is_none()));
        let required = |key: &str| {
            get(key)?.ok_or_else(|| Error::Config(format!("{name}: __array_interface__ has no {key:?}")).into())
        };
        let (base, read_only): (usize, bool) =
            PyResult::<Bound<'_, PyAny>>::and_then(required("data"), |data| data.extract())?;
        let typestr: String = PyResult::<Bound<'_, PyAny>>::and_then(required("typestr"), |typestr| typestr.extract())?;
        let (dtype, item_bytes) = match typestr.as_str() {
            "<f4" => ("float32", 4),
            "<f2" => ("float16", 2),
            "|b1" => ("bool", 1),
            "<i4" => ("int32", 4),
            "|u1" => ("uint8", 1),
            "|i1" => ("int8", 1),
            other => (other, 0),
        };
        let shape: Vec<usize> = PyResult::<Bound<'_, PyAny>>::and_then(required("shape"), |shape| shape.extract())?;
        let strides = match get("strides")? {
            _ if item_bytes == 0 => vec![1; shape.len()], // the element type is refused before strides matter
            None => contiguous(&shape),
            Some(bytes) => {
                let bytes: Vec<isize> = bytes.extract()?;
                if bytes.iter().any(|stride| stride % item_bytes != 0) {
                    return Err(Error::Stride { name, strides: bytes }.into());
                }
                bytes.iter().map(|stride| stride / item_bytes).collect()
            }
        };
        Ok(Self { name, device: Device::Cpu, base, dtype: dtype.to_owned(), shape, strides, writable: !read_only })
    }

    /// Checks that this tensor, which is written, cannot overlap `other`, which is read or written.
    pub fn check_apart(&self, other: &Self) -> Result<()> {
        let ((start, end), (other_start, other_end)) = (self.extent(), other.extent());
        if start < other_end && other_start < end {
            return Err(Error::Overlap { name: self.name, other: other.name.to_owned() });
        }
        Ok(())
    }

    /// Checks that every element is inside the storage, which it is not for fake tensors and resized storages.
    fn check_within(&self, start: usize, bytes: usize) -> Result<()> {
        let (low, high) = self.extent();
        let is_empty = self.shape.contains(&0);
        if is_empty || (start != 0 && low >= start as isize && high <= start.saturating_add(bytes) as isize) {
            return Ok(());
        }
        let name = self.name;
        let needed = high.saturating_sub(low);
        Err(Error::Unsupported(format!("{name}: {needed} bytes of elements, but a storage of {bytes} bytes")))
    }

    /// The first byte that shape and strides reach, and one past the last.
    fn extent(&self) -> (isize, isize) {
        let bytes = self.element_bytes() as isize;
        let (mut low, mut high) = (self.base as isize, self.base as isize);
        for (&n, &stride) in self.shape.iter().zip(&self.strides) {
            let reach = stride.saturating_mul(bytes).saturating_mul((n as isize - 1).max(0));
            (low, high) = (low.saturating_add(reach.min(0)), high.saturating_add(reach.max(0)));
        }
        if self.shape.contains(&0) { (low, low) } else { (low, high.saturating_add(bytes)) }
    }

    /// Bytes of an element; 1 for dtypes that are refused later.
    fn element_bytes(&self) -> usize {
        Dtype::parse(&self.dtype).map_or(if self.dtype == "int32" { 4 } else { 1 }, Dtype::bytes)
    }

    /// `[T, heads, head_dim]` as `[1, heads, T, head_dim]`.
    pub fn by_tokens(mut self) -> Result<Self> {
        let (&[tokens, heads, width], &[by_token, by_head, by_channel]) = (&self.shape[..], &self.strides[..]) else {
            let expected = "[num_tokens, heads, head_dim]".to_owned();
            return Err(Error::Shape { name: self.name, expected, got: self.shape });
        };
        self.shape = vec![1, heads, tokens, width];
        self.strides = vec![0, by_head, by_token, by_channel];
        Ok(self)
    }

    /// Its elements as rows of one.
    pub fn with_last_dimension(mut self) -> Self {
        self.shape.push(1);
        self.strides.push(1);
        self
    }

    /// Where records of so many heads and bytes are: `[num, num_kv_heads, width]`, bytes.
    pub fn records(&self, num_kv_heads: usize, bytes: usize) -> Result<Records> {
        self.check_host()?;
        if self.dtype != "uint8" && self.dtype != "int8" {
            let (expected, got) = ("uint8 or int8".to_owned(), self.dtype.clone());
            return Err(Error::Dtype { name: self.name, expected, got });
        }
        let refused = || Error::Shape {
            name: self.name,
            expected: format!("[num, {num_kv_heads}, {bytes} or more]"),
            got: self.shape.clone(),
        };
        let (&[num, heads, width], &[stride, head_stride, last]) = (&self.shape[..], &self.strides[..]) else {
            return Err(refused());
        };
        if heads != num_kv_heads || width < bytes {
            return Err(refused());
        }
        match (usize::try_from(stride), usize::try_from(head_stride), last) {
            (Ok(stride), Ok(head_stride), 1) if self.writable => {
                Ok(Records { base: self.base as u64, num, stride, head_stride })
            }
            (Ok(_), Ok(_), 1) => Err(Error::Config(format!("{}: the array is read-only", self.name))),
            _ => Err(Error::Stride { name: self.name, strides: self.strides.clone() }),
        }
    }

    /// The elements of an int32 tensor `[n]`.
    ///
    /// # Safety
    /// The tensor must live, and must not be written, during `'a`.
    pub unsafe fn ints<'a>(&self) -> Result<&'a [i32]> {
        let &[len] = &self.shape[..] else {
            return Err(Error::Shape { name: self.name, expected: "[n]".to_owned(), got: self.shape.clone() });
        };
        // SAFETY: the caller's word.
        unsafe { self.int_slice(len, len < 2 || self.strides[0] == 1) }
    }

    /// The elements of an int32 tensor `[n, width]` from its first to its last, `width`, and the stride of a row.
    ///
    /// # Safety
    /// As for [`ints`](Self::ints).
    pub unsafe fn int_rows<'a>(&self) -> Result<(&'a [i32], usize, usize)> {
        let &[rows, width] = &self.shape[..] else {
            return Err(Error::Shape { name: self.name, expected: "[n, width]".to_owned(), got: self.shape.clone() });
        };
        let stride = if rows < 2 { width } else { usize::try_from(self.strides[0]).unwrap_or(0) };
        let is_whole = (width < 2 || self.strides[1] == 1) && stride >= width;
        let len = if rows == 0 || width == 0 { 0 } else { (rows - 1) * stride + width };
        // SAFETY: the caller's word.
        Ok((unsafe { self.int_slice(len, is_whole)? }, width, stride))
    }

    unsafe fn int_slice<'a>(&self, len: usize, is_contiguous: bool) -> Result<&'a [i32]> {
        self.check_host()?;
        if self.dtype != "int32" {
            return Err(Error::Dtype { name: self.name, expected: "int32".to_owned(), got: self.dtype.clone() });
        }
        if !is_contiguous || !self.base.is_multiple_of(4) && len > 0 {
            return Err(Error::Stride { name: self.name, strides: self.strides.clone() });
        }
        if len == 0 {
            return Ok(&[]);
        }
        // SAFETY: torch and numpy vouch for every element that shape and strides reach.
        Ok(unsafe { std::slice::from_raw_parts(self.base as *const i32, len) })
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Checks that the values can be read here.
    fn check_host(&self) -> Result<()> {
        if self.device == Device::Cpu {
            return Ok(());
        }
        Err(Error::Device { name: self.name, expected: Device::Cpu.to_string(), got: self.device.to_string() })
    }

    fn float(&self) -> Result<Dtype> {
        Dtype::parse(&self.dtype).ok_or_else(|| Error::Dtype {
            name: self.name,
            expected: Dtype::ALL.map(Dtype::name).join(", "),
            got: self.dtype.clone(),
        })
    }

    fn dimensions(&self) -> Result<([usize; 4], [isize; 4])> {
        match (<[usize; 4]>::try_from(&self.shape[..]), <[isize; 4]>::try_from(&self.strides[..])) {
            (Ok(shape), Ok(strides)) => Ok((shape, strides)),
            _ => Err(Error::Shape {
                name: self.name,
                expected: "[B, heads, T, head_dim]".to_owned(),
                got: self.shape.clone(),
            }),
        }
    }

    /// A view of the elements for reading.
    ///
    /// # Safety
    /// The tensor must live, and must not be written, during `'a`.
    pub unsafe fn view<'a>(&self) -> Result<TensorView<'a>> {
        let (dtype, (shape, strides)) = (self.float()?, self.dimensions()?);
        // SAFETY: torch and numpy vouch for the memory that shape and strides reach, the caller for its life.
        unsafe { TensorView::from_raw(self.name, self.device, self.base as *const u8, dtype, shape, strides) }
    }

    /// A view of the elements for writing.
    ///
    /// # Safety
    /// The tensor must live, and must not be read or written elsewhere, during `'a`.
    pub unsafe fn view_mut<'a>(&self) -> Result<TensorViewMut<'a>> {
        let (dtype, (shape, strides)) = (self.float()?, self.dimensions()?);
        if !self.writable {
            return Err(Error::Config(format!("{}: the array is read-only", self.name)));
        }
        if self.strides.last().is_none_or(|&stride| stride == 1) && overlaps(&self.shape, &self.strides) {
            let other = format!("itself: strides {:?}", self.strides);
            return Err(Error::Overlap { name: self.name, other });
        }
        // SAFETY: as above, and no element is reached twice (just checked).
        unsafe { TensorViewMut::from_raw(self.name, self.device, self.base as *mut u8, dtype, shape, strides) }
    }

    /// Copies the values of a one-dimensional float tensor.
    ///
    /// # Safety
    /// The tensor must live, and must not be written, during the call.
    pub unsafe fn to_vec(&self) -> Result<Vec<f32>> {
        self.check_host()?;
        let dtype = self.float()?;
        let &[len] = &self.shape[..] else {
            return Err(Error::Shape { name: self.name, expected: "[n]".to_owned(), got: self.shape.clone() });
        };
        let read = |i: usize| {
            let at = (self.base as *const u8).wrapping_offset(i as isize * self.strides[0] * dtype.bytes() as isize);
            // SAFETY: torch and numpy vouch for every element that shape and strides reach.
            unsafe {
                match dtype {
                    Dtype::F32 => at.cast::<f32>().read_unaligned(),
                    Dtype::F16 => at.cast::<f16>().read_unaligned().to_f32(),
                    Dtype::Bf16 => at.cast::<bf16>().read_unaligned().to_f32(),
                }
            }
        };
        Ok((0..len).map(read).collect())
    }

    /// Copies the rows of a bool tensor `[B, T]`.
    ///
    /// # Safety
    /// The tensor must live, and must not be written, during the call.
    pub unsafe fn to_bool_rows(&self) -> Result<Vec<Vec<bool>>> {
        self.check_host()?;
        if self.dtype != "bool" {
            return Err(Error::Dtype { name: self.name, expected: "bool".to_owned(), got: self.dtype.clone() });
        }
        let &[rows, columns] = &self.shape[..] else {
            return Err(Error::Shape { name: self.name, expected: "[B, T]".to_owned(), got: self.shape.clone() });
        };
        let read = |b: usize, t: usize| {
            let offset = b as isize * self.strides[0] + t as isize * self.strides[1];
            // SAFETY: torch and numpy vouch for every element that shape and strides reach; their bools are bytes.
            unsafe { (self.base as *const u8).wrapping_offset(offset).read() != 0 }
        };
        Ok((0..rows).map(|b| (0..columns).map(|t| read(b, t)).collect()).collect())
    }
}

fn contiguous(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i] as isize;
    }
    strides
}

/// Whether two indices may reach the same element. May be wrongly true, never wrongly false.
fn overlaps(shape: &[usize], strides: &[isize]) -> bool {
    let mut dims: Vec<(usize, usize)> =
        shape.iter().zip(strides).filter(|(n, _)| **n > 1).map(|(n, stride)| (stride.unsigned_abs(), *n)).collect();
    dims.sort_unstable();
    let mut reach = 0;
    dims.iter().any(|&(stride, n)| {
        let clash = stride <= reach;
        reach += stride * (n - 1);
        clash
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_finds_shared_elements_and_allows_transposes() {
        assert!(!overlaps(&[2, 3, 4, 5], &contiguous(&[2, 3, 4, 5])));
        assert!(!overlaps(&[2, 4, 3, 5], &[60, 5, 20, 1]));
        assert!(overlaps(&[2, 3, 4, 5], &[0, 20, 5, 1]));
        assert!(overlaps(&[1, 1, 4, 5], &[0, 0, 3, 1]));
        assert!(!overlaps(&[1, 1, 4, 0], &[0, 0, 3, 1]));
    }
}
