//! Saving and loading blocks: the records of a block's heads, one after the other, as files hold them.

use super::{Cpu, ORDER};
use crate::format::{Arrangement, RecordLayout};
use crate::paging::{BlockId, PageId, Place, UsedBlock};
use crate::quant::record;

impl Cpu {
    fn layout(&self, open: bool) -> RecordLayout {
        self.tile.filter(|_| !open).unwrap_or(self.page)
    }

    /// Bytes of one record of a block, open or sealed.
    #[must_use]
    pub fn record_bytes(&self, open: bool) -> usize {
        self.layout(open).bytes()
    }

    /// Writes what a file holds of a block: of its page, or without one of its tile. `out` is as long as the records of
    /// all heads.
    pub fn save(&self, layer: usize, block: &UsedBlock, page: Option<PageId>, out: &mut [u8]) {
        for (head, out) in out.chunks_exact_mut(self.record_bytes(page.is_some())).enumerate() {
            let place = page.map_or(Place::tile(block.id), Place::page);
            let (layout, record) = self.record(layer, place, head);
            record::reorder(layout, [ORDER, Arrangement::Canonical], record, out);
            record::clear_rows(layout, out, block.used, block.is_first);
        }
    }

    /// Is this what a file may hold of a block?
    ///
    /// # Errors
    /// Why not, by head and field.
    pub fn check_saved(&self, open: bool, saved: &[u8]) -> Result<(), String> {
        let layout = self.layout(open);
        for (head, record) in saved.chunks_exact(layout.bytes()).enumerate() {
            record::check(layout, record).map_err(|why| format!("head {head}: {why}"))?;
        }
        Ok(())
    }

    /// Takes in what a file holds of a block, there being room for it, and its page.
    ///
    /// # Errors
    /// Those of [`check_saved`](Self::check_saved).
    pub fn load(&mut self, layer: usize, block: BlockId, page: Option<PageId>, saved: &[u8]) -> Result<(), String> {
        self.check_saved(page.is_some(), saved)?;
        let layout = self.layout(page.is_some());
        let layer = &self.layers[layer];
        let (arena, index) = match page {
            Some(page) => (&layer.pages, page.0),
            None => (&layer.tiles, block.0),
        };
        for (head, saved) in saved.chunks_exact(layout.bytes()).enumerate() {
            // SAFETY: `&mut self` holds the arena exclusively, and one record is had at a time.
            let record = unsafe { arena.record_mut(index, head) };
            record::reorder(layout, [Arrangement::Canonical, ORDER], saved, record);
        }
        Ok(())
    }
}
