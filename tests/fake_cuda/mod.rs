//! Libraries that are made up for a test: each is compiled from C, and found by a process of its own before any other.

use std::path::PathBuf;
use std::process::{Command, Output};
use tempfile::TempDir;

/// Everything that the driver of a GPU calls.
pub const WHOLE: &str = include_str!("libcuda.c");

/// A folder of libraries.
pub struct Libraries(TempDir);

impl Libraries {
    /// `source` as libcuda.
    pub fn new(source: &str) -> Self {
        let this = Libraries(tempfile::tempdir().unwrap());
        this.compile("libcuda", source);
        this
    }

    /// A file of this folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Adds another library.
    pub fn compile(&self, name: &str, source: &str) -> PathBuf {
        let (file, product) = (self.path(&format!("{name}.c")), self.path(&format!("{name}.so")));
        std::fs::write(&file, source).unwrap();
        let mut cc = Command::new("cc");
        let made = cc.args(["-shared", "-fPIC", "-w", "-o"]).arg(&product).arg(&file).status();
        assert!(made.unwrap().success(), "{name} does not compile");
        product
    }

    /// Runs this test program's `test` with these libraries and variables of the environment.
    pub fn run(&self, test: &str, variables: &[(&str, PathBuf)]) -> Output {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture"])
            .env_remove("NVTX_INJECTION64_PATH")
            .env("LD_LIBRARY_PATH", self.0.path())
            .env("INSIDE", "1")
            .envs(variables.iter().cloned())
            .output()
            .unwrap();
        let (told, errors) = (stdout(&output), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{told}\n{errors}");
        output
    }
}

/// Compiles `source` as libcuda and runs this test program's `test` with it; what it printed.
pub fn with_library(source: &str, test: &str) -> String {
    stdout(&Libraries::new(source).run(test, &[]))
}

/// Whether this is the process that [`Libraries::run`] started.
pub fn inside() -> bool {
    std::env::var_os("INSIDE").is_some()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}
