//! Reading the goldens of this folder. What each case holds is told in `README.md` beside this file.

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::fmt;
use std::path::PathBuf;
use tessera::model::lora::Lora;

/// A case: a checkpoint, prompts, pictures, and what the reference made of them.
pub struct Case {
    folder: PathBuf,
    json: Value,
    expected: Vec<u8>,
}

/// A prompt of a case.
#[derive(Clone, Debug)]
pub struct CaseRequest {
    /// The prefix of its tensors.
    pub name: String,
    /// The rendered prompt, `<image>` once for each picture.
    pub prompt: String,
    /// File names of its pictures.
    pub images: Vec<String>,
    /// SHA-256 of the pixels of each, where the case has it.
    pub pixels_sha256: Vec<String>,
    /// Tokens generated, unless end of text came before.
    pub max_new_tokens: usize,
    /// The decoded answer.
    pub expected_text: Option<String>,
    /// What is asked, if the prompt is the style that the model's name tells.
    pub question: Option<String>,
    /// How far the reference in f32 is from the same in f64.
    pub noise: f64,
}

impl CaseRequest {
    /// Ten times the reference's own noise, but at least 5e-4: room for other orders of summation.
    pub fn logits_bound(&self) -> f64 {
        (10.0 * self.noise).max(5e-4)
    }
}

/// The folder of all cases, from where cargo runs tests, and `scripts/gpu/prove` those that it carries.
pub fn folder() -> PathBuf {
    PathBuf::from("tests/data")
}

#[allow(dead_code, reason = "each test program uses a part")]
impl Case {
    /// Reads a case.
    pub fn load(name: &str) -> Case {
        let folder = folder().join(name);
        let read =
            |file: &str| std::fs::read(folder.join(file)).unwrap_or_else(|e| panic!("{name}/{file}: {e}"));
        let json = serde_json::from_slice(&read("case.json")).unwrap();
        let expected = read("expected.safetensors");
        Case { folder, json, expected }
    }

    /// The checkpoint, which may be another case's.
    pub fn model(&self) -> PathBuf {
        self.folder.join(self.json["model"].as_str().unwrap())
    }

    /// The language model that the checkpoint, an adapter, was trained over.
    pub fn base(&self) -> Option<PathBuf> {
        Some(self.folder.join(self.json["base"].as_str()?))
    }

    /// Whether the checkpoint is in the layout of the original LLaVA.
    pub fn is_original(&self) -> bool {
        self.json["kind"] == "llava_original"
    }

    /// The adapters that the reference had merged into the checkpoint.
    pub fn lora(&self) -> Vec<Lora> {
        let list = self.json["adapters"].as_array().into_iter().flatten();
        list.map(|adapter| Lora {
            dir: self.folder.join(adapter["folder"].as_str().unwrap()),
            scale: adapter["scale"].as_f64().unwrap(),
        })
        .collect()
    }

    /// The bytes of a picture as the reference decoded it: a JPEG has its pixels beside it, because
    /// decoders differ by a few levels.
    pub fn image(&self, name: &str) -> Vec<u8> {
        let path = self.folder.join("images").join(name);
        let decoded = path.with_extension("decoded.png");
        std::fs::read(if decoded.exists() { decoded } else { path }).unwrap()
    }

    /// The prompts.
    pub fn requests(&self) -> Vec<CaseRequest> {
        let list = self.json["requests"].as_array().unwrap();
        let strings = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().map(|v| v.as_str().unwrap().into()).collect()
        };
        list.iter()
            .map(|r| CaseRequest {
                name: r["name"].as_str().unwrap().into(),
                prompt: r["prompt"].as_str().unwrap().into(),
                images: strings(&r["images"]),
                pixels_sha256: strings(&r["pixels_sha256"]),
                max_new_tokens: r["sampling"]["max_new_tokens"].as_u64().unwrap() as usize,
                expected_text: r["expected_text"].as_str().map(String::from),
                question: r["question"].as_str().map(String::from),
                noise: r["measured"]["logits_max_abs_diff_f32_vs_f64"].as_f64().unwrap_or(0.0),
            })
            .collect()
    }

    /// Whether the reference left this tensor.
    pub fn has(&self, tensor: &str) -> bool {
        SafeTensors::deserialize(&self.expected).unwrap().tensor(tensor).is_ok()
    }

    /// A tensor of f32.
    pub fn f32s(&self, tensor: &str) -> Vec<f32> {
        let all = SafeTensors::deserialize(&self.expected).unwrap();
        let view = all.tensor(tensor).unwrap_or_else(|e| panic!("{tensor}: {e}"));
        assert_eq!(view.dtype(), Dtype::F32, "{tensor}");
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// A tensor of ids.
    pub fn ids(&self, tensor: &str) -> Vec<u32> {
        let all = SafeTensors::deserialize(&self.expected).unwrap();
        let view = all.tensor(tensor).unwrap_or_else(|e| panic!("{tensor}: {e}"));
        assert_eq!(view.dtype(), Dtype::I32, "{tensor}");
        view.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    }
}

/// The largest deviation of each kind of tensor, as a share of its bound.
#[derive(Default)]
pub struct Worst(Vec<(String, f64, f64)>);

#[allow(dead_code, reason = "each test program uses a part")]
impl Worst {
    /// Compares element by element.
    pub fn compare(&mut self, what: &str, ours: &[f32], expected: &[f32], bound: f64) {
        assert_eq!(ours.len(), expected.len(), "{what}: elements");
        let deviation = ours
            .iter()
            .zip(expected)
            .map(|(a, b)| (*a as f64 - *b as f64).abs())
            .fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { f64::max(m, d) });
        assert!(deviation <= bound, "{what}: deviates by {deviation:.2e}, the bound is {bound:.2e}");
        match self.0.iter_mut().find(|w| w.0 == what) {
            Some(worst) if worst.1 / worst.2 < deviation / bound => (worst.1, worst.2) = (deviation, bound),
            Some(_) => {}
            None => self.0.push((what.into(), deviation, bound)),
        }
    }

    /// Fails if more or fewer kinds of tensors were compared.
    pub fn must_have_compared(&self, kinds: usize) {
        assert_eq!(self.0.len(), kinds, "kinds of tensors compared: {self}");
    }
}

impl fmt::Display for Worst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, deviation, bound) in &self.0 {
            write!(f, "{what} {deviation:.1e} of {bound:.1e} ({:.0} %)  ", 100.0 * deviation / bound)?;
        }
        Ok(())
    }
}
