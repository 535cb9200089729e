//! The command line: one file per command. Text goes to stdout as it is made; progress, timings and
//! warnings go to stderr. Exit codes: 0 done, 1 failed, 2 usage.

mod bench;
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
mod synth;

use crate::error::{Error, Result};
use clap::{Parser, Subcommand};
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
    Bench(bench::Bench),
    /// Show where one run's time goes: a trace, a summary, a roofline
    Profile(profile::Profile),
    /// Write a checkpoint of real dimensions and random weights
    Synth(synth::Synth),
    /// List the devices that can run a model
    Devices(devices::Devices),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough, as `| head` does, is no failure of ours.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        // Ctrl-C before there was anything to show: asked for, so no failure either.
        Err(Error::Cancelled) => {
            eprintln!("stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if matches!(error, Error::Option { .. }) { 2 } else { 1 })
        }
    }
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

/// Reads a file that a command was pointed at.
fn read(path: &std::path::Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::io(path, source))
}

/// Writes to stdout and flushes, so that text appears as it is made.
fn print(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|source| Error::io("stdout", source))
}
