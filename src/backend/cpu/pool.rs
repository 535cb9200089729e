//! A persistent pool of threads. Running a closure on all of them allocates nothing and, when steps
//! follow one another closely, costs about a microsecond: a thread that has finished spins for a
//! while before it sleeps.
//!
//! The pool knows nothing about the work. Kernels split it by worker index or by an atomic counter;
//! their results do not depend on how.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Rounds of waiting before a thread sleeps: longer than the time between the ops of a decode step.
const SPINS: usize = 1280;
/// Rounds of waiting before a thread offers its core to others each time.
const SPINS_BEFORE_YIELD: usize = 1024;

/// Threads that run one closure at a time, all together. Dropping the pool ends them.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held for the length of a run.
    running: Mutex<()>,
    handles: Vec<JoinHandle<()>>,
}

/// One thread's part in a run.
#[derive(Clone, Copy)]
pub struct Worker<'a> {
    /// Which of the threads this is, from 0, the caller of [`Pool::run`].
    pub index: usize,
    /// How many take part.
    pub count: usize,
    shared: &'a Shared,
}

type Job<'a> = &'a (dyn Fn(Worker<'_>) + Sync);

struct Shared {
    /// Counts runs; a worker waits for it to change.
    epoch: AtomicUsize,
    /// The closure of this run, for the length of the run.
    job: UnsafeCell<Option<Job<'static>>>,
    /// Workers that have not finished this run, the caller not counted.
    unfinished: AtomicUsize,
    /// Threads that have reached the barrier, in all.
    arrived: AtomicUsize,
    /// Some thread of this run has panicked.
    panicked: AtomicBool,
    payload: Mutex<Option<Box<dyn Any + Send>>>,
    closing: AtomicBool,
    /// Guards sleeping and waking only.
    sleep: Mutex<()>,
    begun: Condvar,
    ended: Condvar,
    count: usize,
    /// Whether workers write down when they begin and end their parts.
    watched: AtomicBool,
    /// What they wrote, each its own list, as long as there is room.
    parts: Vec<Mutex<Vec<Part>>>,
}

/// When a thread began its part of a run, and when it ended.
pub type Part = (Instant, Instant);

// SAFETY: `job` is the one field that is not Sync. It is written only by the caller of `run`, who
// holds `running` and knows that no worker is inside a run; workers read it after they have seen the
// new epoch (Release, Acquire), and not after they have counted themselves finished.
unsafe impl Sync for Shared {}
// SAFETY: the closure that `job` refers to is Sync, so it may be called from any thread.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] among them; at least that one.
    ///
    /// # Errors
    /// What the operating system says when it has no thread to give.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let count = threads.max(1);
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            unfinished: AtomicUsize::new(0),
            arrived: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            payload: Mutex::new(None),
            closing: AtomicBool::new(false),
            sleep: Mutex::new(()),
            begun: Condvar::new(),
            ended: Condvar::new(),
            count,
            watched: AtomicBool::new(false),
            parts: (0..count).map(|_| Mutex::default()).collect(),
        });
        let mut pool = Pool { shared, running: Mutex::new(()), handles: Vec::new() };
        for index in 1..count {
            let shared = pool.shared.clone();
            let thread = std::thread::Builder::new().name(format!("tessera-{index}"));
            pool.handles.push(thread.spawn(move || shared.serve(index))?);
        }
        Ok(pool)
    }

    /// How many threads take part in a run.
    pub fn threads(&self) -> usize {
        self.shared.count
    }

    /// From now on each thread writes down its parts of runs, the first `capacity` of them; 0 stops it. It costs two
    /// readings of the clock a run.
    pub fn watch(&self, capacity: usize) {
        for parts in &self.shared.parts {
            *lock(parts) = Vec::with_capacity(capacity);
        }
        self.shared.watched.store(capacity > 0, Relaxed);
    }

    /// What each thread has written since [`watch`](Pool::watch).
    pub fn parts(&self) -> Vec<Vec<Part>> {
        self.shared.parts.iter().map(|parts| lock(parts).clone()).collect()
    }

    /// Calls `job` once on every thread, on this one as worker 0, and returns when all have returned.
    /// A second caller waits; a call from inside a run would wait for itself.
    ///
    /// # Panics
    /// If `job` panics on any thread, with the first payload, after all threads have left it.
    pub fn run(&self, job: impl Fn(Worker<'_>) + Sync) {
        let _running = lock(&self.running);
        let shared = &*self.shared;
        let job: Job<'_> = &job;
        // SAFETY: only the lifetime changes. The reference is dropped below, before `job` is, and
        // `shared.call` returns even when the closure panics.
        let job: Job<'static> = unsafe { std::mem::transmute(job) };
        // SAFETY: no worker reads `job` between runs, and `running` keeps other callers out.
        unsafe { *shared.job.get() = Some(job) };
        shared.arrived.store(0, Relaxed);
        shared.panicked.store(false, Relaxed);
        shared.unfinished.store(shared.count - 1, Relaxed);
        shared.announce();
        shared.call(job, 0);
        shared.wait_for_workers();
        // SAFETY: as above; all workers have finished.
        unsafe { *shared.job.get() = None };
        if let Some(payload) = lock(&shared.payload).take() {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.closing.store(true, Relaxed);
        self.shared.announce();
        for handle in self.handles.drain(..) {
            // A worker catches what its jobs throw, so it has nothing to report.
            let _ = handle.join();
        }
    }
}

impl Worker<'_> {
    /// Waits until every thread of the run has called it as often as this one. What a thread wrote
    /// before, all threads see after.
    ///
    /// # Panics
    /// If another thread has panicked, since it will never arrive.
    pub fn barrier(self) {
        let shared = self.shared;
        let ticket = shared.arrived.fetch_add(1, AcqRel);
        let everyone = (ticket / self.count + 1) * self.count;
        let mut spins = 0;
        while shared.arrived.load(Acquire) < everyone {
            if shared.panicked.load(Relaxed) {
                // Not a second payload: the first thread's own is what the caller shall see.
                resume_unwind(Box::new(()));
            }
            spin(&mut spins);
        }
    }

    /// This thread's share of `0..n` when it is cut into `count` runs of nearly equal length.
    pub fn share(self, n: usize) -> std::ops::Range<usize> {
        n * self.index / self.count..n * (self.index + 1) / self.count
    }
}

impl Shared {
    /// Starts a run, or the end.
    fn announce(&self) {
        let _sleep = lock(&self.sleep);
        self.epoch.fetch_add(1, Release);
        self.begun.notify_all();
    }

    /// The life of a worker.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_run(seen);
            if self.closing.load(Relaxed) {
                return;
            }
            // SAFETY: this run has begun and this worker has not finished it.
            if let Some(job) = unsafe { *self.job.get() } {
                self.call(job, index);
            }
            if self.unfinished.fetch_sub(1, AcqRel) == 1 {
                let _sleep = lock(&self.sleep);
                self.ended.notify_one();
            }
        }
    }

    fn call(&self, job: Job<'_>, index: usize) {
        let worker = Worker { index, count: self.count, shared: self };
        let begin = self.watched.load(Relaxed).then(Instant::now);
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(worker))) {
            let mut first = lock(&self.payload);
            if !self.panicked.swap(true, Relaxed) {
                *first = Some(payload);
            }
        }
        if let Some(begin) = begin {
            let mut parts = lock(&self.parts[index]);
            if parts.len() < parts.capacity() {
                parts.push((begin, Instant::now()));
            }
        }
    }

    fn wait_for_run(&self, seen: usize) -> usize {
        let changed = || {
            let epoch = self.epoch.load(Acquire);
            (epoch != seen).then_some(epoch)
        };
        let mut spins = 0;
        while spins < SPINS {
            if let Some(epoch) = changed() {
                return epoch;
            }
            spin(&mut spins);
        }
        let mut sleep = lock(&self.sleep);
        loop {
            if let Some(epoch) = changed() {
                return epoch;
            }
            sleep = self.begun.wait(sleep).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn wait_for_workers(&self) {
        let mut spins = 0;
        while spins < SPINS {
            if self.unfinished.load(Acquire) == 0 {
                return;
            }
            spin(&mut spins);
        }
        let mut sleep = lock(&self.sleep);
        while self.unfinished.load(Acquire) != 0 {
            sleep = self.ended.wait(sleep).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Waits a moment; when that has been for long, lets another thread have the core.
fn spin(spins: &mut usize) {
    *spins += 1;
    if *spins < SPINS_BEFORE_YIELD {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

/// The pool's mutexes guard no invariant that a panic could break.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_runs_once_and_sees_what_others_wrote_before_a_barrier() {
        for threads in 1..=5 {
            let pool = Pool::new(threads).unwrap();
            for _ in 0..200 {
                let written: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                pool.run(|worker| {
                    assert_eq!(worker.count, threads);
                    for round in 1..=3 {
                        written[worker.index].fetch_add(1, Relaxed);
                        worker.barrier();
                        assert!(written.iter().all(|w| w.load(Relaxed) == round));
                        worker.barrier();
                    }
                });
                assert!(written.iter().all(|w| w.load(Relaxed) == 3));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_past_a_barrier_and_the_pool_lives_on() {
        for threads in 1..=4 {
            let pool = Pool::new(threads).unwrap();
            for culprit in 0..threads {
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(|worker| {
                        if worker.index == culprit {
                            panic!("worker {culprit} fell");
                        }
                        worker.barrier();
                    })
                }));
                let payload = outcome.expect_err("the run must not succeed");
                assert_eq!(payload.downcast_ref::<String>(), Some(&format!("worker {culprit} fell")));
                let calls = AtomicUsize::new(0);
                pool.run(|_| {
                    calls.fetch_add(1, Relaxed);
                });
                assert_eq!(calls.into_inner(), threads);
            }
        }
    }

    #[test]
    fn watched_threads_write_down_their_parts() {
        let pool = Pool::new(3).unwrap();
        pool.run(|_| ());
        pool.watch(2);
        (0..5).for_each(|_| pool.run(|worker| worker.barrier()));
        let parts = pool.parts();
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2], "as many as there is room for");
        // Nobody passes the barrier of a run before all have begun it.
        let begun = parts.iter().map(|parts| parts[0].0).max();
        assert!(parts.iter().all(|parts| Some(parts[0].1) >= begun && parts[0].1 <= parts[1].0));
        pool.watch(0);
        pool.run(|_| ());
        assert!(pool.parts().iter().all(Vec::is_empty));
    }

    #[test]
    fn shares_cover_everything_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads).unwrap();
            for n in [0, 1, 2, 3, 7, 64, 65] {
                let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                pool.run(|worker| {
                    for i in worker.share(n) {
                        hits[i].fetch_add(1, Relaxed);
                    }
                });
                assert!(hits.iter().all(|h| h.load(Relaxed) == 1), "{threads} threads, {n} items");
            }
        }
    }
}
