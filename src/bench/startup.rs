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

/// Makes the system forget what it has cached of the files of a directory.
///
/// # Errors
/// Why it did not, in words: a page that some process has mapped, or that was just written, stays.
pub fn forget(dir: &Path) -> std::result::Result<(), String> {
    let named = |path: &Path, problem: &dyn std::fmt::Display| format!("{}: {problem}", path.display());
    let files = std::fs::read_dir(dir).map_err(|error| named(dir, &error))?;
    let (mut cached, mut all) = (0, 0);
    for path in files.flatten().map(|entry| entry.path()).filter(|path| path.is_file()) {
        let file = File::open(&path).map_err(|error| named(&path, &error))?;
        // Pages that wait to be written are not dropped.
        file.sync_all().map_err(|error| named(&path, &error))?;
        let (here, pages) = drop_pages(&file).map_err(|error| named(&path, &error))?;
        (cached, all) = (cached + here, all + pages);
    }
    // A few pages may have been read ahead by others.
    if cached * 20 > all {
        return Err(format!("{cached} of {all} pages of {} stayed in the page cache", dir.display()));
    }
    Ok(())
}

/// Drops the pages of a file; how many are still cached, and how many it has.
#[cfg(target_os = "linux")]
fn drop_pages(file: &File) -> std::io::Result<(usize, usize)> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open as long as `file` is; the call reads no memory of ours.
    let code = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    if code != 0 {
        return Err(std::io::Error::from_raw_os_error(code));
    }
    if file.metadata()?.len() == 0 {
        return Ok((0, 0));
    }
    // SAFETY: the mapping is not read; only whether its pages are in memory is asked.
    let map = unsafe { memmap2::Mmap::map(file)? };
    // SAFETY: sysconf reads a number and touches no memory of ours.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let mut states = vec![0u8; map.len().div_ceil(page)];
    // SAFETY: the range is the mapping, which begins at a page; there is a byte of ours for each of its pages.
    let code = unsafe { libc::mincore(map.as_ptr() as *mut _, map.len(), states.as_mut_ptr()) };
    if code != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok((states.iter().filter(|state| **state & 1 == 1).count(), states.len()))
}

#[cfg(not(target_os = "linux"))]
fn drop_pages(_: &File) -> std::io::Result<(usize, usize)> {
    Err(std::io::Error::other("this system has no way to drop what it has cached of a file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_elsewhere_stays_and_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, vec![1u8; 1 << 20]).unwrap();
        // Where the system forgets, it is seen to: a file system in memory never does, and says so.
        let first = forget(dir.path());
        // SAFETY: nobody changes the file while it is mapped.
        let map = unsafe { memmap2::Mmap::map(&File::open(&path).unwrap()).unwrap() };
        assert!(map.iter().all(|byte| *byte == 1));
        let second = forget(dir.path());
        if cfg!(target_os = "linux") {
            let reason = second.unwrap_err();
            assert!(reason.contains("256 of 256 pages"), "{reason}");
        } else {
            assert!(first.is_err());
        }
        assert!(forget(&dir.path().join("nowhere")).is_err());
    }
}
