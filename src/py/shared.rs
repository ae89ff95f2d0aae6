//! A cache that its steps share.

use crate::cache;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) type Shared = Arc<Mutex<cache::PagedKvCache>>;

pub(super) fn lock(cache: &Shared) -> MutexGuard<'_, cache::PagedKvCache> {
    // A panic under the lock is a bug that was already reported; the cache stays usable.
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}
