//! `tokenizer.model`: a SentencePiece model, rewritten as the `tokenizer.json` that transformers' converter
//! would write for it.
//!
//! The file is a protocol buffer (`sentencepiece_model.proto`). Only what decides about ids is read, and a
//! setting that would make other ids than the rewritten tokenizer is refused by its name.

use crate::error::{Error, Result};
use crate::folder::Folder;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// More pieces than that no vocabulary has.
const MAX_PIECES: usize = 1 << 20;
/// Bytes of the longest piece; all its splits are looked up.
const MAX_PIECE: usize = 256;

/// Whose reading of `tokenizer_config.json` holds: `legacy` (true if absent) puts a space before each stretch of text
/// between added tokens, and otherwise only before the first; `add_prefix_space` may leave it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// transformers' fast tokenizers of today: both settings count, and a first stretch that begins with a space gets
    /// no other one.
    Fast,
    /// Those of the transformers that the original LLaVA is pinned to, 4.37: always `legacy`.
    OldFast,
    /// The slow tokenizers of that version: `add_prefix_space` is not known. Where [`prefixes_once`] says so, no space
    /// is put before anything, and the caller puts it before the text.
    Slow,
}

/// Whether the slow tokenizer of `folder` puts one space before a whole text.
///
/// # Errors
/// [`Error::Checkpoint`] for a malformed `tokenizer_config.json`.
pub fn prefixes_once(folder: &Folder) -> Result<bool> {
    Ok(object(folder, CONFIG)?.get(LEGACY) == Some(&Value::Bool(false)))
}

const CONFIG: &str = "tokenizer_config.json";
const LEGACY: &str = "legacy";

/// The bytes of a `tokenizer.json` that tokenises as the `tokenizer.model` in `folder`, if there is one. Added tokens
/// come from `tokenizer_config.json` and `added_tokens.json`.
///
/// # Errors
/// [`Error::Tokenizer`] for a model that is malformed or of another kind than BPE; [`Error::Checkpoint`] and
/// [`Error::Tokenizer`] for the files beside it.
pub fn as_json(folder: &Folder, kind: Kind) -> Result<Option<Vec<u8>>> {
    const FILE: &str = "tokenizer.model";
    let Some(bytes) = folder.read(FILE)? else { return Ok(None) };
    let file = folder.path(FILE);
    let wrong = |problem: String| Error::Tokenizer { file: file.clone(), problem };
    let model = Model::parse(&bytes).map_err(wrong)?;
    let config = object(folder, CONFIG)?;
    let added = added_tokens(folder, &config, &model)?;
    Ok(Some(model.tokenizer(&config, kind, added).map_err(wrong)?.to_string().into_bytes()))
}

/// What a SentencePiece model says.
struct Model<'a> {
    pieces: Vec<Piece<'a>>,
    unknown: usize,
    begin: usize,
    end: usize,
    byte_fallback: bool,
    /// Whether a space is put before a text.
    dummy_prefix: bool,
}

struct Piece<'a> {
    text: &'a str,
    score: f32,
    kind: u64,
}

/// Kinds of pieces.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;
const BYTE: u64 = 6;
const UNKNOWN: u64 = 2;

impl<'a> Model<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        let mut model = Model {
            pieces: Vec::new(),
            unknown: 0,
            begin: 1,
            end: 2,
            byte_fallback: false,
            dummy_prefix: true,
        };
        let mut settings = Settings { kind: 1, collapses_spaces: true, ..Settings::default() };
        // The fields of `ModelProto`.
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(piece)) => model.pieces.push(Piece::parse(piece)?),
                (2, Field::Bytes(trainer)) => model.trainer(trainer, &mut settings)?,
                (3, Field::Bytes(normalizer)) => model.normalizer(normalizer, &mut settings)?,
                _ => {}
            }
            if model.pieces.len() > MAX_PIECES {
                return Err(format!("has more than {MAX_PIECES} pieces"));
            }
        }
        if model.pieces.is_empty() {
            return Err("has no pieces; is it a SentencePiece model?".into());
        }
        settings.check()?;
        let end = model.pieces.len();
        if model.unknown >= end || model.begin >= end {
            return Err(format!("has {end} pieces, but <unk> is {} and <s> {}", model.unknown, model.begin));
        }
        Ok(model)
    }

    /// The fields of `TrainerSpec` that decide about ids.
    fn trainer(&mut self, bytes: &[u8], settings: &mut Settings) -> Result<(), String> {
        for field in Fields(bytes) {
            match field? {
                (3, Field::Number(kind)) => settings.kind = kind,
                (24, Field::Number(flag)) => settings.whitespace_behind = flag != 0,
                (35, Field::Number(flag)) => self.byte_fallback = flag != 0,
                (40, Field::Number(id)) => self.unknown = id as usize,
                // Minus one, for none, is ten bytes long.
                (41, Field::Number(id)) => self.begin = id as usize,
                (42, Field::Number(id)) => self.end = id as usize,
                _ => {}
            }
        }
        Ok(())
    }

    /// The fields of `NormalizerSpec`.
    fn normalizer(&mut self, bytes: &'a [u8], settings: &mut Settings) -> Result<(), String> {
        for field in Fields(bytes) {
            match field? {
                (2, Field::Bytes(map)) => settings.maps_characters = !map.is_empty(),
                (3, Field::Number(flag)) => self.dummy_prefix = flag != 0,
                (4, Field::Number(flag)) => settings.collapses_spaces = flag != 0,
                (5, Field::Number(flag)) => settings.keeps_spaces = flag == 0,
                _ => {}
            }
        }
        Ok(())
    }

    /// The tokenizer as transformers' `LlamaConverter` makes it.
    fn tokenizer(&self, config: &Map<String, Value>, kind: Kind, added: Vec<Value>) -> Result<Value, String> {
        let flag = |key: &str, default| config.get(key).and_then(Value::as_bool).unwrap_or(default);
        let ids: HashMap<&str, usize> =
            self.pieces.iter().enumerate().map(|(id, piece)| (piece.text, id)).collect();
        if ids.len() != self.pieces.len() {
            return Err("has two pieces of one text".into());
        }
        let replace =
            |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let prefix = self.dummy_prefix && (kind != Kind::Fast || flag("add_prefix_space", true));
        let each = kind == Kind::OldFast || flag(LEGACY, true);
        let (normalizer, pre_tokenizer) = match (prefix, each) {
            (true, true) => {
                let prepend = json!({"type": "Prepend", "prepend": SPACE});
                (json!({"type": "Sequence", "normalizers": [prepend, replace(" ", SPACE)]}), Value::Null)
            }
            (true, false) if kind == Kind::Fast => (
                Value::Null,
                json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": false}),
            ),
            _ => (replace(" ", SPACE), Value::Null),
        };
        let mut decoders =
            vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let begin = self.pieces[self.begin].text;
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        if flag("add_bos_token", true) {
            single.insert(0, json!({"SpecialToken": {"id": begin, "type_id": 0}}));
        }
        let mut special = json!({begin: {"id": begin, "ids": [self.begin], "tokens": [begin]}});
        if flag("add_eos_token", false) {
            let end = self.pieces.get(self.end).ok_or("has no end token, which add_eos_token asks for")?.text;
            single.push(json!({"SpecialToken": {"id": end, "type_id": 0}}));
            special[end] = json!({"id": end, "ids": [self.end], "tokens": [end]});
        }
        Ok(json!({
            "version": "1.0",
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": {
                "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special,
            },
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": self.pieces[self.unknown].text,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": self.byte_fallback,
                "ignore_merges": false,
                "vocab": ids,
                "merges": self.merges(&ids),
            },
        }))
    }

    /// Every way to make a piece of two others, best piece first: what SentencePiece finds by score while it
    /// merges, BPE looks up by rank.
    fn merges(&self, ids: &HashMap<&str, usize>) -> Vec<[&'a str; 2]> {
        let mut merges = Vec::new();
        for piece in &self.pieces {
            if matches!(piece.kind, CONTROL | UNKNOWN | BYTE) {
                continue;
            }
            let first = merges.len();
            for (at, _) in piece.text.char_indices().skip(1) {
                let halves = piece.text.split_at(at);
                if let (Some(&left), Some(&right)) = (ids.get(halves.0), ids.get(halves.1)) {
                    merges.push((piece.score, left, right, [halves.0, halves.1]));
                }
            }
            merges[first..].sort_by_key(|&(_, left, right, _)| (left, right));
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0));
        merges.into_iter().map(|(.., halves)| halves).collect()
    }
}

/// What SentencePiece has for a space.
pub const SPACE: &str = "▁";

impl<'a> Piece<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        let mut piece = Piece { text: "", score: 0.0, kind: 1 };
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(text)) => {
                    piece.text = std::str::from_utf8(text).map_err(|_| "has a piece that is not UTF-8")?;
                }
                (2, Field::Float(score)) => piece.score = score,
                (3, Field::Number(kind)) => piece.kind = kind,
                _ => {}
            }
        }
        match () {
            () if piece.text.is_empty() => Err("has a piece without a text".into()),
            () if piece.text.len() > MAX_PIECE => Err(format!("has a piece of more than {MAX_PIECE} bytes")),
            () if piece.kind == UNUSED => {
                Err(format!("has an unused piece, {:?}, which is not supported", piece.text))
            }
            () => Ok(piece),
        }
    }
}

/// Settings that must have one value.
#[derive(Default)]
struct Settings {
    /// 1 unigram, 2 BPE, 3 words, 4 characters.
    kind: u64,
    whitespace_behind: bool,
    maps_characters: bool,
    collapses_spaces: bool,
    keeps_spaces: bool,
}

impl Settings {
    fn check(&self) -> Result<(), String> {
        let kind = match self.kind {
            2 => None,
            1 => Some("unigram"),
            3 => Some("word"),
            4 => Some("character"),
            _ => Some("unknown"),
        };
        if let Some(kind) = kind {
            return Err(format!(
                "is a {kind} model, expected BPE; load it with transformers and save a tokenizer.json"
            ));
        }
        let unsupported = [
            (self.whitespace_behind, "treat_whitespace_as_suffix"),
            (self.maps_characters, "a character map (normalization other than identity)"),
            (self.collapses_spaces, "remove_extra_whitespaces"),
            (self.keeps_spaces, "escape_whitespaces: false"),
        ];
        match unsupported.iter().find(|(set, _)| *set) {
            Some((_, name)) => Err(format!(
                "asks for {name}, which is not supported; load it with transformers and save a tokenizer.json"
            )),
            None => Ok(()),
        }
    }
}

/// Control and user-defined pieces, then what the files beside the model add, in the order of their ids.
fn added_tokens(folder: &Folder, config: &Map<String, Value>, model: &Model) -> Result<Vec<Value>> {
    const MAP: &str = "added_tokens.json";
    let token = |id: usize, text: &str, special: bool| {
        json!({
            "id": id, "content": text, "special": special, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        })
    };
    let mut tokens = BTreeMap::new();
    for (id, piece) in model.pieces.iter().enumerate() {
        if matches!(piece.kind, CONTROL | UNKNOWN | USER_DEFINED) {
            tokens.insert(id, token(id, piece.text, piece.kind != USER_DEFINED));
        }
    }
    let special = special_texts([config, &object(folder, "special_tokens_map.json")?]);
    for (text, id) in object(folder, MAP)? {
        let id = id.as_u64().ok_or_else(|| wrong_id(&folder.path(MAP), &text, &id))? as usize;
        tokens.insert(id, token(id, &text, special.contains(&text)));
    }
    const DECODER: &str = "added_tokens_decoder";
    for (id, entry) in config.get(DECODER).and_then(Value::as_object).into_iter().flatten() {
        let file = folder.path("tokenizer_config.json");
        let id: usize = id.parse().map_err(|_| wrong_id(&file, DECODER, &json!(id)))?;
        let text = entry["content"].as_str().ok_or_else(|| wrong_id(&file, DECODER, entry))?;
        let mut token = token(id, text, false);
        for flag in ["special", "normalized", "single_word", "lstrip", "rstrip"] {
            if let Some(set) = entry[flag].as_bool() {
                token[flag] = set.into();
            }
        }
        tokens.insert(id, token);
    }
    // The library numbers what it adds by itself, from the end of the vocabulary on.
    let beyond = tokens.range(model.pieces.len()..).map(|(&id, token)| (id, &token["content"]));
    for ((id, text), expected) in beyond.zip(model.pieces.len()..) {
        if id != expected {
            let problem = format!("adds {text} as id {id}, expected {expected}, the first that is free");
            return Err(Error::Tokenizer { file: folder.path(MAP), problem });
        }
    }
    for (&id, token) in tokens.range(..model.pieces.len()) {
        if token["content"] != model.pieces[id].text {
            let problem =
                format!("says that {id} is {}, but it is {:?}", token["content"], model.pieces[id].text);
            return Err(Error::Tokenizer { file: folder.path("tokenizer_config.json"), problem });
        }
    }
    Ok(tokens.into_values().collect())
}

/// The texts of `bos_token` and its like, and of `additional_special_tokens`; each a string or an object with
/// `content`.
fn special_texts(files: [&Map<String, Value>; 2]) -> HashSet<String> {
    let entries =
        files.into_iter().flatten().filter(|(key, _)| key.ends_with("_token") || key.ends_with("_tokens"));
    let values = entries.flat_map(|(_, value)| match value {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    });
    values.filter_map(|value| value.as_str().or(value["content"].as_str()).map(String::from)).collect()
}

fn wrong_id(file: &Path, key: &str, found: &Value) -> Error {
    let found: String = found.to_string().chars().take(100).collect();
    Error::Config { file: file.into(), key: key.into(), expected: "a token with its id".into(), found }
}

/// The JSON object in a file; empty if there is no such file.
fn object(folder: &Folder, name: &str) -> Result<Map<String, Value>> {
    let Some(bytes) = folder.read(name)? else { return Ok(Map::new()) };
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::checkpoint(folder.path(name), format!("expected a JSON object: {e}")))
}

/// The fields of a protocol buffer message, with their numbers.
struct Fields<'a>(&'a [u8]);

/// A field's value, by how it is written.
enum Field<'a> {
    Number(u64),
    Float(f32),
    Bytes(&'a [u8]),
    /// Eight bytes, which no field that is read has.
    Double,
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| "is not a SentencePiece model, or damaged: its fields do not fit".into()))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Field::Number(self.varint()?),
            1 => self.take(8).map(|_| Field::Double)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Float(f32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((tag >> 3, value))
    }

    /// Seven bits a byte, lowest first; the last one has its highest bit clear.
    fn varint(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}
