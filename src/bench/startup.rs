//! How long a process takes until it is ready and until its first token, with weight files in the page
//! cache and without.

use crate::error::{Error, Result};
use serde::Serialize;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// One start of the program.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Start {
    /// From before the process was made until its model was loaded.
    pub ready_ms: f64,
    /// From before the process was made until its first token.
    pub first_token_ms: f64,
}

/// Starts `program run ARGS --max-tokens 1 --json` and reads its timings; what the process spent outside
/// of them, being made and ending, counts as before it was ready.
///
/// # Errors
/// A program that cannot be started or fails: its own words.
pub fn start(program: &Path, args: &[String]) -> Result<Start> {
    let begin = Instant::now();
    let output = Command::new(program)
        .arg("run")
        .args(args)
        .args(["--max-tokens", "1", "--ignore-eos", "--json", "--quiet"])
        .output()
        .map_err(|source| Error::io(program, source))?;
    let wall = begin.elapsed().as_secs_f64() * 1e3;
    let failed = |problem: String| Error::Device { device: "a child process".into(), problem };
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_string()));
    }
    let object: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(|error| failed(format!("its output: {error}")))?;
    let time = |key: &str| {
        object["timings_ms"][key].as_f64().ok_or_else(|| failed(format!("its timings have no `{key}`")))
    };
    let outside = (wall - time("total")?).max(0.0);
    let ready_ms = outside + time("load")?;
    Ok(Start { ready_ms, first_token_ms: ready_ms + time("first_token")? })
}

/// Asks the system to forget what it has cached of the files of a directory; whether it was asked.
pub fn forget(dir: &Path) -> bool {
    let Ok(files) = std::fs::read_dir(dir) else { return false };
    files.flatten().filter(|file| file.path().is_file()).all(|file| drop_cache(&file.path()))
}

#[cfg(target_os = "linux")]
fn drop_cache(path: &Path) -> bool {
    use std::os::fd::AsRawFd;
    let Ok(file) = File::open(path) else { return false };
    // SAFETY: the descriptor is open until `file` is dropped; the call reads no memory of ours.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn drop_cache(path: &Path) -> bool {
    let _ = File::open(path);
    false
}
