//! The sequences by id, each in the row that the table of places has for it.

use std::collections::HashMap;

use super::{Sequence, SequenceId};
use crate::error::{Error, Result};

/// A row stays a sequence's until it is removed, and is then given to another one.
#[derive(Debug, Clone, Default)]
pub(super) struct Sequences {
    row_of: HashMap<SequenceId, usize>,
    /// Rows of no sequence hold an empty one.
    rows: Vec<Sequence>,
    free: Vec<usize>,
}

impl Sequences {
    pub(super) fn row(&self, id: SequenceId) -> Result<usize> {
        self.row_of.get(&id).copied().ok_or(Error::UnknownSequence { id: id.0 })
    }

    pub(super) fn at(&self, row: usize) -> &Sequence {
        &self.rows[row]
    }

    pub(super) fn at_mut(&mut self, row: usize) -> &mut Sequence {
        &mut self.rows[row]
    }

    /// Rows, those of no sequence included.
    pub(super) fn rows(&self) -> &[Sequence] {
        &self.rows
    }

    pub(super) fn insert(&mut self, id: SequenceId, sequence: Sequence) -> usize {
        let row = self.free.pop().unwrap_or(self.rows.len());
        if row == self.rows.len() {
            self.rows.push(sequence);
        } else {
            self.rows[row] = sequence;
        }
        self.row_of.insert(id, row);
        row
    }

    pub(super) fn remove(&mut self, id: SequenceId) -> Result<Sequence> {
        let row = self.row_of.remove(&id).ok_or(Error::UnknownSequence { id: id.0 })?;
        self.free.push(row);
        let empty = Sequence::from_chain(1, Vec::new(), self.rows[row].chain);
        Ok(std::mem::replace(&mut self.rows[row], empty))
    }

    pub(super) fn contains(&self, id: SequenceId) -> bool {
        self.row_of.contains_key(&id)
    }

    pub(super) fn len(&self) -> usize {
        self.row_of.len()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.row_of.keys().copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (SequenceId, usize, &Sequence)> + '_ {
        self.row_of.iter().map(|(&id, &row)| (id, row, &self.rows[row]))
    }
}
