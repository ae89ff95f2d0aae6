//! The values of a step: what the oracle takes, and the same as tensors of a backend's device.

use crate::common::Random;
use kvarn::backend::{Device, Fresh, Model, TensorView};
use kvarn::calibration::{Calibration, HeadShape};
use kvarn::config::Shape;
use kvarn::format::Dtype;
use kvarn::plan::StepPlan;

/// The keys and values of a step in one layer, `[num_rows, num_kv_heads, head_dim]` each, as the dtype holds them.
pub struct Values {
    pub num_rows: usize,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Values {
    /// Random values for the tokens of a step. Rows of padding, which no backend reads, are NaN.
    pub fn of_step(shape: &Shape, plan: &StepPlan, random: &mut Random) -> Self {
        let (num_rows, width) = (plan.num_rows(), shape.num_kv_heads * shape.head_dim);
        let mut values = Self { num_rows, k: vec![f32::NAN; num_rows * width], v: vec![f32::NAN; num_rows * width] };
        for &row in plan.token_rows() {
            for of in [&mut values.k, &mut values.v] {
                for head in of[row as usize * width..][..width].chunks_exact_mut(shape.head_dim) {
                    let row = new_row(random, shape.head_dim);
                    head.iter_mut().zip(row).for_each(|(x, y)| *x = round(shape.dtype, y));
                }
            }
        }
        values
    }
}

/// What is known of the model, by layer: from queries that look at few channels.
pub fn models(num_layers: usize, heads: usize, head_dim: usize) -> Vec<Model> {
    let shape = HeadShape { num_q_heads: heads, num_kv_heads: heads, head_dim };
    let (calibration, mut random) = (Calibration::new(), Random(5));
    for layer in 0..num_layers {
        let mut q = random.normals(200 * heads * head_dim);
        q.iter_mut().enumerate().for_each(|(i, x)| *x *= if i % head_dim < 3 { 4.0 } else { 0.5 });
        let k: Vec<f32> = (0..200 * heads).flat_map(|_| new_row(&mut random, head_dim)).collect();
        calibration.observe(layer, shape, &q, &k).unwrap();
    }
    calibration.freeze().unwrap();
    (0..num_layers).map(|layer| calibration.layer(layer)).collect()
}

/// A row with a few loud channels, and now and then a loud token.
fn new_row(random: &mut Random, head_dim: usize) -> Vec<f32> {
    let loud = if random.below(50) == 0 { 20.0 } else { 1.0 };
    let mut row = random.normals(head_dim);
    row.iter_mut().enumerate().for_each(|(d, x)| *x = loud * (*x * [1.0, 0.3, 5.0][d % 3] + (d % 7) as f32 - 3.0));
    row
}

fn round(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// K and V of a step as tensors of a device, `[num_rows, num_kv_heads, head_dim]` in memory.
pub struct Tensors {
    bytes: [Vec<u128>; 2],
    dtype: Dtype,
    shape: [usize; 4],
}

impl Tensors {
    /// `values` are values of `dtype`. With two rows or more of an even number, the batch is two.
    pub fn new(device: Device, dtype: Dtype, shape: &Shape, values: &Values) -> Self {
        assert_eq!(device, Device::Cpu, "tensors are made in host memory");
        let batch = if values.num_rows.is_multiple_of(2) { 2 } else { 1 };
        let bytes = [&values.k, &values.v].map(|values| {
            let bytes: Vec<u8> = match dtype {
                Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
                Dtype::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
            };
            bytes.chunks_exact(16).map(|word| u128::from_ne_bytes(word.try_into().unwrap())).collect()
        });
        let shape = [batch, shape.num_kv_heads, values.num_rows / batch, shape.head_dim];
        Self { bytes, dtype, shape }
    }

    pub fn fresh(&self) -> Fresh<'_> {
        let [_, heads, rows, head_dim] = self.shape.map(|n| n as isize);
        let strides = [rows * heads * head_dim, head_dim, heads * head_dim, 1];
        let [k, v] = [0, 1].map(|which| {
            let base = self.bytes[which].as_ptr().cast();
            // SAFETY: the memory holds that many elements of the type, and outlives the view.
            unsafe { TensorView::from_raw("new", Device::Cpu, base, self.dtype, self.shape, strides) }.unwrap()
        });
        Fresh { k, v }
    }
}
