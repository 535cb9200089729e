//! `tessera chat`: a conversation, one turn a line.

use super::ask::{answer, decode, encode, stop_on_ctrl_c};
use super::options::{ModelArgs, SamplingArgs, SessionArgs};
use crate::error::{Error, Result};
use crate::input::prompt::{Content, ImageSource, Message, Part};
use crate::runtime::{Engine, ImageHandle, Input, Request, Sampling};
use clap::Args;
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

/// Options of `tessera chat`.
#[derive(Debug, Args)]
pub struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    /// A picture for the first turn; may be given several times
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// A system message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of one answer [default: 512, within the context]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// No prompts, hints or progress
    #[arg(long)]
    quiet: bool,
}

/// The conversation so far.
struct Talk {
    engine: Engine,
    sampling: Sampling,
    max_tokens: Option<usize>,
    quiet: bool,
    system: Option<String>,
    messages: Vec<Message>,
    images: Vec<ImageHandle>,
    /// Pictures that were shown since the last turn.
    shown: usize,
}

impl Chat {
    pub fn run(self) -> Result<()> {
        let sampling = self.sampling.sampling()?;
        let (source, load) = self.model.load_options()?;
        let engine = Engine::load(&source, &load, self.session.session_options())?;
        stop_on_ctrl_c(&engine.control)?;
        let mut talk = Talk {
            engine,
            sampling,
            max_tokens: self.max_tokens,
            quiet: self.quiet,
            system: self.system,
            messages: Vec::new(),
            images: Vec::new(),
            shown: 0,
        };
        talk.reset();
        for path in self.image {
            talk.show(path)?;
        }
        let interactive = std::io::stdin().is_terminal() && !self.quiet;
        if interactive {
            super::say(format_args!(
                "/image FILE shows a picture, /reset starts again, /quit ends; Ctrl-C stops an answer"
            ));
        }
        talk.listen(interactive)
    }
}

impl Talk {
    fn listen(&mut self, interactive: bool) -> Result<()> {
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if interactive {
                super::print("> ")?;
            }
            let Some(line) = lines.next() else { return Ok(()) };
            let line = line.map_err(|source| Error::io("stdin", source))?;
            self.engine.control.reset();
            let done = match line.trim() {
                "" => Ok(()),
                "/quit" | "/exit" => return Ok(()),
                "/reset" => {
                    self.reset();
                    Ok(())
                }
                command if command.starts_with("/image ") => self.show(command[7..].trim().into()),
                command if command.starts_with('/') => Err(Error::Prompt(format!(
                    "{} is no command; there are /image FILE, /reset and /quit",
                    command.split_whitespace().next().unwrap_or(command)
                ))),
                text => self.turn(text),
            };
            match done {
                // Whoever sits there can try something else; a script should hear of it.
                Err(Error::Cancelled) if interactive => super::say(format_args!("stopped")),
                Err(error) if interactive => super::say(format_args!("error: {error}")),
                done => done?,
            }
        }
    }

    fn reset(&mut self) {
        self.messages = self.system.iter().map(|text| Message::text("system", text.as_str())).collect();
        self.images.clear();
        self.shown = 0;
    }

    fn show(&mut self, path: PathBuf) -> Result<()> {
        let picture = decode(&self.engine, &[ImageSource::Path(path)])?;
        let image = encode(&mut self.engine, picture, self.quiet)?;
        self.images.extend(image);
        self.shown += 1;
        Ok(())
    }

    fn turn(&mut self, text: &str) -> Result<()> {
        let question = Message::prompt(text, self.shown)?;
        let mut messages = self.messages.clone();
        messages.push(question);
        let request = Request {
            images: self.images.clone(),
            sampling: self.sampling,
            max_tokens: self.max_tokens,
            ..Request::new(Input::Chat(messages))
        };
        let answer = answer(&mut self.engine, &request, true, self.quiet)?;
        let Input::Chat(mut messages) = request.input else { unreachable!("made above") };
        let text = answer.text.trim().to_string();
        messages.push(Message { role: "assistant".into(), content: Content::Parts(vec![Part::Text(text)]) });
        self.messages = messages;
        self.shown = 0;
        Ok(())
    }
}
