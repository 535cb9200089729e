//! `tessera devices`: what could run a model here, and why not what cannot.

use super::options::format_size;
use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::resources::{self, Instructions, Resources};
use crate::backend::cuda::{gpu, ledger};
use crate::error::Result;
use clap::Args;
use serde_json::{Value, json};

/// Options of `tessera devices`.
#[derive(Debug, Args)]
pub struct Devices {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// List the GPU kernels in this build with registers, stack and instructions
    #[arg(long, conflicts_with = "json")]
    kernels: bool,
}

impl Devices {
    pub fn run(self) -> Result<()> {
        if self.kernels {
            return super::print(&kernels());
        }
        let found = [vec![cpu()?], gpus(), vec![emulator()]].concat();
        if self.json {
            let (usable, unusable): (Vec<_>, Vec<_>) = found.into_iter().partition(|d| d.problem.is_none());
            let devices: Vec<_> = usable.into_iter().map(Found::json).collect();
            let unavailable: Vec<_> = unusable.into_iter().map(Found::json).collect();
            let kernels = (!gpu::COMPILER.is_empty()).then_some(gpu::COMPILER);
            // Results of a run carry them, so that the ledger knows which kernels it was that ran.
            let digests = ledger::digests();
            let object = json!({
                "devices": devices, "unavailable": unavailable, "kernels": kernels, "kernel_digests": digests,
            });
            return super::print(&format!("{object}\n"));
        }
        let width = found.iter().map(|device| device.name.len()).max().unwrap_or(0);
        let lines = found.iter().map(|device| match &device.problem {
            None => format!("{:<width$}  {}\n", device.name, device.description),
            Some(problem) => format!("{:<width$}  not usable: {problem}\n", device.name),
        });
        super::print(&lines.collect::<String>())
    }
}

/// One line a kernel and architecture.
fn kernels() -> String {
    let all = resources::all();
    if all.is_empty() {
        return format!("{}: {REMEDY}\n", gpu::NO_KERNELS);
    }
    let mut text = format!(
        "{:<36} {:<7} {:>9} {:>6} {:>6} {:>6} {:>7} {:>6} {:>6}\n",
        "kernel", "arch", "registers", "stack", "spills", "HMMA", "LDGSTS", "LDG128", "local"
    );
    for Resources { kernel, arch, registers, stack, spills, instructions } in all {
        text += &format!("{kernel:<36} {arch:<7} {registers:>9} {stack:>6} {spills:>6}");
        if let Some(Instructions { products, copies, wide_loads, local }) = instructions {
            text += &format!(" {products:>6} {copies:>7} {wide_loads:>6} {local:>6}");
        }
        text.push('\n');
    }
    text.push('\n');
    ledger::states().iter().for_each(|(file, state)| text += &format!("{file:<16} {state}\n"));
    text
}

/// What to do about a build without kernels.
const REMEDY: &str = "put nvcc on the PATH or run kernels/fetch-nvcc, then build again";

/// A device, and why it cannot be used, if so.
#[derive(Clone, Debug)]
struct Found {
    name: String,
    description: String,
    problem: Option<String>,
    more: Value,
}

impl Found {
    fn json(self) -> Value {
        let mut object = json!({ "name": self.name, "description": self.description });
        let more = match self.problem {
            Some(problem) => json!({ "problem": problem }),
            None => self.more,
        };
        if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
            object.extend(more);
        }
        object
    }
}

fn cpu() -> Result<Found> {
    let cpu = CpuBackend::new(None)?;
    let memory = crate::backend::cpu::usable_memory();
    let paths: Vec<_> = cpu.instruction_sets().collect();
    let description = format!(
        "{}, {} of memory; instruction sets that kernels exist for here: {}",
        cpu.describe().trim_start_matches("cpu "),
        format_size(memory),
        paths.join(", ")
    );
    let more = json!({ "threads": cpu.threads(), "instruction_sets": paths, "memory_bytes": memory });
    Ok(Found { name: "cpu".into(), description, problem: None, more })
}

fn gpus() -> Vec<Found> {
    let absent = |problem| {
        let (name, description) = ("cuda".into(), String::new());
        vec![Found { name, description, problem: Some(problem), more: Value::Null }]
    };
    let named = match gpu::list() {
        Ok(named) => named,
        Err(problem) => return absent(problem),
    };
    let built = !gpu::MODULES.is_empty();
    let found = named.into_iter().enumerate().map(|(ordinal, description)| Found {
        name: format!("cuda:{ordinal}"),
        problem: (!built).then(|| format!("{description}; {}: {REMEDY}", gpu::NO_KERNELS)),
        description: format!("{description}; kernels by {}", gpu::COMPILER),
        more: Value::Null,
    });
    found.collect()
}

#[cfg(feature = "emu")]
fn emulator() -> Found {
    let description = "the GPU's kernels on the processor, every access checked; slow, for tests".to_string();
    Found { name: "emu".into(), description, problem: None, more: Value::Null }
}

#[cfg(not(feature = "emu"))]
fn emulator() -> Found {
    let problem = "not in this build; build with `--features emu`".to_string();
    Found { name: "emu".into(), description: String::new(), problem: Some(problem), more: Value::Null }
}
