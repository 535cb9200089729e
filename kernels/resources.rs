//! What the compiler made of each kernel: a part of build.rs, which embeds it for `tessera devices --kernels`
//! and for the test that keeps it sound.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// A kernel and an architecture.
type Key = (String, String);

/// Lines of `kernel architecture registers stack spills`, then, if there is a disassembler beside nvcc, counts of
/// instructions: `tensor-core products, asynchronous copies, 16-byte loads, accesses to local memory`.
pub fn describe(nvcc: &Path, product: &Path, ptxas: &str) -> String {
    let instructions = disassemble(nvcc, product).map(|text| instructions(&text));
    let mut text = String::new();
    for ((kernel, arch), [registers, stack, spills]) in registers(ptxas) {
        text += &format!("{kernel} {arch} {registers} {stack} {spills}");
        let counts = instructions.as_ref().and_then(|all| all.get(&(kernel, arch)));
        for count in counts.into_iter().flatten() {
            text += &format!(" {count}");
        }
        text.push('\n');
    }
    text
}

/// Registers, bytes of stack and bytes of spills of each kernel, from what `ptxas -v` says.
fn registers(ptxas: &str) -> BTreeMap<Key, [u32; 3]> {
    let mut all = BTreeMap::new();
    let (mut key, mut stack, mut spills) = (Key::default(), 0, 0);
    for line in ptxas.lines() {
        let number_before = |what: &str| -> u32 {
            let words = line.split(what).next().unwrap_or_default();
            words.split_whitespace().next_back().and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'').skip(1).step_by(2).map(String::from);
            key = (quoted.next().unwrap_or_default(), quoted.next().unwrap_or_default());
        } else if line.contains("bytes stack frame") {
            stack = number_before(" bytes stack frame");
            spills = number_before(" bytes spill stores") + number_before(" bytes spill loads");
        } else if line.contains(" registers") {
            all.insert(key.clone(), [number_before(" registers"), stack, spills]);
        }
    }
    all
}

fn disassemble(nvcc: &Path, product: &Path) -> Option<String> {
    let output = Command::new(nvcc.with_file_name("cuobjdump")).arg("-sass").arg(product).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn instructions(sass: &str) -> BTreeMap<Key, [u32; 4]> {
    let mut all = BTreeMap::<Key, [u32; 4]>::new();
    let mut key = Key::default();
    for line in sass.lines().map(str::trim) {
        if let Some(arch) = line.strip_prefix("code for ") {
            key.1 = arch.into();
        } else if let Some(kernel) = line.strip_prefix("Function : ") {
            key.0 = kernel.into();
        }
        // An instruction: `/*00f0*/  @!P0 LDG.E.128 R4, [R4.64] ;  /* encoding */`.
        let Some(code) = line.strip_prefix("/*").and_then(|line| line.split_once("*/")) else { continue };
        let Some(name) = code.1.split_whitespace().find(|word| !word.starts_with('@')) else { continue };
        let counts = all.entry(key.clone()).or_default();
        counts[0] += name.starts_with("HMMA") as u32;
        counts[1] += name.starts_with("LDGSTS") as u32;
        counts[2] += (name.starts_with("LDG.") && name.contains(".128")) as u32;
        counts[3] += (name.starts_with("LDL") || name.starts_with("STL")) as u32;
    }
    all
}
