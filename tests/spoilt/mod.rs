//! Copies of a small LLaVA checkpoint (`tests/data/names_saved_v5`) with something spoilt.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use tessera::Result;
use tessera::runtime::{Engine, ImageHandle, LoadOptions, Model, Request, Session, SessionOptions, Source};

/// A tensor of a safetensors file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

#[allow(dead_code, reason = "each test program uses a part")]
impl Tensor {
    /// Sets bf16 elements to `value`: all, or the first.
    pub fn fill(&mut self, value: f32, all: bool) {
        assert_eq!(self.dtype, "BF16");
        let bits = ((value.to_bits() >> 16) as u16).to_le_bytes();
        let elements = if all { self.bytes.len() / 2 } else { 1 };
        self.bytes.chunks_exact_mut(2).take(elements).for_each(|x| x.copy_from_slice(&bits));
    }
}

/// A checkpoint directory that a test may change.
pub struct Checkpoint {
    pub dir: TempDir,
}

pub const WEIGHTS: &str = "model.safetensors";

#[allow(dead_code, reason = "each test program uses a part")]
impl Checkpoint {
    /// A copy.
    pub fn copy() -> Self {
        Checkpoint::copy_of("tests/data/names_saved_v5/model")
    }

    /// A copy of a directory of the repository.
    pub fn copy_of(model: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(model)).unwrap() {
            let from = entry.unwrap().path();
            fs::write(dir.path().join(from.file_name().unwrap()), fs::read(&from).unwrap()).unwrap();
        }
        Checkpoint { dir }
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Changes a JSON file.
    pub fn json(self, file: &str, change: impl FnOnce(&mut Value)) -> Self {
        let mut value = serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap();
        change(&mut value);
        fs::write(self.path(file), value.to_string()).unwrap();
        self
    }

    /// Changes the tensors.
    pub fn tensors(self, change: impl FnOnce(&mut Vec<Tensor>)) -> Self {
        let mut tensors = read(&fs::read(self.path(WEIGHTS)).unwrap());
        change(&mut tensors);
        fs::write(self.path(WEIGHTS), write(&tensors)).unwrap();
        self
    }

    /// Changes one tensor.
    pub fn tensor(self, name: &str, change: impl FnOnce(&mut Tensor)) -> Self {
        self.tensors(|all| change(all.iter_mut().find(|t| t.name == name).unwrap()))
    }

    pub fn source(&self) -> Source {
        Source::Directory(self.dir.path().into())
    }

    pub fn load(&self) -> Result<Model> {
        Model::load(&self.source(), &LoadOptions { threads: Some(1), ..LoadOptions::default() })
    }

    pub fn engine(&self) -> Result<Engine> {
        Ok(Engine::new(Session::new(Arc::new(self.load()?), SessionOptions::default())?))
    }

    /// Loads the model, shows it a picture and has it make three tokens.
    pub fn answer(&self) -> Result<String> {
        let mut engine = self.engine()?;
        let image = picture(&mut engine)?;
        let request = Request { max_tokens: Some(3), ..Request::ask("What is it?", &[image])? };
        Ok(engine.generate(&request, |_| {})?.text)
    }
}

/// The sample picture, encoded.
pub fn picture(engine: &mut Engine) -> Result<ImageHandle> {
    let scene = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/samples/scene1.png");
    engine.image("scene1.png", &fs::read(scene).unwrap())
}

/// The tensors of a safetensors file, in its order.
pub fn read(file: &[u8]) -> Vec<Tensor> {
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&file[8..end]).unwrap();
    let numbers = |value: &Value| -> Vec<usize> {
        value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
    };
    header
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, info)| {
            let offsets = numbers(&info["data_offsets"]);
            Tensor {
                name: name.clone(),
                dtype: info["dtype"].as_str().unwrap().into(),
                shape: numbers(&info["shape"]),
                bytes: file[end + offsets[0]..end + offsets[1]].to_vec(),
            }
        })
        .collect()
}

/// A safetensors file.
pub fn write(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for t in tensors {
        let start = data.len();
        data.extend(&t.bytes);
        let offsets = [start, data.len()];
        let info = serde_json::json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets});
        header.insert(t.name.clone(), info);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}
