//! What the compiler made of the kernels: nothing spilt, nothing in local memory, tensor cores and asynchronous
//! copies where products are, 16-byte loads where bytes stream. Needs a build with nvcc (kernels/fetch-nvcc).

use std::collections::{BTreeMap, BTreeSet};
use tessera::backend::cuda::ledger::SOURCES;
use tessera::backend::cuda::resources::{self, Resources};
use tessera::backend::cuda::tile::{ANY, PATCH, TILES, Tile};

/// The table, or a word on why there is none.
fn kernels() -> Vec<Resources> {
    let all = resources::all();
    if all.is_empty() {
        println!("skipped: this build found no nvcc; kernels/fetch-nvcc gets one");
    }
    all
}

#[test]
fn nothing_is_spilt() {
    for k in kernels() {
        let name = format!("{} on {}", k.kernel, k.arch);
        assert_eq!((k.stack, k.spills), (0, 0), "{name}: bytes of stack and of spills");
        assert!(k.registers <= 255, "{name}: {} registers", k.registers);
        assert_eq!(k.instructions.map_or(0, |code| code.local), 0, "{name}: accesses to local memory");
    }
}

/// Families that multiply matrices do so on tensor cores, over tiles that are copied while others are multiplied;
/// products of few rows stream their weights in loads of 16 bytes.
#[test]
fn products_run_on_tensor_cores() {
    for k in kernels() {
        let Some(code) = k.instructions else { continue };
        let name = format!("{} on {}", k.kernel, k.arch);
        let tiles = ["linear_", "patch_embed_", "attention_", "paged_decode_"];
        if tiles.iter().any(|family| k.kernel.starts_with(family)) {
            assert!(code.products > 0, "{name}: no tensor cores");
            assert!(code.copies > 0, "{name}: no asynchronous copies");
        }
        assert!(!k.kernel.starts_with("matvec_") || code.wide_loads > 0, "{name}: no 16-byte loads");
    }
}

/// What a multiprocessor of an architecture has: warps at most, KiB of shared memory (CUDA C++ Programming Guide,
/// "Compute Capabilities"). All have 65536 registers, which a warp gets in portions of 256, and take 1 KiB of each
/// block's shared memory for themselves.
const MULTIPROCESSORS: [(&str, u32, u32); 4] =
    [("sm_80", 64, 164), ("sm_90", 64, 228), ("sm_100", 64, 228), ("sm_120", 48, 100)];

/// Threads of a block of each kernel, and the blocks for which it is compiled: `KERNEL(threads, blocks, name, ...)`.
fn launch_bounds() -> BTreeMap<&'static str, (u32, u32)> {
    let lines = SOURCES.iter().flat_map(|(_, text)| text.lines());
    let kernel = |line: &'static str| {
        let mut words = line.strip_prefix("KERNEL(")?.split(", ");
        let (threads, blocks) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some((words.next()?, (threads, blocks)))
    };
    lines.filter_map(kernel).collect()
}

/// A multiprocessor holds as many blocks as a kernel is written for: by its registers and warps everywhere, by its
/// tiles' shared memory on the GPUs of data centres since Hopper; on an A100 one at least, elsewhere of the smaller tiles.
#[test]
fn blocks_fit_a_multiprocessor() {
    let bounds = launch_bounds();
    let tiles: Vec<&Tile> = TILES.iter().chain(&ANY).chain(&PATCH).collect();
    for k in kernels() {
        let (threads, asked) = bounds[k.kernel];
        let (_, warps, shared) = MULTIPROCESSORS
            .into_iter()
            .find(|(arch, ..)| *arch == k.arch)
            .expect("an architecture of the table");
        let of_block = threads / 32;
        let by_warps = warps / of_block;
        let by_registers = 65536 / ((k.registers * 32).next_multiple_of(256) * of_block);
        let tile = tiles.iter().find(|tile| {
            k.kernel.strip_prefix(tile.kernel).is_some_and(|dtype| ["_bf16", "_f16"].contains(&dtype))
        });
        let by_shared = tile.map(|tile| (shared << 10) / (tile.shared() + 1024));
        let name = format!("{} on {}", k.kernel, k.arch);
        println!(
            "{name}: {asked} blocks asked; registers hold {by_registers}, warps {by_warps}, shared {by_shared:?}"
        );
        assert!(
            by_registers.min(by_warps) >= asked.min(warps / of_block),
            "{name}: {} registers",
            k.registers
        );
        let least = match k.arch {
            "sm_90" | "sm_100" => asked,
            // There are tiles for what a block may have here; the others are not chosen.
            "sm_120" => u32::from(tile.is_none_or(|tile| tile.shared() <= 99 << 10)),
            _ => 1,
        };
        assert!(by_shared.is_none_or(|fit| fit >= least), "{name}: tiles in shared memory");
    }
}

/// Every kernel is there for every architecture, in both dtypes, and the emulated device has the same ones.
#[test]
fn every_kernel_is_there_for_every_architecture() {
    let all = kernels();
    let names: BTreeSet<_> = all.iter().map(|k| k.kernel).collect();
    let archs: BTreeSet<_> = all.iter().map(|k| k.arch).collect();
    assert_eq!(all.len(), names.len() * archs.len());
    // What reads memory to empty caches and to find a ceiling knows no numbers.
    for name in names.iter().filter(|name| **name != "sweep") {
        let other = match name.strip_suffix("_bf16") {
            Some(base) => format!("{base}_f16"),
            None => format!("{}_bf16", name.strip_suffix("_f16").expect("a dtype in every name")),
        };
        assert!(names.contains(other.as_str()), "{name} has no {other}");
    }
    #[cfg(feature = "emu")]
    if !all.is_empty() {
        let emulated: BTreeSet<_> = tessera::backend::cuda::emu::kernels().collect();
        let missing: Vec<_> = names.iter().filter(|name| !emulated.contains(**name)).collect();
        assert!(missing.is_empty(), "not on the emulated device: {missing:?}");
    }
}
