//! `tokenizer.json`, exactly as written, or `tokenizer.model`, rewritten as one: text to ids, and the pieces
//! that ids stand for.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tokenizers::tokenizer::normalizer::Range as Span;
use tokenizers::{
    AddedToken, Encoding, Model, NormalizedString, Normalizer, OffsetType, PreTokenizedString, PreTokenizer,
    Token,
};

use super::sentencepiece::{self, Kind, SPACE};
use super::stream::{Decoder, TextStream};
use crate::error::{self, Error, Result};
use crate::folder::Folder;

/// A tokenizer that fits its model: no id it makes is outside the vocabulary.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    file: PathBuf,
    decoder: Decoder,
    /// Tokens that only a template or a raw prompt may write: the special ones and the image token.
    control: HashMap<u32, AddedToken>,
    /// What the post-processor puts before a text (BOS, for LLaMA) and behind it.
    around: [Vec<u32>; 2],
    /// Whether a space of its own is put before every text, whatever the text begins with: what the original code's
    /// tokenizer does, and no setting of the library can.
    prefix: bool,
}

/// A tokenizer as the `tokenizers` library writes it, whose ids fit `whose` vocabulary. Truncation and padding are
/// switched off.
///
/// # Errors
/// [`Error::Tokenizer`] for another file, or one that makes ids of `vocab_size` or more.
pub(super) fn from_json(
    file: &Path,
    bytes: Vec<u8>,
    vocab_size: usize,
    whose: &str,
) -> Result<tokenizers::Tokenizer> {
    let error = |problem: String| Error::Tokenizer { file: file.into(), problem };
    let malformed =
        |e: String| error(format!("expected a tokenizer as the `tokenizers` library writes it: {e}"));
    // Of a file that is cut off the library makes a panic, which is caught but not silent.
    serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).map_err(|e| malformed(e.to_string()))?;
    let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(malformed)?;
    inner.with_truncation(None).map_err(|e| error(e.to_string()))?;
    inner.with_padding(None);
    if let Some((token, id)) = inner.get_vocab(true).into_iter().max_by_key(|&(_, id)| id)
        && id as usize >= vocab_size
    {
        return Err(error(format!(
            "token {token:?} has id {id}, but {whose} vocabulary ends before {vocab_size}; \
             use the tokenizer that belongs to this model"
        )));
    }
    Ok(inner)
}

/// An added token in a text: the bytes it covers, and its id.
type AddedSpan = (Range<usize>, u32);

impl Tokenizer {
    /// Reads `tokenizer.json`, or `tokenizer.model` where there is none. Nothing is rewritten (`legacy` flags of
    /// other files are not looked at);
    /// truncation and padding are switched off, because a prompt is one sequence and must stay whole.
    /// `image_token` is the id of the model's image placeholder.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the file is missing or malformed, makes ids of `vocab_size` or more,
    /// lacks the image token, or decodes in a way no LLaMA-family tokenizer does.
    pub fn load(folder: &Folder, vocab_size: usize, image_token: Option<u32>) -> Result<Self> {
        let (file, bytes) = read(folder)?;
        Self::new(file, bytes, vocab_size, image_token, false)
    }

    /// Reads the tokenizer that the original code loads for a model of one of these `names`: `tokenizer.model` by
    /// itself, as transformers' slow tokenizer reads it, where there is one; for a Mistral as for everyone else, but
    /// with `legacy` always on, as transformers had it then.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn load_original(folder: &Folder, vocab_size: usize, names: &[String]) -> Result<Self> {
        let fast = names.iter().any(|name| name.to_lowercase().contains("mistral"));
        let kind = if fast { Kind::OldFast } else { Kind::Slow };
        let (file, bytes) = match (fast, folder.read(FILE)?) {
            (true, Some(bytes)) => (folder.path(FILE), bytes),
            (_, json) => match (sentencepiece::as_json(folder, kind)?, json) {
                (Some(bytes), _) => (folder.path(MODEL), bytes),
                (None, Some(bytes)) => (folder.path(FILE), bytes),
                (None, None) => read(folder)?,
            },
        };
        let prefix = !fast && file.ends_with(MODEL) && sentencepiece::prefixes_once(folder)?;
        Self::new(file, bytes, vocab_size, None, prefix)
    }

    fn new(
        file: PathBuf,
        bytes: Vec<u8>,
        vocab_size: usize,
        image_token: Option<u32>,
        prefix: bool,
    ) -> Result<Self> {
        let inner = from_json(&file, bytes, vocab_size, "the model's")?;
        let error = |problem: String| Error::Tokenizer { file: file.clone(), problem };
        let decoder = Decoder::of(inner.get_decoder()).map_err(&error)?;
        let added = inner.get_added_tokens_decoder();
        if let Some(id) = image_token.filter(|id| !added.contains_key(id)) {
            return Err(error(format!(
                "the model's image token is {id}, which is not among the added tokens"
            )));
        }
        let control = added.into_iter().filter(|(id, t)| t.special || Some(*id) == image_token).collect();
        let mut tokenizer = Tokenizer { inner, file, decoder, control, around: Default::default(), prefix };
        tokenizer.around = tokenizer.around_a_text()?;
        Ok(tokenizer)
    }

    fn around_a_text(&self) -> Result<[Vec<u32>; 2]> {
        const TEXT: &str = "a";
        let ids = |special| Ok(self.library(|| self.inner.encode(TEXT, special))?.get_ids().to_vec());
        let (text, whole): (Vec<u32>, Vec<u32>) = (ids(false)?, ids(true)?);
        let at = whole.windows(text.len().max(1)).position(|part| part == text).unwrap_or(whole.len());
        let behind = whole.get(at + text.len()..).unwrap_or_default().to_vec();
        Ok([whole[..at].to_vec(), behind])
    }

    /// What is put behind a text.
    pub(super) fn ending(&self) -> &[u32] {
        &self.around[1]
    }

    /// The ids of `text`, special tokens in it recognised. With `add_special`, the special tokens that
    /// the file asks for around a text (BOS) are added, unless the text begins with them already.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.ids(text, &[], add_special)
    }

    /// As [`encode`](Self::encode), but no byte of the ranges `user` takes part in a control token.
    /// Where none would, the result is that of `encode`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer cannot represent the text; [`Error::Prompt`] if a control
    /// token in `user` has no other representation.
    pub fn encode_with_user_text(
        &self,
        text: &str,
        user: &[Range<usize>],
        add_special: bool,
    ) -> Result<Vec<u32>> {
        self.ids(text, user, add_special)
    }

    /// The text of `ids` without special tokens.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = TextStream::new(self);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// Makes `tokens` special; those that the vocabulary lacks are appended to it in this order.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if one would have an id of `vocab_size` or more.
    pub(super) fn add_special(&mut self, tokens: &[&str], vocab_size: usize) -> Result<()> {
        for &text in tokens {
            let token = AddedToken::from(text, true).normalized(false);
            self.inner.add_special_tokens(std::slice::from_ref(&token));
            match self.id(text).filter(|&id| (id as usize) < vocab_size) {
                Some(id) => self.control.insert(id, token),
                None => {
                    let problem = format!(
                        "lacks {text}, for which the model's embedding has no row, although its config.json asks for \
                         it (mm_use_im_start_end); add the added_tokens.json that belongs to the model"
                    );
                    return Err(Error::Tokenizer { file: self.file.clone(), problem });
                }
            };
        }
        Ok(())
    }

    /// The id of a token.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token `id` as the vocabulary spells it; `None` if there is no such id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The control tokens (the special ones and the image placeholder) as they are written.
    pub(super) fn control_tokens(&self) -> impl Iterator<Item = &str> {
        self.control.values().map(|token| token.content.as_str())
    }

    /// What `id` adds to a text, before decoding: `None` for special tokens and for ids that are none.
    pub(super) fn piece(&self, id: u32) -> Option<String> {
        let token = self.inner.id_to_token(id)?;
        (!self.inner.get_added_vocabulary().is_special_token(&token)).then_some(token)
    }

    pub(super) fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn ids(&self, text: &str, user: &[Range<usize>], add_special: bool) -> Result<Vec<u32>> {
        let mut ids = match self.prefix && !text.is_empty() {
            false => self.plain_ids(text, user)?,
            true => {
                let by = SPACE.len();
                let user: Vec<_> = user.iter().map(|range| range.start + by..range.end + by).collect();
                let mut ids = self.plain_ids(&format!("{SPACE}{text}"), &user)?;
                // The slow tokenizer takes its space back from before a special token. (An unknown character has the id of
                // one, and is none.)
                let special = |id| self.control.get(id).is_some_and(|token| text.starts_with(&token.content));
                if ids.first().copied() == self.id(SPACE) && ids.get(1).is_some_and(special) {
                    ids.remove(0);
                }
                ids
            }
        };
        let [before, behind] = &self.around;
        if add_special && (before.is_empty() || !ids.starts_with(before)) {
            ids.splice(..0, before.iter().copied());
            ids.extend_from_slice(behind);
        }
        Ok(ids)
    }

    /// The ids of `text` and nothing around it.
    fn plain_ids(&self, text: &str, user: &[Range<usize>]) -> Result<Vec<u32>> {
        let encoding = self.library(|| self.inner.encode(text, false))?;
        let from_user = |(id, span): (&u32, &(usize, usize))| {
            self.control.contains_key(id) && overlaps(&trimmed(text, span.0..span.1), user)
        };
        match encoding.get_ids().iter().zip(encoding.get_offsets()).any(from_user) {
            true => Ok(self.encode_held(text, user)?.get_ids().to_vec()),
            false => Ok(encoding.get_ids().to_vec()),
        }
    }

    /// Encodes `text` with the control tokens of its template parts only. The library splits a text at
    /// added tokens, then normalises, pre-tokenises and tokenises what lies between; here the same is
    /// done with spans of our own choice, in one text, so that what depends on the position in it
    /// (Metaspace's first word) and merges across a border of `user` come out as they would.
    fn encode_held(&self, text: &str, user: &[Range<usize>]) -> Result<Encoding> {
        let added = self.added_outside(text, user)?;
        let encode = || -> tokenizers::Result<Encoding> {
            let mut pieces = PreTokenizedString::from(text);
            pieces.split(|_, whole| Ok(split_at(&whole, &added)))?;
            if let Some(normalizer) = self.inner.get_normalizer() {
                pieces.normalize(|piece| normalizer.normalize(piece))?;
            }
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            pieces.tokenize(|piece| self.inner.get_model().tokenize(piece.get()))?;
            pieces.into_encoding(None, 0, OffsetType::Byte)
        };
        let encoding = self.library(encode)?;
        // A vocabulary may know a control token as an ordinary word as well (Unigram models do).
        for (id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            let Some(token) = self.control.get(id) else { continue };
            let span = trimmed(text, start..end);
            if token.content == text[span.clone()] && overlaps(&span, user) {
                return Err(Error::Prompt(format!(
                    "the text holds {:?}, which this tokenizer cannot write as plain text; remove it",
                    token.content
                )));
            }
        }
        Ok(encoding)
    }

    /// The added tokens of `text` that hold: all those within its template parts, each part looked at
    /// alone so that user text can neither make nor break one, and those anywhere that control nothing.
    fn added_outside(&self, text: &str, user: &[Range<usize>]) -> Result<Vec<AddedSpan>> {
        let mut found = Vec::new();
        let mut start = 0;
        for range in user.iter().cloned().chain(std::iter::once(text.len()..text.len())) {
            let part = self.added_spans(&self.inner, &text[start..range.start])?;
            found.extend(part.into_iter().map(|(span, id)| (span.start + start..span.end + start, id)));
            start = range.end;
        }
        let mut plain = self.inner.clone();
        plain.set_encode_special_tokens(true);
        // The image token need not be marked special in the file; here it counts as such.
        let control: Vec<_> =
            self.control.values().map(|t| AddedToken { special: true, ..t.clone() }).collect();
        plain.add_special_tokens(&control);
        for (span, id) in self.added_spans(&plain, text)? {
            if !found.iter().any(|(other, _)| span.start < other.end && other.start < span.end) {
                found.push((span, id));
            }
        }
        found.sort_by_key(|(span, _)| span.start);
        Ok(found)
    }

    fn added_spans(&self, tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<AddedSpan>> {
        let encoding = self.library(|| tokenizer.encode(text, false))?;
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let spans = encoding.get_ids().iter().zip(encoding.get_offsets());
        let spans = spans.map(|(&id, &(start, end))| (start..end, id));
        // Only a span that reads as the token is one: `<unk>` stands for anything.
        let is_added = |(span, id): &AddedSpan| {
            added.get(id).is_some_and(|t| text[span.clone()].trim() == t.content.trim())
        };
        Ok(spans.filter(is_added).collect())
    }

    fn library<T>(&self, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
        guarded(work).map_err(|problem| Error::Tokenizer { file: self.file.clone(), problem })
    }
}

const FILE: &str = "tokenizer.json";
const MODEL: &str = "tokenizer.model";

/// A tokenizer's file and the JSON that it holds or means.
fn read(folder: &Folder) -> Result<(PathBuf, Vec<u8>)> {
    if let Some(bytes) = folder.read(FILE)? {
        return Ok((folder.path(FILE), bytes));
    }
    match sentencepiece::as_json(folder, Kind::Fast)? {
        Some(bytes) => Ok((folder.path(MODEL), bytes)),
        None => Err(Error::Tokenizer {
            file: folder.path(FILE),
            problem: "not found, nor a tokenizer.model; a checkpoint needs one of them".into(),
        }),
    }
}

/// Runs the tokenizers library, which takes some malformed files (a merge shorter than the subword prefix,
/// to name one) for impossible and panics.
pub(super) fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    let done = error::guarded(work).unwrap_or_else(|| Err("the file contradicts itself".into()));
    done.map_err(|e| e.to_string())
}

/// Cuts a text into added tokens and the pieces between them, in order.
fn split_at(whole: &NormalizedString, added: &[AddedSpan]) -> Vec<(NormalizedString, Option<Vec<Token>>)> {
    let mut pieces = Vec::new();
    let slice = |range: Range<usize>| whole.slice(Span::Original(range));
    let mut start = 0;
    for (span, id) in added {
        pieces.extend(slice(start..span.start).map(|piece| (piece, None)));
        pieces.extend(slice(span.clone()).map(|piece| {
            let token = Token::new(*id, piece.get().into(), (0, piece.get().len()));
            (piece, Some(vec![token]))
        }));
        start = span.end;
    }
    pieces.extend(slice(start..whole.len_original()).map(|piece| (piece, None)));
    pieces
}

/// `span` without the white space at its ends, which tokens that strip their surroundings cover.
fn trimmed(text: &str, span: Range<usize>) -> Range<usize> {
    let covered = &text[span.clone()];
    let start = span.start + (covered.len() - covered.trim_start().len());
    start..start + covered.trim().len()
}

/// Whether `span` shares a byte with one of the sorted, disjoint `ranges`.
pub(super) fn overlaps(span: &Range<usize>, ranges: &[Range<usize>]) -> bool {
    let next = ranges.partition_point(|range| range.end <= span.start);
    ranges.get(next).is_some_and(|range| range.start < span.end)
}
