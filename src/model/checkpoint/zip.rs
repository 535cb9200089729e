//! Where the entries of a zip archive are in its bytes, trusted in nothing. Nothing is unpacked: torch stores
//! its tensors as they are, so a range of the file is all that is needed.

use std::collections::HashMap;
use std::ops::Range;

/// An entry: its bytes in the archive, if they are stored as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The bytes, compressed or not.
    pub range: Range<usize>,
    /// Whether they must be inflated or decrypted before they mean anything.
    pub packed: bool,
}

/// What a local entry, and so a file made by `torch.save`, begins with.
pub const MAGIC: &[u8] = b"PK\x03\x04";

const DIRECTORY_ENTRY: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const END_64_LOCATOR: &[u8] = b"PK\x06\x07";

/// A directory of more is no checkpoint's: a shard has some hundred tensors of a hundred bytes each here.
const MAX_DIRECTORY: usize = 16 << 20;

/// All entries by name, from the directory at the end of `bytes`.
///
/// # Errors
/// In words.
pub fn entries(bytes: &[u8]) -> Result<HashMap<&str, Entry>, String> {
    let directory = directory(bytes)?;
    let mut rest = Reader(&bytes[directory.clone()]);
    let mut entries = HashMap::new();
    while !rest.0.is_empty() {
        let (name, entry) = next(&mut rest, bytes, directory.start)?;
        if entries.insert(name, entry).is_some() {
            return Err(format!("holds `{name}` twice"));
        }
    }
    Ok(entries)
}

/// The directory's bytes: the end record says where they are, or the 64-bit one that a locator before it names.
fn directory(bytes: &[u8]) -> Result<Range<usize>, String> {
    const END_BYTES: usize = 22;
    let cut_off = || "is a zip archive without its end: it is cut off; download it again".to_string();
    // The end record is followed by a comment of at most 65535 bytes, whose length it states.
    let first = bytes.len().saturating_sub(END_BYTES + 0xFFFF);
    let is_end = |&at: &usize| {
        let mut end = Reader(&bytes[at..]);
        let comment = end.expect(END).and_then(|()| end.skip(16)).and_then(|()| end.u16());
        comment.is_ok_and(|length| at + END_BYTES + length as usize == bytes.len())
    };
    let last = bytes.len().checked_sub(END_BYTES).ok_or_else(cut_off)?;
    let end = (first..=last).rev().find(is_end).ok_or_else(cut_off)?;
    let mut record = Reader(&bytes[end + 12..]);
    let (mut length, mut start) = (record.u32()? as u64, record.u32()? as u64);
    let mut limit = end;
    if let Some(locator) = end.checked_sub(20).filter(|&at| bytes[at..].starts_with(END_64_LOCATOR)) {
        limit = usize::try_from(Reader(&bytes[locator + 8..]).u64()?).map_err(|_| cut_off())?;
        let mut record = Reader(bytes.get(limit..).ok_or_else(cut_off)?);
        record.expect(END_64)?;
        record.skip(36)?;
        (length, start) = (record.u64()?, record.u64()?);
    }
    let range = range(start, length).filter(|range| range.end <= limit && range.len() <= MAX_DIRECTORY);
    range.ok_or_else(|| format!("has a directory of {length} bytes at {start}, which is not inside it"))
}

/// Reads one entry of the directory, and the local header it points to, of which only the length counts.
fn next<'a>(rest: &mut Reader<'a>, bytes: &'a [u8], end: usize) -> Result<(&'a str, Entry), String> {
    rest.expect(DIRECTORY_ENTRY)?;
    rest.skip(4)?;
    let (flags, method) = (rest.u16()?, rest.u16()?);
    rest.skip(8)?;
    let (mut packed_size, mut size) = (rest.u32()? as u64, rest.u32()? as u64);
    let (name_length, extra_length, comment_length) = (rest.u16()?, rest.u16()?, rest.u16()?);
    rest.skip(8)?;
    let mut offset = rest.u32()? as u64;
    let name = rest.take(name_length.into())?;
    let name = std::str::from_utf8(name).map_err(|_| "holds an entry whose name is not UTF-8".to_string())?;
    let mut extra = Reader(rest.take(extra_length.into())?);
    rest.skip(comment_length.into())?;
    while extra.0.len() >= 4 {
        let (id, length) = (extra.u16()?, extra.u16()?);
        let mut field = Reader(extra.take(length.into())?);
        // Sizes of 4 GiB and more, in this order, each only if its own field could not hold it.
        for value in [&mut size, &mut packed_size, &mut offset] {
            if id == 1 && *value == u64::from(u32::MAX) {
                *value = field.u64()?;
            }
        }
    }
    let outside = || format!("`{name}` is not inside the archive; the file is cut off or damaged");
    let header = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).ok_or_else(outside)?;
    let mut header = Reader(header);
    header.expect(MAGIC)?;
    header.skip(22)?;
    let lengths = u64::from(header.u16()?) + u64::from(header.u16()?);
    let range = range(offset + 30 + lengths, packed_size).filter(|range| range.end <= end);
    // Bit 0: encrypted. Method 0: stored.
    let packed = flags & 1 != 0 || method != 0 || packed_size != size;
    Ok((name, Entry { range: range.ok_or_else(outside)?, packed }))
}

fn range(start: u64, length: u64) -> Option<Range<usize>> {
    let end = start.checked_add(length)?;
    Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}

/// Bytes that are read from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) =
            self.0.split_at_checked(length).ok_or("has a directory that ends within an entry")?;
        self.0 = rest;
        Ok(taken)
    }

    fn skip(&mut self, length: usize) -> Result<(), String> {
        self.take(length).map(|_| ())
    }

    fn expect(&mut self, magic: &[u8]) -> Result<(), String> {
        match self.take(magic.len())? == magic {
            true => Ok(()),
            false => Err("has a directory that points to something else than an entry".into()),
        }
    }

    fn u16(&mut self) -> Result<u16, String> {
        self.take(2).map(|b| u16::from_le_bytes([b[0], b[1]]))
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.take(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self) -> Result<u64, String> {
        let (low, high) = (self.u32()?, self.u32()?);
        Ok(u64::from(low) | u64::from(high) << 32)
    }
}
