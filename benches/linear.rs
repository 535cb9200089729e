//! Matrix products against the machine's own ceilings, measured beside them on the same threads: the
//! multiply-add rate of a loop that stays in registers, and the rate at which a mapping is read.

use criterion::{Criterion, Throughput};
use memmap2::MmapMut;
use std::time::Duration;
use tessera::backend::cpu::ceilings::{fma_rate, median, read_rate};
use tessera::backend::cpu::linear::{Layer, Residual, linear, linear_workspace};
use tessera::backend::cpu::machine::Machine;
use tessera::backend::cpu::panel::Matrix;
use tessera::op::Activation;
use tessera::tensor::DType;

/// Weights in anonymous pages, more of them than any cache holds, used one after another.
struct Rotation {
    map: MmapMut,
    next: usize,
}

impl Rotation {
    fn new(bytes: usize) -> Self {
        let mut map = MmapMut::map_anon(bytes).expect("pages for the weights");
        // 16-bit patterns near 1.0 in every format: no denormals, no infinities.
        for (i, chunk) in map.chunks_exact_mut(2).enumerate() {
            chunk.copy_from_slice(&(0x3c00u16 | (i as u16).wrapping_mul(40503) & 0x80ff).to_le_bytes());
        }
        Rotation { map, next: 0 }
    }

    fn take(&mut self, rows: usize, cols: usize, dtype: DType) -> Matrix<'_> {
        let size = rows * cols * dtype.size();
        if self.next + size > self.map.len() {
            self.next = 0;
        }
        let bytes = &self.map[self.next..self.next + size];
        self.next += size;
        Matrix { bytes, dtype, rows, cols }
    }
}

fn multiply(machine: &Machine, x: &[f32], weight: Matrix<'_>, out: &mut [f32], workspace: &mut [u8]) {
    let layer = Layer::new(weight, None);
    linear(machine, x, &[layer], (Activation::None, Residual::None), out, workspace);
}

fn gemm_crate(x: &[f32], w: &[f32], out: &mut [f32], (m, n, k): (usize, usize, usize), threads: usize) {
    // SAFETY: the slices are [m, k], [n, k] and [m, n], row-major.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            x.as_ptr(),
            1,
            k as isize,
            w.as_ptr(),
            k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(threads),
        )
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let machine = Machine::new(threads).expect("threads");
    let (n, k) = (4096, 4096);
    let mut weights = Rotation::new(1 << 30);

    println!("{} threads, {}", threads, machine.isa().name());
    println!("{:<34} {:>9}  {:>10}  {:>7}", "", "ms", "", "ceiling");
    for (m, dtypes) in [
        (1, &[DType::BF16, DType::F16, DType::F32][..]),
        (2, &[DType::F16]),
        (4, &[DType::BF16, DType::F16]),
        (8, &[DType::F16]),
        (16, &[DType::F16]),
        (32, &[DType::F16]),
        (64, &[DType::F16]),
        (577, &[DType::F16]),
        (640, &[DType::BF16, DType::F16, DType::F32]),
    ] {
        let x: Vec<f32> = (0..m * k).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
        let mut out = vec![0f32; m * n];
        let mut workspace = vec![0u8; linear_workspace(m, k, std::iter::empty(), threads)];
        for &dtype in dtypes {
            let id = format!("cpu/linear/{m}x{n}x{k}/{dtype}");
            let flops = 2.0 * (m * n * k) as f64;
            let bytes = (n * k * dtype.size()) as f64;
            // Ceilings and product by turns, so that a busy neighbour slows both.
            let (mut fma, mut read, mut time) = (0f64, 0f64, f64::INFINITY);
            for _ in 0..3 {
                fma = fma.max(fma_rate(&machine));
                read = read.max(read_rate(&machine, &weights.map));
                let runs = if m > 64 { 7 } else { 61 };
                time = time.min(median(runs, || {
                    multiply(&machine, &x, weights.take(n, k, dtype), &mut out, &mut workspace)
                }));
            }
            let (got, roof, unit) = if flops / fma > bytes / read {
                (flops / time, fma, "GFLOP/s")
            } else {
                (bytes / time, read, "GB/s")
            };
            println!(
                "{id:<34} {:9.3}  {:6.1} {unit}  {:6.1} {:6.1} %",
                time * 1e3,
                got / 1e9,
                roof / 1e9,
                100.0 * got / roof
            );
            let mut group = criterion.benchmark_group("cpu/linear");
            group.throughput(if unit == "GB/s" {
                Throughput::Bytes(bytes as u64)
            } else {
                Throughput::Elements(flops as u64)
            });
            group.bench_function(format!("{m}x{n}x{k}/{dtype}"), |b| {
                b.iter(|| multiply(&machine, &x, weights.take(n, k, dtype), &mut out, &mut workspace))
            });
            group.finish();
        }
        if m == 1 || m == 640 {
            let w = vec![0.5f32; n * k];
            let time = median(5, || gemm_crate(&x, &w, &mut out, (m, n, k), threads));
            println!(
                "{:<34} {:9.3}  {:6.1} GFLOP/s",
                format!("gemm crate {m}x{n}x{k}/f32"),
                time * 1e3,
                2e-9 * (m * n * k) as f64 / time
            );
        }
    }
}
