//! Each primitive of `kernels/ptx.cuh`, on given bits, against sources that it was not written from: on the
//! emulated device (feature `emu`), on a GPU where there is one, and as GPUs once answered.
//!
//! `RECORD_PROBES=FOLDER` makes a run on a GPU write its answers there, as `chip_sm_90.txt`. Files of that kind in
//! `tests/data/ptx` are replayed on every machine: what they hold was asked of a chip, so the check that the
//! emulated device passes, it passes on evidence.

#[path = "probes/asked.rs"]
mod asked;
mod devices;
#[path = "probes/meaning.rs"]
mod meaning;

use std::fmt::Write;
use std::path::Path;
#[cfg(feature = "emu")]
use std::sync::Arc;
use tessera::backend::cuda::driver::{Driver, Shape};
use tessera::backend::cuda::gpu;

/// Where answers of GPUs are kept.
const RECORDINGS: &str = "tests/data/ptx";

/// A kernel of `kernels/emu/probes.cu`.
struct Kernel {
    name: &'static str,
    /// Threads of a block; as many blocks as `n` needs.
    block: u32,
    /// Words it writes, given those it reads.
    outputs: fn(usize) -> usize,
    /// Panics if the answer is not what the primitive means.
    check: fn(&Probe, &[u32], Who),
}

const KERNELS: [Kernel; 7] = [
    Kernel { name: "probe_mma_bf16", block: 32, outputs: |_| 128, check: meaning::mma },
    Kernel { name: "probe_mma_f16", block: 32, outputs: |_| 128, check: meaning::mma },
    Kernel { name: "probe_load_matrices", block: 32, outputs: |_| 256, check: meaning::load_matrices },
    Kernel { name: "probe_shuffle", block: 32, outputs: |_| 128, check: meaning::shuffle },
    Kernel { name: "probe_memory", block: 32, outputs: |_| 128, check: meaning::memory },
    Kernel { name: "probe_convert", block: 256, outputs: |n| 4 * n, check: meaning::convert },
    Kernel { name: "probe_approximate", block: 256, outputs: |n| 2 * n, check: meaning::approximate },
];

fn kernel(name: &str) -> &'static Kernel {
    KERNELS.iter().find(|kernel| kernel.name == name).unwrap_or_else(|| panic!("no probe {name}"))
}

/// One question.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    kernel: String,
    /// The kernel's `n`.
    n: u32,
    input: Vec<u32>,
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Who {
    /// It adds exactly and rounds once.
    Emulator,
    /// It adds with fewer bits.
    Chip,
}

fn check(probe: &Probe, answer: &[u32], who: Who) {
    let kernel = kernel(&probe.kernel);
    assert_eq!(answer.len(), (kernel.outputs)(probe.input.len()), "{}: words of the answer", kernel.name);
    (kernel.check)(probe, answer, who);
}

fn answer(driver: &dyn Driver, probe: &Probe) -> Vec<u32> {
    let kernel = kernel(&probe.kernel);
    let mut output = vec![0u32; (kernel.outputs)(probe.input.len())];
    let alloc = |what, words: usize| driver.alloc(what, 4 * words).unwrap().unwrap();
    let (from, to) = (alloc("in", probe.input.len()), alloc("out", output.len()));
    let found = driver.kernel(kernel.name).unwrap();
    let shape = Shape { grid: [probe.n.div_ceil(kernel.block), 1, 1], block: kernel.block, shared: 2048 };
    let args = [from as u64, to as u64, probe.n.into()];
    // SAFETY: both buffers were made for these words, and the arguments are those of `ProbeArgs`.
    unsafe {
        driver.upload(from, bytemuck::cast_slice(&probe.input)).unwrap();
        driver.launch(found, shape, bytemuck::cast_slice(&args)).unwrap();
        driver.download(to, bytemuck::cast_slice_mut(&mut output)).unwrap();
        driver.free(from);
        driver.free(to);
    }
    output
}

#[cfg(feature = "emu")]
fn emulator() -> Arc<dyn Driver> {
    use tessera::backend::cuda::emu::Emulator;
    Arc::new(Emulator::new(1, Emulator::LIMITS).unwrap())
}

#[cfg(feature = "emu")]
#[test]
fn the_emulated_device_means_what_is_meant() {
    let driver = emulator();
    for probe in asked::all() {
        check(&probe, &answer(&*driver, &probe), Who::Emulator);
    }
}

/// Answers are written before they are judged, so that one that is not as expected is kept as well.
#[test]
fn a_gpu_means_what_is_meant() {
    let Some(gpu) = devices::gpu(gpu::PROBES) else { return };
    let probes = asked::all();
    let answers: Vec<_> = probes.iter().map(|probe| answer(&*gpu, probe)).collect();
    if let Some(folder) = std::env::var_os("RECORD_PROBES") {
        let (major, minor) = gpu.limits().capability;
        let path = Path::new(&folder).join(format!("chip_sm_{major}{minor}.txt"));
        std::fs::write(&path, record(&gpu.describe(), probes.iter().zip(&answers))).unwrap();
        println!("written: {}", path.display());
    }
    probes.iter().zip(&answers).for_each(|(probe, answer)| check(probe, answer, Who::Chip));
}

/// What GPUs answered is what is meant, and what the emulated device answers today.
#[test]
fn answers_of_gpus_are_replayed() {
    let mut chips = 0;
    for entry in std::fs::read_dir(RECORDINGS).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let Some(chip) = text.strip_prefix("chip ").and_then(|text| text.lines().next()) else { continue };
        let answers = read(&text);
        println!("{}: {} answers of {chip}", path.display(), answers.len());
        let asked: Vec<_> = answers.iter().map(|(probe, _)| probe.kernel.as_str()).collect();
        KERNELS.iter().for_each(|k| assert!(asked.contains(&k.name), "{}: no {}", path.display(), k.name));
        for (probe, answer) in &answers {
            check(probe, answer, Who::Chip);
            #[cfg(feature = "emu")]
            check(probe, &self::answer(&*emulator(), probe), Who::Emulator);
        }
        chips += 1;
    }
    if chips == 0 {
        println!("skipped: no GPU's answers are in {RECORDINGS} (scripts/gpu/prove records them)");
    }
}

/// Two tickets of each thread, of two blocks: none is given twice, none is left out.
#[test]
fn tickets_count() {
    #[allow(unused_mut, reason = "with the feature `emu` there is one more")]
    let mut drivers = Vec::from_iter(devices::gpu(gpu::PROBES));
    #[cfg(feature = "emu")]
    drivers.push(emulator());
    for driver in drivers {
        let mut out = vec![0u32; 1 + 2 * 128];
        let to = driver.alloc("out", 4 * out.len()).unwrap().unwrap();
        let args = [0, to as u64, 0];
        // SAFETY: the buffer was made for these words; the kernel reads no `in`.
        unsafe {
            driver.upload(to, bytemuck::cast_slice(&out)).unwrap();
            let shape = Shape { grid: [2, 1, 1], block: 64, shared: 0 };
            driver.launch(driver.kernel("probe_order").unwrap(), shape, bytemuck::cast_slice(&args)).unwrap();
            driver.download(to, bytemuck::cast_slice_mut(&mut out)).unwrap();
            driver.free(to);
        }
        assert!(out[1..].chunks_exact(2).all(|times| times[0] < times[1]), "{out:?}");
        out[1..].sort_unstable();
        assert!(out[0] == 256 && out[1..].iter().copied().eq(0..256), "{}: {out:?}", driver.describe());
    }
}

// ---- recordings ----

/// Longer answers are judged, but not kept.
const KEPT: usize = 4096;

/// `chip NAME`, then for each question `probe KERNEL N`, lines `in WORDS` and lines `out WORDS`, in hexadecimal.
fn record<'a>(chip: &str, answers: impl Iterator<Item = (&'a Probe, &'a Vec<u32>)>) -> String {
    let mut text = format!("chip {chip}\n");
    for (probe, answer) in answers.filter(|(_, answer)| answer.len() <= KEPT) {
        writeln!(text, "probe {} {}", probe.kernel, probe.n).unwrap();
        for (what, words) in [("in", &probe.input), ("out", answer)] {
            for words in words.chunks(12) {
                text += what;
                words.iter().for_each(|word| write!(text, " {word:08x}").unwrap());
                text.push('\n');
            }
        }
    }
    text
}

fn read(text: &str) -> Vec<(Probe, Vec<u32>)> {
    let mut answers: Vec<(Probe, Vec<u32>)> = Vec::new();
    for line in text.lines().skip(1) {
        let (what, rest) = line.split_once(' ').unwrap();
        if what == "probe" {
            let (kernel, n) = rest.split_once(' ').unwrap();
            let probe = Probe { kernel: kernel.into(), n: n.parse().unwrap(), input: Vec::new() };
            answers.push((probe, Vec::new()));
            continue;
        }
        let (probe, answer) = answers.last_mut().expect("a probe before its words");
        let words = rest.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap());
        if what == "in" { probe.input.extend(words) } else { answer.extend(words) }
    }
    answers
}

/// A recording is read as it was written, and one wrong bit of it is seen: in the last place that a chip must get
/// right, for each kernel.
#[test]
fn a_wrong_answer_is_seen() {
    let probes = asked::all();
    let answers: Vec<_> = probes.iter().map(meaning::right_answer).collect();
    let text = record("made up", probes.iter().zip(&answers));
    let read = read(&text);
    assert!(text.len() < 400_000, "{} bytes", text.len());
    let kept = |k: &str| read.iter().filter(|(probe, _)| probe.kernel == k).count();
    KERNELS.iter().for_each(|kernel| assert!(kept(kernel.name) > 0, "{} is not kept", kernel.name));
    for (probe, answer) in &read {
        assert!(probes.contains(probe));
        check(probe, answer, Who::Emulator);
        check(probe, answer, Who::Chip);
        let mut wrong = answer.clone();
        let coarse = probe.kernel.contains("mma") || probe.kernel == "probe_approximate";
        let at = wrong.iter().position(|w| f32::from_bits(*w).is_normal()).unwrap_or(0);
        wrong[at] ^= if coarse { 1 << 12 } else { 1 };
        let seen = std::panic::catch_unwind(|| check(probe, &wrong, Who::Chip));
        assert!(seen.is_err(), "{}: word {at} is wrong and nobody sees it", probe.kernel);
    }
}
