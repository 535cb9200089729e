//! What a number needs beside it to be believed: program, machine, load.

use serde::Serialize;
use std::fs;

/// The program and the machine, as they were when a test ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Environment {
    /// The program's version.
    pub build_version: String,
    /// How it was built: compiler, optimisation, target, flags, features.
    pub build_flags: String,
    /// The frequency governor of the first processor, where the system tells.
    pub governor: Option<String>,
    /// Runnable tasks on average over the last minute, before and after: above the number of our own
    /// threads, others were at work.
    pub load_average: [Option<f64>; 2],
    /// The share of time that the hypervisor gave to others between the two readings.
    pub steal: Option<f64>,
    /// The processors we may run on.
    pub cpus_allowed: Option<String>,
    /// Whether our threads are pinned to some of them: never, the system moves them.
    pub pinned: bool,
    /// The GPU before and after, where one computes.
    pub gpu: Option<[Gpu; 2]>,
    /// Why the GPU is not known, where one computes.
    pub gpu_unknown: Option<String>,
}

/// What NVIDIA's tool tells of a GPU; a field it does not know is none.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: Option<String>,
    /// The driver's version.
    pub driver: Option<String>,
    /// The clock of its multiprocessors.
    pub sm_mhz: Option<f64>,
    /// The clock of its memory.
    pub memory_mhz: Option<f64>,
    /// Reasons why its clocks are lower than they could be, as a mask: 0 is none, 1 idle, 4 power, 0x20 and 0x40 heat.
    pub throttle_reasons: Option<String>,
    /// Degrees Celsius.
    pub temperature: Option<f64>,
    /// What it draws.
    pub power_watts: Option<f64>,
}

/// What is asked of `nvidia-smi`, in the order of [`Gpu`]'s fields.
const QUERY: &str =
    "name,driver_version,clocks.sm,clocks.mem,clocks_throttle_reasons.active,temperature.gpu,power.draw";

impl Gpu {
    /// Asks for the state of a GPU by its number. It takes a while: not inside a clock.
    ///
    /// # Errors
    /// Why it is not known.
    pub fn query(ordinal: usize) -> Result<Self, String> {
        let output = std::process::Command::new("nvidia-smi")
            .args([
                &format!("--query-gpu={QUERY}"),
                "--format=csv,noheader,nounits",
                "-i",
                &ordinal.to_string(),
            ])
            .output()
            .map_err(|error| format!("nvidia-smi: {error}"))?;
        let said =
            String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr });
        if output.status.success() {
            Ok(Gpu::parse(&said))
        } else {
            Err(format!("nvidia-smi: {}", said.trim()))
        }
    }

    fn parse(line: &str) -> Self {
        let mut fields = line.trim().split(", ").map(|field| {
            let known = !field.is_empty() && !field.starts_with('[') && field != "N/A";
            known.then(|| field.to_string())
        });
        let mut text = || fields.next().flatten();
        let (name, driver) = (text(), text());
        let number = |text: Option<String>| text.and_then(|text| text.parse().ok());
        Gpu {
            name,
            driver,
            sm_mhz: number(text()),
            memory_mhz: number(text()),
            throttle_reasons: text(),
            temperature: number(text()),
            power_watts: number(text()),
        }
    }
}

/// The first reading; [`Watch::end`] takes the second.
#[derive(Clone, Debug)]
pub struct Watch {
    load: Option<f64>,
    ticks: Option<Ticks>,
    /// The GPU's number, and its state.
    gpu: Option<(usize, Result<Gpu, String>)>,
}

#[derive(Clone, Copy, Debug)]
struct Ticks {
    all: u64,
    stolen: u64,
}

impl Watch {
    /// Begins to watch the machine, and the GPU of this number.
    pub fn begin(gpu: Option<usize>) -> Self {
        Watch { load: load_average(), ticks: ticks(), gpu: gpu.map(|n| (n, Gpu::query(n))) }
    }

    /// What was seen.
    pub fn end(&self) -> Environment {
        let steal = self.ticks.zip(ticks()).map(|(before, after)| {
            let all = after.all.saturating_sub(before.all).max(1);
            after.stolen.saturating_sub(before.stolen) as f64 / all as f64
        });
        let states = |(n, before): (usize, Result<Gpu, String>)| -> Result<[Gpu; 2], String> {
            Ok([before?, Gpu::query(n)?])
        };
        let gpu = self.gpu.clone().map(states);
        let (gpu, gpu_unknown) = match gpu {
            None => (None, None),
            Some(Ok(states)) => (Some(states), None),
            Some(Err(reason)) => (None, Some(reason)),
        };
        Environment {
            build_version: env!("CARGO_PKG_VERSION").into(),
            build_flags: build_flags(),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            load_average: [self.load, load_average()],
            steal,
            cpus_allowed: field("/proc/self/status", "Cpus_allowed_list:"),
            pinned: false,
            gpu,
            gpu_unknown,
        }
    }
}

/// The commit that the program was built from, where the build knew.
pub fn commit() -> &'static str {
    option_env!("TESSERA_COMMIT").unwrap_or("unknown")
}

/// How many commits there are up to that one; 0 where the build did not know.
pub fn build_number() -> u64 {
    option_env!("TESSERA_BUILD_NUMBER").and_then(|n| n.parse().ok()).unwrap_or(0)
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
    let debug = if cfg!(debug_assertions) { "debug assertions on" } else { "release" };
    format!("{debug}, {}", env!("TESSERA_BUILD"))
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
    fn a_gpu_tells_what_it_knows() {
        let gpu = Gpu::parse("NVIDIA H200, 570.86.15, 1980, 3201, 0x0000000000000000, 41, [N/A]\n");
        assert_eq!((gpu.name.as_deref(), gpu.sm_mhz), (Some("NVIDIA H200"), Some(1980.0)));
        assert_eq!(gpu.throttle_reasons.as_deref(), Some("0x0000000000000000"));
        assert_eq!((gpu.temperature, gpu.power_watts), (Some(41.0), None));
        assert_eq!(Gpu::parse(""), Gpu::default());
    }

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(utc(4_102_444_799), "2099-12-31T23:59:59Z");
    }
}
