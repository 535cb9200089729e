//! The tokenizer of CLIP's text tower: lower case, white space collapsed, byte-level BPE whose words end in
//! `</w>`, and every text between a start and an end token.

use super::stream::byte_of;
use super::tokenizer::{from_json, guarded};
use crate::error::{Error, Result};
use crate::folder::Folder;
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// A tokenizer that fits its text tower.
pub struct ClipTokenizer {
    inner: tokenizers::Tokenizer,
    file: PathBuf,
    /// Most ids of a text.
    positions: usize,
    /// What ends a text.
    end: u32,
}

/// A text as ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClipTokens {
    /// Start token, text, end token.
    pub ids: Vec<u32>,
    /// How many ids of the text did not fit and were left out.
    pub dropped: usize,
}

impl ClipTokenizer {
    /// Reads `tokenizer.json` as it is written, or else `vocab.json` and `merges.txt`. `vocab_size` and
    /// `positions` are the rows of the tower's two embeddings.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the files are missing or malformed, make ids of `vocab_size` or more, or do not
    /// put a text between a start and an end token.
    pub fn load(folder: &Folder, vocab_size: usize, positions: usize) -> Result<Self> {
        let (name, bytes) = match folder.read("tokenizer.json")? {
            Some(bytes) => ("tokenizer.json", bytes),
            None => ("vocab.json", from_vocabulary(folder)?),
        };
        let file = folder.path(name);
        let error = |problem: String| Error::Tokenizer { file: file.clone(), problem };
        let inner = from_json(&file, bytes, vocab_size, "the text tower's")?;
        let empty = guarded(|| inner.encode("", true)).map_err(&error)?;
        let [_, end] = *empty.get_ids() else {
            let ids = empty.get_ids();
            return Err(error(format!("makes {ids:?} of an empty text, expected a start and an end token")));
        };
        Ok(ClipTokenizer { inner, file, positions, end })
    }

    /// The ids of a text. Of one that is too long the beginning counts, as with `truncation=True` in
    /// transformers; the last id is the end token all the same.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<ClipTokens> {
        let encoding = guarded(|| self.inner.encode(text, true))
            .map_err(|problem| Error::Tokenizer { file: self.file.clone(), problem })?;
        let mut ids = encoding.get_ids().to_vec();
        let dropped = ids.len().saturating_sub(self.positions);
        if dropped > 0 {
            ids.truncate(self.positions);
            ids[self.positions - 1] = self.end;
        }
        Ok(ClipTokens { ids, dropped })
    }

    /// The id that ends every text.
    pub fn end(&self) -> u32 {
        self.end
    }
}

/// The `vocab.json` of a tokenizer that has learnt no merges, with ids as OpenAI's has them: the 256 bytes, the
/// same at the end of a word, and as the last two of `vocab_size` ids what begins and ends a text.
pub fn byte_vocabulary(vocab_size: usize) -> Map<String, Value> {
    let bytes = ('\0'..='\u{143}').filter(|&c| byte_of(c).is_some());
    let tokens = bytes.clone().map(String::from).chain(bytes.map(|c| format!("{c}{END_OF_WORD}")));
    let ends = [(START.to_string(), vocab_size - 2), (END.to_string(), vocab_size - 1)];
    tokens.zip(0..).chain(ends).map(|(token, id)| (token, id.into())).collect()
}

/// `vocab.json` and `merges.txt` as the `tokenizer.json` that transformers' `CLIPTokenizer` makes of them.
fn from_vocabulary(folder: &Folder) -> Result<Vec<u8>> {
    let read = |name: &str| {
        let error = |problem: String| Error::Tokenizer { file: folder.path(name), problem };
        let bytes = folder.read(name)?.ok_or_else(|| {
            error("not found; CLIP needs a tokenizer.json, or a vocab.json and a merges.txt".into())
        })?;
        String::from_utf8(bytes).map_err(|_| error("is not UTF-8 text".into()))
    };
    let error = |name: &str, problem: String| Error::Tokenizer { file: folder.path(name), problem };
    let vocab: Map<String, Value> = serde_json::from_str(&read("vocab.json")?)
        .map_err(|e| error("vocab.json", format!("expected an object of tokens and ids: {e}")))?;
    let id = |token: &str| {
        let id = vocab.get(token).and_then(Value::as_u64).filter(|&id| id <= i32::MAX as u64);
        id.ok_or_else(|| error("vocab.json", format!("has no id for {token:?}")))
    };
    let (start, end) = (id(START)?, id(END)?);
    let merges = read("merges.txt")?;
    let merges =
        merges.lines().enumerate().filter(|(_, line)| !line.starts_with("#version") && !line.is_empty());
    let merges = merges
        .map(|(number, line)| match line.split(' ').collect::<Vec<_>>()[..] {
            [a, b] => Ok([a, b]),
            _ => Err(error("merges.txt", format!("line {} is not two tokens: {line:?}", number + 1))),
        })
        .collect::<Result<Vec<_>>>()?;
    let added = |id: u64, content: &str, normalized: bool| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": normalized, "special": true,
        })
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [added(start, START, true), added(end, END, false)],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "NFC" },
            { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
            { "type": "Lowercase" },
        ] },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": WORDS }, "behavior": "Removed", "invert": true },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        ] },
        "post_processor": {
            "type": "RobertaProcessing", "sep": [END, end], "cls": [START, start],
            "trim_offsets": false, "add_prefix_space": false,
        },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": END, "continuing_subword_prefix": "",
            "end_of_word_suffix": END_OF_WORD, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    });
    Ok(tokenizer.to_string().into_bytes())
}

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
const END_OF_WORD: &str = "</w>";

/// What a text is cut into: special tokens, English contractions, words, single digits, runs of the rest.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
