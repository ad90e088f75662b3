//! [`Tensor`]: a shaped view of device memory. Rows are contiguous; there are no strides.

use super::{DType, cpu, cuda};
use std::fmt;

/// Up to four dimensions, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; 4],
    rank: usize,
}

impl Shape {
    /// # Panics
    /// If `dims` has more than four entries: shapes are written by the programmer, never read from a file.
    pub fn new(dims: &[usize]) -> Self {
        assert!(dims.len() <= 4, "a shape has at most four dimensions");
        let mut all = [1; 4];
        all[..dims.len()].copy_from_slice(dims);
        Shape { dims: all, rank: dims.len() }
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

/// Memory of one device. Cloning shares it.
#[derive(Clone)]
pub enum Storage {
    Cpu(cpu::Memory),
    Cuda(cuda::Memory),
}

/// A dense array on a device. Cloning is cheap and shares the memory; what may be read or written when is decided by
/// the order of operations on a [`super::Queue`] and by events between queues, as on a GPU.
#[derive(Clone)]
pub struct Tensor {
    storage: Storage,
    dtype: DType,
    shape: Shape,
    byte_offset: usize,
}

impl Tensor {
    /// Wraps memory that holds at least `byte_offset` + the bytes of `shape`. For backends.
    pub fn from_storage(storage: Storage, dtype: DType, shape: Shape, byte_offset: usize) -> Self {
        Tensor { storage, dtype, shape, byte_offset }
    }

    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        self.shape.dims()
    }

    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// Length of the innermost dimension.
    pub fn row_len(&self) -> usize {
        self.shape().last().copied().unwrap_or(1)
    }

    /// Number of rows: the product of all dimensions but the innermost.
    pub fn rows(&self) -> usize {
        let dims = self.shape();
        dims[..dims.len().saturating_sub(1)].iter().product()
    }

    pub fn byte_offset(&self) -> usize {
        self.byte_offset
    }

    /// Bytes from the first element to the end.
    pub fn bytes(&self) -> usize {
        self.elements() / self.dtype.block_len() * self.dtype.block_bytes()
    }

    /// Whether the two have a byte in common.
    pub fn overlaps(&self, other: &Tensor) -> bool {
        let same = match (&self.storage, &other.storage) {
            (Storage::Cpu(mine), Storage::Cpu(theirs)) => mine.is_same(theirs),
            (Storage::Cuda(mine), Storage::Cuda(theirs)) => mine.is_same(theirs),
            _ => false,
        };
        let (a, b) = (self.byte_offset, other.byte_offset);
        same && a < b + other.bytes() && b < a + self.bytes()
    }

    /// Rows `start..start + len` of the outermost dimension, sharing the memory; `None` if out of range.
    pub fn narrow(&self, start: usize, len: usize) -> Option<Tensor> {
        let dims = self.shape();
        let outer = *dims.first()?;
        if start.checked_add(len)? > outer {
            return None;
        }
        let inner: usize = dims[1..].iter().product();
        let mut shape = dims.to_vec();
        shape[0] = len;
        let per_outer = inner / self.dtype.block_len() * self.dtype.block_bytes();
        Some(Tensor {
            storage: self.storage.clone(),
            dtype: self.dtype,
            shape: Shape::new(&shape),
            byte_offset: self.byte_offset + start * per_outer,
        })
    }

    /// The same elements under another shape; `None` if the counts or the block rows differ.
    pub fn reshape(&self, dims: &[usize]) -> Option<Tensor> {
        let shape = Shape::new(dims);
        if shape.elements() != self.elements()
            || !dims.last().copied().unwrap_or(1).is_multiple_of(self.dtype.block_len())
        {
            return None;
        }
        Some(Tensor { shape, ..self.clone() })
    }
}

impl Tensor {
    /// The same bytes read as another dtype of the same size of element: one upload may carry ids and angles.
    ///
    /// # Panics
    /// If the sizes differ: dtypes are written by the programmer.
    pub fn reinterpret(&self, dtype: DType) -> Tensor {
        let size = |dtype: DType| (dtype.block_len(), dtype.block_bytes());
        assert_eq!(size(dtype), size(self.dtype), "elements of another size");
        Tensor { dtype, ..self.clone() }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}
