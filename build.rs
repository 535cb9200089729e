//! Compiles the kernels. The only file that knows a compiler.
//!
//! With nvcc, each `kernels/*.cu` becomes one fat binary, which the library embeds. Without, the library has no
//! kernels for GPUs, and `tessera devices` says how to get them. With the feature `emu`, the same files are
//! compiled by the host's C++ compiler against the emulated device and linked in. Only what has changed is
//! compiled again: beside each product stands a digest of its command, its source and the headers it includes.

#[path = "kernels/resources.rs"]
mod resources;

use std::collections::BTreeSet;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::Mutex;

/// Real architectures with code of their own: Ampere (which 86 and 89 run as well: nothing here gains by theirs),
/// Hopper, Blackwell for data centres and for desks.
const ARCHITECTURES: [&str; 4] = ["80", "90", "100", "120"];

/// The virtual architecture of the PTX that later GPUs compile for themselves: the oldest that has all the
/// kernels use, so that it serves every GPU that the list above does not.
const PTX: &str = "80";

/// Each primitive in a kernel of its own, so that a test may ask a GPU what it makes of it.
const PROBES: &str = "kernels/emu/probes.cu";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    name_build();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = find_nvcc(&out);
    match &nvcc {
        Some(nvcc) => compile_for_gpus(nvcc, &out),
        None => {
            println!(
                "cargo:warning=no nvcc found: this build has no kernels for GPUs (kernels/fetch-nvcc gets one)"
            );
            embed(&[], &[], "", &out);
        }
    }
    #[cfg(feature = "emu")]
    emulated::compile(&out);
}

/// Tells the library how it was built, and a release build of a checkout which commit it is of: `bench` prints both
/// beside every figure. Development builds do without the commit, or every one would build the library anew.
fn name_build() {
    let set = |name: &str| env::var(name).unwrap_or_default();
    let rustc = Command::new(set("RUSTC")).arg("-V").output();
    let rustc =
        rustc.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string()).unwrap_or_default();
    let flags = set("CARGO_ENCODED_RUSTFLAGS").replace('\u{1f}', " ");
    let features: Vec<_> = env::vars()
        .filter_map(|(name, _)| name.strip_prefix("CARGO_FEATURE_").map(str::to_lowercase))
        .filter(|feature| feature != "default")
        .collect();
    let mut build = format!("opt-level {}, {}, {rustc}", set("OPT_LEVEL"), set("TARGET"));
    for (what, value) in [("RUSTFLAGS", flags), ("features", features.join(" "))] {
        if !value.is_empty() {
            build += &format!(", {what} {value}");
        }
    }
    println!("cargo:rustc-env=TESSERA_BUILD={build}");
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_string())
    };
    if env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    let number = git(&["rev-list", "--count", "HEAD"]);
    if let (Some(commit), Some(log)) =
        (git(&["rev-parse", "--short", "HEAD"]), git(&["rev-parse", "--git-path", "logs/HEAD"]))
    {
        println!("cargo:rustc-env=TESSERA_BUILD_NUMBER={}", number.unwrap_or_default());
        println!("cargo:rerun-if-changed={log}");
        println!("cargo:rustc-env=TESSERA_COMMIT={commit}");
    }
}

/// The compiler that NVCC names (empty: none), or that of CUDA_HOME, CUDA_PATH, the target folder
/// (`kernels/fetch-nvcc` puts one there), the PATH, or where installers put it.
fn find_nvcc(out: &Path) -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    if let Some(nvcc) = env::var_os("NVCC") {
        return (!nvcc.is_empty()).then(|| nvcc.into());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set).map(PathBuf::from);
    let fetched = out.ancestors().map(|dir| dir.join("cuda/nvidia/cu13"));
    let installed = [PathBuf::from("/usr/local/cuda")];
    let path = env::var_os("PATH").unwrap_or_default();
    let in_bin = homes.chain(fetched).chain(installed).map(|home| home.join("bin"));
    in_bin.chain(env::split_paths(&path)).map(|bin| bin.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// Makes a fat binary of every kernel file and embeds them.
fn compile_for_gpus(nvcc: &Path, out: &Path) {
    println!("cargo:rerun-if-changed={}", nvcc.display());
    let ask = |option| {
        let output = Command::new(nvcc).arg(option).output();
        let output = output.unwrap_or_else(|error| fail(&format!("{}: {error}", nvcc.display())));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let known = ask("--list-gpu-code");
    let version = ask("--version");
    let version = version.lines().find(|line| line.contains("release")).unwrap_or_default().to_string();

    let mut options: Vec<OsString> =
        ["-fatbin", "-O3", "-std=c++17", "-lineinfo", "--compress-mode=size", "-Xptxas=-v"]
            .map(OsString::from)
            .to_vec();
    // An older compiler leaves out the architectures it does not know; PTX serves them.
    for arch in ARCHITECTURES.iter().filter(|arch| known.lines().any(|line| line == format!("sm_{arch}"))) {
        options.push(format!("-gencode=arch=compute_{arch},code=sm_{arch}").into());
    }
    options.push(format!("-gencode=arch=compute_{PTX},code=compute_{PTX}").into());

    let mut jobs = Vec::new();
    for source in files("kernels", "cu").into_iter().chain([PathBuf::from(PROBES)]) {
        let product = out.join(source.file_stem().expect("a file name")).with_extension("fatbin");
        let mut command = Command::new(nvcc);
        command.args(&options).arg(&source).arg("-o").arg(&product);
        let after = |product: &Path, told: &str| {
            write(&product.with_extension("resources"), resources::describe(nvcc, product, told).as_bytes());
        };
        jobs.push(Job { source, product, command, after: Box::new(after) });
    }
    let products: Vec<_> = jobs.iter().map(|job| job.product.clone()).collect();
    run(jobs, &version);
    let (probes, kernels) = products.split_last().expect("the probes, at least");
    embed(kernels, std::slice::from_ref(probes), &version, out);
}

/// Writes the lists of fat binaries that the library includes.
fn embed(kernels: &[PathBuf], probes: &[PathBuf], version: &str, out: &Path) {
    let module = |product: &PathBuf| {
        let name = product.file_stem().expect("a file name").to_string_lossy();
        let resources = product.with_extension("resources");
        format!(
            "    Module {{ name: {name:?}, image: include_bytes!({product:?}), resources: include_str!({resources:?}) }},\n"
        )
    };
    let modules = |products: &[PathBuf]| products.iter().map(module).collect::<String>();
    let text = format!(
        "/// The compiler that made the kernels; empty: none did.\npub const COMPILER: &str = {version:?};\n\
         /// One module for each file of `kernels/`.\npub const MODULES: &[Module] = &[\n{}];\n\
         /// `kernels/emu/probes.cu`: each primitive alone, for a test.\npub const PROBES: &[Module] = &[\n{}];\n",
        modules(kernels),
        modules(probes),
    );
    write(&out.join("kernels.rs"), text.as_bytes());
}

/// Given the product and what the compiler said, when it is made.
type After<'a> = Box<dyn Fn(&Path, &str) + Send + 'a>;

/// One file to compile.
struct Job<'a> {
    source: PathBuf,
    product: PathBuf,
    command: Command,
    after: After<'a>,
}

/// Runs the jobs whose products are stale, as many at once as cargo allows. An error ends the build with the
/// compiler's own words.
fn run(jobs: Vec<Job<'_>>, salt: &str) {
    let stale = Mutex::new(jobs.into_iter().filter(|job| !job.is_fresh(salt)).collect::<Vec<_>>());
    let workers: usize = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let next = || stale.lock().expect("no worker panics").pop();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(mut job) = next() {
                    job.compile();
                    write(&job.stamp(), job.digest(salt).as_bytes());
                }
            });
        }
    });
}

impl Job<'_> {
    fn compile(&mut self) {
        let output = self.command.output();
        let output =
            output.unwrap_or_else(|error| fail(&format!("{:?}: {error}", self.command.get_program())));
        let told = [output.stderr, output.stdout].concat();
        let told = String::from_utf8_lossy(&told);
        if !output.status.success() {
            fail(&format!("{} does not compile:\n{told}", self.source.display()));
        }
        (self.after)(&self.product, &told);
    }

    fn is_fresh(&self, salt: &str) -> bool {
        let stamp = fs::read_to_string(self.stamp()).unwrap_or_default();
        self.product.exists() && stamp == self.digest(salt)
    }

    fn stamp(&self) -> PathBuf {
        let mut name = self.product.clone().into_os_string();
        name.push(".digest");
        name.into()
    }

    /// What the product is made of.
    fn digest(&self, salt: &str) -> String {
        let mut hasher = DefaultHasher::new();
        hasher.write(salt.as_bytes());
        hasher.write(format!("{:?}", self.command).as_bytes());
        let mut files = BTreeSet::new();
        with_includes(&self.source, &mut files);
        for file in files {
            hasher.write(file.as_os_str().as_encoded_bytes());
            hasher.write(&fs::read(&file).unwrap_or_default());
        }
        format!("{:016x}", hasher.finish())
    }
}

/// Adds a file and all that it includes by name, `#include "..."`, from its own folder.
fn with_includes(file: &Path, all: &mut BTreeSet<PathBuf>) {
    if !file.exists() || !all.insert(file.to_path_buf()) {
        return;
    }
    let text = fs::read_to_string(file).unwrap_or_default();
    for line in text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")) {
        let name = line.split('"').next().unwrap_or_default();
        with_includes(&file.with_file_name(name), all);
    }
}

/// Files of a folder with an extension, in order; none if there is no such folder.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<_> = entries.filter(|path| path.extension() == Some(OsStr::new(extension))).collect();
    files.sort();
    files
}

fn write(path: &Path, bytes: &[u8]) {
    if fs::read(path).ok().as_deref() != Some(bytes) {
        fs::write(path, bytes).unwrap_or_else(|error| fail(&format!("{}: {error}", path.display())));
    }
}

fn fail(text: &str) -> ! {
    eprintln!("{text}");
    exit(1);
}

/// The emulated device and the kernels as it runs them; kernels/emu/api.h says why these options.
#[cfg(feature = "emu")]
mod emulated {
    use super::*;

    pub fn compile(out: &Path) {
        let mut jobs = Vec::new();
        for source in files("kernels/emu", "cc") {
            let mut build = cc::Build::new();
            build.opt_level(3);
            jobs.push(job(build, source, out));
        }
        for source in files("kernels", "cu").into_iter().chain(files("kernels/emu", "cu")) {
            let mut build = cc::Build::new();
            build.opt_level(2).define("EMU", None);
            for flag in [
                "-fsanitize=thread",
                "-fsanitize-coverage=trace-pc",
                "-ffp-contract=off",
                "-Wno-unknown-pragmas",
            ] {
                build.flag(flag);
            }
            build.flag_if_supported("-fno-tree-loop-distribute-patterns");
            build.flag_if_supported("--param=tsan-instrument-func-entry-exit=0");
            jobs.push(job(build, source, out));
        }
        let objects: Vec<_> = jobs.iter().map(|job| job.product.clone()).collect();
        run(jobs, "");
        let mut archive = cc::Build::new();
        // Linked whole, because kernels register themselves when the program starts.
        archive.cargo_metadata(false).objects(objects).compile("tessera_emu");
        println!("cargo:rustc-link-search=native={}", out.display());
        println!("cargo:rustc-link-lib=static:+whole-archive,-bundle=tessera_emu");
        println!("cargo:rustc-link-lib={}", if cfg!(target_os = "macos") { "c++" } else { "stdc++" });
    }

    fn job(mut build: cc::Build, source: PathBuf, out: &Path) -> Job<'static> {
        build.cpp(true).std("c++17").debug(false).flag("-g1").warnings(true).cargo_metadata(false);
        let stem = source.to_string_lossy().replace(['/', '\\', '.'], "_");
        let product = out.join(stem).with_extension("o");
        let mut command = build.get_compiler().to_command();
        if source.extension() == Some(OsStr::new("cu")) {
            command.args(["-x", "c++"]);
        }
        command.arg("-c").arg(&source).arg("-o").arg(&product);
        Job { source, product, command, after: Box::new(|_, _| ()) }
    }
}
