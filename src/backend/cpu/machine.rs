//! What kernels run on: an instruction set and a pool of threads.

use super::lanes::{Isa, Kernel, Lanes};
use super::pool::{Pool, Worker};

/// An instruction set and the threads that use it.
pub struct Machine {
    isa: Isa,
    pool: Pool,
}

impl Machine {
    /// `threads` threads on the fastest instruction set there is.
    ///
    /// # Errors
    /// What the operating system says when it has no thread to give.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        Machine::with_isa(Isa::detect(), threads)
    }

    /// `threads` threads on `isa`, which must be one of [`Isa::available`].
    ///
    /// # Errors
    /// What the operating system says when it has no thread to give.
    pub fn with_isa(isa: Isa, threads: usize) -> std::io::Result<Self> {
        Ok(Machine { isa, pool: Pool::new(threads)? })
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How many threads take part in [`Machine::run`].
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The threads, for work that is not a kernel.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Runs `task` on every thread, and returns when all have returned.
    ///
    /// # Panics
    /// If the task panics on any thread.
    pub fn run<T: Task>(&self, task: &T) {
        self.pool.run(|worker| self.isa.run(Part { task, worker }));
    }
}

/// Work that all threads do together, written over [`Lanes`].
pub trait Task: Sync {
    /// One worker's part. Implementations are `#[inline(always)]`, and so is what they call in loops.
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>);
}

struct Part<'a, T> {
    task: &'a T,
    worker: Worker<'a>,
}

impl<T: Task> Kernel for Part<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        self.task.run(lanes, self.worker);
    }
}
