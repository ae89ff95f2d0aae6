//! The names: cache formats and element types.

/// How a block holds its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Unquantized pages in the model's element type: tests the plumbing, baseline of the kernels.
    Raw,
    /// INT8 pages.
    Int8,
    /// INT8 pages while open, sealed into 4-bit tiles.
    Int4,
    /// INT8 pages while open, sealed into 3-bit tiles: a 2-bit plane and a 1-bit plane.
    Int3,
    /// INT8 pages while open, sealed into 2-bit tiles.
    Int2,
}

impl Format {
    /// Every format, from the largest to the smallest.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Int8, Self::Int4, Self::Int3, Self::Int2];

    /// The name used in every interface.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int3 => "int3",
            Self::Int2 => "int2",
        }
    }

    /// The format called `name`, if there is one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Bits of a code in a sealed tile; `None` where blocks stay pages.
    #[must_use]
    pub const fn tile_bits(self) -> Option<u32> {
        match self {
            Self::Raw | Self::Int8 => None,
            Self::Int4 => Some(4),
            Self::Int3 => Some(3),
            Self::Int2 => Some(2),
        }
    }
}

/// Element type of a tensor, or of a `raw` page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Every element type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The name that torch and numpy use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The element type called `name`, if there is one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}
