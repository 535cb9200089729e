//! The front desk: pictures and questions in, text out.

use super::batch::{Advance, Phase, Want};
use super::model::{LoadOptions, Model, Source};
use super::request::{Completion, FinishReason, Input, Request, TokenLogProb};
use super::sampling::log_probs;
use super::sequence::{EncodedImage, Sequence};
use super::session::Session;
use super::size::{SessionOptions, SessionPlan};
use super::vision::{Encoded, Pixels};
use crate::backend::cpu::{CpuBackend, usable_memory};
use crate::error::{Error, Result};
use crate::graph::Control;
use crate::input::image::{Picture, Tiles, pixels_sha256};
use crate::input::prompt::{Prompt, StopStrings, TextStream};
use crate::op::PAGE;
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// A picture that was decoded and encoded once; clones are cheap, and it serves any number of requests.
pub type ImageHandle = Arc<Image>;

/// A picture and what became of it.
#[derive(Debug)]
pub struct Image {
    /// The name it was given, for messages.
    pub name: String,
    /// Width in pixels, upright.
    pub width: usize,
    /// Height in pixels, upright.
    pub height: usize,
    /// SHA-256 of the normalised pixels, in hexadecimal.
    pub pixels_sha256: String,
    /// Its rows in the language model's input.
    pub encoded: Arc<EncodedImage>,
    /// How long each stage took.
    pub timings: ImageTimings,
    /// What a dump needs, if the engine was asked to keep it.
    pub kept: Option<Arc<Kept>>,
}

/// A picture that was decoded and waits to be encoded: its size, and so the length of a prompt about it, is
/// known.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// The name it was given, for messages.
    pub name: String,
    /// Its pixels, upright.
    pub picture: Picture,
    /// How long it took.
    pub time: Duration,
}

/// What is known of an encoded picture for as long as somebody holds its rows.
#[derive(Debug)]
struct Known {
    encoded: Weak<EncodedImage>,
    pixels_sha256: String,
    kept: Option<Arc<Kept>>,
}

/// The intermediates of one picture.
#[derive(Debug)]
pub struct Kept {
    /// Normalised pixels `[squares, 3, S, S]`.
    pub pixels: Vec<f32>,
    /// The squares that the picture is seen in: 1 without tiles.
    pub squares: usize,
    /// The selected hidden states `[squares, rows, D]`, class rows included.
    pub hidden: Vec<f32>,
    /// The picture's rows in the prompt `[rows, D]`.
    pub features: Vec<f32>,
}

/// Stages of a picture.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImageTimings {
    /// File bytes to upright RGB.
    pub decode: Duration,
    /// Resize, crop, normalise.
    pub preprocess: Duration,
    /// Patch embedding and transformer blocks.
    pub vision: Duration,
    /// Projector.
    pub projector: Duration,
}

/// A [`Session`] with a tokenizer and an image processor in front of it. One request at a time; the
/// keys and values of the last one stay cached, so that the next turn of a conversation continues
/// where it ended.
pub struct Engine {
    session: Session,
    last: Option<Sequence>,
    /// Pictures by digest.
    known: HashMap<[u8; 32], Known>,
    /// Whether [`Engine::image`] keeps intermediates for a dump.
    pub keep_intermediates: bool,
    /// Watches and stops what the engine is doing, from any thread.
    pub control: Control,
}

/// How many tokens an answer has at most, unless the request says.
pub const DEFAULT_MAX_TOKENS: usize = 512;

impl Engine {
    /// Loads a model and makes a session for it.
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint or the options, named.
    pub fn load(source: &Source, options: &LoadOptions, session: SessionOptions) -> Result<Self> {
        if let Source::Preset(_) = source {
            Engine::plan(source, options, &session)?;
        }
        Ok(Engine::new(Session::new(Arc::new(Model::load(source, options)?), session)?))
    }

    /// Whether a preset, whose weights take long to make, would fit into memory with its session.
    fn plan(source: &Source, options: &LoadOptions, session: &SessionOptions) -> Result<()> {
        let blank = LoadOptions { preset_values: false, progress: None, ..options.clone() };
        let backend = Arc::new(CpuBackend::new(Some(1))?);
        let plan = SessionPlan::new(&Model::load_on(backend, source, &blank)?, session)?;
        // A device with memory of its own, and pages of 16 bits, says itself what does not fit.
        if options.device.may_be_gpu() { Ok(()) } else { plan.memory.check(usable_memory()) }
    }

    /// An engine over a session.
    pub fn new(session: Session) -> Self {
        Engine {
            session,
            last: None,
            known: HashMap::new(),
            keep_intermediates: false,
            control: Control::default(),
        }
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session, for a scheduler that steps it directly.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        self.session.model()
    }

    /// Forgets what the last request has cached, so that the next one begins from nothing.
    pub fn forget(&mut self) {
        self.last = None;
    }

    /// Decodes and encodes a picture. `name` is for messages only. One that was encoded before, and that
    /// somebody still holds, is not encoded again.
    ///
    /// # Errors
    /// [`Error::Image`]; [`Error::Prompt`] for a text model; [`Error::NonFinite`]; [`Error::Cancelled`].
    pub fn image(&mut self, name: &str, bytes: &[u8]) -> Result<ImageHandle> {
        let decoded = self.decode(name, bytes)?;
        self.encode(&decoded)
    }

    /// Encodes a picture that was decoded elsewhere.
    ///
    /// # Errors
    /// As for [`image`](Engine::image).
    pub fn picture(&mut self, name: &str, picture: &Picture) -> Result<ImageHandle> {
        self.look(name, picture, Duration::ZERO)
    }

    /// The first half of [`image`](Engine::image): what needs no device.
    ///
    /// # Errors
    /// [`Error::Image`]; [`Error::Prompt`] for a text model.
    pub fn decode(&self, name: &str, bytes: &[u8]) -> Result<Decoded> {
        let start = Instant::now();
        let picture = self.model().decode(name, bytes)?;
        Ok(Decoded { name: name.into(), picture, time: start.elapsed() })
    }

    /// The second half of [`image`](Engine::image).
    ///
    /// # Errors
    /// As for [`image`](Engine::image).
    pub fn encode(&mut self, decoded: &Decoded) -> Result<ImageHandle> {
        self.look(&decoded.name, &decoded.picture, decoded.time)
    }

    fn look(&mut self, name: &str, picture: &Picture, decode: Duration) -> Result<ImageHandle> {
        let start = Instant::now();
        let digest = self.model().preprocess()?.digest(picture);
        let mut timings = ImageTimings { decode, preprocess: start.elapsed(), ..Default::default() };
        let (encoded, pixels_sha256, kept) = match self.recall(&digest) {
            Some(known) => known,
            None => self.see(picture, digest, &mut timings)?,
        };
        let (name, width, height) = (name.into(), picture.width, picture.height);
        Ok(Arc::new(Image { name, width, height, pixels_sha256, encoded, timings, kept }))
    }

    /// A picture that was encoded before, unless it lacks what is to be kept now.
    fn recall(&self, digest: &[u8; 32]) -> Option<(Arc<EncodedImage>, String, Option<Arc<Kept>>)> {
        let known = self.known.get(digest)?;
        let enough = known.kept.is_some() || !self.keep_intermediates;
        let encoded = known.encoded.upgrade().filter(|_| enough)?;
        Some((encoded, known.pixels_sha256.clone(), known.kept.clone()))
    }

    /// Preprocesses and encodes a picture, and remembers it.
    fn see(
        &mut self,
        picture: &Picture,
        digest: [u8; 32],
        timings: &mut ImageTimings,
    ) -> Result<(Arc<EncodedImage>, String, Option<Arc<Kept>>)> {
        let start = Instant::now();
        let model = self.model().clone();
        let values = model.preprocess()?.pixels(picture)?;
        let tiles = model.config().tiling.as_ref().map(|t| t.tiles(picture.width, picture.height));
        let order = tiles.as_ref().map(Tiles::order);
        let squares = tiles.map_or(1, |tiles| tiles.squares());
        timings.preprocess += start.elapsed();

        let (order, keep_hidden) = (order.as_deref(), self.keep_intermediates);
        let pixels = Pixels { values: &values, order, digest, keep_hidden };
        self.control.begin(self.session.vision_nodes(squares));
        let (encoded, pixels_sha256) = std::thread::scope(|scope| {
            // The hash takes 0.8 ms, beside a GPU that takes 2.5. If there is no thread to be had, it is made after.
            let hash = || pixels_sha256(&values);
            let beside = std::thread::Builder::new().spawn_scoped(scope, hash).ok();
            let encoded = self.session.encode(pixels, &self.control);
            (encoded, beside.and_then(|beside| beside.join().ok()).unwrap_or_else(hash))
        });
        let Encoded { image, tower, projector, hidden } = encoded?;
        (timings.vision, timings.projector) = (tower, projector);

        let kept = match self.keep_intermediates {
            true => {
                let features = self.session.image_rows(&image)?;
                Some(Arc::new(Kept { pixels: values, squares, hidden, features }))
            }
            false => None,
        };
        let encoded = Arc::new(image);
        let known = Known {
            encoded: Arc::downgrade(&encoded),
            pixels_sha256: pixels_sha256.clone(),
            kept: kept.clone(),
        };
        self.known.retain(|_, known| known.encoded.strong_count() > 0);
        self.known.insert(digest, known);
        Ok((encoded, pixels_sha256, kept))
    }

    /// The ids of a prompt, pictures expanded.
    ///
    /// # Errors
    /// [`Error::Prompt`] or [`Error::Template`].
    pub fn prompt(&self, input: &Input, images: &[ImageHandle]) -> Result<Prompt> {
        self.prompt_about(input, &sizes(images))
    }

    /// The ids of a prompt about pictures of these sizes, (width, height), none of which need have been
    /// encoded: its length is known before any work is done.
    ///
    /// # Errors
    /// As for [`prompt`](Engine::prompt).
    pub fn prompt_about(&self, input: &Input, sizes: &[(usize, usize)]) -> Result<Prompt> {
        let config = self.model().config();
        let rows: Vec<_> = sizes.iter().map(|&(width, height)| config.image_tokens(width, height)).collect();
        match input {
            Input::Chat(messages) => self.model().prompter().conversation(messages, &rows),
            Input::Raw(text) => self.model().prompter().raw(text, &rows),
        }
    }

    /// Whether [`generate`](Engine::generate) would take the request, its pictures being of these sizes
    /// whatever `request.images` holds: what to ask before pictures are encoded.
    ///
    /// # Errors
    /// Those of `generate` before any work.
    pub fn admit(&self, request: &Request, sizes: &[(usize, usize)]) -> Result<()> {
        let prompt = self.prompt_about(&request.input, sizes)?;
        self.max_tokens(request, prompt.ids.len()).map(drop)
    }

    /// Answers a request. `on_text` is given the text piece by piece as it becomes certain; together
    /// the pieces are the completion's text.
    ///
    /// # Errors
    /// [`Error::Prompt`], [`Error::Context`], [`Error::KvExhausted`] and [`Error::Option`] before any work;
    /// [`Error::NonFinite`] during it. A cancelled request is not an error: it has what was made.
    pub fn generate(&mut self, request: &Request, mut on_text: impl FnMut(&str)) -> Result<Completion> {
        let prompt = self.prompt(&request.input, &request.images)?;
        let max_tokens = self.max_tokens(request, prompt.ids.len())?;
        let mut sequence = self.begin(&prompt, request)?;
        let model = self.model().clone();
        let mut text = TextOut {
            stream: TextStream::new(model.prompter().tokenizer()),
            stop: StopStrings::new(&self.stop_words(request))?,
            stopped: false,
            text: String::new(),
            on_text: &mut on_text,
        };
        let mut answer = Completion {
            text: String::new(),
            token_ids: Vec::with_capacity(max_tokens),
            finish_reason: FinishReason::Cancelled,
            image_tokens: prompt.images.iter().map(|span| span.len).sum(),
            prompt_ids: prompt.ids,
            reused_tokens: sequence.cached(),
            logprobs: Vec::new(),
            prompt_logits: Vec::new(),
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
        };
        match self.run(&mut sequence, request, max_tokens, &mut answer, &mut text) {
            Ok(finish_reason) => answer.finish_reason = finish_reason,
            Err(Error::Cancelled) => {}
            Err(error) => return Err(error),
        }
        answer.text = text.finish();
        self.last = Some(sequence);
        Ok(answer)
    }

    /// The log-probability of every token of `continuation` after a prompt: teacher-forced scoring.
    /// The continuation is tokenised by itself, without special tokens.
    ///
    /// # Errors
    /// As for [`generate`](Engine::generate), and [`Error::Cancelled`].
    pub fn score(&mut self, request: &Request, continuation: &str) -> Result<Vec<TokenLogProb>> {
        let prompt = self.prompt(&request.input, &request.images)?;
        let given = self.model().prompter().tokenizer().encode(continuation, false)?;
        self.fits(prompt.ids.len(), given.len())?;
        let mut sequence = self.begin(&prompt, request)?;
        let mut scores = Vec::with_capacity(given.len());
        if given.is_empty() {
            return Ok(scores);
        }
        let mut logits = vec![0f32; self.model().config().text.vocab_size];
        let top = request.logprobs.unwrap_or(0);
        self.prefill(&mut sequence, request, &mut Vec::new())?;
        self.session.logits(0, self.session.output_rows(0) - 1, &mut logits)?;
        scores.push(TokenLogProb::of(&logits, given[0], top));
        for &id in &given[..given.len() - 1] {
            sequence.push(id);
        }
        while sequence.pending() > 0 {
            let tokens = sequence.pending().min(self.session.max_outputs()).min(self.session.prefill_chunk());
            self.step(&mut sequence, tokens, Want::All, Phase::Prefill)?;
            for row in 0..tokens {
                self.session.logits(0, row, &mut logits)?;
                scores.push(TokenLogProb::of(&logits, given[scores.len()], top));
            }
        }
        self.last = Some(sequence);
        Ok(scores)
    }

    /// Prefill, then one token after another.
    fn run(
        &mut self,
        sequence: &mut Sequence,
        request: &Request,
        max_tokens: usize,
        answer: &mut Completion,
        text: &mut TextOut<'_>,
    ) -> Result<FinishReason> {
        let start = Instant::now();
        let vocab = self.model().config().text.vocab_size;
        let mut logits = vec![0f32; if request.logprobs.is_some() { vocab } else { 0 }];
        let prefill = self.prefill(sequence, request, &mut answer.prompt_logits);
        answer.prefill = start.elapsed();
        prefill?;
        while answer.token_ids.len() < max_tokens {
            if !answer.token_ids.is_empty() {
                let step = self.step(sequence, 1, Want::Next, Phase::Decode);
                answer.decode = start.elapsed() - answer.prefill;
                step?;
            }
            let id = self.session.next(0);
            if let Some(top) = request.logprobs {
                let row = self.session.output_rows(0) - 1;
                self.session.logits(0, row, &mut logits)?;
                answer.logprobs.push(TokenLogProb::of(&logits, id, top));
            }
            answer.token_ids.push(id);
            sequence.push(id);
            let is_eos = self.model().eos_token_ids().contains(&id) && !request.ignore_eos;
            if is_eos || text.push(id) {
                return Ok(FinishReason::Stop);
            }
        }
        Ok(FinishReason::Length)
    }

    /// Processes all pending ids in chunks; the last one chooses a token. With `prompt_logits`, every
    /// row's logits are appended to `kept`.
    fn prefill(&mut self, sequence: &mut Sequence, request: &Request, kept: &mut Vec<f32>) -> Result<()> {
        let vocab = self.model().config().text.vocab_size;
        let chunk = match request.prompt_logits {
            true => self.session.prefill_chunk().min(self.session.max_outputs()),
            false => self.session.prefill_chunk(),
        };
        let nodes = self.session.language().graph().nodes.len();
        self.control.begin(nodes * sequence.pending().div_ceil(chunk));
        while sequence.pending() > 0 {
            let tokens = sequence.pending().min(chunk);
            // A token is chosen after every chunk, though only the last one counts: its logits show at once
            // if the chunk made NaN, and they cost one row of the head.
            let want = if request.prompt_logits { Want::All } else { Want::Next };
            self.step(sequence, tokens, want, Phase::Prefill)?;
            if request.prompt_logits {
                let start = kept.len();
                kept.resize(start + tokens * vocab, 0.0);
                for (row, logits) in kept[start..].chunks_exact_mut(vocab).enumerate() {
                    self.session.logits(0, row, logits)?;
                }
            }
        }
        Ok(())
    }

    fn step(&mut self, sequence: &mut Sequence, tokens: usize, want: Want, phase: Phase) -> Result<()> {
        self.session.step(&mut [Advance { sequence, tokens, want, phase }], &self.control)
    }

    /// A sequence for the prompt, with whatever the last one left in the cache for it.
    fn begin(&mut self, prompt: &Prompt, request: &Request) -> Result<Sequence> {
        let spans = prompt.images.iter().map(|span| span.start..span.start + span.len);
        let images = spans.zip(request.images.iter().map(|image| image.encoded.clone())).collect();
        let mut sequence = self.session.sequence(&prompt.ids, images, request.sampling)?;
        if let Some(last) = self.last.take().filter(|_| !request.prompt_logits) {
            sequence.adopt(last);
        }
        Ok(sequence)
    }

    /// What ends the answer: the request's words, and those of the chat template.
    fn stop_words(&self, request: &Request) -> Vec<String> {
        let mut words = request.stop.clone();
        if let Input::Chat(_) = request.input {
            words.extend(self.model().prompter().stop_words().map(String::from));
        }
        words
    }

    /// How many tokens the answer may have.
    fn max_tokens(&self, request: &Request, prompt: usize) -> Result<usize> {
        let room = (self.session.longest() + 1).saturating_sub(prompt);
        let wanted = request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS.min(room).max(1));
        self.fits(prompt, wanted)?;
        Ok(wanted)
    }

    fn fits(&self, prompt: usize, new: usize) -> Result<()> {
        let context = self.session.context();
        let needed = prompt.saturating_add(new.saturating_sub(1));
        if needed > context {
            return Err(Error::Context { needed, prompt, new, context });
        }
        let (needed, total) = (needed.div_ceil(PAGE), self.session.memory().pages);
        if needed > total {
            return Err(Error::KvExhausted { needed, free: total, total, page_size: PAGE });
        }
        Ok(())
    }
}

fn sizes(images: &[ImageHandle]) -> Vec<(usize, usize)> {
    images.iter().map(|image| (image.width, image.height)).collect()
}

impl TokenLogProb {
    fn of(logits: &[f32], id: u32, top: usize) -> Self {
        let (logprob, top) = log_probs(logits, id, top);
        TokenLogProb { id, logprob, top }
    }
}

/// The text of an answer on its way out.
struct TextOut<'a> {
    stream: TextStream<'a>,
    stop: StopStrings,
    stopped: bool,
    text: String,
    on_text: &'a mut dyn FnMut(&str),
}

impl TextOut<'_> {
    /// Adds a token; whether a stop string is complete.
    fn push(&mut self, id: u32) -> bool {
        let (piece, stopped) = self.stop.push(&self.stream.push(id));
        self.text.push_str(&piece);
        if !piece.is_empty() {
            (self.on_text)(&piece);
        }
        self.stopped = stopped;
        stopped
    }

    /// The whole text, after what was still held back is out.
    fn finish(self) -> String {
        let TextOut { stream, mut stop, stopped, mut text, on_text } = self;
        if !stopped {
            let (mut rest, stopped) = stop.push(&stream.finish());
            if !stopped {
                rest += &stop.finish();
            }
            text.push_str(&rest);
            on_text(&rest);
        }
        text
    }
}
