//! `build.rs` with compilers that are made up: what it asks of them, what it compiles again, and what it says when one
//! is missing, old or fails.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use tempfile::TempDir;

/// `build.rs` as a program; without the feature `emu` it needs nothing but the standard library.
static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("build-script");
    let rustc = std::env::var_os("RUSTC").unwrap_or("rustc".into());
    let made = Command::new(rustc).args(["--edition=2024", "build.rs", "-o"]).arg(&program).status();
    assert!(made.unwrap().success(), "build.rs does not compile by itself");
    program
});

/// A compiler that knows two architectures, writes down what it is asked, and says what ptxas says.
const OLD: &str = r#"
case "$1" in
    --list-gpu-code) printf 'sm_80\nsm_90\n'; exit ;;
    --version) echo 'Cuda compilation tools, release 11.8, V11.8.89'; exit ;;
esac
echo "$@" >>asked
for word; do product=$word; done
echo "a binary" >"$product"
echo "ptxas info : Compiling entry function 'add_bf16' for 'sm_80'" >&2
echo "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads" >&2
echo "ptxas info : Used 40 registers" >&2
"#;

/// A checkout with two kernel files, one of which includes a header. One at a time: a compiler that is being written
/// cannot be run, and a process that another test starts may hold it open for writing a moment longer.
struct Checkout {
    folder: TempDir,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Checkout {
    fn new(nvcc: &str) -> Self {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let this = Checkout { folder: tempfile::tempdir().unwrap(), _alone };
        fs::create_dir_all(this.path("kernels/emu")).unwrap();
        fs::create_dir(this.path("out")).unwrap();
        this.write("kernels/add.cu", "#include \"add.cuh\"\n");
        this.write("kernels/add.cuh", "// one\n");
        this.write("kernels/norm.cu", "// alone\n");
        this.write("kernels/emu/probes.cu", "#include \"../add.cuh\"\n");
        this.write("nvcc", &format!("#!/bin/sh\n{nvcc}"));
        fs::set_permissions(this.path("nvcc"), fs::Permissions::from_mode(0o755)).unwrap();
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Runs the build with what NVCC says.
    fn build(&self, nvcc: &str) -> Output {
        let mut build = Command::new(&*PROGRAM);
        build.current_dir(self.folder.path()).env_remove("CUDA_HOME").env_remove("CUDA_PATH");
        build.env("OUT_DIR", self.path("out")).env("NVCC", nvcc).env("NUM_JOBS", "2").env("PROFILE", "debug");
        build.output().unwrap()
    }

    /// Builds, and returns the files that were compiled.
    fn compiled(&self) -> Vec<String> {
        let _ = fs::remove_file(self.path("asked"));
        let output = self.build(self.path("nvcc").to_str().unwrap());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let asked = self.read("asked");
        let source = |line: &str| line.split(' ').find(|word| word.ends_with(".cu")).unwrap().to_string();
        let mut files: Vec<_> = asked.lines().map(source).collect();
        files.sort();
        files
    }
}

#[test]
fn a_compiler_that_fails_fails_the_build_in_its_own_words() {
    let fails =
        OLD.replace("echo \"a binary\"", "echo 'add.cu(7): error: expected a \";\"' >&2; exit 2; echo");
    let checkout = Checkout::new(&fails);
    let output = checkout.build(checkout.path("nvcc").to_str().unwrap());
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(told.contains("does not compile:\nadd.cu(7): error: expected a \";\""), "{told}");
    assert!(!checkout.path("out/kernels.rs").exists());
}

#[test]
fn a_build_without_a_compiler_has_no_kernels_and_says_how_to_get_them() {
    let checkout = Checkout::new(OLD);
    let output = checkout.build("");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    assert!(told.contains("cargo:warning=no nvcc found") && told.contains("kernels/fetch-nvcc"), "{told}");
    let embedded = checkout.read("out/kernels.rs");
    assert!(embedded.contains("COMPILER: &str = \"\"") && !embedded.contains("include_bytes"), "{embedded}");
}

#[test]
fn a_compiler_that_is_named_and_is_not_there_fails_the_build() {
    let checkout = Checkout::new(OLD);
    let output = checkout.build("/nowhere/nvcc");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && told.contains("/nowhere/nvcc: "), "{told}");
}

#[test]
fn an_old_compiler_is_asked_for_what_it_knows_and_for_ptx() {
    let checkout = Checkout::new(OLD);
    checkout.compiled();
    let asked = checkout.read("asked");
    for line in asked.lines() {
        let codes: Vec<_> = line.split(' ').filter_map(|word| word.strip_prefix("-gencode=arch=")).collect();
        let wanted = ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_80,code=compute_80"];
        assert_eq!(codes, wanted, "{line}");
    }
    let embedded = checkout.read("out/kernels.rs");
    assert!(embedded.contains("release 11.8"), "{embedded}");
    let (modules, probes) = embedded.split_once("PROBES").unwrap();
    assert!(modules.contains("\"add\"") && modules.contains("\"norm\"") && !modules.contains("\"probes\""));
    assert!(probes.contains("\"probes\""), "{probes}");
    // Without a disassembler beside it there are no counts of instructions.
    assert_eq!(checkout.read("out/norm.resources"), "add_bf16 sm_80 40 8 16\n");
}

#[test]
fn only_what_has_changed_is_compiled_again() {
    let checkout = Checkout::new(OLD);
    let all = ["kernels/add.cu", "kernels/emu/probes.cu", "kernels/norm.cu"];
    assert_eq!(checkout.compiled(), all);
    assert_eq!(checkout.compiled(), [""; 0]);
    checkout.write("kernels/add.cuh", "// two\n");
    assert_eq!(checkout.compiled(), all[..2]);
    checkout.write("kernels/norm.cu", "// edited\n");
    assert_eq!(checkout.compiled(), all[2..]);
    fs::remove_file(checkout.path("out/add.fatbin")).unwrap();
    assert_eq!(checkout.compiled(), all[..1]);
    // Another compiler makes other products.
    checkout.write("nvcc", &format!("#!/bin/sh\n{}", OLD.replace("11.8, V11.8.89", "12.0, V12.0.1")));
    assert_eq!(checkout.compiled(), all);
}
