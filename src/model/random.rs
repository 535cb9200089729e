//! Seeded random weights: as many bytes as the real ones, as well behaved, made about as fast as memory
//! takes them. The same seed gives the same bytes on any machine and any number of threads, because
//! every element is a function of (seed, tensor name, index) alone.

use super::names::TensorSpec;
use crate::tensor::DType;
use half::{bf16, f16};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// Told of the bytes made so far, from any thread, every few MiB.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

/// Makes the elements of one tensor, uniform on `center ± spread`.
#[derive(Clone, Copy, Debug)]
pub struct Generator {
    key: u64,
    center: f32,
    spread: f32,
    dtype: DType,
}

/// Distinct values of a tensor. Few enough that a table of them stays in L1 and no element has to be
/// converted on its own.
const LEVELS: usize = 4096;

/// Elements made from one hash, which has 16 bits for each.
const LANES: usize = 4;

impl Generator {
    /// The generator of tensor `spec`. Linear layers get the variance 1/columns, so that rows of
    /// variance 1 keep it; the head 9 times that, so that logits spread like a trained model's (std 3).
    pub fn new(spec: &TensorSpec, dtype: DType, seed: u64) -> Self {
        let name = spec.name.as_str();
        let fan_in: usize = spec.shape.iter().skip(1).product();
        let embeds = ["embed_tokens.weight", "token_embedding.weight", "position_embedding.weight"];
        let (center, std) = match spec.shape.len() {
            0 => (2.6592, 0.0), // CLIP's logit_scale, where its training begins
            1 if name.ends_with(".weight") => (1.0, 0.1), // every norm
            1 if name.ends_with(".bias") => (0.0, 0.02),
            _ if name.ends_with("class_embedding") || name == "image_newline" => (0.0, 1.0),
            _ if embeds.iter().any(|end| name.ends_with(end)) => (0.0, 1.0),
            _ if name == "lm.head.weight" => (0.0, 3.0 / (fan_in as f32).sqrt()),
            _ => (0.0, 1.0 / (fan_in as f32).sqrt()),
        };
        Generator { key: mix(seed ^ fnv1a(name)), center, spread: std * 3f32.sqrt(), dtype }
    }

    /// Writes the elements from number `first`, a multiple of 4, as little-endian bytes.
    pub fn fill(&self, first: usize, bytes: &mut [u8]) {
        match self.dtype.size() {
            2 => self.look_up::<2>(first, bytes),
            _ => self.look_up::<4>(first, bytes),
        }
    }

    fn look_up<const SIZE: usize>(&self, first: usize, bytes: &mut [u8]) {
        let levels = self.levels::<SIZE>();
        let mut counter = self.key.wrapping_add((first / LANES) as u64);
        for group in bytes.chunks_mut(LANES * SIZE) {
            let mut hash = mix(counter);
            for element in group.chunks_exact_mut(SIZE) {
                element.copy_from_slice(&levels[hash as usize % LEVELS]);
                hash >>= 16;
            }
            counter = counter.wrapping_add(1);
        }
    }

    /// The values in ascending order, encoded. Additions and products alone make them, which round
    /// alike on every machine.
    fn levels<const SIZE: usize>(&self) -> [[u8; SIZE]; LEVELS] {
        std::array::from_fn(|level| {
            let uniform = (2 * level + 1) as f32 / LEVELS as f32 - 1.0;
            let value = self.center + uniform * self.spread;
            let mut bytes = [0; SIZE];
            match self.dtype {
                DType::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                DType::BF16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                DType::F32 | DType::I32 => bytes.copy_from_slice(&value.to_le_bytes()),
            }
            bytes
        })
    }
}

/// A run of one tensor's elements to be made, from element `first`.
pub struct Job<'a> {
    /// Whose elements.
    pub generator: Generator,
    /// A multiple of 4.
    pub first: usize,
    /// Where to.
    pub bytes: &'a mut [u8],
}

/// Fills all jobs on `threads` threads, each taking `CHUNK` bytes at a time.
pub fn fill<'a>(jobs: impl Iterator<Item = Job<'a>> + Send, threads: usize, progress: Progress) {
    /// Large beside the cost of handing them out; a multiple of 4 elements.
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
