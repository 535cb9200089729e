//! Device time between ops that follow each other without a pause.
//!
//! A mark is an event in a stream of its own, which waits for the work that was asked for before it; the work does not
//! wait for the mark. In a recording it is a node that no op depends on. Between 262 launches of 4 to 10 us on an H200,
//! a mark in the stream of the work itself cost 2 us each, one beside it 0.2. There marks are late by up to 1 us, now and
//! then: the time of a single short op is rough, that of many is not.

use super::library::check;
use cudarc::driver::sys;
use std::ptr;
use std::time::Duration;

/// The functions called here, by the names they have in the library; [`library`](super::library) probes them.
pub(super) const FUNCTIONS: [&str; 2] = ["cuStreamWaitEvent", "cuEventRecordWithFlags"];

/// Events by their number, beside the work.
pub(super) struct Marks {
    stream: sys::CUstream,
    /// What the stream waits for.
    reached: sys::CUevent,
    events: Vec<sys::CUevent>,
    /// Whether the stream takes part in a recording.
    recorded: bool,
}

// SAFETY: the handles may be used from any thread whose current context is theirs.
unsafe impl Send for Marks {}

const TIMED: u32 = 0;
const UNTIMED: u32 = 2;

impl Marks {
    /// # Safety
    /// A context is current, is current for every later call, and lives until this is dropped.
    pub unsafe fn new() -> Result<Self, String> {
        let mut marks =
            Marks { stream: ptr::null_mut(), reached: ptr::null_mut(), events: Vec::new(), recorded: false };
        const NON_BLOCKING: u32 = 1;
        // SAFETY: the context is current; the handles are ours, and dropped with the marks also when one fails.
        unsafe {
            check("cuStreamCreate", sys::cuStreamCreate(&mut marks.stream, NON_BLOCKING))?;
            check("cuEventCreate", sys::cuEventCreate(&mut marks.reached, UNTIMED))?;
        }
        Ok(marks)
    }

    /// Mark `at` behind all that `stream` has been given, which is being recorded or not.
    ///
    /// # Safety
    /// As for [`new`](Marks::new), and the stream lives.
    pub unsafe fn mark(&mut self, at: usize, stream: sys::CUstream, recorded: bool) -> Result<(), String> {
        if self.recorded && !recorded {
            return Err("another thread records a step that is watched; watch one session at a time".into());
        }
        while self.events.len() <= at {
            let mut event = ptr::null_mut();
            // SAFETY: the context is current, the handle is ours.
            check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, TIMED) })?;
            self.events.push(event);
        }
        self.recorded |= recorded;
        const EXTERNAL: u32 = 1;
        // SAFETY: events and stream are ours; the other stream is the caller's obligation.
        unsafe {
            check("cuEventRecord", sys::cuEventRecord(self.reached, stream))?;
            check("cuStreamWaitEvent", sys::cuStreamWaitEvent(self.stream, self.reached, 0))?;
            // External to the recording: what replays it has the time.
            let flags = if recorded { EXTERNAL } else { 0 };
            check("cuEventRecordWithFlags", sys::cuEventRecordWithFlags(self.events[at], self.stream, flags))
        }
    }

    /// Ends this stream's part in what `stream` records, if it has one.
    ///
    /// # Safety
    /// As for [`mark`](Marks::mark).
    pub unsafe fn join(&mut self, stream: sys::CUstream) -> Result<(), String> {
        if !std::mem::take(&mut self.recorded) {
            return Ok(());
        }
        // SAFETY: as for `mark`.
        unsafe {
            check("cuEventRecord", sys::cuEventRecord(self.reached, self.stream))?;
            check("cuStreamWaitEvent", sys::cuStreamWaitEvent(stream, self.reached, 0))
        }
    }

    /// The times from each of the first `count` marks to the next. All work behind which they stand is done.
    ///
    /// # Safety
    /// As for [`new`](Marks::new).
    ///
    /// # Panics
    /// If so many were never made.
    pub unsafe fn between(&self, count: usize) -> Result<Vec<Duration>, String> {
        let events = &self.events[..count];
        // Those that a replay recorded are done with it; others are where this stream is.
        // SAFETY: the stream is ours.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })?;
        let took = |pair: &[sys::CUevent]| {
            let mut ms = 0f32;
            // SAFETY: both events are ours, recorded and reached; the number is ours.
            let asked = unsafe { sys::cuEventElapsedTime_v2(&mut ms, pair[0], pair[1]) };
            check("cuEventElapsedTime_v2", asked)?;
            Ok(Duration::from_secs_f32(ms.max(0.0) / 1e3))
        };
        events.windows(2).map(took).collect()
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        for &event in self.events.iter().chain([&self.reached]).filter(|event| !event.is_null()) {
            // SAFETY: made here, and nobody else has it.
            let _ = unsafe { sys::cuEventDestroy_v2(event) };
        }
        if !self.stream.is_null() {
            // SAFETY: as above.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
    }
}
