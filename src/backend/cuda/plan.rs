//! Plans on the device: words of a step in a pool of buffers, and a table of places that is told what changes.

use super::driver::{Context, call};
use super::launch::{Grid, raw};
use super::memory::{Buffer, Pinned};
use super::module::Function;
use super::params::PlanPointers;
use crate::backend::{Device, DevicePlan};
use crate::error::Result;
use crate::format::PlanArray;
use crate::paging::Place;
use crate::plan::StepView;
use cudarc::driver::sys;
use std::ptr;
use std::sync::Arc;

/// Changes of the table that are entered one by one; of more, or where it has moved, it is copied whole.
const MOST_CHANGES: usize = 4096;
/// Plans that may be unloaded while the device still works on them; then the host waits.
const MOST_PENDING: usize = 8;

/// Words of one step on the device, and the pinned memory that they were sent from.
#[derive(Debug)]
struct Slot {
    words: Buffer,
    staging: Pinned,
    /// Recorded behind the copies, and again behind all that was launched before the plan was unloaded.
    event: Event,
    is_loaded: bool,
    stream: u64,
}

/// All loaded plans of a backend.
#[derive(Debug)]
pub(super) struct Plans {
    context: Arc<Context>,
    change_places: Function,
    slots: Vec<Slot>,
    /// The table; those before it, which were too small, are kept while a plan is loaded.
    tables: Vec<Buffer>,
    stream: u64,
}

impl Plans {
    pub fn new(context: Arc<Context>, change_places: Function) -> Self {
        Self { context, change_places, slots: Vec::new(), tables: Vec::new(), stream: 0 }
    }

    /// Copies a plan's words, and what has changed in the table, behind what is queued on a stream.
    pub fn load(&mut self, step: StepView<'_>, stream: u64) -> Result<DevicePlan> {
        let _entered = self.context.enter()?;
        if self.slots.iter().all(|slot| !slot.is_loaded) {
            let last = self.tables.len().saturating_sub(1);
            self.tables.drain(..last);
        }
        let entries = step.places().entries();
        let is_new = self.tables.last().is_none_or(|table| table.bytes < 4 * entries.len());
        if is_new {
            let words = entries.len().next_power_of_two().max(1024);
            self.tables.push(Buffer::new(&self.context, 4 * words)?);
        }
        let num_changes = step.layout().count(PlanArray::Changes);
        let is_whole = is_new || step.is_whole_table() || num_changes > MOST_CHANGES;
        let table = self.tables.last().map_or(0, |table| table.address);
        let words = step.words().len();
        let at = self.free_slot(words, words + if is_whole { entries.len() } else { 0 }, stream)?;
        if self.stream != stream {
            // Work on the other stream may read the table yet.
            let other = Event::new(&self.context)?;
            other.record(self.stream)?;
            other.hold(stream)?;
            self.stream = stream;
        }
        let slot = &mut self.slots[at];
        slot.staging.send(0, step.words().iter().copied(), slot.words.address, stream)?;
        if is_whole && !entries.is_empty() {
            slot.staging.send(words, entries.iter().map(|place: &Place| place.word()), table, stream)?;
        }
        let plan = DevicePlan {
            device: Device::Cuda(self.context.index),
            words: slot.words.address,
            layout: *step.layout(),
            places: table,
            places_stride: step.places().stride(),
            block_size: step.block_size(),
            window: step.window(),
            bounds: step.bounds(),
        };
        if !is_whole && num_changes > 0 {
            // SAFETY: the kernel takes the plan's pointers, which are the slot's and the table's.
            unsafe { self.change_places.launch(Grid::new([1; 3], 256), &PlanPointers::from(&plan), stream) }?;
        }
        slot.event.record(stream)?;
        (slot.is_loaded, slot.stream) = (true, stream);
        Ok(plan)
    }

    /// A slot with room, whose words no work reads any more.
    fn free_slot(&mut self, words: usize, staged: usize, stream: u64) -> Result<usize> {
        let is_idle = |slot: &Slot| !slot.is_loaded && slot.event.is_done();
        let unloaded = self.slots.iter().filter(|slot| !slot.is_loaded);
        if unloaded.clone().count() >= MOST_PENDING && !unloaded.clone().any(is_idle) {
            unloaded.clone().try_for_each(|slot| slot.event.wait())?; // the host is far ahead of the device
        }
        let fits = |slot: &Slot| slot.words.bytes >= 4 * words && slot.staging.words >= staged;
        if let Some(at) = self.slots.iter().position(|slot| is_idle(slot) && fits(slot)) {
            return Ok(at);
        }
        let slot = Slot {
            words: Buffer::new(&self.context, 4 * words.next_power_of_two().max(1024))?,
            staging: Pinned::new(&self.context, staged.next_power_of_two().max(1024))?,
            event: Event::new(&self.context)?,
            is_loaded: false,
            stream,
        };
        if let Some(at) = self.slots.iter().position(is_idle) {
            self.slots[at] = slot;
            return Ok(at);
        }
        self.slots.push(slot);
        Ok(self.slots.len() - 1)
    }

    /// Gives a plan's slot back; work that was launched with it is waited for before the slot is written again.
    pub fn unload(&mut self, plan: &DevicePlan) {
        let Ok(_entered) = self.context.enter() else { return };
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.words.address == plan.words) {
            slot.is_loaded = false;
            _ = slot.event.record(slot.stream);
        }
    }
}

/// A point of a stream.
#[derive(Debug)]
struct Event {
    context: Arc<Context>,
    event: sys::CUevent,
}

// SAFETY: a handle that any thread may use while the context is current.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    fn new(context: &Arc<Context>) -> Result<Self> {
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes one handle.
        unsafe { call!(cuEventCreate(&raw mut event, flags)) }?;
        Ok(Self { context: Arc::clone(context), event })
    }

    fn record(&self, stream: u64) -> Result<()> {
        // SAFETY: a live event and a stream of the same context.
        unsafe { call!(cuEventRecord(self.event, raw(stream))) }
    }

    /// Holds a stream back until the event.
    fn hold(&self, stream: u64) -> Result<()> {
        // SAFETY: as above.
        unsafe { call!(cuStreamWaitEvent(raw(stream), self.event, 0)) }
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: a live event.
        unsafe { call!(cuEventSynchronize(self.event)) }
    }

    fn is_done(&self) -> bool {
        // SAFETY: a live event.
        (unsafe { sys::cuEventQuery(self.event) }) == sys::CUresult::CUDA_SUCCESS
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else { return };
        // SAFETY: made by `new`.
        _ = unsafe { sys::cuEventDestroy_v2(self.event) };
    }
}
