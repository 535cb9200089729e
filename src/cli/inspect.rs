//! `tessera inspect`: what a checkpoint is, and what running it would do.

use super::options::{ModelArgs, SessionArgs, format_size};
use crate::error::{Error, Result};
use crate::graph::Executor;
use crate::input::image::ImageMode;
use crate::model::config::{ModelConfig, SelectStrategy};
use crate::model::weights::{TensorInfo, Weights};
use crate::op::{Cost, KvExtent};
use crate::runtime::{Model, Session};
use crate::tensor::{Bindings, DType, View};
use clap::{Args, ValueEnum};
use std::collections::BTreeMap;
use std::sync::Arc;

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
    /// One picture: tower and projector.
    Vision,
    /// The language model over a prompt.
    Prefill,
    /// The language model over one token.
    Decode,
}

impl Inspect {
    pub fn run(self) -> Result<()> {
        let (source, load) = self.model.load_options()?;
        let model = Arc::new(Model::load(&source, &load)?);
        if self.tensors {
            return super::print(&tensor_list(model.weights()));
        }
        let session = Session::new(model, self.session.session_options())?;
        super::print(&match self.graph {
            Some(graph) => self.listing(&session, graph)?,
            None => card(&session),
        })
    }

    /// The nodes of a graph under the row counts of a typical step.
    fn listing(&self, session: &Session, graph: GraphName) -> Result<String> {
        let (executor, bindings, kv) = match graph {
            GraphName::Vision => {
                let vision = session.vision().ok_or_else(|| {
                    Error::option("--graph", "prefill or decode, as this is a text model", "vision")
                })?;
                (vision, Bindings { images: 1, ..Bindings::default() }, KvExtent::default())
            }
            GraphName::Prefill | GraphName::Decode => {
                let (past, tokens) = match graph {
                    GraphName::Prefill => (0, self.tokens.unwrap_or(session.prefill_chunk())),
                    _ => (self.tokens.unwrap_or(session.context() - 1), 1),
                };
                let (chunk, context) = (session.prefill_chunk(), session.context());
                if tokens == 0 || tokens > chunk || past >= context {
                    let expected =
                        format!("1 to {chunk} rows of a prefill, or less than {context} positions");
                    return Err(Error::option("--tokens", expected, self.tokens.unwrap_or(tokens)));
                }
                let max = session.language().plan().max;
                let entries = (past + tokens).div_ceil(crate::op::PAGE);
                let bindings = Bindings { tokens, outputs: 1, images: 0, table_entries: entries, ..max };
                (session.language(), bindings, KvExtent::of(past, tokens))
            }
        };
        Ok(nodes(executor, &bindings, kv))
    }
}

/// One line a node.
fn nodes(executor: &Executor, bindings: &Bindings, kv: KvExtent) -> String {
    let (graph, plan) = (executor.graph(), executor.plan());
    let mut text = format!(
        "{:<34} {:<14} {:<24} {:<16} {:>10} {:>12} {:>12}\n",
        "node", "op", "operands", "result", "MFLOP", "bytes", "arena offset"
    );
    let mut total = Cost::default();
    for node in &graph.nodes {
        let shapes = graph.shapes(node, bindings);
        let cost = node.op.cost(&shapes.ins, &graph.weight_types(node), &shapes.outs, kv);
        total.flops += cost.flops;
        total.bytes += cost.bytes;
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
fn card(session: &Session) -> String {
    let model = session.model();
    let config = model.config();
    let mut lines: Vec<(&str, String)> =
        vec![("model", model.name().into()), ("layout", model.weights().layout().to_string())];
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
            if t.tie_word_embeddings { " (tied)" } else { "" },
        ),
    ));
    lines.push(("positions", format!("{}, {}", t.max_positions, t.rope)));
    lines.push(("end of text", format!("{:?}", model.eos_token_ids())));
    lines.push(("chat template", model.prompter().template().name().into()));
    lines.push(("device", model.backend().describe()));
    let plan = session.memory();
    let on_cpu = model.backend().dtype() == DType::F32;
    lines.push((
        "memory plan",
        format!(
            "weights {} ({}) + KV cache {} ({} pages of {} positions, context {}) + activations {} = {}",
            format_size(plan.weights),
            if on_cpu { "as stored" } else { model.backend().dtype().name() },
            format_size(plan.kv),
            plan.pages,
            crate::op::PAGE,
            plan.context,
            format_size(plan.arena),
            format_size(plan.total()),
        ),
    ));
    lines.push((
        "row results",
        match on_cpu {
            true => "the same bits in any batch, chunk, page layout and thread count, on every instruction set",
            false => "the same bits in any batch, chunk and page layout; they differ between given and chosen tokens",
        }
        .into(),
    ));
    let mut text: String = lines.iter().map(|(key, value)| format!("{key:<15} {value}\n")).collect();
    text += &tensor_table(model.weights());
    text
}

fn vision_lines(model: &Model, config: &ModelConfig) -> Vec<(&'static str, String)> {
    let (Some(v), Some(p)) = (&config.vision, &config.projector) else { return Vec::new() };
    let layers: Vec<_> = config.feature_layers.iter().map(usize::to_string).collect();
    let blocks = config.feature_layers.iter().max().copied().unwrap_or(0);
    let rows = match config.select {
        SelectStrategy::Default => "class row dropped",
        SelectStrategy::Full => "class row kept",
    };
    let mode = model.preprocess().map(|processor| match processor.mode {
        ImageMode::Crop => "crop: the shorter side is resized, the longer one cut",
        ImageMode::Pad => "pad: put on a square of the mean colour",
    });
    vec![
        (
            "vision tower",
            format!(
                "CLIP, {} of {} blocks run, width {}, {} heads of {}, MLP {}, {}x{} pixels in patches of {}",
                blocks,
                v.num_layers,
                v.hidden_size,
                v.num_heads,
                v.head_dim,
                v.intermediate_size,
                v.image_size,
                v.image_size,
                v.patch_size,
            ),
        ),
        (
            "image features",
            format!(
                "hidden state {}, {rows}: {} tokens a picture",
                layers.join(" and "),
                config.image_tokens()
            ),
        ),
        ("projector", format!("{} -> {} -> {}, exact GELU", p.input_size, p.hidden_size, p.hidden_size)),
        ("image mode", mode.unwrap_or("none").into()),
        ("EXIF rotation", "applied, as by Hugging Face's loader".into()),
    ]
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
