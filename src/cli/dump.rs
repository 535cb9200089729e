//! `--dump`: what went through the model, as safetensors that any tool can compare.

use crate::error::{Error, Result};
use crate::runtime::engine::Kept;
use crate::runtime::request::Completion;
use crate::runtime::{ImageHandle, Model};
use safetensors::tensor::{Dtype, TensorView};
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// A tensor before it is written.
struct Tensor {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A file that can be written, and is when its tensors are known. If that never comes to pass, a file that was
/// there keeps what it holds, and one that was not is not left behind.
pub struct Dump {
    path: PathBuf,
    remove: bool,
}

impl Drop for Dump {
    fn drop(&mut self) {
        if self.remove {
            // Nothing depends on it, and whoever asked has heard of a failure already.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Dump {
    /// Makes sure that `path` can be written, before the work whose results it will hold.
    pub fn create(path: &Path) -> Result<Self> {
        let remove = !path.exists();
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(path);
        file.map(|_| Dump { path: path.into(), remove }).map_err(|source| Error::io(path, source))
    }

    /// Writes `pixel_values` (see [`pixel_values`]), `vision_hidden` [squares of all pictures,rows,D],
    /// `image_features` [rows,D], `input_ids` [T], `logits` [T,V] and `generated_ids` [n].
    pub fn write(self, model: &Model, images: &[ImageHandle], answer: &Completion) -> Result<()> {
        let mut tensors = Vec::new();
        let kept: Vec<_> = images.iter().filter_map(|image| image.kept.as_deref()).collect();
        if let (Some(vision), [_, ..]) = (&model.config().vision, &kept[..]) {
            let concat = |part: fn(&Kept) -> &Vec<f32>| -> Vec<f32> {
                kept.iter().flat_map(|k| part(k).iter().copied()).collect()
            };
            let pixels: Vec<_> = kept.iter().map(|k| k.pixels.as_slice()).collect();
            tensors.push(pixel_values(vision.image_size, model.config().tiling.is_some(), &pixels));
            let (hidden, squares) = (concat(|k| &k.hidden), kept.iter().map(|k| k.squares).sum::<usize>());
            let shape = [squares, vision.num_rows(), hidden.len() / (squares * vision.num_rows())];
            tensors.push(f32s("vision_hidden", &shape, &hidden));
            let features = concat(|k| &k.features);
            let rows: usize = images.iter().map(|image| image.encoded.len).sum();
            tensors.push(f32s("image_features", &[rows, features.len() / rows], &features));
        }
        let rows = answer.prompt_ids.len();
        tensors.push(ids("input_ids", &answer.prompt_ids));
        tensors.push(f32s("logits", &[rows, answer.prompt_logits.len() / rows], &answer.prompt_logits));
        tensors.push(ids("generated_ids", &answer.token_ids));
        self.save(&tensors)
    }

    /// Writes the pixels of several pictures, as `preprocess --out` does.
    pub fn write_pixels(self, side: usize, tiled: bool, pictures: &[Vec<f32>]) -> Result<()> {
        let pictures: Vec<_> = pictures.iter().map(Vec::as_slice).collect();
        self.save(&[pixel_values(side, tiled, &pictures)])
    }

    /// Writes vectors of one length as the rows of a tensor.
    pub fn write_rows(self, name: &'static str, rows: &[Vec<f32>]) -> Result<()> {
        let cols = rows.first().map_or(0, Vec::len);
        self.save(&[f32s(name, &[rows.len(), cols], &rows.concat())])
    }

    fn save(mut self, tensors: &[Tensor]) -> Result<()> {
        let invalid =
            |error: safetensors::SafeTensorError| Error::io(&self.path, std::io::Error::other(error));
        let views = tensors
            .iter()
            .map(|t| Ok((t.name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).map_err(invalid)?)))
            .collect::<Result<Vec<_>>>()?;
        safetensors::serialize_to_file(views, None, &self.path).map_err(invalid)?;
        self.remove = false;
        Ok(())
    }
}

/// A tensor of f32.
fn f32s(name: &'static str, shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor { name, dtype: Dtype::F32, shape: shape.into(), bytes }
}

/// Token ids as i64, as torch has them.
fn ids(name: &'static str, values: &[u32]) -> Tensor {
    let bytes = values.iter().flat_map(|&id| (id as i64).to_le_bytes()).collect();
    Tensor { name, dtype: Dtype::I64, shape: vec![values.len()], bytes }
}

/// Pixels of several pictures: [n,3,S,S], or, if they are seen in tiles, [n,squares,3,S,S] with zeros where a
/// picture has fewer squares than another.
fn pixel_values(side: usize, tiled: bool, pictures: &[&[f32]]) -> Tensor {
    let square = 3 * side * side;
    let longest = pictures.iter().map(|pixels| pixels.len()).max().unwrap_or(square);
    let mut values = Vec::with_capacity(pictures.len() * longest);
    for (i, pixels) in pictures.iter().enumerate() {
        values.extend_from_slice(pixels);
        values.resize((i + 1) * longest, 0.0);
    }
    match tiled {
        true => f32s("pixel_values", &[pictures.len(), longest / square, 3, side, side], &values),
        false => f32s("pixel_values", &[pictures.len(), 3, side, side], &values),
    }
}
