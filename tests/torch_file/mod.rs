//! Writes files as `torch.save` does: a zip archive with a pickle and one entry for each storage.

/// A tensor to be written; its storage holds it row after row.
pub struct Saved<'a> {
    pub name: &'a str,
    /// As safetensors calls it.
    pub dtype: &'a str,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// A file of a dictionary of tensors.
pub fn save(tensors: &[Saved]) -> Vec<u8> {
    let keys: Vec<String> = (0..tensors.len()).map(|i| format!("archive/data/{i}")).collect();
    let pickle = pickle(tensors);
    let mut entries: Vec<(&str, &[u8])> =
        vec![("archive/data.pkl", &pickle), ("archive/byteorder", b"little")];
    entries.extend(keys.iter().zip(tensors).map(|(key, tensor)| (key.as_str(), tensor.bytes)));
    zip(&entries)
}

/// An archive of entries stored as they are.
#[allow(dead_code, reason = "each test program uses a part")]
pub fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    archive(entries, false)
}

/// The same with the fields of 64 bits that archives of 4 GiB and more have.
#[allow(dead_code, reason = "each test program uses a part")]
pub fn zip_64(entries: &[(&str, &[u8])]) -> Vec<u8> {
    archive(entries, true)
}

fn archive(entries: &[(&str, &[u8])], wide: bool) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    // A number that does not fit, or is not to, stands in a field of its own.
    let narrow = |number: usize| if wide { u32::MAX } else { number as u32 }.to_le_bytes();
    let extra = |numbers: &[usize]| {
        let mut field = Vec::new();
        if wide {
            field.extend([1, 0, 8 * numbers.len() as u8, 0]);
            numbers.iter().for_each(|&number| field.extend((number as u64).to_le_bytes()));
        }
        field
    };
    for (name, bytes) in entries {
        let (offset, length) = (file.len(), bytes.len());
        // Version, flags, method, time, date, CRC (not looked at), two sizes, length of the name.
        let mut common = vec![0u8; 14];
        common.extend(narrow(length).repeat(2));
        common.extend((name.len() as u16).to_le_bytes());
        let [here, there] = [extra(&[length, length]), extra(&[length, length, offset])];
        file.extend(b"PK\x03\x04");
        file.extend(&common);
        file.extend([here.len() as u8, 0]);
        file.extend(name.as_bytes());
        file.extend(here);
        file.extend(*bytes);
        directory.extend(b"PK\x01\x02\0\0");
        directory.extend(&common);
        directory.extend([there.len() as u8, 0]);
        directory.extend([0; 10]);
        directory.extend(narrow(offset));
        directory.extend(name.as_bytes());
        directory.extend(there);
    }
    let start = file.len();
    file.extend(&directory);
    let end = file.len();
    if wide {
        file.extend(b"PK\x06\x06");
        file.extend([0; 36]);
        file.extend((directory.len() as u64).to_le_bytes());
        file.extend((start as u64).to_le_bytes());
        file.extend(b"PK\x06\x07\0\0\0\0");
        file.extend((end as u64).to_le_bytes());
        file.extend([1, 0, 0, 0]);
    }
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend((entries.len() as u16).to_le_bytes().repeat(2));
    file.extend(narrow(directory.len()));
    file.extend(narrow(start));
    file.extend([0, 0]);
    file
}

fn pickle(tensors: &[Saved]) -> Vec<u8> {
    let mut p = b"\x80\x02}(".to_vec();
    for (key, tensor) in tensors.iter().enumerate() {
        let storage = match tensor.dtype {
            "F16" => "HalfStorage",
            "BF16" => "BFloat16Storage",
            "F32" => "FloatStorage",
            "I64" => "LongStorage",
            other => panic!("{other} is not written here"),
        };
        let elements: usize = tensor.shape.iter().product();
        let strides: Vec<usize> =
            (0..tensor.shape.len()).map(|i| tensor.shape[i + 1..].iter().product()).collect();
        text(&mut p, tensor.name);
        p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut p, "storage");
        p.extend(format!("ctorch\n{storage}\n").as_bytes());
        text(&mut p, &key.to_string());
        text(&mut p, "cpu");
        number(&mut p, elements);
        p.extend(b"tQK\0");
        tuple(&mut p, tensor.shape);
        tuple(&mut p, &strides);
        p.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    p.extend(b"u.");
    p
}

fn text(pickle: &mut Vec<u8>, text: &str) {
    pickle.push(b'X');
    pickle.extend((text.len() as u32).to_le_bytes());
    pickle.extend(text.as_bytes());
}

fn number(pickle: &mut Vec<u8>, number: usize) {
    pickle.push(b'J');
    pickle.extend((number as u32).to_le_bytes());
}

fn tuple(pickle: &mut Vec<u8>, numbers: &[usize]) {
    pickle.push(b'(');
    numbers.iter().for_each(|&n| number(pickle, n));
    pickle.push(b't');
}
