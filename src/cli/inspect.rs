//! `tessera inspect`: what a checkpoint is, and what running it would do.

use super::options::{ModelArgs, SessionArgs, format_size};
use crate::backend::cpu::usable_memory;
use crate::error::{Error, Result};
use crate::graph::{Graph, Plan};
use crate::input::image::{ImageMode, Merge, Tiling};
use crate::model::config::{ModelConfig, Pooling, ProjectorConfig, SelectStrategy, VisionConfig};
use crate::model::lora::Adapter;
use crate::model::names::Layout;
use crate::model::weights::{TensorInfo, Weights};
use crate::op::{Cost, KvExtent};
use crate::runtime::{Clip, LoadOptions, MemoryPlan, Model, SessionPlan};
use crate::tensor::{Bindings, DType, View};
use clap::{Args, ValueEnum};
use std::collections::{BTreeMap, BTreeSet};

/// Options of `tessera inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// List the nodes of a graph with shapes, FLOPs, bytes and arena offsets
    #[arg(long, value_enum)]
    graph: Option<GraphName>,
    /// Token rows of the prefill, or cached positions of the decode step, that --graph counts
    #[arg(long, value_name = "N", requires = "graph")]
    tokens: Option<usize>,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
}

/// `--graph`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GraphName {
    /// One picture: tower and projector, or projection.
    Vision,
    /// The language model over a prompt.
    Prefill,
    /// The language model over one token.
    Decode,
    /// CLIP's text tower over a text of all its positions.
    Text,
}

impl Inspect {
    pub fn run(self) -> Result<()> {
        let (source, load) = self.model.load_options()?;
        // Nothing is computed, so nothing is drawn or allocated: a model may be larger than the machine.
        let load = LoadOptions { preset_values: false, ..load };
        if source.is_clip()? {
            return self.clip(&mut Clip::load(&source, &load)?);
        }
        let model = Model::load(&source, &load)?;
        if self.tensors {
            return super::print(&tensor_list(model.weights()));
        }
        let plan = SessionPlan::new(&model, &self.session.session_options())?;
        super::print(&match self.graph {
            Some(graph) => self.listing(&model, &plan, graph)?,
            None => card(&model, &plan),
        })
    }

    /// CLIP by itself has no sessions: its card, its tensors, or a tower.
    fn clip(&self, clip: &mut Clip) -> Result<()> {
        super::print(&match self.graph {
            _ if self.tensors => tensor_list(clip.weights()),
            Some(graph) => clip_listing(clip, graph)?,
            None => clip_card(clip),
        })
    }

    /// The nodes of a graph under the row counts of a typical step.
    fn listing(&self, model: &Model, plan: &SessionPlan, graph: GraphName) -> Result<String> {
        let max = plan.language.max;
        match graph {
            GraphName::Vision => {
                let (Some(vision), Some(plan)) = (model.vision(), &plan.vision) else {
                    return Err(Error::option(
                        "--graph",
                        "prefill or decode, as this is a text model",
                        "vision",
                    ));
                };
                // Without tiles one picture; with them the largest picture, so far as its squares go together.
                Ok(nodes(&vision.graph, plan, &plan.max, KvExtent::default()))
            }
            GraphName::Text => {
                Err(Error::option("--graph", "vision, prefill or decode, as this is no CLIP", "text"))
            }
            GraphName::Prefill | GraphName::Decode => {
                let (chunk, context) = (max.tokens, max.context);
                let (past, tokens) = match graph {
                    GraphName::Prefill => (0, self.tokens.unwrap_or(chunk)),
                    _ => (self.tokens.unwrap_or(context - 1), 1),
                };
                if tokens == 0 || tokens > chunk || past >= context {
                    let expected =
                        format!("1 to {chunk} rows of a prefill, or less than {context} positions");
                    return Err(Error::option("--tokens", expected, self.tokens.unwrap_or(tokens)));
                }
                let entries = (past + tokens).div_ceil(crate::op::PAGE);
                let bindings = Bindings { tokens, outputs: 1, images: 0, table_entries: entries, ..max };
                Ok(nodes(model.language(), &plan.language, &bindings, KvExtent::of(past, tokens)))
            }
        }
    }
}

/// The nodes of a tower of a CLIP, for one picture or the longest text.
fn clip_listing(clip: &mut Clip, graph: GraphName) -> Result<String> {
    let tower = match graph {
        GraphName::Vision => clip.vision_tower()?,
        GraphName::Text => clip.text_tower(usize::MAX)?,
        GraphName::Prefill | GraphName::Decode => {
            let found = if graph == GraphName::Prefill { "prefill" } else { "decode" };
            return Err(Error::option("--graph", "vision or text, as this is a CLIP", found));
        }
    };
    Ok(nodes(tower.graph(), tower.plan(), &tower.plan().max, KvExtent::default()))
}

/// One line a node.
fn nodes(graph: &Graph, plan: &Plan, bindings: &Bindings, kv: KvExtent) -> String {
    let mut text = format!(
        "{:<34} {:<14} {:<24} {:<16} {:>10} {:>12} {:>12}\n",
        "node", "op", "operands", "result", "MFLOP", "bytes", "arena offset"
    );
    let mut total = Cost::default();
    for node in &graph.nodes {
        let shapes = graph.shapes(node, bindings);
        let cost = node.op.cost(&shapes.ins, &graph.weight_types(node), &shapes.outs, kv);
        total += cost;
        let show = |views: &[View]| {
            let shapes: Vec<_> = views.iter().map(|v| format!("{}x{}", v.rows, v.cols)).collect();
            shapes.join(" ")
        };
        // Of the operands only the first says how much work there is; the others are listed by --graph's
        // readers in the model's source.
        let offset = node.outs.first().and_then(|out| plan.offset(*out));
        text += &format!(
            "{:<34} {:<14} {:<24} {:<16} {:>10.2} {:>12} {:>12}\n",
            node.name,
            node.op.name(),
            show(&shapes.ins[..1.min(shapes.ins.len())]),
            show(&shapes.outs),
            cost.flops as f64 / 1e6,
            cost.bytes,
            offset.map_or("-".into(), |offset| offset.to_string()),
        );
    }
    text += &format!(
        "{} nodes, {:.3} GFLOP, {} moved; arena {} ({} of workspace at offset {})\n",
        graph.nodes.len(),
        total.flops as f64 / 1e9,
        format_size(total.bytes),
        format_size(plan.bytes as u64),
        format_size((plan.bytes - plan.workspace) as u64),
        plan.workspace,
    );
    text
}

/// The model card.
fn card(model: &Model, session: &SessionPlan) -> String {
    let (config, plan) = (model.config(), &session.memory);
    let mut lines: Vec<(&str, String)> = vec![
        ("model", model.name().into()),
        ("family", config.family.to_string()),
        ("layout", model.weights().layout().to_string()),
    ];
    lines.extend(vision_lines(model, config));
    let t = &config.text;
    let bias = match (t.attention_bias, t.mlp_bias) {
        (false, false) => "",
        (true, false) => ", attention biases",
        (false, true) => ", MLP biases",
        (true, true) => ", biases",
    };
    lines.push((
        "language model",
        format!(
            "LLaMA, {} layers, width {}, {} heads and {} KV heads of {}, MLP {}, vocabulary {}{}{bias}",
            t.num_layers,
            t.hidden_size,
            t.num_heads,
            t.num_kv_heads,
            t.head_dim,
            t.intermediate_size,
            t.vocab_size,
            if t.tie_word_embeddings && !model.weights().contains("lm.head.weight") { " (tied)" } else { "" },
        ),
    ));
    let window = if t.sliding_window.is_some() { " (the sliding window)" } else { "" };
    lines.push(("positions", format!("{}{window}, {}", t.max_positions, t.rope)));
    lines.push(("end of text", format!("{:?}", model.eos_token_ids())));
    lines.push(("chat template", model.prompter().template().name().into()));
    lines.extend(adapter_lines(model.weights()));
    lines.push(("device", model.backend().describe()));
    let on_cpu = model.backend().dtype() == DType::F32;
    lines.push((
        "memory plan",
        format!(
            "weights {} ({}) + KV cache {} ({} pages of {} positions, context {}) + activations {}{} = {}{}",
            format_size(plan.weights),
            if on_cpu { "as stored" } else { model.backend().dtype().name() },
            format_size(plan.kv),
            plan.pages,
            crate::op::PAGE,
            plan.context,
            format_size(plan.arena),
            squares_plan(model, session),
            format_size(plan.total()),
            match plan.pinned {
                0 => String::new(),
                pinned => format!(", and {} of this machine's memory for copies", format_size(pinned)),
            },
        ),
    ));
    lines.push(room(model, plan));
    lines.push((
        "row results",
        match on_cpu {
            true => "the same bits in any batch, chunk, page layout and thread count, on every instruction set",
            false => "the same bits in any batch, chunk and page layout; they differ between given and chosen tokens",
        }
        .into(),
    ));
    show(&lines, model.weights())
}

/// Whether there is room for a session: on a device for all but the weights, which are there already.
fn room(model: &Model, plan: &MemoryPlan) -> (&'static str, String) {
    let (whose, available, needs) = match model.backend().available() {
        Ok(Some(free)) => ("device memory", free, MemoryPlan { weights: 0, ..*plan }),
        Ok(None) | Err(_) => ("machine", usable_memory(), *plan),
    };
    let fits = if needs.check(available).is_ok() { "enough" } else { "too small: `run` will refuse" };
    let free = if whose == "machine" { "of memory" } else { "free beside the weights" };
    (whose, format!("{} {free}, {fits}", format_size(available)))
}

/// The card of a CLIP by itself.
fn clip_card(clip: &Clip) -> String {
    let (config, weights) = (clip.config(), clip.weights());
    let mut lines = vec![("model", clip.name().to_string()), ("layout", weights.layout().to_string())];
    if let Some(v) = &config.vision {
        lines.push(("vision tower", tower_line(v, "", v.num_layers)));
    }
    if let Some(t) = &config.text {
        let pooling = match t.pooling {
            Pooling::LargestId => "the largest id (eos_token_id is 2)".into(),
            Pooling::First(id) => format!("the first {id}"),
        };
        lines.push((
            "text tower",
            format!(
                "{} blocks, width {}, {} heads of {}, MLP {}, vocabulary {}, {} positions, pooled at {pooling}",
                t.num_layers,
                t.hidden_size,
                t.num_heads,
                t.hidden_size / t.num_heads,
                t.intermediate_size,
                t.vocab_size,
                t.max_positions,
            ),
        ));
    }
    lines.push(("shared space", format!("{} columns", config.projection_dim)));
    lines.extend(adapter_lines(weights));
    lines.push(("device", clip.backend().describe()));
    show(&lines, weights)
}

/// Key and value a line, and the table of tensors.
fn show(lines: &[(&str, String)], weights: &Weights) -> String {
    let text: String = lines.iter().map(|(key, value)| format!("{key:<15} {value}\n")).collect();
    text + &tensor_table(weights)
}

/// One line for each adapter: ranks, scales, and what it is added to.
fn adapter_lines(weights: &Weights) -> Vec<(&'static str, String)> {
    let layout = weights.layout();
    weights.adapters().iter().map(|adapter| ("adapter", adapter_line(adapter, layout))).collect()
}

fn adapter_line(adapter: &Adapter, layout: Layout) -> String {
    let part = |name: &str| {
        let spelt = layout.spell(name);
        let module = spelt.rsplit('.').nth(1).unwrap_or(&spelt).to_string();
        if name.starts_with("vision.") { format!("vision {module}") } else { module }
    };
    let (mut ranks, mut scales) = (BTreeSet::new(), BTreeSet::new());
    let mut targets: BTreeMap<String, usize> = BTreeMap::new();
    for (name, pair) in adapter.pairs() {
        ranks.insert(pair.a.rows);
        scales.insert(pair.scale.to_string());
        *targets.entry(part(name)).or_default() += 1;
    }
    let join = |items: Vec<String>| items.join(", ");
    let mut line = adapter.dir().display().to_string();
    if !targets.is_empty() {
        let kind = if adapter.config().rank_stabilised { "rsLoRA" } else { "LoRA" };
        let ranks = join(ranks.iter().map(usize::to_string).collect());
        let scales = join(scales.into_iter().collect());
        let targets = join(targets.iter().map(|(part, count)| format!("{part} x{count}")).collect());
        line += &format!(": {kind}, rank {ranks}, scale {scales}, on {targets}");
    }
    let replaced: Vec<_> = adapter.replacements().map(|name| layout.spell(name)).collect();
    if !replaced.is_empty() {
        line += &format!("; replaces {}", join(replaced));
    }
    line
}

/// What tiles cost, for the picture that has most of them.
fn squares_plan(model: &Model, session: &SessionPlan) -> String {
    let (Some(tiling), Some(vision)) = (&model.config().tiling, &session.vision) else {
        return String::new();
    };
    let plan = &session.memory;
    format!(
        " (vision {} of them, for {} of {} squares at a time) + projected squares {}",
        format_size(plan.vision_arena),
        vision.max.images,
        tiling.max_squares(),
        format_size(plan.squares),
    )
}

fn vision_lines(model: &Model, config: &ModelConfig) -> Vec<(&'static str, String)> {
    let (Some(v), Some(p)) = (&config.vision, &config.projector) else { return Vec::new() };
    let layers: Vec<_> = config.feature_layers.iter().map(usize::to_string).collect();
    let blocks = config.feature_layers.iter().max().copied().unwrap_or(0);
    let rows = match config.select {
        SelectStrategy::Default => "class row dropped",
        SelectStrategy::Full => "class row kept",
    };
    let mode = match (&config.tiling, model.preprocess().map(|processor| processor.mode)) {
        (Some(tiling), _) => tiling_line(tiling),
        (None, Ok(ImageMode::Crop)) => "crop: the shorter side is resized, the longer one cut".into(),
        (None, Ok(ImageMode::Pad)) => "pad: put on a square of the mean colour".into(),
        (None, Err(_)) => "none".into(),
    };
    let tokens = match &config.tiling {
        Some(tiling) => {
            format!("{} tokens a square, {} a picture at most", config.square_rows(), tiling.max_tokens())
        }
        None => format!("{} tokens a picture", config.square_rows()),
    };
    let apart = match model.tower_folder() {
        Some(folder) => format!(" of {}", folder.path("").display()),
        None => " inside the checkpoint".into(),
    };
    let mut lines = vec![
        ("vision tower", tower_line(v, &apart, blocks)),
        ("image features", format!("hidden state {}, {rows}: {tokens}", layers.join(" and "))),
        ("projector", projector_line(p)),
        ("image mode", mode),
    ];
    let rules = model.rules().lines(config.tiling.as_ref());
    lines.extend(rules.into_iter().map(|(rule, text)| (rule, text.into())));
    lines
}

/// The canvases of a LLaVA-NeXT, and what becomes of their rows.
fn tiling_line(tiling: &Tiling) -> String {
    let sizes: Vec<_> = tiling.resolutions().iter().map(|(w, h)| format!("{w}x{h}")).collect();
    let merge = match tiling.merge() {
        Merge::Flat => "square after square",
        Merge::Spatial => "line by line",
        Merge::SpatialUnpad { .. } => "line by line without the margin, a newline behind each",
    };
    format!("anyres: the whole, and tiles of {} (width x height); rows {merge}", sizes.join(", "))
}

/// The widths between linear layers.
fn projector_line(projector: &ProjectorConfig) -> String {
    let widths: Vec<_> = projector.inputs().chain([projector.hidden_size]).map(|n| n.to_string()).collect();
    match projector.layers {
        0 => "none (identity)".into(),
        1 => format!("{}, linear", widths.join(" -> ")),
        _ => format!("{}, exact GELU", widths.join(" -> ")),
    }
}

fn tower_line(v: &VisionConfig, apart: &str, blocks: usize) -> String {
    format!(
        "CLIP{apart}, {} of {} blocks run, width {}, {} heads of {}, MLP {}, {}x{} pixels in patches of {}",
        blocks,
        v.num_layers,
        v.hidden_size,
        v.num_heads,
        v.head_dim,
        v.intermediate_size,
        v.image_size,
        v.image_size,
        v.patch_size,
    )
}

/// Tensors with the layer number left out: one line for all layers.
fn tensor_table(weights: &Weights) -> String {
    let mut groups: BTreeMap<String, (usize, &TensorInfo, u64)> = BTreeMap::new();
    for tensor in weights.tensors() {
        let name: Vec<_> = tensor
            .name
            .split('.')
            .map(|part| if part.bytes().all(|b| b.is_ascii_digit()) { "N" } else { part })
            .collect();
        let key = format!("{} {} {:?}", name.join("."), tensor.dtype, tensor.shape);
        let group = groups.entry(key).or_insert((0, tensor, 0));
        group.0 += 1;
        group.2 += tensor.bytes as u64;
    }
    let mut text = format!(
        "\n{} tensors, {}\n{:<66} {:<6} {:<18} {:>5} {:>12}\n",
        weights.tensors().len(),
        format_size(weights.bytes()),
        "tensor",
        "dtype",
        "shape",
        "count",
        "bytes"
    );
    for (key, (count, tensor, bytes)) in groups {
        let name = key.split(' ').next().unwrap_or(&key);
        let shape = format!("{:?}", tensor.shape);
        text += &format!("{name:<66} {:<6} {shape:<18} {count:>5} {bytes:>12}\n", tensor.dtype);
    }
    text
}

fn tensor_list(weights: &Weights) -> String {
    let line = |t: &TensorInfo| {
        let file = weights.file(t.file).display();
        format!("{} {} {:?} {} bytes at {} of {file}\n", t.name, t.dtype, t.shape, t.bytes, t.offset)
    };
    weights.tensors().iter().map(line).collect()
}
