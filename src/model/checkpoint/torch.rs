//! Files of `torch.save`: a zip archive with a pickle, which describes tensors, and one entry for each
//! storage. The bytes of a tensor that lies in its storage row after row are used where they are.

use super::header::Entry;
use super::pickle::{self, View};
use super::zip;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// The tensors of a file.
#[derive(Debug, Default)]
pub struct Contents {
    /// Those whose bytes are in the file.
    pub mapped: Vec<Entry>,
    /// Those that lie in their storage in another order, by the bytes of `copies`.
    pub copied: Vec<Entry>,
    /// Their elements, row after row.
    pub copies: Vec<u8>,
}

/// Whether a file of this name is one of torch's.
pub fn is_torch(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "bin" || extension == "pt" || extension == "pth")
}

/// How torch wrote files before 1.6: a row of pickles, the first of which is this number.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

/// The pickle of a file: some hundred bytes for each tensor.
const MAX_PICKLE: usize = 16 << 20;

/// Reads what tensors `bytes`, the contents of `file`, hold. Touches no byte of them but those to be copied.
pub fn parse(bytes: &[u8], file: &Path) -> Result<Contents> {
    let wrong = |problem: String| Error::checkpoint(file, problem);
    const SAVE_AGAIN: &str =
        "load it with torch.load and write it with torch.save, or better with safetensors";
    if bytes.starts_with(LEGACY) {
        return Err(wrong(format!("is in the format of torch before 1.6, which is not read; {SAVE_AGAIN}")));
    }
    if !bytes.starts_with(zip::MAGIC) {
        return Err(wrong("is not a file of torch.save: it does not begin as a zip archive does".into()));
    }
    let archive = Archive::open(bytes).map_err(wrong)?;
    let mut contents = Contents::default();
    for (name, view) in pickle::tensors(&bytes[archive.pickle.clone()]).map_err(wrong)? {
        archive
            .place(name, &view, &mut contents)
            .map_err(|problem| wrong(format!("tensor `{name}`: {problem}")))?;
    }
    Ok(contents)
}

/// A file's entries.
struct Archive<'a> {
    bytes: &'a [u8],
    entries: HashMap<&'a str, zip::Entry>,
    /// What stands before the name of every entry, with its slash.
    prefix: &'a str,
    pickle: Range<usize>,
}

impl<'a> Archive<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self, String> {
        const PICKLE: &str = "data.pkl";
        let entries = zip::entries(bytes)?;
        let mut prefixes = entries.keys().filter_map(|name| name.strip_suffix(PICKLE));
        let prefix = match (prefixes.next(), prefixes.next()) {
            (Some(prefix), None) if prefix.ends_with('/') => prefix,
            _ => return Err(format!("has not the one entry NAME/{PICKLE} that torch.save writes")),
        };
        if entries.contains_key(format!("{prefix}constants.pkl").as_str()) {
            return Err("is a TorchScript program, not a file of tensors".into());
        }
        let archive = Archive { bytes, entries, prefix, pickle: 0..0 };
        let order = archive.stored("byteorder")?.map_or(&b"little"[..], |range| &bytes[range]);
        if order != b"little" {
            return Err(format!(
                "has its numbers in the order {:?}, expected little",
                String::from_utf8_lossy(order)
            ));
        }
        let pickle = archive.stored(PICKLE)?.filter(|pickle| pickle.len() <= MAX_PICKLE);
        let pickle = pickle.ok_or_else(|| format!("has a {PICKLE} of more than {MAX_PICKLE} bytes"))?;
        Ok(Archive { pickle, ..archive })
    }

    /// The bytes of the entry called `name`, if there is one.
    fn stored(&self, name: &str) -> Result<Option<Range<usize>>, String> {
        match self.entries.get(format!("{}{name}", self.prefix).as_str()) {
            Some(entry) if entry.packed => Err(format!(
                "`{name}` is compressed; torch stores tensors as they are, so that they can be mapped: unpack the \
                 archive and pack it again without compression"
            )),
            entry => Ok(entry.map(|entry| entry.range.clone())),
        }
    }

    /// Finds the bytes of a tensor, or copies its elements into order.
    fn place(&self, name: &str, view: &View, contents: &mut Contents) -> Result<(), String> {
        let key = format!("data/{}", view.storage);
        let storage = self.stored(&key)?.ok_or_else(|| format!("its storage `{key}` is missing"))?;
        if view.storage_len.checked_mul(view.element) != Some(storage.len()) {
            let (len, bytes) = (view.storage_len, storage.len());
            return Err(format!(
                "its storage `{key}` has {bytes} bytes, expected {len} elements of {}",
                view.dtype
            ));
        }
        let elements = elements(view).ok_or_else(|| {
            let (shape, stride, offset, len) = (&view.shape, &view.stride, view.offset, view.storage_len);
            format!(
                "shape {shape:?} with strides {stride:?} from {offset} is not inside its storage of {len}"
            )
        })?;
        let size = elements * view.element;
        let entry =
            |range| Entry { name: name.into(), dtype: view.dtype.into(), shape: view.shape.clone(), range };
        if is_contiguous(view) {
            // A tensor without elements may begin behind the end.
            let start = storage.start + view.offset.saturating_mul(view.element).min(storage.len() - size);
            contents.mapped.push(entry(start..start + size));
            return Ok(());
        }
        // Views of one storage can overlap, and a small file could ask for a large copy.
        let start = contents.copies.len();
        if start + size > self.bytes.len() {
            return Err(
                "it and the other tensors in another order than row after row are larger than the file"
                    .into(),
            );
        }
        copy(view, &self.bytes[storage], &mut contents.copies);
        contents.copied.push(entry(start..start + size));
        Ok(())
    }
}

/// How many elements a view has, if all of them are inside its storage.
fn elements(view: &View) -> Option<usize> {
    let count = view.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))?;
    if count == 0 {
        return Some(0);
    }
    let last = view
        .shape
        .iter()
        .zip(&view.stride)
        .try_fold(view.offset, |at, (&dim, &stride)| at.checked_add((dim - 1).checked_mul(stride)?))?;
    (last < view.storage_len).then_some(count).filter(|count| count.checked_mul(view.element).is_some())
}

/// Whether the elements lie one after the other; the stride of a dimension of length 1 means nothing.
fn is_contiguous(view: &View) -> bool {
    if view.shape.contains(&0) {
        return true;
    }
    let mut expected = 1;
    view.shape.iter().zip(&view.stride).rev().all(|(&dim, &stride)| {
        let fits = dim == 1 || stride == expected;
        expected *= dim;
        fits
    })
}

/// Appends the elements of a view of `storage` to `out`, the last index running fastest.
fn copy(view: &View, storage: &[u8], out: &mut Vec<u8>) {
    let mut index = vec![0; view.shape.len()];
    let mut at = view.offset;
    loop {
        out.extend_from_slice(&storage[at * view.element..(at + 1) * view.element]);
        let mut dim = view.shape.len();
        loop {
            let Some(next) = dim.checked_sub(1) else { return };
            dim = next;
            index[dim] += 1;
            at += view.stride[dim];
            if index[dim] < view.shape[dim] {
                break;
            }
            at -= index[dim] * view.stride[dim];
            index[dim] = 0;
        }
    }
}
