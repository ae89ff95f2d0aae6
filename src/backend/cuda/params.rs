//! The parameters of kernels: each struct is declared here once, and printed for C with an assertion for every offset.

use std::fmt::Write;

/// A type that kernels are given.
pub trait Parameter: Copy {
    /// The declaration of a variable of this type in C.
    fn declare(name: &str) -> String;
}

macro_rules! scalars {
    ($($type:ty => $name:literal),* $(,)?) => {
        $(impl Parameter for $type {
            fn declare(name: &str) -> String {
                format!(concat!($name, " {}"), name)
            }
        })*
    };
}

scalars! { u64 => "uint64_t", i64 => "int64_t", i32 => "int32_t", f32 => "float", f64 => "double" }

impl<T: Parameter, const N: usize> Parameter for [T; N] {
    fn declare(name: &str) -> String {
        T::declare(&format!("{name}[{N}]"))
    }
}

/// Declares structs of parameters, and [`text`], which prints them.
macro_rules! parameters {
    ($($(#[doc = $doc:literal])* $name:ident {
        $($(#[doc = $field_doc:literal])* $field:ident: $type:ty,)*
    })*) => {
        $(
            $(#[doc = $doc])*
            #[repr(C)]
            #[derive(Debug, Clone, Copy, PartialEq)]
            #[allow(missing_docs)] // a field without a word is what its name says
            pub struct $name {
                $($(#[doc = $field_doc])* pub $field: $type,)*
            }

            impl Parameter for $name {
                fn declare(name: &str) -> String {
                    format!(concat!(stringify!($name), " {}"), name)
                }
            }
        )*

        /// The structs in C.
        #[must_use]
        pub fn text() -> String {
            let mut out = String::new();
            $(
                comment(&mut out, "", &[$($doc),*]);
                _ = writeln!(out, "struct {} {{", stringify!($name));
                $(
                    comment(&mut out, "    ", &[$($field_doc),*]);
                    _ = writeln!(out, "    {};", <$type>::declare(stringify!($field)));
                )*
                _ = writeln!(out, "}};");
                _ = writeln!(out, "static_assert(sizeof({}) == {}, \"size\");", stringify!($name), size_of::<$name>());
                $(
                    let (name, offset) = (stringify!($name), std::mem::offset_of!($name, $field));
                    let field = stringify!($field);
                    _ = writeln!(out, "static_assert(OFFSET_OF({name}, {field}) == {offset}, \"{field}\");");
                )*
                _ = writeln!(out);
            )*
            out
        }
    };
}

fn comment(out: &mut String, indent: &str, lines: &[&str]) {
    for line in lines {
        _ = writeln!(out, "{indent}///{line}");
    }
}

parameters! {
    /// Records of one kind: (i, head) is at `base + i * stride + head * head_stride`, in bytes.
    Records {
        base: u64,
        stride: u64,
        head_stride: u64,
    }

    /// The records of a layer; kernels of several layers are given an array of these.
    LayerRecords {
        pages: Records,
        /// Zeros in formats that do not seal.
        tiles: Records,
    }

    /// A tensor `[B, H, T, D]`; strides in elements, the last of which is 1. Row r of a step is `(r / T, r % T)`.
    Tensor {
        base: u64,
        strides: [i64; 4],
    }

    /// A plan, and the table of places. Word j of record i of array a is `words[starts[a] + i * width(a) + j]`; entry
    /// `places[row * places_stride + block]` is page p where p >= 0, the tile of block ~p where p < 0.
    PlanPointers {
        /// `int32_t`
        words: u64,
        /// `int32_t`
        places: u64,
        places_stride: i32,
        starts: [i32; 15],
    }

    /// What is known of a layer's model. Of a layer without calibration `channels` is 0, `feedback` that of no feedback
    /// and `feedback_stride` 0.
    LayerModel {
        /// `float [num_kv_heads][mean, deviation, query_rms][head_dim]`
        channels: u64,
        /// Of each head: the constants of the plain frame, then those of the rotated one.
        feedback: u64,
        /// Bytes from one head to the next.
        feedback_stride: u64,
    }

    /// Counters of a layer, added to by all kernels that encode. There are `HEALTH_SLOTS` of each layer, so that blocks
    /// do not wait for each other; the host sums them.
    HealthSlot {
        /// Of K, in units of the page's channel scales.
        squares: f64,
        /// (token, head) pairs that `squares` is over.
        num_rows: u64,
        /// K codes of tiles.
        num_codes: u64,
        /// Those of them that the grid clamped.
        num_clamped: u64,
        /// (token, head) pairs whose K or V f16 does not hold.
        out_of_range: u64,
        /// (token, head) pairs with a NaN or an infinity, which was stored as a finite value.
        non_finite: u64,
    }

    /// Of kernels that write records.
    EncodeParams {
        plan: PlanPointers,
        /// The step's rows; not read where all tokens are stored ones.
        k: Tensor,
        v: Tensor,
        /// `LayerRecords [num_layers]`
        layers: u64,
        /// `LayerModel [num_layers]`
        models: u64,
        /// `HealthSlot [num_layers][HEALTH_SLOTS]`
        health: u64,
        num_layers: i32,
        num_kv_heads: i32,
        block_size: i32,
        /// T of the tensors.
        rows_per_batch: i32,
        /// Do all rows of k and v start on multiples of 16 bytes?
        is_aligned: i32,
        /// May the step write pages whole? Then single tokens leave those pages alone.
        has_whole_pages: i32,
        /// Is B = 1, and each row of k and v the token of its number?
        is_dense: i32,
    }

    /// Copies of pages in every layer.
    CopyParams {
        /// `LayerRecords [num_layers]`
        layers: u64,
        record_bytes: i32,
        num_copies: i32,
        /// Source and destination of each.
        copies: [i32; 128],
    }

    /// A range of positions of one sequence as values.
    DequantizeParams {
        pages: Records,
        tiles: Records,
        /// `int32_t`: of the block of position `start`, and on.
        places: u64,
        k: Tensor,
        v: Tensor,
        num_kv_heads: i32,
        block_size: i32,
        rows_per_batch: i32,
        start: i32,
        count: i32,
        is_aligned: i32,
    }

    /// Of the kernels of a call of attend but prefills: `schedule`, `query`, `decode` and `combine`, in this order. What
    /// they leave for each other is in a workspace; sizes are those of the structs of `kernels/attend/params.cuh`.
    ///
    /// Query heads `h * group ..` are of key/value head h. A *column* is a query row of one (sequence, key/value head): of
    /// head `h * group + member` at the sequence's new token `token`, it is number `token * group + member`.
    AttendParams {
        plan: PlanPointers,
        pages: Records,
        /// Zeros in formats that do not seal.
        tiles: Records,
        q: Tensor,
        out: Tensor,
        /// Base 0: not asked for. `float`
        lse: Tensor,
        /// `float [num_q_heads]`, or 0
        sinks: u64,
        /// `Work [blocks][warps]`
        work: u64,
        /// `Scheduled [sequences]`
        sequences: u64,
        /// `Parts [sequences][num_kv_heads]`
        parts: u64,
        /// `int2 [rows]`: sequence and new token, or `ROW_PADDING` or `ROW_OTHERS`.
        row_tokens: u64,
        /// `uint4 [sequences][num_kv_heads][column_tiles][frames][head_dim * tile columns / 8]`: q as operands.
        operands: u64,
        /// `float [sequences][num_kv_heads][column_tiles]`
        factors: u64,
        /// `float2 [partials][columns]`: maximum, in log2 units, and sum.
        part_ml: u64,
        /// `float [partials][columns][head_dim]`
        part_o: u64,
        num_kv_heads: i32,
        group: i32,
        /// T of the tensors.
        rows_per_batch: i32,
        block_size: i32,
        /// Those of the sequence that has the most.
        columns: i32,
        /// Tiles of 8 or 16 columns that hold them.
        column_tiles: i32,
        /// Sequences of fewer new tokens are left to another launch.
        min_new: i32,
        /// So are those of more.
        max_new: i32,
        /// A query sees so many tokens at most, itself included; 2^31 - 1 where that is all.
        window: i32,
        /// Are only tokens from before the step attended to?
        over_history: i32,
        /// 0: warps get equal runs of blocks. Else cuts are at the multiples of this power of two, and results the same in
        /// any batch.
        chunk_tokens: i32,
        /// Of the decode kernel's grid, in x.
        blocks: i32,
        /// Of one of its blocks.
        warps: i32,
        scale: f32,
        /// 0: none.
        softcap: f32,
        unused: i32,
    }

    /// Of the kernel of prefills.
    PrefillParams {
        /// Without the workspace.
        attend: AttendParams,
        /// Read where `has_new`; else all tokens are read from records.
        k: Tensor,
        v: Tensor,
        has_new: i32,
        /// 0 f16, 1 bf16, 2 f32
        q_dtype: i32,
        kv_dtype: i32,
        out_dtype: i32,
    }
}
