//! The command line: one file per command. Text goes to stdout as it is made; progress, timings and
//! warnings go to stderr. Exit codes: 0 done, 1 failed, 2 usage.

mod ask;
mod bench;
mod bench_ops;
mod chat;
mod clip;
mod devices;
mod dump;
mod eval;
mod inspect;
mod options;
mod preprocess;
mod profile;
mod progress;
mod run;
mod startup;
mod synth;

use crate::error::{self, Error, Result};
use clap::{Parser, Subcommand};
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "tessera", version, about, long_about = None, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer one prompt, with or without pictures
    Run(run::Run),
    /// Talk: one turn a line, `/image FILE` shows a picture
    Chat(chat::Chat),
    /// Tell which of several texts describes a picture best (CLIP)
    Classify(clip::Classify),
    /// Turn pictures or texts into vectors (CLIP)
    Embed(clip::Embed),
    /// Describe a model: layout, dimensions, tensors, memory, graphs
    Inspect(inspect::Inspect),
    /// Show the pixels that the vision tower would see, with their SHA-256
    Preprocess(preprocess::Preprocess),
    /// Ask all questions of a file and count the right answers
    Eval(eval::Eval),
    /// Time every stage, against what the hardware can do
    Bench(Box<bench::Bench>),
    /// Show where one run's time goes: a trace, a summary, a roofline
    Profile(profile::Profile),
    /// Write a checkpoint of real dimensions and random weights
    Synth(synth::Synth),
    /// List the devices that can run a model
    Devices(devices::Devices),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    keep_caught_panics_quiet();
    let result = match Cli::try_parse_from(bench::llama_bench_spelling(std::env::args_os())) {
        Ok(cli) => cli.command.run(),
        Err(usage) if usage.use_stderr() => {
            // Where nobody can be told there is still the exit code.
            let _ = usage.print();
            return ExitCode::from(2);
        }
        Err(help) => help.print().map_err(|source| Error::io(STDOUT, source)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough, as `| head` does, is no failure of ours.
        Err(Error::Io { path, source })
            if path == Path::new(STDOUT) && source.kind() == std::io::ErrorKind::BrokenPipe =>
        {
            ExitCode::SUCCESS
        }
        // Ctrl-C before there was anything to show: asked for, so no failure either.
        Err(Error::Cancelled) => {
            say(format_args!("stopped"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(format_args!("error: {error}"));
            ExitCode::from(if matches!(error, Error::Option { .. }) { 2 } else { 1 })
        }
    }
}

/// A decoder's panic that becomes an [`Error`] is no news; any other is a bug, and told as ever.
fn keep_caught_panics_quiet() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !error::is_guarded() {
            tell(panic);
        }
    }));
}

impl Command {
    fn run(self) -> Result<()> {
        match self {
            Command::Run(command) => command.run(),
            Command::Chat(command) => command.run(),
            Command::Classify(command) => command.run(),
            Command::Embed(command) => command.run(),
            Command::Inspect(command) => command.run(),
            Command::Preprocess(command) => command.run(),
            Command::Eval(command) => command.run(),
            Command::Bench(command) => command.run(),
            Command::Profile(command) => command.run(),
            Command::Synth(command) => command.run(),
            Command::Devices(command) => command.run(),
        }
    }
}

/// The longest file that is read whole, in bytes: the largest picture without compression has fewer.
const MAX_FILE: u64 = 1 << 30;

/// Reads a file that a command was pointed at. It may be a pipe, or a device that never ends.
fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path);
    let read = file.and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes));
    match read.map_err(|source| Error::io(path, source))? as u64 {
        0..=MAX_FILE => Ok(bytes),
        _ => Err(Error::io(path, std::io::Error::other(format!("longer than {MAX_FILE} bytes")))),
    }
}

/// What errors call the standard output.
const STDOUT: &str = "stdout";

/// Writes to stdout and flushes, so that text appears as it is made.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|source| Error::io(STDOUT, source))
}

/// Writes a line to stderr: a remark, which is no reason to fail where nobody listens.
fn say(line: fmt::Arguments<'_>) {
    let _ = std::io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}
