//! `tessera devices`: what could run a model here.

use super::options::format_size;
use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::error::Result;
use clap::Args;
use serde_json::json;

/// Options of `tessera devices`.
#[derive(Debug, Args)]
pub struct Devices {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Devices {
    pub fn run(self) -> Result<()> {
        let cpu = CpuBackend::new(None)?;
        let memory = crate::backend::cpu::physical_memory();
        let paths: Vec<_> = cpu.instruction_sets().collect();
        if self.json {
            let object = json!({
                "devices": [{
                    "name": "cpu", "description": cpu.describe(), "threads": cpu.threads(),
                    "instruction_sets": paths, "memory_bytes": memory,
                }]
            });
            return super::print(&format!("{object}\n"));
        }
        super::print(&format!(
            "cpu   {}, {} of memory; instruction sets that kernels exist for here: {}\n\
             cuda  not in this build: the CUDA kernels are not written yet\n",
            cpu.describe(),
            format_size(memory),
            paths.join(", "),
        ))
    }
}
