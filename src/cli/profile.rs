//! `tessera profile`: one run, node by node.

use super::options::{ModelArgs, SessionArgs};
use crate::bench::profile::Question;
use crate::bench::subject::Subject;
use crate::bench::{roofline, trace};
use crate::error::{Error, Result};
use crate::runtime::Engine;
use clap::Args;
use std::path::PathBuf;

/// Options of `tessera profile`.
#[derive(Debug, Args)]
pub struct Profile {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// A picture to ask about
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// The question
    #[arg(long, value_name = "TEXT", default_value = "What is in this picture?")]
    prompt: String,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 16)]
    max_tokens: usize,
    /// Write a trace for Perfetto or chrome://tracing
    #[arg(short = 'o', long, value_name = "FILE.json")]
    output: Option<PathBuf>,
    /// Print calls, time, share and distance from the ceiling of every op; what is done without -o and --svg
    #[arg(long)]
    summary: bool,
    /// Draw a roofline plot
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,
}

impl Profile {
    pub fn run(self) -> Result<()> {
        let (source, load) = self.model.load_options()?;
        let mut engine = Engine::load(&source, &load, self.session.session_options())?;
        super::ask::stop_on_ctrl_c(&engine.control)?;
        let picture = self.image.as_deref().map(super::read).transpose()?;
        let question = Question { picture, prompt: self.prompt, max_tokens: self.max_tokens };
        question.rehearse(&mut engine)?;
        let ceilings = engine.model().ceilings()?;
        if let (None, Some(_)) = (ceilings, &self.svg) {
            return Err(Error::option(
                "--svg",
                "a device that is timed",
                engine.model().backend().describe(),
            ));
        }
        let profile = question.profile(&mut engine, ceilings)?;

        let subject = Subject::new(engine.model(), load.load_mode, engine.session().prefill_chunk());
        if let Some(path) = &self.output {
            let file = std::fs::File::create(path).map_err(|error| Error::io(path, error))?;
            let trace = trace::chrome(&subject, profile.clock, &profile.events);
            serde_json::to_writer(std::io::BufWriter::new(file), &trace)
                .map_err(|error| Error::io(path, error.into()))?;
        }
        if let Some((path, ceilings)) = self.svg.as_ref().zip(profile.ceilings) {
            let title = format!("{} on {}", subject.model_filename, subject.device);
            std::fs::write(path, roofline::svg(&title, &profile.ops, ceilings))
                .map_err(|error| Error::io(path, error))?;
        }
        if self.summary || (self.output.is_none() && self.svg.is_none()) {
            super::print(&trace::table(&profile.ops))?;
        }
        let overhead = profile.overhead.unwrap_or("nothing is timed on this device".into());
        super::say(format_args!("{} spans; {overhead}", profile.spans));
        Ok(())
    }
}
