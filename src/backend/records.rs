//! The records of a block as files have them: in canonical order, rows without a token zero.

use super::Executor;
use crate::error::Result;
use crate::format::{Arrangement, RecordLayout};
use crate::paging::{Place, UsedBlock};
use crate::quant::record;

impl Executor {
    /// The record of one head of a block, open or sealed.
    #[must_use]
    pub fn layout(&self, open: bool) -> RecordLayout {
        if open { self.shape().page() } else { self.shape().at_rest() }
    }

    /// The records of a block in a layer, head by head, in canonical order.
    ///
    /// # Errors
    /// Those of [`Executor::read_records`].
    pub fn save(&self, layer: usize, place: Place, block: &UsedBlock) -> Result<Vec<u8>> {
        let layout = self.layout(place.as_page().is_some());
        let records = self.read_records(layer, place)?;
        let mut saved = vec![0; records.len()];
        let order = self.backend().arrangement();
        for (record, saved) in records.chunks_exact(layout.bytes()).zip(saved.chunks_exact_mut(layout.bytes())) {
            record::reorder(layout, [order, Arrangement::Canonical], record, saved);
            record::clear_rows(layout, saved, block.used, block.is_first);
        }
        Ok(saved)
    }

    /// Could [`save`](Self::save) have given these records?
    ///
    /// # Errors
    /// Why not, by head and field.
    pub fn check_saved(&self, open: bool, saved: &[u8]) -> std::result::Result<(), String> {
        let layout = self.layout(open);
        for (head, record) in saved.chunks_exact(layout.bytes()).enumerate() {
            record::check(layout, record).map_err(|why| format!("head {head}: {why}"))?;
        }
        Ok(())
    }

    /// Writes what [`save`](Self::save) gave and [`check_saved`](Self::check_saved) accepts.
    ///
    /// # Errors
    /// Those of [`Executor::write_records`].
    pub fn restore(&mut self, layer: usize, place: Place, saved: &[u8]) -> Result<()> {
        let layout = self.layout(place.as_page().is_some());
        let order = self.backend().arrangement();
        let mut records = vec![0; saved.len()];
        for (saved, record) in saved.chunks_exact(layout.bytes()).zip(records.chunks_exact_mut(layout.bytes())) {
            record::reorder(layout, [Arrangement::Canonical, order], saved, record);
        }
        self.write_records(layer, place, &records)
    }
}
