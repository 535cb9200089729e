//! Reading JSON that may lie: every value that leaves here has the type and the range its reader
//! asked for, or is an [`Error::Config`] that names the file and the key.

use crate::error::{Error, Result};
use crate::folder::Folder;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::LazyLock;

/// The JSON object in the file `name` of `folder`, or `None` if there is no such file.
pub fn find_object(folder: &Folder, name: &str) -> Result<Option<Map<String, Value>>> {
    let bytes = folder.read(name)?;
    bytes.map(|bytes| parse_object(&bytes, &folder.path(name))).transpose()
}

/// The JSON object in the file `name` of `folder`, which must be there.
pub fn read_object(folder: &Folder, name: &str) -> Result<Map<String, Value>> {
    find_object(folder, name)?
        .ok_or_else(|| Error::checkpoint(folder.path(name), "not found; a checkpoint directory has one"))
}

/// The JSON object in `bytes`, which came from `path`.
pub fn parse_object(bytes: &[u8], path: &Path) -> Result<Map<String, Value>> {
    serde_json::from_slice(bytes)
        .map_err(|problem| Error::checkpoint(path, format!("is not a JSON object: {problem}")))
}

/// One object of a JSON file. `null` counts as absent throughout, as it does in Python's `get`.
#[derive(Clone, Copy)]
pub struct Section<'a> {
    file: &'a Path,
    /// The key of this object with a trailing dot, or nothing for the whole file.
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// The whole of `file`.
    pub fn root(file: &'a Path, map: &'a Map<String, Value>) -> Self {
        Section { file, prefix: "", map }
    }

    /// The object itself.
    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// A part of `file` that is not as it stands there; `prefix` is put before its keys in errors.
    pub fn part(file: &'a Path, prefix: &'static str, map: &'a Map<String, Value>) -> Self {
        Section { file, prefix, map }
    }

    /// Another object of the same file.
    pub fn other(&self, map: &'a Map<String, Value>) -> Self {
        Section { file: self.file, prefix: "", map }
    }

    /// An object without keys in the place of one that is absent, whose keys are reported behind `prefix`.
    pub fn empty(&self, prefix: &'static str) -> Section<'a> {
        static NONE: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        Section { file: self.file, prefix, map: &NONE }
    }

    /// The object under `key`, whose keys are reported behind `prefix` (`key` with a dot).
    pub fn child(&self, key: &str, prefix: &'static str) -> Result<Option<Section<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Section { file: self.file, prefix, map })),
            Some(_) => Err(self.error(key, "an object")),
        }
    }

    /// All keys with their values, copied.
    pub fn entries(&self) -> impl Iterator<Item = (String, Value)> + use<'a> {
        self.map.iter().map(|(key, value)| (key.clone(), value.clone()))
    }

    /// The value under `key`, unless it is absent or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` stands there, be it as null: some defaults are for absent keys only.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The one of two spellings that the file uses. Both may stand there if they agree.
    pub fn alias(&self, key: &'static str, other: &'static str) -> Result<&'static str> {
        match (self.get(key), self.get(other)) {
            (Some(a), Some(b)) if a != b => Err(self.error(key, format!("the same as `{other}`, {b}"))),
            (None, Some(_)) => Ok(other),
            _ => Ok(key),
        }
    }

    /// A whole number within `range`, or `default` if there is none.
    pub fn size(&self, key: &str, default: usize, range: RangeInclusive<usize>) -> Result<usize> {
        Ok(self.optional_size(key, range)?.unwrap_or(default))
    }

    /// A whole number within `range`, if there is one.
    pub fn optional_size(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n));
        let expected = || format!("a whole number from {} to {}", range.start(), range.end());
        number.map(Some).ok_or_else(|| self.error(key, expected()))
    }

    /// A number above 0 and at most `most`, or `default` if there is none.
    pub fn positive(&self, key: &str, default: f64, most: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let number = value.as_f64().filter(|&x| x > 0.0 && x <= most);
        number.ok_or_else(|| self.error(key, format!("a number above 0 and at most {most}")))
    }

    /// true or false, or `default` if there is neither.
    pub fn bool(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.error(key, "true or false")),
        }
    }

    /// A string, if there is one.
    pub fn string(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.error(key, "a string")),
        }
    }

    /// What `choices` makes of the string under `key`, or of `default` if there is none.
    pub fn choice<T: Copy>(&self, key: &str, default: &str, choices: &[(&str, T)]) -> Result<T> {
        let found = self.string(key)?.unwrap_or(default);
        let chosen = choices.iter().find(|(name, _)| *name == found);
        let expected =
            || choices.iter().map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(" or ");
        chosen.map(|&(_, value)| value).ok_or_else(|| self.error(key, expected()))
    }

    /// Token ids: a number, a list of numbers, or `None` if there is no value.
    pub fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let one = |value: &Value| value.as_u64().filter(|&n| n <= MAX_TOKEN_ID as u64).map(|n| n as u32);
        let Some(value) = self.get(key) else { return Ok(None) };
        let ids = match value {
            Value::Array(items) => items.iter().map(one).collect(),
            item => one(item).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.error(key, "a token id or a list of token ids"))
    }

    /// An error about `key`: `expected` in words, found what stands there.
    pub fn error(&self, key: &str, expected: impl Into<String>) -> Error {
        const LONGEST: usize = 100;
        let mut found = self.map.get(key).map_or("absent".to_string(), Value::to_string);
        if found.chars().count() > LONGEST {
            found = found.chars().take(LONGEST).chain("...".chars()).collect();
        }
        let key = format!("{}{key}", self.prefix);
        Error::Config { file: self.file.into(), key, expected: expected.into(), found }
    }
}

/// Token ids travel in i32 index buffers.
pub const MAX_TOKEN_ID: usize = i32::MAX as usize;
