//! The machine's ceilings, on the threads that run ops: the multiply-add rate of a loop that stays in
//! registers, and the rate at which memory is read.

use super::lanes::{LANES, Lanes};
use super::machine::{Machine, Task};
use super::panel::LINE;
use super::pool::Worker;
use crate::backend::{CACHED, Ceilings};
use std::hint::black_box;
use std::time::Instant;

/// All ceilings; `memory` is larger than any cache, and at least the largest of [`CACHED`].
pub fn measure(machine: &Machine, memory: &[u8]) -> Ceilings {
    Ceilings {
        flops_per_s: fma_rate(machine),
        bytes_per_s: read_rate(machine, memory),
        cached_per_s: CACHED.map(|bytes| read_again(machine, &memory[..bytes as usize])),
    }
}

/// Bytes per second at which `bytes` are read over and over, so many times that starting is nothing beside it.
fn read_again(machine: &Machine, bytes: &[u8]) -> f64 {
    let times = (PASSES / bytes.len()).max(1);
    (times * bytes.len()) as f64 / best(2, || machine.run(&ReadLoop { bytes, times }))
}

/// Bytes that are read of a small working set.
const PASSES: usize = 256 << 20;

/// Floating-point operations per second of register-resident multiply-adds.
pub fn fma_rate(machine: &Machine) -> f64 {
    let steps = 24_000_000 / 24 * 24;
    let flops = (steps * 2 * LANES * machine.threads()) as f64;
    flops / best(20, || machine.run(&FmaLoop { steps }))
}

/// Bytes per second at which `bytes`, larger than any cache, are read.
pub fn read_rate(machine: &Machine, bytes: &[u8]) -> f64 {
    bytes.len() as f64 / best(5, || machine.run(&ReadLoop { bytes, times: 1 }))
}

/// Seconds of the fastest of `runs` runs after one to warm up: a ceiling is what was reached once.
fn best(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    let time = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(|_| time(&mut f)).fold(f64::INFINITY, f64::min)
}

/// Seconds of the median of `runs` runs after one to warm up.
pub fn median(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut times: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[runs / 2]
}

/// Register-resident multiply-adds: 24 chains on AVX-512, as many as a tile has.
struct FmaLoop {
    steps: usize,
}

impl Task for FmaLoop {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, _: Worker<'_>) {
        let (rows, groups) = L::TILE;
        if rows * groups == 24 {
            chains::<L, 24>(lanes, self.steps)
        } else {
            chains::<L, 6>(lanes, self.steps)
        }
    }
}

#[inline(always)]
fn chains<L: Lanes, const N: usize>(lanes: L, steps: usize) {
    let (scale, offset) = (lanes.splat(black_box(0.999)), lanes.splat(black_box(0.001)));
    let mut sums = [lanes.splat(1.0); N];
    for _ in 0..steps / N {
        for sum in &mut sums {
            *sum = lanes.fma(*sum, scale, offset);
        }
    }
    for sum in sums {
        black_box(lanes.sum(sum));
    }
}

/// Reads bytes so many times and sums them, each thread its share, as fast as they come.
struct ReadLoop<'a> {
    bytes: &'a [u8],
    times: usize,
}

impl Task for ReadLoop<'_> {
    #[inline(always)]
    fn run<L: Lanes>(&self, lanes: L, worker: Worker<'_>) {
        let blocks = self.bytes.as_chunks::<{ 8 * LINE }>().0;
        let blocks = &blocks[worker.share(blocks.len())];
        let mut sums = [lanes.splat(0.0); 8];
        for _ in 0..self.times {
            for block in blocks {
                for (sum, line) in sums.iter_mut().zip(block.as_chunks::<LINE>().0) {
                    // SAFETY: a line has the 64 bytes of a vector.
                    *sum = lanes.add(*sum, unsafe { lanes.load(line.as_ptr().cast()) });
                }
            }
        }
        for sum in sums {
            black_box(lanes.sum(sum));
        }
    }
}
