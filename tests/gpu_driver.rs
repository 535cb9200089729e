//! The GPU driver without a GPU: against a library that has every function and runs on the host, and against
//! libraries that lack something. Each runs in a process of its own, which finds that library before any other.
#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tessera::backend::cuda::CudaBackend;
use tessera::backend::cuda::device::Launch;
use tessera::backend::cuda::driver::Driver;
use tessera::backend::cuda::gpu::{Gpu, Module, list};
use tessera::tensor::DType;

/// Compiles `source` as libcuda and runs this test program's `test` with it; what it printed.
fn with_library(source: &str, test: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("libcuda.c");
    std::fs::write(&file, source).unwrap();
    let mut cc = Command::new("cc");
    let made =
        cc.args(["-shared", "-fPIC", "-w", "-o"]).arg(dir.path().join("libcuda.so")).arg(&file).status();
    assert!(made.unwrap().success(), "the library does not compile");
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env("LD_LIBRARY_PATH", dir.path())
        .env("INSIDE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Whether this is the process that [`with_library`] started.
fn inside() -> bool {
    std::env::var_os("INSIDE").is_some()
}

const WHOLE: &str = include_str!("fake_cuda/libcuda.c");

#[test]
fn a_whole_library_is_driven() {
    if inside() {
        return drive();
    }
    let text = with_library(WHOLE, "a_whole_library_is_driven");
    assert!(text.contains("Fake 7, compute capability 8.6, 4 multiprocessors"), "{text}");
    // Nothing is left behind when the device is closed.
    let left = "left: 0 bytes, 0 pinned, 0 streams, 0 graphs, 0 modules, 0 contexts";
    assert!(text.contains(left), "{text}");
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct AddArgs {
    to: usize,
    add: u32,
    unused: u32,
}

fn drive() {
    println!("{:?}", list().unwrap());
    static MODULES: [Module; 1] = [Module { name: "add", image: b"fake image", resources: "" }];
    let gpu = Arc::new(Gpu::open_with(0, &MODULES).unwrap());
    assert!(Gpu::open_with(1, &MODULES).is_err_and(|e| e.to_string().contains("numbered 0 to 0")));

    // More rows than both pinned buffers hold (64 MiB), made in order while others are copied.
    let (rows, row_bytes) = (10_000, 8 << 10);
    let addr = gpu.alloc("rows", rows * row_bytes).unwrap().unwrap();
    let mut next = 0;
    let mut fill = |row: usize, out: &mut [u8]| {
        assert_eq!(row, next, "rows are made in order");
        next += 1;
        out.fill((row % 251) as u8);
        Ok(())
    };
    let mut back = vec![0; rows * row_bytes];
    // SAFETY: the whole of what was just allocated; so for all below.
    unsafe {
        gpu.upload_rows(addr, rows, row_bytes, &mut fill).unwrap();
        gpu.upload_rows(addr, 1, row_bytes, &mut |_, out| {
            out.fill(200);
            Ok(())
        })
        .unwrap();
        gpu.download(addr, &mut back).unwrap();
    }
    assert!(back[..row_bytes].iter().all(|b| *b == 200));
    assert!(
        back.chunks(row_bytes).enumerate().skip(1).all(|(i, row)| row.iter().all(|b| *b == (i % 251) as u8))
    );
    // Uploads of any length, whose bytes are changed at once, and more of them than there are buffers.
    for round in 0..5 {
        let mut bytes = vec![round; 12_345];
        // SAFETY: as above.
        unsafe { gpu.upload(addr + 7 + round as usize * bytes.len(), &bytes).unwrap() };
        bytes.fill(99);
    }
    // SAFETY: as above.
    unsafe { gpu.download(addr, &mut back).unwrap() };
    assert!(back[..7].iter().all(|b| *b == 200));
    assert!(
        back[7..].chunks(12_345).take(5).zip(0..).all(|(bytes, round)| bytes.iter().all(|b| *b == round))
    );
    assert_eq!(gpu.alloc("too much", 2 << 28).unwrap(), None);
    // SAFETY: allocated above, and not used again.
    unsafe { gpu.free(addr) };

    let backend = CudaBackend::new(gpu.clone(), DType::BF16).unwrap();
    let error = backend.device().alloc("the KV cache", 2 << 28).unwrap_err().to_string();
    assert!(error.contains("the KV cache: 536870912 bytes are needed, 268"), "{error}");
    let number = backend.device().alloc("a number", 4).unwrap();
    let launch = Launch { kernel: "add", grid: [1, 2, 3], block: 32, shared: 64 };
    let args = |add| AddArgs { to: number.addr, add, unused: 0 };
    let add = |n| {
        // SAFETY: the kernel's own arguments, and the number is live.
        unsafe { backend.device().launch(launch, &args(n)) }
    };
    let read = || {
        let mut bytes = [0; 4];
        // SAFETY: as above.
        unsafe { gpu.download(number.addr, &mut bytes).unwrap() };
        u32::from_le_bytes(bytes)
    };
    // SAFETY: as above.
    unsafe { gpu.fill(number.addr, 0, 4).unwrap() };
    add(5).unwrap();
    assert_eq!(read(), 5);
    // The made-up clock always says a millisecond and a half.
    let took = gpu.time(&mut || add(0)).unwrap().expect("a GPU's time");
    assert!((took.as_secs_f64() - 1.5e-3).abs() < 1e-6, "{took:?}");
    let recording = backend.device().record(&mut || {
        add(10)?;
        // Another thread's launch is none of this recording's.
        std::thread::scope(|scope| scope.spawn(|| add(100)).join().unwrap())?;
        add(20)
    });
    let recording = recording.unwrap();
    assert_eq!(read(), 105, "what is recorded does not run");
    for round in 1..4 {
        // SAFETY: the number is where it was.
        unsafe { recording.replay().unwrap() };
        assert_eq!(read(), 105 + 30 * round);
    }
    // Threads that record take their turns.
    std::thread::scope(|scope| {
        let recorders: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    backend.device().record(&mut || {
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        add(0)
                    })
                })
            })
            .collect();
        assert!(recorders.into_iter().all(|recorder| recorder.join().unwrap().is_ok()));
    });
    let failed = backend.device().record(&mut || Err(tessera::Error::Cancelled));
    assert!(matches!(failed, Err(tessera::Error::Cancelled)));
    add(1).unwrap();
    assert_eq!(read(), 196, "after a recording that failed, launches run");
    let wrong = Launch { kernel: "multiply", ..launch };
    // SAFETY: nothing is launched.
    let error = unsafe { backend.device().launch(wrong, &args(1)) }.unwrap_err().to_string();
    assert!(error.contains("multiply_bf16"), "{error}");
    let wide = Launch { block: 64, ..launch };
    // SAFETY: the library refuses.
    let error = unsafe { backend.device().launch(wide, &args(1)) }.unwrap_err().to_string();
    assert!(error.contains("add [1, 2, 3] x 64, 64 bytes of shared memory: cuLaunchKernel"), "{error}");
}

/// What a library without GPUs, one that is too old, and one that does not start say.
#[test]
fn what_is_missing_is_told() {
    if inside() {
        println!("{}", list().unwrap_err());
        return;
    }
    let told = |source: &str| with_library(source, "what_is_missing_is_told");
    let cases = [
        (
            WHOLE.replace("*n = 1; return OK; }\nint cuDeviceGet(", "*n = 0; return OK; }\nint cuDeviceGet("),
            "finds no GPU",
        ),
        (WHOLE.replace("int cuGraphLaunch(", "int cuGraphStart("), "too old: it has no cuGraphLaunch"),
        (
            WHOLE.replace("return flags ? INVALID : OK; }\nint cuDriver", "return INVALID; }\nint cuDriver"),
            "cuInit: a made-up error",
        ),
    ];
    for (source, expected) in cases {
        assert_ne!(source, WHOLE, "{expected}");
        let text = told(&source);
        assert!(text.contains(expected), "{text}");
    }
}

/// Every function of the library that is called is probed before.
#[test]
fn what_is_called_is_probed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/cuda");
    let files = ["library.rs", "gpu.rs", "staging.rs", "clock.rs"];
    let texts = files.map(|file| std::fs::read_to_string(folder.join(file)).unwrap());
    let lists = texts.iter().filter_map(|text| text.split("const FUNCTIONS").nth(1)?.split("];").next());
    let probed: String = lists.collect();
    for (file, text) in files.iter().zip(&texts) {
        for call in text.split("sys::cu").skip(1) {
            let name: String = call.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            // `culib` is the loader's, not the library's.
            let known = probed.contains(&format!("\"cu{name}\"")) || name == "lib";
            assert!(known, "{file} calls cu{name} without having asked for it");
        }
    }
}
