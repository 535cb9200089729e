//! Seeded random weights: as many bytes as the real ones, as well behaved, made about as fast as memory
//! takes them. The same seed gives the same bytes on any machine and any number of threads, because
//! every element is a function of (seed, tensor name, index) alone.

use super::names::TensorSpec;
use crate::tensor::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// Told of the bytes made so far, from any thread, every few MiB.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

/// The elements of one tensor: uniform on `center ± spread`.
#[derive(Clone, Copy, Debug)]
pub struct Generator {
    key: u64,
    center: f32,
    spread: f32,
    dtype: DType,
}

/// Elements converted together. A multiple of [`LANES`], small enough to stay in L1.
const BLOCK: usize = 1024;

/// Elements made from one hash, 16 bits each.
const LANES: usize = 4;

impl Generator {
    /// The generator of tensor `spec`. Linear layers get the variance 1/columns, so that rows of
    /// variance 1 keep it; the head 9 times that, so that logits spread like a trained model's (std 3).
    pub fn new(spec: &TensorSpec, dtype: DType, seed: u64) -> Self {
        let name = spec.name.as_str();
        let fan_in: usize = spec.shape[1..].iter().product();
        let (center, std) = match spec.shape.len() {
            1 if name.ends_with(".weight") => (1.0, 0.1), // every norm
            1 if name.ends_with(".bias") => (0.0, 0.02),
            _ if name.ends_with("class_embedding") => (0.0, 1.0),
            _ if name.ends_with("embed_tokens.weight") || name.ends_with("position_embedding.weight") => {
                (0.0, 1.0)
            }
            _ if name == "lm.head.weight" => (0.0, 3.0 / (fan_in as f32).sqrt()),
            _ => (0.0, 1.0 / (fan_in as f32).sqrt()),
        };
        Generator { key: mix(seed ^ fnv1a(name)), center, spread: std * 3f32.sqrt(), dtype }
    }

    /// Writes the elements from number `first`, a multiple of 1024, as little-endian bytes.
    pub fn fill(&self, first: usize, bytes: &mut [u8]) {
        let size = self.dtype.size();
        let mut values = [0f32; BLOCK];
        for (block, out) in bytes.chunks_mut(BLOCK * size).enumerate() {
            let values = &mut values[..out.len() / size];
            self.values(first + block * BLOCK, values);
            match self.dtype {
                DType::F16 => {
                    let mut halves = [f16::ZERO; BLOCK];
                    halves[..values.len()].convert_from_f32_slice(values);
                    out.copy_from_slice(bytemuck::cast_slice(&halves[..values.len()]));
                }
                DType::BF16 => {
                    let mut halves = [bf16::ZERO; BLOCK];
                    halves[..values.len()].convert_from_f32_slice(values);
                    out.copy_from_slice(bytemuck::cast_slice(&halves[..values.len()]));
                }
                DType::F32 | DType::I32 => out.copy_from_slice(bytemuck::cast_slice(values)),
            }
        }
    }

    fn values(&self, first: usize, values: &mut [f32]) {
        debug_assert!(first.is_multiple_of(LANES));
        let step = self.spread / 32768.0;
        for (group, lanes) in values.chunks_mut(LANES).enumerate() {
            let hash = mix(self.key.wrapping_add((first / LANES + group) as u64));
            for (lane, value) in lanes.iter_mut().enumerate() {
                let uniform = (hash >> (16 * lane)) as i16;
                *value = self.center + (f32::from(uniform) + 0.5) * step;
            }
        }
    }
}

/// A run of one tensor's elements to be made, from element `first`.
pub struct Job<'a> {
    /// Whose elements.
    pub generator: Generator,
    /// A multiple of 1024.
    pub first: usize,
    /// Where to.
    pub bytes: &'a mut [u8],
}

/// Fills all jobs on `threads` threads, each taking [`CHUNK`] bytes at a time.
pub fn fill<'a>(jobs: impl Iterator<Item = Job<'a>> + Send, threads: usize, progress: Progress) {
    /// Large beside the cost of handing them out; a multiple of `BLOCK` elements.
    const CHUNK: usize = 4 << 20;
    let chunks = jobs.flat_map(|Job { generator, first, bytes }| {
        let elements = CHUNK / generator.dtype.size();
        let parts = bytes.chunks_mut(CHUNK).enumerate();
        parts.map(move |(part, bytes)| Job { generator, first: first + part * elements, bytes })
    });
    let queue = Mutex::new(chunks);
    let done = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                // A worker that panicked would end the scope anyway, so poison says nothing new.
                let next = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
                while let Some(job) = next() {
                    job.generator.fill(job.first, job.bytes);
                    let bytes = job.bytes.len() as u64;
                    progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes);
                }
            });
        }
    });
}

/// SplitMix64's output function: a bijection in which every input bit flips every output bit with
/// probability near one half (Steele, Lea and Flood 2014).
fn mix(counter: u64) -> u64 {
    let z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// FNV-1a, 64 bits.
fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
