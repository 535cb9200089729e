//! `adapter_config.json`: peft's `LoraConfig`, as far as it changes what is computed.

use crate::error::Result;
use crate::folder::Folder;
use crate::model::json::{self, Section};
use regex::Regex;
use serde_json::Value;

/// Ranks and scales of an adapter's pairs.
#[derive(Clone, Debug)]
pub struct LoraConfig {
    /// Rank of every pair that no pattern names.
    pub rank: usize,
    /// Divided by the rank, or its root, it is the scale of every pair that no pattern names.
    pub alpha: f64,
    /// Whether alpha is divided by √r (rsLoRA) and not by r.
    pub rank_stabilised: bool,
    /// Ranks of modules that a pattern names; the first that fits holds.
    rank_pattern: Vec<(Regex, f64)>,
    /// The same for alpha.
    alpha_pattern: Vec<(Regex, f64)>,
}

/// Settings that change what is computed in ways that are not known here. Each must be absent, false or empty.
const UNSUPPORTED: [&str; 12] = [
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "loftq_config",
    "kasa_config",
];

/// Ways to begin a training that change the model's own weights, so that its adapter fits another model.
const CHANGE_THE_BASE: [&str; 5] = ["pissa", "olora", "loftq", "corda", "lora_ga"];

impl LoraConfig {
    /// Reads `adapter_config.json` in `folder`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming a key that is malformed or cannot be honoured.
    pub fn load(folder: &Folder) -> Result<Self> {
        const FILE: &str = "adapter_config.json";
        let (map, file) = (json::read_object(folder, FILE)?, folder.path(FILE));
        let root = Section::root(&file, &map);
        root.choice("peft_type", "LORA", &[("LORA", ())])?;
        for key in UNSUPPORTED {
            if root.get(key).is_some_and(|value| !is_off(value)) {
                return Err(root.error(key, "none: this is not supported"));
            }
        }
        if let Some(Value::String(how)) = root.get("init_lora_weights")
            && CHANGE_THE_BASE.iter().any(|name| how.to_ascii_lowercase().starts_with(name))
        {
            let expected =
                "an adapter of the model as it is: save it with path_initial_model_for_weight_conversion";
            return Err(root.error("init_lora_weights", expected));
        }
        Ok(LoraConfig {
            rank: root.size("r", 8, RANK)?,
            alpha: root.positive("lora_alpha", 8.0, ALPHA)?,
            rank_stabilised: root.bool("use_rslora", false)?,
            rank_pattern: patterns(&root, "rank_pattern", |value| {
                let rank = usize::try_from(value.as_u64()?).ok()?;
                RANK.contains(&rank).then_some(rank as f64)
            })?,
            alpha_pattern: patterns(&root, "alpha_pattern", |value| {
                value.as_f64().filter(|alpha| *alpha > 0.0 && *alpha <= ALPHA)
            })?,
        })
    }

    /// The rank of the pair beside `module`, a name as it stands in the adapter.
    pub fn rank(&self, module: &str) -> usize {
        first(&self.rank_pattern, module).map_or(self.rank, |rank| rank as usize)
    }

    /// What the pair beside `module` is multiplied by.
    pub fn scale(&self, module: &str) -> f64 {
        let rank = self.rank(module) as f64;
        let alpha = first(&self.alpha_pattern, module).unwrap_or(self.alpha);
        alpha / if self.rank_stabilised { rank.sqrt() } else { rank }
    }
}

const RANK: std::ops::RangeInclusive<usize> = 1..=1 << 16;
const ALPHA: f64 = 1e9;

/// Whether a setting says that it is not used.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) | Value::Number(_) => false,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// The patterns under `key`, in their order. As in peft, a pattern fits a name that ends with it at a dot.
fn patterns(root: &Section, key: &str, number: impl Fn(&Value) -> Option<f64>) -> Result<Vec<(Regex, f64)>> {
    let wrong = || root.error(key, "an object of patterns (regular expressions) and numbers above 0");
    let map = match root.get(key) {
        None => return Ok(Vec::new()),
        Some(value) => value.as_object().ok_or_else(wrong)?,
    };
    let pattern = |(pattern, value): (&String, &Value)| {
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")).ok()?;
        Some((regex, number(value)?))
    };
    map.iter().map(pattern).collect::<Option<_>>().ok_or_else(wrong)
}

/// The number of the first pattern that fits.
fn first(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(regex, _)| regex.is_match(module)).map(|&(_, number)| number)
}
