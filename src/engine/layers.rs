//! A step through the layers of a group: what a cache and an engine have in common.

use super::model::ModelCalibration;
use super::undo::Snapshot;
use crate::backend::{
    AttendOptions, DevicePlan, Executor, Fresh, Launch, Model, Output, Plan, Stream, TensorView, TensorViewMut,
};
use crate::calibration::HeadShape;
use crate::config::Shape;
use crate::error::{Error, Result};
use crate::paging::{Place, Places};
use crate::plan::{PageRefit, StepPlan};
use std::ops::Range;
use std::sync::Arc;

/// The layers of a group: an executor, and what is known of their model.
#[derive(Debug)]
pub struct Layers {
    /// Where the records are.
    pub executor: Executor,
    /// What sealing and opening pages take from the model.
    pub calibration: Option<ModelCalibration>,
    /// The queue of the work.
    pub stream: Stream,
}

/// How far an open step is.
#[derive(Debug)]
pub struct Progress {
    plan: Arc<StepPlan>,
    /// The plan on the backend's device, where that is not the host.
    loaded: Option<DevicePlan>,
    /// Are pages of committed tokens sealed and opened in every layer, or with each layer's append?
    has_begun: bool,
    /// Which layers have their keys and values.
    appended: Vec<bool>,
    /// Committed pages that appends have rewritten.
    snapshots: Vec<Snapshot>,
}

impl Progress {
    /// The plan of the step.
    #[must_use]
    pub fn plan(&self) -> &Arc<StepPlan> {
        &self.plan
    }

    /// Has the layer its keys and values?
    #[must_use]
    pub fn is_appended(&self, layer: usize) -> bool {
        self.appended[layer]
    }

    /// Checks that the layer has its keys and values.
    ///
    /// # Errors
    /// [`Error::IncompleteStep`] naming it.
    pub fn check_appended(&self, layer: usize) -> Result<()> {
        if self.appended[layer] { Ok(()) } else { Err(Error::IncompleteStep { missing: vec![layer] }) }
    }

    /// Checks that a step is whole.
    ///
    /// # Errors
    /// [`Error::IncompleteStep`], naming the layers without keys and values.
    pub fn check_whole(&self) -> Result<()> {
        let missing: Vec<usize> = (0..self.appended.len()).filter(|&layer| !self.appended[layer]).collect();
        if missing.is_empty() { Ok(()) } else { Err(Error::IncompleteStep { missing }) }
    }

    fn launch<'a>(&'a self, places: Places<'a>, stream: Stream) -> Launch<'a> {
        let on_host = || Plan::Host(self.plan.over(places));
        Launch { plan: self.loaded.map_or_else(on_host, Plan::Device), stream }
    }
}

impl Layers {
    /// Layers whose model is not known.
    #[must_use]
    pub fn new(executor: Executor) -> Self {
        Self { executor, calibration: None, stream: Stream::default() }
    }

    /// Checks a layer's index.
    ///
    /// # Errors
    /// [`Error::Config`] naming it.
    pub fn check_layer(&self, layer: usize) -> Result<()> {
        let num_layers = self.executor.shape().num_layers;
        if layer < num_layers {
            return Ok(());
        }
        Err(Error::Config(format!("layer {layer}: the cache has {num_layers} layers")))
    }

    /// Begins a step: pages of committed tokens are sealed, and pages opened, in all layers. While a calibration learns,
    /// a layer does that with its append instead, once it has learned from the step's queries.
    ///
    /// # Errors
    /// Those of [`Executor::begin`]; nothing is left open then.
    pub fn begin(&mut self, plan: Arc<StepPlan>, places: Places<'_>) -> Result<Progress> {
        let loaded = self.executor.load(plan.over(places), self.stream)?;
        let has_work = plan.has_stored_work();
        let has_begun = !has_work || !self.calibration.as_ref().is_some_and(ModelCalibration::is_learning);
        let appended = vec![false; self.executor.shape().num_layers];
        let progress = Progress { plan, loaded, has_begun, appended, snapshots: Vec::new() };
        if has_work && has_begun {
            let models = self.models();
            let begun = self.executor.begin(progress.launch(places, self.stream), 0..models.len(), &models);
            if let Err(error) = begun {
                self.end(&progress);
                return Err(error);
            }
        }
        Ok(progress)
    }

    /// Restores the committed pages that an open step has rewritten.
    ///
    /// # Errors
    /// Those of [`Executor::write_records`].
    pub fn undo(&mut self, progress: &Progress) -> Result<()> {
        progress.snapshots.iter().try_for_each(|page| page.restore(&mut self.executor))
    }

    /// Ends a step, committed or aborted.
    pub fn end(&mut self, progress: &Progress) {
        progress.loaded.into_iter().for_each(|plan| self.executor.unload(plan));
    }

    /// Writes a layer's keys and values of the step; written again, the last write counts. A calibration that is not frozen learns from the queries `q`,
    /// `[B, num_q_heads, T, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for other queries, and those of [`Executor::append`].
    pub fn append(
        &mut self,
        progress: &mut Progress,
        places: Places<'_>,
        layer: usize,
        new: Fresh<'_>,
        q: Option<TensorView<'_>>,
    ) -> Result<()> {
        let launch = progress.launch(places, self.stream);
        let is_again = progress.appended[layer];
        if let Some(q) = q {
            let num_q_heads = self.executor.check_queries(launch, q)?;
            if !is_again {
                self.learn(&progress.plan, launch, layer, new, (q, num_q_heads))?;
            }
        }
        let model = match &self.calibration {
            Some(model) if progress.plan.seals().len() > 0 => model.for_seal(layer)?,
            _ => self.model(layer),
        };
        if !progress.has_begun && !is_again {
            self.executor.check_append(launch, layer, new)?;
            self.executor.begin(launch, layer..layer + 1, std::slice::from_ref(&model))?;
        }
        if is_again {
            self.executor.check_append(launch, layer, new)?;
            let mut of_layer = progress.snapshots.iter().filter(|page| page.layer == layer);
            of_layer.try_for_each(|page| page.restore(&mut self.executor))?;
        } else if progress.snapshots.iter().all(|page| page.layer != layer) {
            progress.snapshots.extend(Snapshot::of_step(&self.executor, progress.plan.over(places), layer)?);
        }
        self.executor.append(progress.launch(places, self.stream), layer, new, &model)?;
        progress.appended[layer] = true;
        Ok(())
    }

    /// What [`attend`](Self::attend) would refuse, but for keys and values that are not there yet.
    ///
    /// # Errors
    /// Those of [`Executor::attend`].
    #[allow(clippy::too_many_arguments)] // as `attend`
    pub fn check_attend(
        &self,
        progress: &Progress,
        places: Places<'_>,
        layer: usize,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: &Output<'_>,
    ) -> Result<()> {
        self.executor.check_attend(progress.launch(places, self.stream), layer, q, new, options, output)
    }

    /// Attends in a layer.
    ///
    /// # Errors
    /// [`Error::IncompleteStep`] before the layer's append, and those of [`Executor::attend`].
    #[allow(clippy::too_many_arguments)] // a step, a layer, and what attention takes
    pub fn attend(
        &self,
        progress: &Progress,
        places: Places<'_>,
        layer: usize,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: &Output<'_>,
    ) -> Result<()> {
        progress.check_appended(layer)?;
        self.executor.attend(progress.launch(places, self.stream), layer, q, new, options, output)
    }

    /// Decodes tokens `start..` of a sequence into `k` and `v`, `[B, num_kv_heads, T, head_dim]` each, `B * T` tokens, which
    /// are among those that are stored: `held`. `places` are those of its blocks.
    ///
    /// # Errors
    /// [`Error::Shape`] for other tokens, and those of [`Executor::dequantize`].
    pub fn dequantize(
        &self,
        layer: usize,
        (places, held): (&[Place], Range<usize>),
        start: usize,
        k: &TensorViewMut<'_>,
        v: &TensorViewMut<'_>,
    ) -> Result<()> {
        let [batch, _, count, _] = k.shape();
        if start < held.start || start.saturating_add(batch.saturating_mul(count)) > held.end {
            let expected = format!("tokens within {held:?}, from {start} on");
            return Err(Error::Shape { name: "k", expected, got: k.shape().to_vec() });
        }
        self.executor.dequantize(layer, places, start, k, v, self.stream)
    }

    /// Refits the first pages that the plan names and `keep` accepts, once their tokens are committed.
    ///
    /// # Errors
    /// Those of [`Executor::refit`].
    pub fn refit(&mut self, progress: &Progress, places: Places<'_>, keep: &dyn Fn(&PageRefit) -> bool) -> Result<()> {
        let kept = progress.plan.refits().filter(keep).count();
        if kept == 0 {
            return Ok(());
        }
        let models = self.models();
        if kept == progress.plan.refits().len() {
            return self.executor.refit(progress.launch(places, self.stream), 0..models.len(), &models);
        }
        let plan = progress.plan.with_refits(keep);
        let loaded = self.executor.load(plan.over(places), self.stream)?;
        let launch =
            Launch { plan: loaded.map_or_else(|| Plan::Host(plan.over(places)), Plan::Device), stream: self.stream };
        let done = self.executor.refit(launch, 0..models.len(), &models);
        loaded.into_iter().for_each(|plan| self.executor.unload(plan));
        done
    }

    /// What is known of a layer's model so far.
    #[must_use]
    pub fn model(&self, layer: usize) -> Model {
        self.calibration.as_ref().and_then(|calibration| calibration.model(layer))
    }

    fn models(&self) -> Vec<Model> {
        (0..self.executor.shape().num_layers).map(|layer| self.model(layer)).collect()
    }

    /// Shows the calibration the rows of the step that it still wants. What is refused teaches nothing.
    fn learn(
        &self,
        plan: &StepPlan,
        launch: Launch<'_>,
        layer: usize,
        new: Fresh<'_>,
        (q, num_q_heads): (TensorView<'_>, usize),
    ) -> Result<()> {
        let Some(calibration) = &self.calibration else { return Ok(()) };
        let wanted = calibration.wanted(layer);
        let rows: Vec<usize> = plan.token_rows().iter().map(|&row| row as usize).take(wanted).collect();
        if rows.is_empty() {
            return Ok(());
        }
        self.executor.check_append(launch, layer, new)?;
        let &Shape { num_kv_heads, head_dim, .. } = self.executor.shape();
        let shape = HeadShape { num_q_heads, num_kv_heads, head_dim };
        let read = |view| self.executor.backend().read_rows(view, &rows, launch.stream);
        calibration.observe(layer, shape, &read(q)?, &read(new.k)?)
    }
}
