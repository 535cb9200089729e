//! What is measured: a model on a device, as llama-bench names it.

use super::environment;
use crate::backend::Backend;
use crate::graph::{Executor, Graph};
use crate::model::checkpoint::LoadMode;
use crate::model::weights::Weights;
use crate::runtime::{Clip, Model};
use crate::tensor::DType;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// What is the same for all rows of a model on a device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Subject {
    /// The commit the program was built from.
    pub build_commit: String,
    /// How many commits there are up to it; 0 if the build did not know.
    pub build_number: u64,
    /// The processor.
    pub cpu_info: String,
    /// The GPU; empty without one.
    pub gpu_info: String,
    /// `CPU`, `CUDA` or `EMU`.
    pub backends: String,
    /// The device as Tessera describes it: instruction set and threads, or GPU, driver and dtype.
    pub device: String,
    /// Where the model came from.
    pub model_filename: String,
    /// Its kind, size and dtype.
    pub model_type: String,
    /// Bytes of the weights in use.
    pub model_size: u64,
    /// Numbers among the weights in use.
    pub model_n_params: u64,
    /// The dtype that most of the weights have.
    pub weights_dtype: String,
    /// SHA-256 over every tensor's name, dtype and shape and its first 4 KiB.
    pub weights_sha256_sampled: String,
    /// Most token rows of one step on the device.
    pub n_ubatch: usize,
    /// Threads that compute; 0 on a GPU.
    pub n_threads: usize,
    /// The dtype of cached keys.
    pub type_k: String,
    /// The dtype of cached values.
    pub type_v: String,
    /// Layers of the language model on a GPU: all or none; of a CLIP none.
    pub n_gpu_layers: usize,
    /// Whether weights are mapped.
    pub use_mmap: bool,
    /// The same as llama-bench has it since 2026: `mmap` or `none`.
    pub load_mode: &'static str,
    /// What llama-bench can be asked for and Tessera has but one way of.
    #[serde(flatten)]
    pub fixed: Fixed,
}

/// Options of llama-bench that scripts expect in a row; here each has one value.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the names are llama-bench's")]
pub struct Fixed {
    pub cpu_mask: &'static str,
    pub cpu_strict: bool,
    pub poll: u32,
    pub n_cpu_moe: u32,
    pub split_mode: &'static str,
    pub main_gpu: u32,
    pub no_kv_offload: bool,
    pub flash_attn: u32,
    pub devices: &'static str,
    pub tensor_split: &'static str,
    pub tensor_buft_overrides: &'static str,
    pub no_op_offload: u32,
    pub fit_target: u32,
    pub fit_min_ctx: u32,
}

impl Fixed {
    /// One device; attention that never stores its scores.
    const VALUES: Fixed = Fixed {
        cpu_mask: "0x0",
        cpu_strict: false,
        poll: 50,
        n_cpu_moe: 0,
        split_mode: "none",
        main_gpu: 0,
        no_kv_offload: false,
        flash_attn: 1,
        devices: "auto",
        tensor_split: "0.00",
        tensor_buft_overrides: "none",
        no_op_offload: 0,
        fit_target: 0,
        fit_min_ctx: 0,
    };
}

impl Subject {
    /// Describes a model on its device, in a session whose steps have at most `n_ubatch` rows.
    pub fn new(model: &Model, load_mode: LoadMode, n_ubatch: usize) -> Self {
        let graphs = [Some(&**model.language()), model.vision().map(|vision| &*vision.graph)];
        let graphs: Vec<_> = graphs.into_iter().flatten().collect();
        let kind = if model.vision().is_some() { "llava" } else { "llama" };
        let named = Subject::of(model.name(), kind, &graphs, model.weights(), &**model.backend(), load_mode);
        let layers = if named.gpu_info.is_empty() { 0 } else { model.config().text.num_layers };
        Subject { n_gpu_layers: layers, n_ubatch, ..named }
    }

    /// Describes a CLIP on its device, whose texts have at most `n_ubatch` rows.
    pub fn of_clip(clip: &Clip, load_mode: LoadMode) -> Self {
        let graphs: Vec<_> = clip.towers().map(Executor::graph).collect();
        let n_ubatch = clip.config().text.as_ref().map_or(1, |text| text.max_positions);
        let named = Subject::of(clip.name(), "clip", &graphs, clip.weights(), &**clip.backend(), load_mode);
        Subject { n_ubatch, ..named }
    }

    /// What `graphs` compute on `backend` with some of `weights`.
    fn of(
        name: &str,
        kind: &str,
        graphs: &[&Graph],
        weights: &Weights,
        backend: &dyn Backend,
        load_mode: LoadMode,
    ) -> Self {
        let used: Vec<_> = graphs.iter().flat_map(|graph| &graph.weights).map(|weight| weight.ty).collect();
        let params: u64 = used.iter().map(|weight| (weight.rows * weight.cols) as u64).sum();
        // Norms may be kept wider than the matrices; the largest weight says what the model is made of.
        let dtype = used.iter().max_by_key(|weight| weight.bytes()).map_or(DType::F32, |weight| weight.dtype);
        let kv = backend.dtype().name().to_string();
        let device = backend.describe();
        let (backends, gpu_info) = names(&device);
        Subject {
            build_commit: environment::commit().into(),
            build_number: environment::build_number(),
            cpu_info: environment::cpu(),
            n_gpu_layers: 0,
            gpu_info,
            backends,
            device,
            model_filename: name.into(),
            model_type: format!("{kind} {} {}", count(params), dtype.name().to_uppercase()),
            model_size: graphs.iter().map(|graph| graph.weight_bytes()).sum(),
            model_n_params: params,
            weights_dtype: dtype.name().into(),
            weights_sha256_sampled: digest(weights),
            n_ubatch: 0,
            n_threads: backend.threads(),
            type_k: kv.clone(),
            type_v: kv,
            use_mmap: load_mode == LoadMode::Mmap,
            load_mode: if load_mode == LoadMode::Mmap { "mmap" } else { "none" },
            fixed: Fixed::VALUES,
        }
    }
}

impl Subject {
    /// The number of the GPU that computes.
    pub fn gpu_number(&self) -> Option<usize> {
        let number = self.device.strip_prefix("cuda:")?;
        number.split(' ').next()?.parse().ok()
    }
}

/// The backend and the GPU in a device's description: `CUDA` and `NVIDIA H200` of `cuda:0 (NVIDIA H200, ...)`.
fn names(device: &str) -> (String, String) {
    let (name, about) = device.split_once(" (").unwrap_or((device, ""));
    let backend = name.split(':').next().unwrap_or(name).to_uppercase();
    let gpu = if backend == "CUDA" { about.split(',').next().unwrap_or(about) } else { "" };
    (backend, gpu.into())
}

/// `7.1B`, `3.2M`: as people name models.
fn count(params: u64) -> String {
    match params {
        0..1_000_000_000 => format!("{:.1}M", params as f64 / 1e6),
        _ => format!("{:.1}B", params as f64 / 1e9),
    }
}

fn digest(weights: &Weights) -> String {
    let mut hash = Sha256::new();
    let storages: Vec<_> = weights.storages().collect();
    for tensor in weights.tensors() {
        hash.update(format!("{} {} {:?}\n", tensor.name, tensor.dtype, tensor.shape));
        let bytes = storages.get(tensor.file).map_or(&[][..], |storage| storage.as_bytes());
        let end = (tensor.offset + tensor.bytes.min(4096)).min(bytes.len());
        hash.update(bytes.get(tensor.offset..end).unwrap_or_default());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_llama_bench_does() {
        let of = |device| {
            let (backend, gpu) = names(device);
            [backend, gpu]
        };
        assert_eq!(of("cpu (AVX-512, 2 threads)"), ["CPU", ""]);
        assert_eq!(of("cuda:1 (NVIDIA H200, compute capability 9.0, bf16)"), ["CUDA", "NVIDIA H200"]);
        assert_eq!(of("emu (slow, for tests, f16)"), ["EMU", ""]);
    }
}
