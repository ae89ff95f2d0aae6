//! Places: which page or tile each block of a sequence is read from.
//!
//! A [`Place`] is one `i32`. The table of places has a row a sequence and persists from step to step: whoever changes a
//! block's place changes its entry, so a step costs what it changes and not what its sequences hold. The entry of block
//! `i` of the sequence in row `r` is `entries[r * stride + i]`; entries of released blocks and beyond a sequence's end
//! are stale.

use super::{BlockId, PageId};

/// Where a block is read: page `p` where `p >= 0`, the tile of block `!p` where `p < 0`.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place(i32);

/// What a [`Place`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PlaceKind {
    /// The block is open, or blocks do not seal.
    Page(PageId),
    /// The block is sealed.
    Tile(BlockId),
}

impl Place {
    /// A page. Ids are below 2^31.
    #[must_use]
    pub const fn page(id: PageId) -> Self {
        Self(id.0 as i32)
    }

    /// The tile of a block. Ids are below 2^31.
    #[must_use]
    pub const fn tile(id: BlockId) -> Self {
        Self(!(id.0 as i32))
    }

    /// The place that a word says.
    #[must_use]
    pub const fn from_word(word: i32) -> Self {
        Self(word)
    }

    /// The place in one word.
    #[must_use]
    pub const fn word(self) -> i32 {
        self.0
    }

    /// Page or tile.
    #[must_use]
    pub const fn kind(self) -> PlaceKind {
        if self.0 >= 0 { PlaceKind::Page(PageId(self.0 as u32)) } else { PlaceKind::Tile(BlockId(!self.0 as u32)) }
    }

    /// The page, `None` for a tile.
    #[must_use]
    pub const fn as_page(self) -> Option<PageId> {
        match self.kind() {
            PlaceKind::Page(page) => Some(page),
            PlaceKind::Tile(_) => None,
        }
    }
}

/// A borrowed table of places.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    entries: &'a [Place],
    stride: usize,
}

impl<'a> Places<'a> {
    /// A table of rows of `stride` entries.
    #[must_use]
    pub const fn new(entries: &'a [Place], stride: usize) -> Self {
        Self { entries, stride }
    }

    /// All rows, one after the other.
    #[must_use]
    pub const fn entries(self) -> &'a [Place] {
        self.entries
    }

    /// Entries of a row.
    #[must_use]
    pub const fn stride(self) -> usize {
        self.stride
    }

    /// One row.
    #[must_use]
    pub fn row(self, row: usize) -> &'a [Place] {
        &self.entries[row * self.stride..][..self.stride]
    }
}

/// An entry of the table that has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaceChange {
    /// Row of the table.
    pub row: usize,
    /// Index of the block in the sequence.
    pub block: usize,
    /// What the entry is now.
    pub place: Place,
}

/// What a copy of the table elsewhere is to be told.
#[derive(Debug, Clone, Default)]
pub struct PlaceChanges {
    /// The table has moved or grown: all of it is to be copied, and `entries` is empty.
    pub is_whole: bool,
    /// In the order in which they changed; an entry may be there twice.
    pub entries: Vec<PlaceChange>,
}

/// The table itself, and what has changed since it was last asked.
#[derive(Debug, Clone, Default)]
pub(super) struct PlaceTable {
    entries: Vec<Place>,
    stride: usize,
    changes: PlaceChanges,
}

impl PlaceTable {
    pub(super) fn view(&self) -> Places<'_> {
        Places::new(&self.entries, self.stride)
    }

    /// Makes room for `num_rows` rows of `width` entries.
    pub(super) fn reserve(&mut self, num_rows: usize, width: usize) {
        if width > self.stride {
            let stride = width.next_power_of_two();
            let mut entries = vec![Place(0); self.num_rows().max(num_rows) * stride];
            for (to, from) in entries.chunks_exact_mut(stride).zip(self.entries.chunks_exact(self.stride.max(1))) {
                to[..self.stride].copy_from_slice(from);
            }
            (self.entries, self.stride) = (entries, stride);
            self.set_whole();
        }
        if num_rows * self.stride > self.entries.len() {
            self.entries.resize(num_rows.next_power_of_two() * self.stride, Place(0));
            self.set_whole();
        }
    }

    fn num_rows(&self) -> usize {
        self.entries.len().checked_div(self.stride).unwrap_or(0)
    }

    fn set_whole(&mut self) {
        self.changes = PlaceChanges { is_whole: true, entries: Vec::new() };
    }

    pub(super) fn set(&mut self, row: usize, block: usize, place: Place) {
        self.entries[row * self.stride + block] = place;
        if self.changes.is_whole {
            return;
        }
        self.changes.entries.push(PlaceChange { row, block, place });
        if self.changes.entries.len() > self.entries.len() {
            self.set_whole();
        }
    }

    /// What has changed since the last call.
    pub(super) fn take_changes(&mut self) -> PlaceChanges {
        std::mem::take(&mut self.changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_page_or_the_tile_of_a_block() {
        assert_eq!(Place::page(PageId(7)).kind(), PlaceKind::Page(PageId(7)));
        assert_eq!(Place::tile(BlockId(0)).kind(), PlaceKind::Tile(BlockId(0)));
        assert_eq!((Place::page(PageId(7)).word(), Place::tile(BlockId(7)).word()), (7, -8));
        assert_eq!((Place::from_word(-1).as_page(), Place::from_word(1).as_page()), (None, Some(PageId(1))));
    }

    #[test]
    fn a_table_keeps_its_entries_when_rows_grow() {
        let mut table = PlaceTable::default();
        table.reserve(2, 3);
        table.set(1, 2, Place::page(PageId(5)));
        table.reserve(9, 30);
        assert_eq!(table.view().row(1)[2], Place::page(PageId(5)));
        assert!(table.view().row(8).len() >= 30);
    }

    #[test]
    fn a_copy_that_applies_the_changes_is_the_table() {
        let mut table = PlaceTable::default();
        table.reserve(4, 4);
        assert!(table.take_changes().is_whole);
        table.set(3, 1, Place::tile(BlockId(9)));
        table.set(3, 1, Place::page(PageId(2)));
        let changes = table.take_changes();
        let change = |place| PlaceChange { row: 3, block: 1, place };
        assert_eq!(changes.entries, [change(Place::tile(BlockId(9))), change(Place::page(PageId(2)))]);
        assert!(!changes.is_whole && table.take_changes().entries.is_empty());
    }

    #[test]
    fn changes_that_nobody_asks_for_do_not_pile_up() {
        let mut table = PlaceTable::default();
        table.reserve(1, 4);
        table.take_changes();
        (0..100).for_each(|_| table.set(0, 0, Place::page(PageId(0))));
        assert!(table.take_changes().is_whole);
    }
}
