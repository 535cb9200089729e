//! What is asked of an engine, and what it answers.

use super::engine::ImageHandle;
use super::sampling::Sampling;
use crate::error::Result;
use crate::input::prompt::Message;
use std::time::Duration;

/// What to continue.
#[derive(Clone, Debug)]
pub enum Input {
    /// A conversation, rendered by the checkpoint's chat template.
    Chat(Vec<Message>),
    /// Text taken verbatim, in which `<image>` marks the pictures.
    Raw(String),
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The conversation or text.
    pub input: Input,
    /// Its pictures, in order.
    pub images: Vec<ImageHandle>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens to generate; `None` is 512, or fewer if the context ends before.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Whether to go on after an end-of-text token.
    pub ignore_eos: bool,
    /// How many alternatives to report for every token, besides its own log-probability.
    pub logprobs: Option<usize>,
    /// Whether to keep the logits of every prompt position. Without `all_logits` the session makes few at
    /// a time, and the prompt takes many steps.
    pub prompt_logits: bool,
}

impl Request {
    /// A request for `input`, greedy, with no pictures.
    pub fn new(input: Input) -> Self {
        Request {
            input,
            images: Vec::new(),
            sampling: Sampling::GREEDY,
            max_tokens: None,
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logits: false,
        }
    }

    /// A question about `images`. Where `text` holds `<image>`, the pictures stand there, else in front.
    ///
    /// # Errors
    /// [`Error::Prompt`](crate::Error::Prompt) when the number of `<image>` differs from that of the pictures.
    pub fn ask(text: &str, images: &[ImageHandle]) -> Result<Self> {
        let message = Message::prompt(text, images.len())?;
        Ok(Request { images: images.to_vec(), ..Request::new(Input::Chat(vec![message])) })
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token, or a stop string.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// The request was cancelled.
    Cancelled,
}

impl FinishReason {
    /// The word that OpenAI's API uses (`cancelled` is ours).
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// A token's log-probability under the model, before sampling options, and the likeliest alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogProb {
    /// The token.
    pub id: u32,
    /// ln of its probability.
    pub logprob: f32,
    /// The likeliest tokens, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The text, without stop strings and special tokens.
    pub text: String,
    /// The tokens, a final end-of-text token included.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Ids of the prompt, pictures expanded.
    pub prompt_ids: Vec<u32>,
    /// How many of them are image rows.
    pub image_tokens: usize,
    /// Prompt positions that were still in the cache from the request before.
    pub reused_tokens: usize,
    /// One for each token, if asked for.
    pub logprobs: Vec<TokenLogProb>,
    /// Logits of the prompt positions `[T, V]`, if asked for.
    pub prompt_logits: Vec<f32>,
    /// From the start of the request to the end of the prefill, the first token chosen.
    pub prefill: Duration,
    /// All steps after that.
    pub decode: Duration,
}

impl Completion {
    /// Whether it was cut short by [`Control::cancel`](crate::graph::Control::cancel).
    pub fn is_stopped(&self) -> bool {
        self.finish_reason == FinishReason::Cancelled
    }

    /// Tokens per second after the first.
    pub fn decode_tokens_per_s(&self) -> f64 {
        let steps = self.token_ids.len().saturating_sub(1) as f64;
        if steps == 0.0 { 0.0 } else { steps / self.decode.as_secs_f64() }
    }
}
