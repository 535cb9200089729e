//! `tessera run`: one prompt, one answer.

use super::ask::{answer, decode, encode, stop_on_ctrl_c};
use super::dump::Dump;
use super::options::{ModelArgs, SamplingArgs, SessionArgs};
use crate::error::{Error, Result};
use crate::input::prompt::{Conversation, ImageSource, Message};
use crate::runtime::request::Completion;
use crate::runtime::{Engine, ImageHandle, Input, Request};
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Options of `tessera run`.
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    model: ModelArgs,
    /// A picture; may be given several times
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// The question; `<image>` in it places a picture, otherwise pictures come first
    #[arg(long, value_name = "TEXT", required_unless_present = "messages", conflicts_with = "messages")]
    prompt: Option<String>,
    /// A system message
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["messages", "raw"])]
    system: Option<String>,
    /// A conversation in OpenAI's chat format; pictures are files or data: URLs
    #[arg(long, value_name = "FILE.json")]
    messages: Option<PathBuf>,
    /// Take the prompt verbatim, without a chat template
    #[arg(long, conflicts_with = "messages")]
    raw: bool,
    /// Most tokens of the answer [default: 512, within the context]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// A text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after an end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    /// Report each token's log-probability and the N likeliest alternatives, in the JSON object
    #[arg(long, value_name = "N", allow_negative_numbers = true, requires = "json")]
    logprobs: Option<usize>,
    #[command(flatten)]
    session: SessionArgs,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
    /// Write pixels, hidden states, features, ids and logits to a safetensors file
    #[arg(long, value_name = "FILE.safetensors")]
    dump: Option<PathBuf>,
    /// No timings, warnings or progress
    #[arg(long)]
    quiet: bool,
}

impl Run {
    pub fn run(self) -> Result<()> {
        let start = Instant::now();
        let sampling = self.sampling.sampling()?;
        let (source, load) = self.model.load_options()?;
        let (input, sources) = self.input()?;
        let dump = self.dump.as_deref().map(Dump::create).transpose()?;
        let mut session = self.session.session_options();
        session.all_logits = self.dump.is_some();

        let mut engine = Engine::load(&source, &load, session)?;
        engine.keep_intermediates = self.dump.is_some();
        let loaded = start.elapsed();
        stop_on_ctrl_c(&engine.control)?;

        let mut request = Request {
            sampling,
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            logprobs: self.logprobs,
            prompt_logits: self.dump.is_some(),
            ..Request::new(input)
        };
        // A prompt that does not fit is better known before pictures are encoded than after it.
        let pictures = decode(&engine, &sources)?;
        let sizes: Vec<_> = pictures.iter().map(|p| (p.picture.width, p.picture.height)).collect();
        engine.admit(&request, &sizes)?;
        request.images = encode(&mut engine, pictures, self.quiet)?;
        if !sampling.is_greedy() && !self.quiet && !self.json {
            super::say(format_args!("seed {}", sampling.seed));
        }
        let answer = answer(&mut engine, &request, !self.json, self.quiet)?;
        // A run that was stopped while it read the prompt has no logits for all of it.
        let whole = !(answer.is_stopped() && answer.token_ids.is_empty());
        if let Some(dump) = dump.filter(|_| whole) {
            dump.write(engine.model(), &request.images, &answer)?;
        }
        let timings = Timings::of(&request.images, &answer, loaded, start.elapsed());
        if self.json {
            let object = self.report(&engine, &request, &answer, &timings);
            return super::print(&format!("{object}\n"));
        }
        if !self.quiet && self.model.times() {
            super::say(format_args!("{}", timings.line(&answer)));
            if let Some(error) = engine.session().unrecorded() {
                super::say(format_args!("warning: work is asked for op by op, which is slower: {error}"));
            }
        }
        Ok(())
    }

    /// The conversation or text, and where its pictures come from.
    fn input(&self) -> Result<(Input, Vec<ImageSource>)> {
        let files: Vec<_> = self.image.iter().cloned().map(ImageSource::Path).collect();
        if let Some(path) = &self.messages {
            let text = String::from_utf8(super::read(path)?)
                .map_err(|_| Error::Prompt(format!("{} is not UTF-8 text", path.display())))?;
            let base = path.parent().unwrap_or(Path::new(""));
            let Conversation { messages, images } = Conversation::parse(&text, base)?;
            return Ok((Input::Chat(messages), place(images, files)?));
        }
        let prompt = self.prompt.clone().unwrap_or_default();
        if self.raw {
            return Ok((Input::Raw(prompt), files));
        }
        let system = self.system.iter().map(|text| Message::text("system", text.as_str()));
        let user = Message::prompt(&prompt, files.len())?;
        Ok((Input::Chat(system.chain([user]).collect()), files))
    }

    fn report(&self, engine: &Engine, request: &Request, answer: &Completion, timings: &Timings) -> Value {
        let images: Vec<_> = request
            .images
            .iter()
            .map(|image| {
                json!({
                    "file": image.name,
                    "width": image.width,
                    "height": image.height,
                    "pixels_sha256": image.pixels_sha256,
                })
            })
            .collect();
        let mut object = json!({
            "model": engine.model().name(),
            "device": engine.model().backend().describe(),
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason.name(),
            "prompt_tokens": answer.prompt_ids.len(),
            "image_tokens": answer.image_tokens,
            "completion_tokens": answer.token_ids.len(),
            "images": images,
            "timings_ms": self.model.times().then(|| timings.json()),
            "decode_tokens_per_s": self.model.times().then(|| answer.decode_tokens_per_s()),
        });
        if !request.sampling.is_greedy() {
            object["seed"] = json!(request.sampling.seed);
        }
        if request.logprobs.is_some() {
            object["logprobs"] = logprobs(engine, answer);
        }
        object
    }
}

fn logprobs(engine: &Engine, answer: &Completion) -> Value {
    let spell = |id: u32| engine.model().prompter().tokenizer().token(id).unwrap_or_default();
    let entry = |id: u32, logprob: f32| json!({"id": id, "token": spell(id), "logprob": logprob});
    answer
        .logprobs
        .iter()
        .map(|token| {
            let mut object = entry(token.id, token.logprob);
            object["top"] = token.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
            object
        })
        .collect()
}

/// Puts the pictures given with `--image` where the conversation names none of its own.
fn place(images: Vec<ImageSource>, files: Vec<ImageSource>) -> Result<Vec<ImageSource>> {
    let wanted = images.iter().filter(|image| **image == ImageSource::Given).count();
    if wanted != files.len() {
        return Err(Error::Prompt(format!(
            "the conversation leaves {wanted} pictures to --image, but {} were given",
            files.len()
        )));
    }
    let mut files = files.into_iter();
    let take = |image| match image {
        ImageSource::Given => files.next().expect("as many files as places"),
        image => image,
    };
    Ok(images.into_iter().map(take).collect())
}

/// Where the time went.
struct Timings {
    load: Duration,
    image_decode: Duration,
    preprocess: Duration,
    vision: Duration,
    projector: Duration,
    prefill: Duration,
    first_token: Duration,
    decode: Duration,
    total: Duration,
}

impl Timings {
    fn of(images: &[ImageHandle], answer: &Completion, load: Duration, total: Duration) -> Self {
        let sum = |stage: fn(&ImageHandle) -> Duration| images.iter().map(stage).sum::<Duration>();
        let image_decode = sum(|image| image.timings.decode);
        let preprocess = sum(|image| image.timings.preprocess);
        let vision = sum(|image| image.timings.vision);
        let projector = sum(|image| image.timings.projector);
        let prefill = answer.prefill;
        Timings {
            load,
            image_decode,
            preprocess,
            vision,
            projector,
            prefill,
            // What a user waits for once the model is loaded.
            first_token: image_decode + preprocess + vision + projector + prefill,
            decode: answer.decode,
            total,
        }
    }

    fn json(&self) -> Value {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        json!({
            "load": ms(self.load),
            "image_decode": ms(self.image_decode),
            "preprocess": ms(self.preprocess),
            "vision": ms(self.vision),
            "projector": ms(self.projector),
            "prefill": ms(self.prefill),
            "first_token": ms(self.first_token),
            "decode": ms(self.decode),
            "total": ms(self.total),
        })
    }

    /// One line for people.
    fn line(&self, answer: &Completion) -> String {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let mut line = format!("load {:.0} ms", ms(self.load));
        if answer.image_tokens > 0 {
            let image = self.image_decode + self.preprocess;
            line += &format!(
                " · image {:.1} ms · vision {:.1} ms · projector {:.1} ms",
                ms(image),
                ms(self.vision),
                ms(self.projector)
            );
        }
        line += &format!(
            " · prefill {} tokens {:.1} ms · {} tokens, {:.1} tokens/s",
            answer.prompt_ids.len(),
            ms(self.prefill),
            answer.token_ids.len(),
            answer.decode_tokens_per_s()
        );
        line
    }
}
