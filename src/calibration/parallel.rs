//! A parallel loop over OpenMP's threads, or over threads that live for one call.
//!
//! rayon's pool would deadlock here: a worker that waits for its subtasks may steal another task, and that task
//! may wait for the layer lock which the worker already holds.

use crate::parallel::Threads;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

/// Calls `work(index, item)` for every item; on several threads if `worth_threads`, else on this one.
pub(super) fn for_each<T: Send>(items: &mut [T], worth_threads: bool, work: impl Fn(usize, &mut T) + Sync) {
    let threads = Threads::of_process();
    if worth_threads && matches!(threads, Threads::OpenMp(_)) {
        return threads.for_each(items, || (), |(), index, item| work(index, item));
    }
    let num_threads = if worth_threads { items.len().min(threads.count()) } else { 1 };
    let queue = Mutex::new(items.iter_mut().enumerate());
    let take_and_work = || {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((index, item)) = next else { return };
            work(index, item);
        }
    };
    thread::scope(|scope| {
        for _ in 1..num_threads {
            // If a thread cannot be spawned, this one does its share.
            let _ = Builder::new().spawn_scoped(scope, take_and_work);
        }
        take_and_work();
    });
}

#[cfg(test)]
mod tests {
    use super::for_each;

    #[test]
    fn every_item_is_worked_on_once_on_one_thread_or_many() {
        for worth_threads in [false, true] {
            for len in [0, 1, 7, 100] {
                let mut items = vec![1usize; len];
                for_each(&mut items, worth_threads, |index, item| *item += index);
                assert!(items.iter().enumerate().all(|(index, &item)| item == index + 1), "{items:?}");
            }
        }
    }
}
