//! The header of a safetensors file, trusted in nothing.
//!
//! The file is 8 bytes of header length, the header (a JSON object), and the data. The specification
//! wants every byte of data to belong to exactly one tensor. The `safetensors` crate lets the last of
//! two equal keys win and needs the whole file to hand, so the header is read here.

use crate::error::{Error, Result};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// The limit that the specification sets.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The length of the header stands in the first 8 bytes.
const PREFIX: usize = 8;

/// One tensor of a file.
#[derive(Debug)]
pub struct Entry {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    /// Bytes of the file.
    pub range: Range<usize>,
}

/// Reads and checks the header of `bytes`, the contents of `file`. Touches no byte of the data.
pub fn parse(bytes: &[u8], file: &Path) -> Result<Vec<Entry>> {
    let wrong = |problem: String| Error::checkpoint(file, problem);
    let data = data_start(bytes).map_err(wrong)?;
    let header: Header = serde_json::from_slice(&bytes[PREFIX..data])
        .map_err(|problem| wrong(format!("the header is not valid: {problem}")))?;
    let mut entries = header.0;
    for entry in &mut entries {
        check_size(entry).map_err(|problem| wrong(format!("tensor `{}`: {problem}", entry.name)))?;
    }
    entries.sort_by_key(|entry| (entry.range.start, entry.range.end));
    check_cover(&entries, bytes.len() - data).map_err(wrong)?;
    for entry in &mut entries {
        entry.range = entry.range.start + data..entry.range.end + data;
    }
    Ok(entries)
}

/// Where the data begins.
fn data_start(bytes: &[u8]) -> Result<usize, String> {
    let Some(prefix) = bytes.first_chunk::<PREFIX>() else {
        return Err(format!("has {} bytes; a safetensors file has at least {PREFIX}", bytes.len()));
    };
    let length = u64::from_le_bytes(*prefix);
    let rest = (bytes.len() - PREFIX) as u64;
    if length > MAX_HEADER_BYTES {
        return Err(format!(
            "claims a header of {length} bytes, the limit is {MAX_HEADER_BYTES}; is it a safetensors file?"
        ));
    }
    if length > rest {
        return Err(format!("is truncated: the header has {length} bytes, the file has {rest} for it"));
    }
    Ok(PREFIX + length as usize)
}

/// Shape, dtype and range of one tensor must say the same, without overflow.
fn check_size(entry: &Entry) -> Result<(), String> {
    let Range { start, end } = entry.range;
    let Some(bytes) = end.checked_sub(start) else {
        return Err(format!("its data ends at {end}, before it begins at {start}"));
    };
    // A dtype made after this was written can stand in the file as long as nobody asks for it.
    let Some(bits) = dtype_bits(&entry.dtype) else { return Ok(()) };
    let expected = entry.shape.iter().try_fold(bits, |product, &dim| product.checked_mul(dim));
    if expected == bytes.checked_mul(8) && expected.is_some() {
        return Ok(());
    }
    Err(format!("{} {:?} does not fill the {bytes} bytes it has", entry.dtype, entry.shape))
}

/// Sorted by range, the tensors must cover all of the data: no overlap, no hole, nothing left over.
fn check_cover(entries: &[Entry], data: usize) -> Result<(), String> {
    let mut covered = 0;
    let mut last = "the header";
    for Entry { name, range, .. } in entries {
        if range.start < covered {
            return Err(format!("tensors `{last}` and `{name}` overlap"));
        }
        if range.start > covered {
            return Err(format!("{} unused bytes between `{last}` and `{name}`", range.start - covered));
        }
        (covered, last) = (range.end, name);
    }
    match covered.cmp(&data) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(format!("{} unused bytes after `{last}`", data - covered)),
        std::cmp::Ordering::Greater => Err(format!(
            "is truncated: the tensors need {covered} bytes of data, the file has {data}; download it again"
        )),
    }
}

/// Bits of one element, for every dtype of the specification.
fn dtype_bits(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// The header's object. Equal keys are an error, unlike in a map; `__metadata__` is skipped.
struct Header(Vec<Entry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut seen = HashSet::new();
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!("`{name}` stands there twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let Tensor { dtype, shape, data_offsets: (start, end) } = map.next_value()?;
                    entries.push(Entry { name, dtype, shape: shape.0, range: start..end });
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The value of one key. Serde refuses equal keys here by itself.
#[derive(serde::Deserialize)]
struct Tensor {
    dtype: String,
    shape: Shape,
    data_offsets: (usize, usize),
}

/// At most 8 dimensions, so that a header cannot ask for more memory than it has bytes.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a shape of at most 8 dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == 8 {
                        return Err(serde::de::Error::invalid_length(9, &self));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}
