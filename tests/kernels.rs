//! What the compiler made of the kernels: nothing spilt, nothing in local memory, tensor cores and asynchronous
//! copies where products are, 16-byte loads where bytes stream. Needs a build with nvcc (kernels/fetch-nvcc).

use std::collections::BTreeSet;
use tessera::backend::cuda::resources::{self, Resources};

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

/// Every kernel is there for every architecture, in both dtypes, and the emulated device has the same ones.
#[test]
fn every_kernel_is_there_for_every_architecture() {
    let all = kernels();
    let names: BTreeSet<_> = all.iter().map(|k| k.kernel).collect();
    let archs: BTreeSet<_> = all.iter().map(|k| k.arch).collect();
    assert_eq!(all.len(), names.len() * archs.len());
    for name in &names {
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
