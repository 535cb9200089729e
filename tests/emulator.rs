//! The emulated device itself: each of its detectors finds the fault that is planted for it in
//! `kernels/emu/faults.cu`, under every seed, and none speaks where there is no fault. What its primitives compute is
//! the subject of probes.rs.
#![cfg(feature = "emu")]

use tessera::backend::cuda::driver::{Driver, Shape};
use tessera::backend::cuda::emu::{self, Emulator};

/// A device with its buffers' bookkeeping kept short.
struct Device(Emulator);

impl Device {
    fn new(seed: u64) -> Self {
        Device(Emulator::new(seed, Emulator::LIMITS).unwrap())
    }

    fn alloc(&self, what: &str, bytes: usize) -> usize {
        self.0.alloc(what, bytes).unwrap().unwrap()
    }

    fn upload<T: bytemuck::Pod>(&self, what: &str, values: &[T]) -> usize {
        let addr = self.alloc(what, size_of_val(values));
        // SAFETY: the memory was made for these bytes; so in all calls of this file, or the device refuses them.
        unsafe { self.0.upload(addr, bytemuck::cast_slice(values)).unwrap() };
        addr
    }

    fn download<T: bytemuck::Pod>(&self, addr: usize, len: usize) -> Result<Vec<T>, String> {
        let mut values = vec![T::zeroed(); len];
        // SAFETY: as above.
        unsafe { self.0.download(addr, bytemuck::cast_slice_mut(&mut values)) }.map_err(|e| e.to_string())?;
        Ok(values)
    }

    /// Launches `grid` blocks of `block` threads with 2 KiB of shared memory.
    fn launch(&self, kernel: &str, grid: u32, block: u32, args: &[usize]) -> Result<(), String> {
        self.launch_with(kernel, grid, block, 2048, args)
    }

    fn launch_with(
        &self,
        kernel: &str,
        grid: u32,
        block: u32,
        shared: u32,
        args: &[usize],
    ) -> Result<(), String> {
        let kernel = self.0.kernel(kernel).map_err(|e| e.to_string())?;
        let shape = Shape { grid: [grid, 1, 1], block, shared };
        // SAFETY: as above.
        unsafe { self.0.launch(kernel, shape, bytemuck::cast_slice(args)) }.map_err(|e| e.to_string())
    }
}

/// Two numbers of 32 bits in one of an argument struct's words.
fn pair(low: u32, high: u32) -> usize {
    (u64::from(high) << 32 | u64::from(low)) as usize
}

const BLOCKS: u32 = 4;
const THREADS: u32 = BLOCKS * 64;

/// Runs a planted fault's kernel on fresh buffers.
fn planted(device: &Device, name: &str, fault: u32) -> Result<(), String> {
    let x = device.upload("x", &[1.0f32; THREADS as usize]);
    let y = device.alloc("y", THREADS as usize * 4);
    let counter = device.upload("counter", &[0u32; 2]);
    let shared = if name == "past_shared" { 256 } else { 2048 };
    let args = [x, y, counter, pair(THREADS, fault)];
    device.launch_with(&format!("fault_{name}"), BLOCKS, 64, shared, &args)
}

/// Kernel, fault, and one of the texts with which it is told. Where two threads meet in a race, the order decides
/// whether the one reads what is not written yet or what is written beside it.
const PLANTED: [(&str, u32, &[&str]); 54] = [
    ("past_the_end", 1, &["reads 4 bytes, 0 past the end of `x` (1024 bytes)"]),
    ("before_the_beginning", 1, &["reads 4 bytes, 4 before `x`"]),
    ("stray", 1, &["which is no memory of this device"]),
    ("past_shared", 1, &["writes 4 bytes, 0 past the end of shared memory (256 bytes)"]),
    ("misaligned", 1, &["not a multiple of 4"]),
    ("misaligned", 2, &["not a multiple of 16"]),
    ("misaligned", 3, &["touches 8 bytes at"]),
    ("misaligned", 4, &["not a multiple of 16"]),
    ("misaligned", 5, &["not a multiple of 16"]),
    ("misaligned", 6, &["not a multiple of 16"]),
    ("unwritten", 1, &["of `y` that nothing has written"]),
    ("half_written", 1, &["of `y` that nothing has written"]),
    ("unwritten_shared", 1, &["reads 4 bytes at offset 0 of shared memory that nothing has written"]),
    ("left_by_another_block", 1, &["of shared memory that nothing has written"]),
    ("host_memory", 1, &["no memory of this device"]),
    ("others_local", 1, &["no memory of this device"]),
    ("read_after_write", 1, &["race: reads", "reads 4 bytes at offset"]),
    ("write_after_read", 1, &["race: writes", "race: reads"]),
    ("same_value", 1, &["race: writes 4 bytes at offset 0 of shared memory"]),
    ("within_a_warp", 1, &["race: reads"]),
    ("widths", 1, &["race: writes", "race: reads"]),
    ("blocks_write", 1, &["race: writes"]),
    ("blocks_read_and_write", 1, &["race: writes", "race: reads"]),
    ("threads_of_a_block", 1, &["race: reads", "that nothing has written"]),
    ("last_block", 1, &["of `y`"]),
    ("last_block", 2, &["of `y`"]),
    ("last_block", 3, &["race: reads", "race: writes", "of shared memory that nothing has written"]),
    ("last_block", 4, &["`counter`, which thread 0"]),
    ("additions", 1, &["race: adds", "race: reads"]),
    ("relay", 1, &["of `y`"]),
    ("stream", 1, &["of `y` that this launch has written"]),
    ("copies", 1, &["where an asynchronous copy of thread"]),
    ("copies", 2, &["asynchronous copy", "race: reads", "that nothing has written"]),
    ("copies", 3, &["where an asynchronous copy of thread"]),
    ("copies", 4, &["where an asynchronous copy of thread"]),
    ("copies", 5, &["whose source has changed since its issue"]),
    ("copies", 6, &["writes 4 bytes", "where an asynchronous copy of thread"]),
    ("copies", 7, &["of `y` that nothing has written"]),
    ("collectives", 1, &["is at sync_block, kernels/emu/faults.cu"]),
    ("collectives", 2, &["while other lanes of its warp are at"]),
    ("collectives", 3, &["while other warps are at kernels/emu/faults.cu"]),
    ("collectives", 4, &["ends while threads of its block wait at", "threads of its block that have ended"]),
    ("collectives", 5, &["lanes of its warp that have ended", "ends while lanes of its warp wait"]),
    ("collectives", 6, &["ends while threads of its block wait at", "threads of its block that have ended"]),
    ("collectives", 7, &["ends while lanes of its warp wait", "lanes of its warp that have ended"]),
    ("stack", 1, &["needs more than 49152 bytes of stack"]),
    ("never_ends", 1, &["does not end"]),
    ("never_ends", 2, &["does not end"]),
    ("never_ends", 3, &["does not end"]),
    ("never_ends", 4, &["does not end"]),
    // Right, whatever the order.
    ("masked", 0, &[]),
    ("last_block", 0, &[]),
    ("relay", 0, &[]),
    ("copies", 0, &[]),
];

#[test]
fn every_planted_fault_is_found_and_nothing_else() {
    for (name, fault, texts) in PLANTED {
        let seeds = if name == "never_ends" && fault > 0 { 1 } else { 20 };
        for seed in 0..seeds {
            let told = if fault > 0 { planted(&Device::new(seed), name, fault) } else { Ok(()) };
            if fault > 0 {
                let told = told.expect_err(&format!("{name} {fault}, seed {seed}: not found"));
                let place = format!("fault_{name}, block (");
                assert!(told.contains(&place), "{name} {fault}, seed {seed}: {told}");
                assert!(texts.iter().any(|text| told.contains(text)), "{name} {fault}, seed {seed}: {told}");
            }
            planted(&Device::new(seed), name, 0).unwrap_or_else(|told| panic!("{name}, seed {seed}: {told}"));
        }
    }
}

/// A device goes on after a fault, and each launch is judged by itself. So too when its clock starts again, as it
/// does after a million barriers: `never_ends` goes through two million.
#[test]
fn a_fault_leaves_no_trace() {
    let device = Device::new(1);
    let mut late = PLANTED.to_vec();
    late.extend(PLANTED.iter().filter(|(name, ..)| *name != "never_ends"));
    for (name, fault, _) in late {
        assert!(fault == 0 || planted(&device, name, fault).is_err());
        planted(&device, name, 0).unwrap_or_else(|told| panic!("{name} after its fault {fault}: {told}"));
    }
}

/// Every barrier, wait, ticket and mask of the right kernels is needed, and the device says so when it is
/// switched off.
#[test]
fn each_site_switched_off_is_noticed() {
    let kernels = ["read_after_write", "threads_of_a_block", "last_block", "copies", "masked"];
    for kernel in kernels {
        planted(&Device::new(1), kernel, 0).unwrap();
    }
    let wanted = |site: &String| site.starts_with("kernels/emu/faults.cu:");
    let text: Vec<_> = include_str!("../kernels/emu/faults.cu").lines().collect();
    let holds = |kernel: &str, site: usize| {
        let first = text.iter().position(|line| *line == format!("FAULT({kernel}) {{")).unwrap();
        let end = first + text[first..].iter().position(|line| *line == "}").unwrap();
        // Other tests, beside this one, reach sites that only faults have.
        (first..end).contains(&(site - 1)) && !text[site - 1].contains("if (fault ==")
    };
    let mut noticed = Vec::new();
    for (site, name) in emu::sites().iter().enumerate().filter(|(_, name)| wanted(name)) {
        let line: usize = name.split([':', ' ']).nth(1).unwrap().parse().unwrap();
        let Some(kernel) = kernels.into_iter().find(|kernel| holds(kernel, line)) else { continue };
        for seed in 0..5 {
            let device = Device::new(seed);
            device.0.switch_off(Some(site));
            // A last block that a barrier does not hold back may still read in time, when blocks come one by one.
            let told = planted(&device, kernel, 0);
            assert!(told.is_err(), "{kernel} does not miss {name}, seed {seed}");
            device.0.switch_off(None);
            planted(&device, kernel, 0).unwrap();
        }
        noticed.push(name.split(' ').nth(1).unwrap().to_string());
    }
    for kind in ["barrier", "wait", "ticket", "mask"] {
        assert!(noticed.iter().any(|noticed| noticed == kind), "no {kind} among {noticed:?}");
    }
}

#[test]
fn host_calls_are_checked() {
    let device = Device::new(1);
    let told = |result: Result<(), String>, text: &str| {
        let told = result.unwrap_err();
        assert!(told.contains(text), "{told}");
    };
    let x = device.upload("x", &[1.0f32; THREADS as usize]);
    let y = device.alloc("y", 64);
    told(device.download::<u8>(y, 64).map(drop), "nothing has written the byte at offset 0");
    told(device.download::<u8>(x + 1020, 8).map(drop), "not within `x` (1024 bytes)");
    told(device.download::<u8>(8, 8).map(drop), "no memory of this device");
    // SAFETY: `y` is memory of 64 bytes; what exceeds it is refused; so below.
    unsafe {
        device.0.fill(y, 7, 32).unwrap();
        assert_eq!(device.download::<u8>(y, 32).unwrap(), [7; 32]);
        told(device.download::<u8>(y, 33).map(drop), "nothing has written the byte at offset 32");
        // A copy carries what is not written, and a forgotten byte is poisoned.
        device.0.copy(y, x, 64).unwrap();
        told(device.download::<u8>(x, 64).map(drop), "nothing has written the byte at offset 32");
        device.0.forget(y, 3).unwrap();
        told(device.download::<u8>(y, 4).map(drop), "nothing has written the byte at offset 0");
        assert!(device.0.fill(y, 0, 65).is_err());
    }
    let args = [x, y, y, pair(THREADS, 0)];
    told(device.launch("fault_copies", 1, 48, &args), "whole warps");
    told(device.launch("fault_copies", 1, 128, &args), "64 threads at most");
    told(device.launch("fault_copies", 1, 64, &args[..3]), "24 bytes of arguments, the kernel has 32");
    told(device.launch("fault_copies", 0, 64, &args), "a grid of 0x1x1");
    let most = Emulator::LIMITS.shared_per_block;
    told(
        device.launch_with("fault_copies", 1, 64, most + 16, &args),
        "shared memory; a block of this device has",
    );
    told(device.launch("fault_copied", 1, 64, &args), "no kernel fault_copied");
    // SAFETY: nothing uses it but the kernel below, which is told so.
    unsafe { device.0.free(x) };
    told(device.launch("fault_blocks_read_and_write", 1, 64, &args), "no memory of this device");
}

/// When each thread began and ended, by tickets.
fn order(seed: u64) -> Vec<[u32; 2]> {
    let device = Device::new(seed);
    let out = device.alloc("out", 4 + THREADS as usize * 8);
    // SAFETY: the counter is the first word.
    unsafe { device.0.fill(out, 0, 4).unwrap() };
    device.launch("probe_order", BLOCKS, 64, &[0, out, 0]).unwrap();
    let times: Vec<u32> = device.download(out + 4, THREADS as usize * 2).unwrap();
    bytemuck::cast_slice(&times).to_vec()
}

/// Seeds draw the order of blocks, warps and lanes; some run blocks side by side; one seed is one order.
#[test]
fn orders_are_drawn_from_the_seed() {
    let orders: Vec<_> = (0..16).map(order).collect();
    assert_eq!(orders[3], order(3));
    let first_of = |times: &[[u32; 2]]| times.iter().map(|time| time[0]).min().unwrap();
    let last_of = |times: &[[u32; 2]]| times.iter().map(|time| time[1]).max().unwrap();
    let (mut blocks_backward, mut warps_backward, mut lanes_backward, mut side_by_side) = (0, 0, 0, 0);
    for times in &orders {
        let (block, next) = (&times[..64], &times[64..128]);
        blocks_backward += u32::from(first_of(next) < first_of(block));
        warps_backward += u32::from(first_of(&times[32..64]) < first_of(&times[..32]));
        lanes_backward += u32::from(times[1][0] < times[0][0]);
        side_by_side += u32::from(first_of(next) < last_of(block) && first_of(block) < last_of(next));
    }
    for (what, count) in [
        ("blocks", blocks_backward),
        ("warps", warps_backward),
        ("lanes", lanes_backward),
        ("blocks side by side", side_by_side),
    ] {
        assert!((2..=14).contains(&count), "{what}: {count} of 16 seeds");
    }
}

#[test]
fn devices_run_side_by_side() {
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                for (name, ..) in PLANTED.iter().filter(|(name, ..)| *name != "never_ends") {
                    planted(&Device::new(seed), name, 0).unwrap();
                }
            });
        }
    });
}
