//! Parallel loops, on the OpenMP threads of the process where it has some, else on rayon's.
//!
//! torch computes on the threads of libgomp (or of libiomp5, which is to have the same entry points: not tried). They
//! wait for the next loop by spinning, bound to cores where the user or vLLM asks for it, and so is the thread that calls
//! them. Threads of our own would share the cores with those that spin, or inherit the one core of their creator. In a
//! process without torch nobody has loaded an OpenMP, and rayon does the work.

use rayon::prelude::*;
use std::any::Any;
use std::ffi::{c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Whose threads run a loop.
#[derive(Debug, Clone, Copy)]
pub enum Threads {
    /// Those of the OpenMP that the process has loaded.
    OpenMp(OpenMp),
    /// Those of rayon's global pool.
    Rayon,
}

/// The entry points of libgomp. A team always has all threads: libgomp ends those that a smaller one leaves out.
#[derive(Debug, Clone, Copy)]
pub struct OpenMp {
    parallel: unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint),
    max_threads: unsafe extern "C" fn() -> c_int,
}

impl Threads {
    /// The threads of this process: OpenMP's from the first call on that finds them. A team does not survive `fork`: in
    /// another process than that of the first call they are rayon's.
    #[must_use]
    pub fn of_process() -> Self {
        static FOUND: OnceLock<OpenMp> = OnceLock::new();
        static FIRST: OnceLock<u32> = OnceLock::new();
        let current = std::process::id();
        if *FIRST.get_or_init(|| current) != current {
            return Self::Rayon;
        }
        match FOUND.get().copied().or_else(OpenMp::find) {
            Some(openmp) => Self::OpenMp(*FOUND.get_or_init(|| openmp)),
            None => Self::Rayon,
        }
    }

    /// Most threads that a loop runs on, if this thread calls it.
    #[must_use]
    pub fn count(self) -> usize {
        match self {
            // SAFETY: a function without arguments.
            Self::OpenMp(openmp) => usize::try_from(unsafe { (openmp.max_threads)() }).unwrap_or(1),
            Self::Rayon => rayon::current_num_threads(),
        }
    }

    /// Calls `work(state, index, item)` for every item, with a state for each thread.
    ///
    /// # Panics
    /// If `work` does.
    pub fn for_each<S, T: Send>(
        self,
        items: &mut [T],
        init: impl Fn() -> S + Sync + Send,
        work: impl Fn(&mut S, usize, &mut T) + Sync + Send,
    ) {
        match self {
            Self::OpenMp(openmp) => {
                let (next, len, first) = (AtomicUsize::new(0), items.len(), Items(items.as_mut_ptr()));
                openmp.run(&|| {
                    let mut state = init();
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= len {
                            return;
                        }
                        // SAFETY: within the items, and each index is taken once.
                        work(&mut state, index, unsafe { &mut *first.at(index) });
                    }
                });
            }
            Self::Rayon => {
                let items = items.par_iter_mut().enumerate();
                items.for_each_init(init, |state, (index, item)| work(state, index, item));
            }
        }
    }

    /// What `work` gives of each index below `count`.
    ///
    /// # Panics
    /// If `work` does.
    pub fn map<R: Send>(self, count: usize, work: impl Fn(usize) -> R + Sync + Send) -> Vec<R> {
        let mut results: Vec<Option<R>> = (0..count).map(|_| None).collect();
        self.for_each(&mut results, || (), |(), index, result| *result = Some(work(index)));
        results.into_iter().flatten().collect()
    }
}

/// The first of some items that threads take one by one.
struct Items<T>(*mut T);

// SAFETY: a thread takes whole items, which may go from thread to thread.
unsafe impl<T: Send> Sync for Items<T> {}

impl<T> Items<T> {
    /// # Safety
    /// There is an item of this index.
    unsafe fn at(&self, index: usize) -> *mut T {
        // SAFETY: passed on.
        unsafe { self.0.add(index) }
    }
}

/// What the threads of a team run.
struct Region<'a> {
    body: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A panic must not pass through the frames of libgomp.
extern "C" fn enter(region: *mut c_void) {
    // SAFETY: `OpenMp::run` passes a region that outlives the team.
    let region = unsafe { &*region.cast::<Region<'_>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(region.body)) {
        *region.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }
}

impl OpenMp {
    #[cfg(all(unix, not(miri)))]
    fn find() -> Option<Self> {
        let process = libloading::os::unix::Library::this();
        // SAFETY: these are the types of the functions, in libgomp and in libiomp5.
        unsafe {
            Some(Self {
                parallel: *process.get(b"GOMP_parallel\0").ok()?,
                max_threads: *process.get(b"omp_get_max_threads\0").ok()?,
            })
        }
    }

    #[cfg(not(all(unix, not(miri))))]
    fn find() -> Option<Self> {
        None
    }

    /// Runs `body` on every thread of a team, this one among them.
    fn run(self, body: &(dyn Fn() + Sync)) {
        let region = Region { body, panic: Mutex::new(None) };
        let data = (&raw const region).cast_mut().cast();
        // SAFETY: `enter` gets the region, which lives until all threads have left it: then the call returns.
        unsafe { (self.parallel)(enter, data, 0, 0) };
        if let Some(panic) = region.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{OpenMp, Threads};
    use std::ffi::{c_int, c_uint, c_void};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A team of three threads.
    unsafe extern "C" fn parallel(body: extern "C" fn(*mut c_void), data: *mut c_void, _: c_uint, _: c_uint) {
        let data = data as usize;
        std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(move || body(data as *mut c_void)))));
    }

    unsafe extern "C" fn max_threads() -> c_int {
        3
    }

    const BOTH: [Threads; 2] = [Threads::Rayon, Threads::OpenMp(OpenMp { parallel, max_threads })];

    #[test]
    fn every_item_is_worked_on_once() {
        for threads in BOTH {
            for len in [0, 1, 2, 100] {
                let mut items = vec![1usize; len];
                let states = AtomicUsize::new(0);
                let init = || {
                    states.fetch_add(1, Ordering::Relaxed);
                };
                threads.for_each(&mut items, init, |(), index, item| *item += index);
                assert!(items.iter().enumerate().all(|(index, &item)| item == index + 1), "{items:?}");
                assert_eq!(threads.map(len, |index| index * index), (0..len).map(|i| i * i).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_panic_of_one_thread_is_the_caller_s() {
        for threads in BOTH {
            let run = || threads.map(20, |index| assert_ne!(index, 7, "seven"));
            let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            assert!(panic.downcast_ref::<String>().is_some_and(|why| why.contains("seven")));
        }
    }
}
