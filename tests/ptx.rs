//! What nvcc makes of each primitive of `kernels/ptx.cuh`: the instructions of `kernels/emu/probes.cu`, each operand
//! named by where its value comes from, are those of `tests/data/ptx/probes.txt`. So a swapped operand or a lost
//! qualifier, which the emulated device cannot see, is seen without a GPU.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Instructions that primitives are made of, by how they begin.
const WANTED: [&str; 15] = [
    "atom.",
    "bar.",
    "cp.async",
    "cvt.f32.f16",
    "cvt.rn.bf16",
    "cvt.rn.f16",
    "ex2.",
    "ldmatrix.",
    "mma.",
    "rcp.",
    "red.",
    "shfl.",
    "vote.",
    "ld.global.",
    "st.global.",
];

/// The registers that a text names, each with its place.
fn registers(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.match_indices('%').map(|(at, _)| {
        let rest = &text[at + 1..];
        let length = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        (at, &text[at..at + 1 + length])
    })
}

/// The wanted instructions of one kernel's PTX. A register that was loaded from global memory is written as
/// `in+OFFSET`, a result by its instruction's name, the instruction's number and its place, any other by its class
/// alone: numbers of registers are the compiler's affair.
fn trace(kernel: &str) -> String {
    let mut names: HashMap<String, String> = HashMap::new();
    let mut count: HashMap<String, usize> = HashMap::new();
    let mut text = String::new();
    for line in kernel.lines() {
        let line = line.trim().trim_end_matches(';');
        let (guard, line) =
            line.split_once(' ').filter(|(guard, _)| guard.starts_with('@')).unwrap_or(("", line));
        let (operation, operands) = line.split_once([' ', '\t']).unwrap_or((line, ""));
        let operands = operands.trim();
        if let ("mov.b32" | "mov.f32", Some((to, from))) = (operation, operands.split_once(", ")) {
            names.insert(to.into(), names.get(from).cloned().unwrap_or_default());
            continue;
        }
        if !WANTED.iter().any(|wanted| operation.starts_with(wanted)) {
            continue;
        }
        if operation.starts_with("ld.global") && !operation.contains(".v4") {
            let (to, from) = operands.split_once(", ").unwrap();
            let offset = from.trim_end_matches(']').split_once('+').map_or("0", |(_, offset)| offset);
            names.insert(to.into(), format!("in+{offset}"));
            continue;
        }
        let (mut traced, mut done) = (String::new(), 0);
        for (at, register) in registers(operands) {
            let class = register.trim_end_matches(|c: char| c.is_ascii_digit());
            traced += &operands[done..at];
            traced += names.get(register).filter(|name| !name.is_empty()).map_or(class, String::as_str);
            done = at + register.len();
        }
        traced += &operands[done..];
        let guard = if guard.is_empty() { "" } else { "(guarded) " };
        writeln!(text, "    {guard}{operation} {traced}").unwrap();

        // The first operand, or list of operands, is the result, if it is no address.
        let name = operation.split('.').next().unwrap();
        let number = count.entry(name.into()).and_modify(|n| *n += 1).or_insert(1);
        let end = operands.find(if operands.starts_with('{') { '}' } else { ',' }).unwrap_or(0);
        for (i, (_, register)) in
            registers(&operands[..end]).enumerate().filter(|_| !operands.starts_with('['))
        {
            names.insert(register.into(), format!("{name}{number}.{i}"));
        }
    }
    text
}

/// Every kernel's trace, by name.
fn traces(ptx: &str) -> String {
    let kernels = ptx.split(".entry ").skip(1).map(|kernel| kernel.split_once('(').unwrap());
    let kernels: BTreeMap<_, _> = kernels.map(|(name, body)| (name, trace(body))).collect();
    kernels.iter().map(|(name, trace)| format!("{name}\n{trace}")).collect()
}

/// The compiler that NVCC, CUDA_HOME or the PATH names.
fn nvcc() -> Option<PathBuf> {
    let named = std::env::var_os("NVCC").map(PathBuf::from);
    let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|dir| dir.join("nvcc")).collect::<Vec<_>>();
    named.into_iter().chain(home).chain(in_path).find(|path| path.is_file())
}

#[test]
fn primitives_compile_to_the_instructions_written_down() {
    let Some(nvcc) = nvcc() else {
        println!("skipped: no nvcc in NVCC, CUDA_HOME or PATH, so there is no PTX to compare");
        return;
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join("probes.ptx");
    let mut command = Command::new(nvcc);
    command.args(["-ptx", "-arch=sm_80", "-O3", "-std=c++17"]).arg(root.join("kernels/emu/probes.cu"));
    let output = command.arg("-o").arg(&made).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found = traces(&std::fs::read_to_string(&made).unwrap());
    let wanted = std::fs::read_to_string(root.join("tests/data/ptx/probes.txt")).unwrap_or_default();
    let written = made.with_extension("txt");
    std::fs::write(&written, &found).unwrap();
    assert!(found == wanted, "the instructions differ from tests/data/ptx/probes.txt; now they are\n{found}");
}

/// The trace sees what it is there to see.
#[test]
fn a_swapped_operand_shows() {
    let ptx = |a: &str, b: &str| {
        format!(
            "ld.global.u32 \t%r1, [%rd4];\nld.global.u32 \t%r2, [%rd4+4];\nmov.b32 \t%f1, %r1;\n\
             cvt.rn.bf16x2.f32 %r9, {a}, {b};\nst.global.u32 \t[%rd6+4], %r9;\n"
        )
    };
    let right = "    cvt.rn.bf16x2.f32 %r, in+0, in+4\n    st.global.u32 [%rd+4], cvt1.0\n";
    assert_eq!(trace(&ptx("%f1", "%r2")), right);
    assert_ne!(trace(&ptx("%r2", "%f1")), right);
}
