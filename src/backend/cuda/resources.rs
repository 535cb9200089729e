//! What the compiler made of the kernels in this build: registers, stack and instructions of each, for each
//! architecture. The build writes the table; without nvcc it is empty.

use super::gpu::MODULES;

/// A kernel on an architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The kernel's name, with its dtype.
    pub kernel: &'static str,
    /// The architecture, as `sm_80`.
    pub arch: &'static str,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of stack of a thread.
    pub stack: u32,
    /// Bytes of registers that a thread spills and fetches back.
    pub spills: u32,
    /// Its instructions, if the compiler had a disassembler beside it.
    pub instructions: Option<Instructions>,
}

/// How many instructions of some kinds a kernel's code has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instructions {
    /// Products on tensor cores (HMMA).
    pub products: u32,
    /// Asynchronous copies to shared memory (LDGSTS).
    pub copies: u32,
    /// Loads of 16 bytes from global memory.
    pub wide_loads: u32,
    /// Accesses to local memory.
    pub local: u32,
}

/// All kernels, in the order of files, kernels, architectures.
pub fn all() -> Vec<Resources> {
    MODULES.iter().flat_map(|module| module.resources.lines()).filter_map(parse).collect()
}

/// A line of the table that `kernels/resources.rs` makes.
fn parse(line: &'static str) -> Option<Resources> {
    let mut words = line.split(' ');
    let (kernel, arch) = (words.next()?, words.next()?);
    let numbers: Vec<u32> = words.map(str::parse).collect::<Result<_, _>>().ok()?;
    let [registers, stack, spills, ref rest @ ..] = numbers[..] else { return None };
    let instructions = match *rest {
        [products, copies, wide_loads, local] => Some(Instructions { products, copies, wide_loads, local }),
        _ => None,
    };
    Some(Resources { kernel, arch, registers, stack, spills, instructions })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let with = parse("rms_norm_bf16 sm_90 32 0 8 1 2 3 4").unwrap();
        assert_eq!((with.kernel, with.arch, with.registers, with.spills), ("rms_norm_bf16", "sm_90", 32, 8));
        assert_eq!(with.instructions.unwrap().local, 4);
        assert_eq!(parse("rms_norm_bf16 sm_90 32 0 0").unwrap().instructions, None);
        assert_eq!(parse("rms_norm_bf16 sm_90 32"), None);
    }
}
