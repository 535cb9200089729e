//! Ids to text while they are made: every complete character at once, never half of one, and in sum
//! exactly the decoded whole.

use serde::Deserialize;
use tokenizers::DecoderWrapper;

use super::tokenizer::Tokenizer;

/// The text of a growing sequence of ids, special tokens left out. Work and memory for an id do not grow
/// with the sequence, but for one thing: bytes of a byte-fallback run are text only once the run has
/// ended, because a single invalid byte turns the whole run into U+FFFD.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Bytes that are not text yet: a run of byte tokens, or the beginning of a character.
    bytes: Vec<u8>,
    /// Pieces so far, up to 1.
    begun: bool,
    /// Leading characters that may still be stripped.
    strip: usize,
}

impl<'t> TextStream<'t> {
    /// A stream at the start of a text.
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        let strip = match tokenizer.decoder() {
            Decoder::ByteLevel => 0,
            Decoder::Pieces { strip, .. } => strip.map_or(0, |(_, count)| count),
        };
        TextStream { tokenizer, bytes: Vec::new(), begun: false, strip }
    }

    /// The text that `id` completes; often one word, sometimes nothing.
    pub fn push(&mut self, id: u32) -> String {
        let Some(piece) = self.tokenizer.piece(id) else { return String::new() };
        let first = !std::mem::replace(&mut self.begun, true);
        match self.tokenizer.decoder() {
            Decoder::ByteLevel => {
                let bytes: Option<Vec<u8>> = piece.chars().map(byte_of).collect();
                self.bytes.extend(bytes.unwrap_or_else(|| piece.into_bytes()));
                take_characters(&mut self.bytes)
            }
            Decoder::Pieces { steps, byte_fallback, .. } => {
                let piece = steps.iter().fold(piece, |piece, step| step.apply(piece, first));
                if *byte_fallback && let Some(byte) = fallback_byte(&piece) {
                    self.bytes.push(byte);
                    return String::new();
                }
                let text = take_run(&mut self.bytes) + &piece;
                self.stripped(text)
            }
        }
    }

    /// The rest, when no more ids come: U+FFFD for what was left incomplete.
    pub fn finish(mut self) -> String {
        match self.tokenizer.decoder() {
            Decoder::ByteLevel => String::from_utf8_lossy(&self.bytes).into_owned(),
            Decoder::Pieces { .. } => {
                let text = take_run(&mut self.bytes);
                self.stripped(text)
            }
        }
    }

    /// `text` without the characters that are stripped from the beginning of the whole.
    fn stripped(&mut self, mut text: String) -> String {
        let Decoder::Pieces { strip: Some((content, _)), .. } = self.tokenizer.decoder() else { return text };
        while self.strip > 0 && !text.is_empty() {
            if !text.starts_with(*content) {
                self.strip = 0;
                break;
            }
            text.remove(0);
            self.strip -= 1;
        }
        text
    }
}

/// How a tokenizer's pieces become text: the two families of decoders that LLaMA-like models have.
pub(super) enum Decoder {
    /// Byte-level BPE: a piece's characters stand for bytes, and the bytes of all pieces are UTF-8.
    ByteLevel,
    /// SentencePiece-like: a piece is text after some replacements.
    Pieces {
        /// What is done to each piece, in order.
        steps: Vec<Step>,
        /// Whether `<0xNN>` is a byte.
        byte_fallback: bool,
        /// A character that is removed from the beginning of the text, up to so many times.
        strip: Option<(char, usize)>,
    },
}

/// A change of one piece.
pub(super) enum Step {
    /// Replaces a string.
    Replace(String, String),
    /// Replaces the mark by a space, or by nothing in the first piece if `trim`.
    Metaspace { mark: char, trim: bool },
}

/// The decoders of `tokenizer.json` that can be streamed.
#[derive(Deserialize)]
#[serde(tag = "type")]
enum Json {
    Sequence { decoders: Vec<serde_json::Value> },
    Replace { pattern: Pattern, content: String },
    Metaspace { replacement: char, prepend_scheme: String },
    Strip { content: char, start: usize, stop: usize },
    ByteFallback,
    ByteLevel,
    Fuse,
}

/// What a Replace looks for; the other kind, a regular expression, is not streamed.
#[derive(Deserialize)]
struct Pattern {
    #[serde(rename = "String")]
    string: String,
}

impl Decoder {
    /// Reads the chain of decoders of a tokenizer.
    ///
    /// # Errors
    /// In words, if it is not of one of the two families.
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> std::result::Result<Self, String> {
        let json = serde_json::to_value(decoder).map_err(|e| e.to_string())?;
        Self::from_json(&json).ok_or_else(|| {
            let found: String = json.to_string().chars().take(200).collect();
            format!(
                "expected a decoder of ByteLevel alone, or of Replace or Metaspace, ByteFallback, Fuse and \
                 Strip (at the start) in this order, found {found}"
            )
        })
    }

    fn from_json(json: &serde_json::Value) -> Option<Self> {
        let mut chain = vec![Json::deserialize(json).ok()?];
        if let Json::Sequence { decoders } = &chain[0] {
            chain = decoders.iter().map(|d| Json::deserialize(d).ok()).collect::<Option<_>>()?;
        }
        if let [Json::ByteLevel] = chain[..] {
            return Some(Decoder::ByteLevel);
        }
        let (mut steps, mut byte_fallback, mut fused, mut stripped) = (Vec::new(), false, false, None);
        for decoder in chain {
            match decoder {
                Json::Replace { pattern: Pattern { string }, content }
                    if !byte_fallback && !fused && !string.is_empty() =>
                {
                    steps.push(Step::Replace(string, content));
                }
                Json::Metaspace { replacement, prepend_scheme } if !byte_fallback && !fused => {
                    steps.push(Step::Metaspace { mark: replacement, trim: prepend_scheme != "never" });
                }
                Json::ByteFallback if !byte_fallback && !fused => byte_fallback = true,
                Json::Fuse if stripped.is_none() => fused = true,
                Json::Strip { content, start, stop: 0 } if fused && stripped.is_none() => {
                    stripped = Some((content, start));
                }
                _ => return None,
            }
        }
        Some(Decoder::Pieces { steps, byte_fallback, strip: stripped })
    }
}

impl Step {
    fn apply(&self, piece: String, first: bool) -> String {
        match self {
            Step::Replace(from, to) => piece.replace(from, to),
            Step::Metaspace { mark, trim } => piece.replace(*mark, if first && *trim { "" } else { " " }),
        }
    }
}

/// Takes a finished run of byte tokens: UTF-8 if all of it is, otherwise one U+FFFD for each byte.
fn take_run(run: &mut Vec<u8>) -> String {
    let run = std::mem::take(run);
    String::from_utf8(run).unwrap_or_else(|e| "\u{FFFD}".repeat(e.as_bytes().len()))
}

/// Takes all characters that are complete, with U+FFFD for what cannot become one, as
/// [`String::from_utf8_lossy`] would. At most three bytes stay.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let incomplete = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
        if incomplete && taken + invalid.len() == bytes.len() {
            break;
        }
        if !invalid.is_empty() {
            text.push('\u{FFFD}');
            taken += invalid.len();
        }
    }
    bytes.drain(..taken);
    text
}

/// The byte that a byte-fallback token `<0xNN>` stands for, read as the tokenizers library reads it.
fn fallback_byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The byte that a character of a byte-level piece stands for (GPT-2's `bytes_to_unicode`): printable
/// Latin-1 is itself, the 68 other bytes are U+0100 and up in ascending order.
pub(super) fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121) as u8 + 0x7F),
        0x143 => Some(0xAD),
        _ => None,
    }
}
