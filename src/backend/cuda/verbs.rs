//! The verbs that kernels carry out. Where the plan has nothing for a verb there is nothing to launch.

use super::backend::Cuda;
use super::params::{EncodeParams, PlanPointers, Tensor};
use crate::backend::{AttendOptions, DevicePlan, Fresh, Launch, Model, Plan, Source, TensorView, TensorViewMut};
use crate::error::{Error, Result};
use crate::format::{Dtype, Format, PlanArray};
use std::ops::Range;

/// How kernels call an element type.
pub(super) const fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "f32",
        Dtype::F16 => "f16",
        Dtype::Bf16 => "bf16",
    }
}

/// The plan of a launch, on this device.
pub(super) fn plan(launch: &Launch<'_>) -> Result<DevicePlan> {
    match launch.plan {
        Plan::Device(plan) => Ok(plan),
        Plan::Host(_) => Err(Error::Config("the plan is on the host: load it first".to_owned())),
    }
}

impl Cuda {
    /// What kernels that write records are given for these layers; `new` is of one layer.
    pub(super) fn encode_params(
        &self,
        plan: &DevicePlan,
        layers: &Range<usize>,
        new: Option<Fresh<'_>>,
    ) -> EncodeParams {
        let none = Tensor { base: 0, strides: [0; 4] };
        let (k, v) = new.map_or((none, none), |new| (new.k.into(), new.v.into()));
        let is_aligned = |tensor: Tensor, dtype: Dtype| {
            let strides = tensor.strides[..3].iter();
            tensor.base.is_multiple_of(16)
                && strides.map(|stride| stride * dtype.bytes() as i64).all(|bytes| bytes % 16 == 0)
        };
        let num_tokens = plan.layout.count(PlanArray::TokenRows);
        EncodeParams {
            plan: PlanPointers::from(plan),
            k,
            v,
            layers: self.memory.list(layers.start),
            models: 0,
            health: self.health_address(layers.start),
            num_layers: layers.len() as i32,
            num_kv_heads: self.shape.num_kv_heads as i32,
            block_size: self.shape.block_size as i32,
            rows_per_batch: new.map_or(1, |new| new.k.shape()[2]) as i32,
            is_aligned: i32::from(new.is_none_or(|new| is_aligned(k, new.k.dtype()) && is_aligned(v, new.v.dtype()))),
            has_whole_pages: i32::from(num_tokens >= self.shape.block_size),
            is_dense: i32::from(
                num_tokens == plan.layout.count(PlanArray::Positions) && new.is_none_or(|new| new.k.shape()[0] == 1),
            ),
        }
    }

    /// The pages of the format: `raw`, `int8`, or `sealing` where V is rotated.
    fn pages_name(&self) -> &'static str {
        match (self.shape.format, self.shape.tile()) {
            (Format::Raw, _) => "raw",
            (_, None) => "int8",
            _ => "sealing",
        }
    }

    fn missing(&self, verb: &str, of: &str, dtype: Option<Dtype>) -> Error {
        let dtype = dtype.map_or_else(String::new, |dtype| format!("_{}", dtype_name(dtype)));
        let name = format!("{verb}_{of}{dtype}_d{}", self.shape.head_dim);
        Error::Unsupported(format!("CUDA: there is no kernel {name}"))
    }

    /// What a verb over `array` is given; `None` where the plan has no record in it.
    fn work(
        &self,
        launch: Launch<'_>,
        array: PlanArray,
        layers: &Range<usize>,
        from: Source<'_>,
    ) -> Result<Option<(EncodeParams, Option<Dtype>)>> {
        let plan = plan(&launch)?;
        let new = match from {
            Source::Stored => None,
            Source::New(new) => Some(new),
        };
        let parameters = || self.encode_params(&plan, layers, new);
        Ok((plan.layout.count(array) > 0).then(|| (parameters(), new.map(|new| new.k.dtype()))))
    }

    pub(super) fn seal_blocks(
        &self,
        launch: Launch<'_>,
        layers: &Range<usize>,
        from: Source<'_>,
        _models: &[Model],
    ) -> Result<()> {
        match self.work(launch, PlanArray::Seals, layers, from)? {
            Some((_, dtype)) => Err(self.missing("seal", self.shape.format.name(), dtype)),
            None => Ok(()),
        }
    }

    pub(super) fn open_pages(
        &self,
        launch: Launch<'_>,
        layers: &Range<usize>,
        from: Source<'_>,
        _models: &[Model],
    ) -> Result<()> {
        match self.work(launch, PlanArray::Opens, layers, from)? {
            Some((_, dtype)) => Err(self.missing("open", self.pages_name(), dtype)),
            None => Ok(()),
        }
    }

    pub(super) fn write_tokens(&self, launch: Launch<'_>, layer: usize, new: Fresh<'_>) -> Result<()> {
        match self.work(launch, PlanArray::TokenRows, &(layer..layer + 1), Source::New(new))? {
            Some((_, dtype)) => Err(self.missing("append", self.pages_name(), dtype)),
            None => Ok(()),
        }
    }

    pub(super) fn refit_pages(&self, launch: Launch<'_>, layers: &Range<usize>, _models: &[Model]) -> Result<()> {
        match self.work(launch, PlanArray::Refits, layers, Source::Stored)? {
            Some(_) => Err(self.missing("refit", self.pages_name(), None)),
            None => Ok(()),
        }
    }

    pub(super) fn attend_step(
        &self,
        launch: Launch<'_>,
        q: TensorView<'_>,
        _new: Option<Fresh<'_>>,
        _options: AttendOptions<'_>,
    ) -> Result<()> {
        plan(&launch)?;
        Err(self.missing("decode", self.shape.format.name(), Some(q.dtype())))
    }

    pub(super) fn dequantize_tokens(&self, k: &TensorViewMut<'_>) -> Result<()> {
        Err(self.missing("dequantize", self.shape.format.name(), Some(k.dtype())))
    }
}
