//! CLIP by itself: pictures and texts become vectors of one space, and the nearer two are, the better the text
//! describes the picture.
//!
//! ```
//! use tessera::runtime::{Clip, LoadOptions, Source, softmax};
//!
//! # fn main() -> tessera::Result<()> {
//! # let case = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/f_clip_zeroshot");
//! # let (dir, file) = (format!("{case}/model"), format!("{case}/images/cat.png"));
//! let mut clip = Clip::load(&Source::Directory(dir.into()), &LoadOptions::default())?;
//! let picture = clip.image("cat.png", &std::fs::read(file).unwrap())?;
//! let labels = [clip.text("a photo of a cat")?, clip.text("a photo of a dog")?];
//! let probabilities = softmax(&clip.logits(&picture, &labels)?);
//! assert!((probabilities[0] + probabilities[1] - 1.0).abs() < 1e-6);
//! # Ok(())
//! # }
//! ```

use super::model::{LoadOptions, Source};
use super::pictures::processor_in;
use super::session::non_finite;
use crate::backend::{Backend, Ceilings, all_finite};
use crate::error::{Error, Result};
use crate::graph::{Control, Executor, Graph, GraphBuilder, Plan};
use crate::input::image::{DecodeOptions, Picture, Preprocess, decode};
use crate::input::prompt::{ClipTokenizer, ClipTokens};
use crate::model::clip::{self, Encoder};
use crate::model::config::{ClipConfig, Pooling};
use crate::model::weights::Weights;
use crate::tensor::Bindings;
use std::sync::Arc;

/// A CLIP, ready to run: a vision tower, a text tower, or both.
pub struct Clip {
    name: String,
    config: ClipConfig,
    weights: Weights,
    backend: Arc<dyn Backend>,
    vision: Option<(Preprocess, Tower)>,
    text: Option<Texts>,
    /// Watches and stops what is being done, from any thread.
    pub control: Control,
}

/// A picture or a text in the space that both share.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// What the tower's projection makes `[projection_dim]`.
    pub projected: Vec<f32>,
    /// The same, of length 1.
    pub unit: Vec<f32>,
}

/// A tower with the memory it runs in.
struct Tower {
    executor: Executor,
    ends: Encoder,
}

/// The text tower, one graph for each of a few lengths: a caption of ten words need not pay for 77 positions.
/// What a row becomes does not depend on the length it was run at.
struct Texts {
    tokenizer: ClipTokenizer,
    /// In the order in which they were wanted, the longest first, with the rows of a text.
    towers: Vec<(usize, Tower)>,
}

/// The rows that a text of so many ids is run at: few lengths, of which all positions are one.
fn text_rows(ids: usize, positions: usize) -> usize {
    const MULTIPLE: usize = 16;
    ids.clamp(1, positions).next_multiple_of(MULTIPLE).min(positions)
}

impl Clip {
    /// Loads a CLIP: `CLIPModel`, or one tower as `CLIPVisionModelWithProjection` or
    /// `CLIPTextModelWithProjection` is saved. Of the options, those about
    /// threads, files, presets and adapters count.
    ///
    /// # Errors
    /// Whatever is wrong with the files, named; [`Error::Config`] for a model of another family.
    pub fn load(source: &Source, options: &LoadOptions) -> Result<Self> {
        let stored = || Ok(ClipConfig::load(&source.folder(options)?)?.dtype);
        Clip::load_on(options.device.open(options.threads, stored)?, source, options)
    }

    /// Loads a CLIP onto a device.
    ///
    /// # Errors
    /// As for [`load`](Clip::load).
    pub fn load_on(backend: Arc<dyn Backend>, source: &Source, options: &LoadOptions) -> Result<Self> {
        let folder = source.folder(options)?;
        let config = ClipConfig::load(&folder)?;
        let mut weights = source.weights(&folder, options)?;
        weights.adapt_all(&options.lora, options.load_mode)?;
        let vision = match &config.vision {
            None => None,
            Some(vision) => {
                let build = |b: &mut GraphBuilder<'_>| {
                    clip::image_encoder(b, vision, config.projection_dim, &weights)
                };
                Some((processor_in([&folder], vision.image_size, options)?, Tower::new(&backend, build)?))
            }
        };
        let text = match &config.text {
            None => None,
            Some(text) => {
                let tokenizer = ClipTokenizer::load(&folder, text.vocab_size, text.max_positions)?;
                if let Pooling::First(end) = text.pooling
                    && end != tokenizer.end()
                {
                    return Err(Error::Config {
                        file: folder.path("config.json"),
                        key: "text_config.eos_token_id".into(),
                        expected: format!("{}, the token that ends every text, or 2", tokenizer.end()),
                        found: end.to_string(),
                    });
                }
                let mut texts = Texts { tokenizer, towers: Vec::new() };
                // The longest is built now, so that what is wrong with the weights is told at once.
                texts.tower(&backend, &config, &weights, text.max_positions)?;
                Some(texts)
            }
        };
        let (name, control) = (source.to_string(), Control::default());
        Ok(Clip { name, config, weights, backend, vision, text, control })
    }

    /// What the model was called when it was loaded.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Dimensions.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// The tensors.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The device.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The vision tower and its projection.
    ///
    /// # Errors
    /// [`Error::Prompt`] if the model has none.
    pub fn vision_tower(&self) -> Result<&Executor> {
        let (_, tower) = self.vision.as_ref().ok_or_else(|| no_vision_tower(&self.name))?;
        Ok(&tower.executor)
    }

    /// The text tower and its projection over texts of `tokens` ids, or of all positions if there are fewer. It is
    /// built when it is first asked for.
    ///
    /// # Errors
    /// [`Error::Prompt`] if the model has none; [`Error::Memory`].
    pub fn text_tower(&mut self, tokens: usize) -> Result<&Executor> {
        Ok(&self.text_tower_mut(tokens)?.executor)
    }

    /// The towers that there are, that of texts over all its positions.
    pub fn towers(&self) -> impl Iterator<Item = &Executor> {
        let texts = self.text.iter().flat_map(|texts| &texts.towers).take(1);
        self.vision.iter().map(|(_, tower)| tower).chain(texts.map(|(_, tower)| tower)).map(|t| &t.executor)
    }

    /// What the device can do at most, on this model's own weights; see [`Backend::ceilings`].
    ///
    /// # Errors
    /// As there.
    pub fn ceilings(&self) -> Result<Option<Ceilings>> {
        self.backend.ceilings(self.weights.largest())
    }

    /// Decodes a picture and encodes it. `name` is for messages only.
    ///
    /// # Errors
    /// [`Error::Image`]; [`Error::Prompt`] if the model has no vision tower; [`Error::NonFinite`];
    /// [`Error::Cancelled`].
    pub fn image(&mut self, name: &str, bytes: &[u8]) -> Result<Embedding> {
        self.picture(&decode(name, bytes, &DecodeOptions::default())?)
    }

    /// Encodes a picture that was decoded elsewhere.
    ///
    /// # Errors
    /// As for [`image`](Clip::image).
    pub fn picture(&mut self, picture: &Picture) -> Result<Embedding> {
        let Some((preprocess, tower)) = &mut self.vision else { return Err(no_vision_tower(&self.name)) };
        let pixels = preprocess.pixels(picture)?;
        tower.executor.write(tower.ends.input, &pixels)?;
        // The class row stands first.
        tower.run(0, &self.control)
    }

    /// The ids of a text, cut off where the tower's positions end.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]; [`Error::Prompt`] if the model has no text tower.
    pub fn tokens(&self, text: &str) -> Result<ClipTokens> {
        let texts = self.text.as_ref().ok_or_else(|| no_text_tower(&self.name))?;
        texts.tokenizer.encode(text)
    }

    /// Encodes a text. Of one that is too long the beginning counts: see [`tokens`](Clip::tokens).
    ///
    /// # Errors
    /// As for [`tokens`](Clip::tokens); [`Error::NonFinite`]; [`Error::Cancelled`].
    pub fn text(&mut self, text: &str) -> Result<Embedding> {
        self.ids(&self.tokens(text)?.ids)
    }

    /// Encodes token ids, start and end among them.
    ///
    /// # Errors
    /// As for [`text`](Clip::text); [`Error::Prompt`] for ids that the tower has no rows for, too many, or none
    /// that ends a text.
    pub fn ids(&mut self, ids: &[u32]) -> Result<Embedding> {
        let Some(config) = &self.config.text else { return Err(no_text_tower(&self.name)) };
        let (vocab, positions) = (config.vocab_size, config.max_positions);
        if ids.len() > positions || ids.iter().any(|&id| id as usize >= vocab) {
            let count = ids.len();
            return Err(Error::Prompt(format!(
                "{count} token ids; the text tower takes at most {positions}, each below {vocab}"
            )));
        }
        let Some(pooled) = config.pooling.row(ids) else {
            return Err(Error::Prompt("a text without its end token".into()));
        };
        // What stands behind the end is not seen by what stands before.
        let mut padded = vec![0i32; text_rows(ids.len(), positions)];
        padded.iter_mut().zip(ids).for_each(|(to, &id)| *to = id as i32);
        let control = self.control.clone();
        let tower = self.text_tower_mut(ids.len())?;
        tower.executor.write(tower.ends.input, &padded)?;
        tower.run(pooled, &control)
    }

    fn text_tower_mut(&mut self, tokens: usize) -> Result<&mut Tower> {
        let (Some(texts), Some(config)) = (&mut self.text, &self.config.text) else {
            return Err(no_text_tower(&self.name));
        };
        let rows = text_rows(tokens, config.max_positions);
        texts.tower(&self.backend, &self.config, &self.weights, rows)
    }

    /// How well each text describes a picture: cosines times the model's learnt scale, the logits whose
    /// [`softmax`] are zero-shot probabilities.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the checkpoint has no `logit_scale`: one with a single tower.
    ///
    /// # Panics
    /// If the embeddings are another model's, with more or fewer columns.
    pub fn logits(&self, picture: &Embedding, texts: &[Embedding]) -> Result<Vec<f32>> {
        let scale = (self.logit_scale()? as f64).exp();
        let logit = |text: &Embedding| {
            assert_eq!(picture.unit.len(), text.unit.len(), "embeddings of two models");
            let products = picture.unit.iter().zip(&text.unit).map(|(&a, &b)| a as f64 * b as f64);
            (scale * products.sum::<f64>()) as f32
        };
        Ok(texts.iter().map(logit).collect())
    }

    /// The logarithm of what cosines are multiplied by.
    fn logit_scale(&self) -> Result<f32> {
        const NAME: &str = "logit_scale";
        let weight = self.weights.tensor(NAME, &[]).or_else(|error| {
            // Some savers make a vector of every scalar.
            self.weights.tensor(NAME, &[1]).map_err(|_| error)
        })?;
        Ok(weight.dtype.widen(weight.bytes.as_bytes())[0])
    }
}

/// What a model without a vision tower says.
fn no_vision_tower(model: &str) -> Error {
    Error::Prompt(format!("{model} has no vision tower; it takes texts only"))
}

/// What a model without a text tower says.
fn no_text_tower(model: &str) -> Error {
    Error::Prompt(format!("{model} has no text tower; it takes pictures only"))
}

impl Texts {
    /// The tower for texts of `rows` rows.
    fn tower(
        &mut self,
        backend: &Arc<dyn Backend>,
        config: &ClipConfig,
        weights: &Weights,
        rows: usize,
    ) -> Result<&mut Tower> {
        let at = match self.towers.iter().position(|(built, _)| *built == rows) {
            Some(at) => at,
            None => {
                let text = config.text.as_ref().expect("a model with a text tower has its configuration");
                let build = |b: &mut GraphBuilder<'_>| {
                    clip::text_encoder(b, text, config.projection_dim, rows, weights)
                };
                self.towers.push((rows, Tower::new(backend, build)?));
                self.towers.len() - 1
            }
        };
        Ok(&mut self.towers[at].1)
    }
}

/// One picture or one text at a time.
const ONE: Bindings = Bindings {
    images: 1,
    outputs: 1,
    tokens: 0,
    decode: 0,
    decode_outputs: 0,
    table_entries: 0,
    pages: 0,
    context: 0,
};

impl Tower {
    /// Builds a graph and allocates what it needs.
    fn new(
        backend: &Arc<dyn Backend>,
        build: impl FnOnce(&mut GraphBuilder<'_>) -> Result<Encoder>,
    ) -> Result<Self> {
        let mut builder = GraphBuilder::new(&**backend);
        let ends = build(&mut builder)?;
        let graph: Arc<Graph> = Arc::new(builder.finish());
        let plan = Plan::new(&graph, &**backend, ONE);
        let arena = Arc::new(backend.alloc("activations", plan.bytes)?);
        Ok(Tower { executor: Executor::new(graph, backend.clone(), plan, arena, &[]), ends })
    }

    /// Runs the tower on the input that was written, and reads what row `pooled` becomes.
    fn run(&mut self, pooled: usize, control: &Control) -> Result<Embedding> {
        let Tower { executor, ends } = self;
        executor.write(ends.pooled, &[pooled as i32])?;
        control.begin(executor.graph().nodes.len());
        // SAFETY: ids are inside the vocabulary (`Clip::ids`), `pooled` is a row of the input (the callers),
        // the graph has no states, and `&mut self` keeps its arena ours.
        unsafe { executor.run(&ONE, control)? };
        let unit = executor.read_floats(ends.unit, &ONE)?;
        if !all_finite(&unit) {
            // SAFETY: as above.
            let node = unsafe { executor.first_non_finite(&ONE)? };
            return Err(non_finite(0, node));
        }
        Ok(Embedding { projected: executor.read_floats(ends.projected, &ONE)?, unit })
    }
}

/// Probabilities of logits: non-negative, with the sum 1.
pub fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().fold(f64::NEG_INFINITY, |most, &x| most.max(x as f64));
    let powers: Vec<f64> = logits.iter().map(|&x| (x as f64 - most).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| (power / sum) as f32).collect()
}
