//! Progress where a person would wait; nothing when stderr is not a terminal.

use crate::graph::Control;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A bar that appears after half a second, follows a [`Control`], and is gone when dropped.
pub struct Progress {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Follows the work under way, called `what`. With `quiet`, or without a terminal, does nothing.
    pub fn follow(what: &'static str, control: &Control, quiet: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        if quiet || !std::io::stderr().is_terminal() {
            return Progress { stop, thread: None };
        }
        let (stopped, control) = (stop.clone(), control.clone());
        let thread = std::thread::spawn(move || {
            std::thread::park_timeout(Duration::from_millis(500));
            if stopped.load(Ordering::Acquire) {
                return;
            }
            let bar = bar(what, 1);
            while !stopped.load(Ordering::Acquire) {
                let (done, total) = control.progress();
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                std::thread::park_timeout(Duration::from_millis(100));
            }
            bar.finish_and_clear();
        });
        Progress { stop, thread: Some(thread) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A bar that failed to draw is nobody's problem.
            let _ = thread.join();
        }
    }
}

/// A bar of `total` units on stderr, hidden when that is not a terminal.
pub fn bar(what: &'static str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{msg} {bar:30} {percent}% ({elapsed})");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what);
    bar
}

/// Shows how far a preset's weights are if they take longer than half a second; gone when they are done.
pub fn making_weights() -> crate::runtime::model::Progress {
    let bar = std::sync::OnceLock::new();
    let start = std::time::Instant::now();
    crate::runtime::model::Progress(Arc::new(move |done, total| {
        if start.elapsed() > Duration::from_millis(500) {
            let bar = bar.get_or_init(|| self::bar("making weights", total));
            bar.set_position(done);
            if done >= total {
                bar.finish_and_clear();
            }
        }
    }))
}
