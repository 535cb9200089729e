//! What a number needs beside it to be believed: program, machine, load.

use serde::Serialize;
use std::fs;

/// The program and the machine, as they were when a test ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Environment {
    /// The program's version.
    pub build_version: String,
    /// Whether it was built with optimisation, and for what.
    pub build_flags: String,
    /// The frequency governor of the first processor, where the system tells.
    pub governor: Option<String>,
    /// Runnable tasks on average over the last minute, before and after: above the number of our own
    /// threads, others were at work.
    pub load_average: [Option<f64>; 2],
    /// The share of time that the hypervisor gave to others between the two readings.
    pub steal: Option<f64>,
    /// The processors we may run on; our threads are not pinned to any of them.
    pub cpus_allowed: Option<String>,
}

/// The first reading; [`Watch::end`] takes the second.
#[derive(Clone, Debug)]
pub struct Watch {
    load: Option<f64>,
    ticks: Option<Ticks>,
}

#[derive(Clone, Copy, Debug)]
struct Ticks {
    all: u64,
    stolen: u64,
}

impl Watch {
    /// Begins to watch the machine.
    pub fn begin() -> Self {
        Watch { load: load_average(), ticks: ticks() }
    }

    /// What was seen.
    pub fn end(&self) -> Environment {
        let steal = self.ticks.zip(ticks()).map(|(before, after)| {
            let all = after.all.saturating_sub(before.all).max(1);
            after.stolen.saturating_sub(before.stolen) as f64 / all as f64
        });
        Environment {
            build_version: env!("CARGO_PKG_VERSION").into(),
            build_flags: build_flags(),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            load_average: [self.load, load_average()],
            steal,
            cpus_allowed: field("/proc/self/status", "Cpus_allowed_list:"),
        }
    }
}

/// The commit that the program was built from, where the build knew.
pub fn commit() -> &'static str {
    option_env!("TESSERA_COMMIT").unwrap_or("unknown")
}

/// The processor's name, or the architecture where it has none.
pub fn cpu() -> String {
    let name =
        field("/proc/cpuinfo", "model name").map(|name| name.trim_start_matches([':', ' ']).to_string());
    name.unwrap_or_else(|| std::env::consts::ARCH.into())
}

/// Bytes this process had resident at most so far, where the system tells.
pub fn peak_resident() -> Option<u64> {
    let kib: u64 = field("/proc/self/status", "VmHWM:")?.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Seconds since 1970 as `2026-01-31T12:34:56Z`.
pub fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to a civil date (Howard Hinnant's algorithm): eras of 400 years from 1 March of year 0.
    let z = days + 719_468;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = z / 146_097 * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

fn build_flags() -> String {
    let optimised = if cfg!(debug_assertions) { "debug assertions on" } else { "release" };
    format!("{optimised}, {}-{}", std::env::consts::ARCH, std::env::consts::OS)
}

fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_string())
}

/// What follows a key in a file of lines.
fn field(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| Some(line.strip_prefix(key)?.trim().to_string()))
}

fn load_average() -> Option<f64> {
    read("/proc/loadavg")?.split_whitespace().next()?.parse().ok()
}

fn ticks() -> Option<Ticks> {
    let line = field("/proc/stat", "cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    Some(Ticks { all: ticks.iter().take(8).sum(), stolen: *ticks.get(7)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(utc(4_102_444_799), "2099-12-31T23:59:59Z");
    }
}
