//! What is done where transformers and the code that LLaVA was published with differ: decided here, all of it, from the
//! checkpoint's layout and `--reference`.

use crate::input::image::{DecodeOptions, ImageMode, Merge, Tiling};
use crate::model::config::{ModelConfig, Reference};

/// Whose rules hold for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The code that is followed.
    pub reference: Reference,
    /// The code that the checkpoint was made for.
    own: Reference,
    /// Whether the checkpoint asks the original code to pad.
    pads: bool,
}

impl Rules {
    /// Those of `asked`, or else of the code that the checkpoint was made for.
    pub fn of(config: &ModelConfig, asked: Option<Reference>) -> Self {
        Rules { reference: asked.unwrap_or(config.reference), own: config.reference, pads: config.pads }
    }

    fn transformers(&self) -> bool {
        self.reference == Reference::Transformers
    }

    /// How the bytes of a picture are read: transformers turns it upright and paints a transparent colour white, the
    /// original does neither.
    pub fn decode_options(&self) -> DecodeOptions {
        DecodeOptions { exif_orientation: self.transformers(), whiten_transparent: self.transformers() }
    }

    /// How a picture becomes one square, if its processor would do it by `processor`. LLaVA-1.5 was published with
    /// `image_aspect_ratio: pad`, which its converted files do not say: transformers cuts.
    pub fn image_mode(&self, processor: ImageMode) -> ImageMode {
        match (self.reference, self.own) {
            (Reference::Original, Reference::Transformers) => ImageMode::Pad,
            (Reference::Original, Reference::Original) if self.pads => ImageMode::Pad,
            _ => processor,
        }
    }

    /// How pictures are seen in tiles: a pair of `image_grid_pinpoints` is (height, width) to transformers and
    /// (width, height) to the original, and only transformers rounds the margin. Crop and pad (`mode`) are ways of
    /// making one square, without tiles.
    pub fn tiling(&self, tiling: Option<Tiling>, mode: Option<ImageMode>) -> Option<Tiling> {
        let tiling = tiling.filter(|_| mode.is_none())?;
        Some(if self.reference == self.own { tiling } else { tiling.read_by_other(self.transformers()) })
    }

    /// Whether the text beside a picture is tokenised piece by piece, as in the original, or with a token for the
    /// picture as a whole.
    pub fn cuts_text(&self) -> bool {
        !self.transformers()
    }

    /// Whether a repetition penalty counts the ids of the prompt, as in transformers. The original gives its
    /// prompt as embeddings, so that only ids of the answer are seen.
    pub fn penalises_prompt(&self) -> bool {
        self.transformers()
    }

    /// Each rule in words, for a model whose tiles are `tiling`.
    pub fn lines(&self, tiling: Option<&Tiling>) -> Vec<(&'static str, &'static str)> {
        let choose = |transformers, original| if self.transformers() { transformers } else { original };
        let asked = self.reference != self.own;
        let mut lines = vec![
            (
                "rules",
                match (self.reference, asked) {
                    (Reference::Transformers, false) => "transformers, by the checkpoint's layout",
                    (Reference::Original, false) => "original LLaVA, by the checkpoint's layout",
                    (Reference::Transformers, true) => "transformers, by --reference",
                    (Reference::Original, true) => "original LLaVA, by --reference",
                },
            ),
            ("  EXIF rotation", choose("applied", "ignored")),
            ("  transparency", choose("a transparent colour is painted white", "dropped")),
            ("  text", choose("tokenised as a whole, a token for each picture", "tokenised piece by piece")),
            ("  penalty", choose("counts the prompt and the answer", "counts the answer")),
        ];
        if let Some(tiling) = tiling {
            lines.push(("  pinpoints", choose("read as (height, width)", "read as (width, height)")));
            if let Merge::SpatialUnpad { rounded } = tiling.merge() {
                lines.push(("  margin", if rounded { "rounded, then cut" } else { "cut" }));
            }
        }
        lines
    }
}
