//! The op case table: one row a shape, for tests and benches alike. A shape that was ever slow or wrong
//! gets a line here.
//!
//! A case is an op with operand types and dtypes; its data come from a seed. [`Case::run`] runs it on any
//! backend through a graph of one node, with guards around every buffer.
//!
//! The table speaks of f32. A device of another dtype gets activations of that dtype: the data are rounded to
//! it when they are made, so that an oracle in f64 sees what the device sees, and results are widened again.

pub mod bounds;
#[allow(dead_code, reason = "each test program uses a part")]
mod pairs;
#[allow(dead_code, reason = "each test program uses a part")]
pub mod sampling;
#[allow(dead_code, reason = "each test program uses a part")]
pub mod sequences;
mod table;

#[allow(unused_imports, reason = "each test program uses a part")]
pub use pairs::pairs;
#[allow(unused_imports, reason = "each test program uses a part")]
pub use table::{all, attention, edges, gated, linear, paged_attention, patch_embed};

use std::sync::Arc;
use tessera::backend::{Backend, Buffer};
use tessera::graph::{Control, Executor, Graph, GraphBuilder, Plan, Source, ValueId};
use tessera::op::{Cost, KvExtent, Op, PAGE, SAMPLE_PARAMS, SampleParams, Select};
use tessera::tensor::{Bindings, DType, Rows, Storage, TensorType, Weight, WeightBytes};

/// An op on given shapes.
#[derive(Clone, Debug)]
pub struct Case {
    /// The op.
    pub op: Op,
    /// Operand types on the CPU; symbolic rows are bound by `bindings`.
    pub ins: Vec<TensorType>,
    /// Shapes of the weights.
    pub weights: Vec<[usize; 2]>,
    /// How the weights are stored.
    pub dtype: DType,
    /// Row counts.
    pub bindings: Bindings,
    /// Positions that are cached before the first token row (paged ops).
    pub past: usize,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rows = self.ins[0].rows.bind(&self.bindings);
        write!(f, "{:?} {rows}x{}", self.op, self.ins[0].cols)?;
        for [n, k] in &self.weights {
            write!(f, " {n}x{k}")?;
        }
        write!(f, " {} past {} decode {}", self.dtype, self.past, self.bindings.decode)
    }
}

/// Numbers from a seed: splitmix64.
pub struct Random(pub u64);

impl Random {
    /// The next word.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    pub fn float(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.word() % n as u64) as usize
    }
}

/// The data of a case.
pub struct Data {
    /// One list of words for each operand; floats as their bits.
    pub ins: Vec<Vec<u32>>,
    /// The weights.
    pub weights: Vec<Weight>,
}

/// What a backend made of a case: the bits of each result, then of each operand that is a KV cache.
pub type Results = Vec<Vec<u32>>;

impl Case {
    /// Data from a seed, for a device of dtype `device`: activations and matrices hold only values of it.
    /// Weight bytes begin at an odd address, as nothing promises otherwise.
    pub fn data(&self, seed: u64, device: DType) -> Data {
        let mut random = Random(seed);
        let weights = (0..self.weights.len()).map(|i| self.weight(i, device, &mut random)).collect();
        let mut ins: Vec<Vec<u32>> = (0..self.ins.len())
            .map(|i| {
                let dtype = self.dtype_on(i, device);
                let len = self.ins[i].rows.bind(&self.bindings) * self.ins[i].cols;
                (0..len).map(|_| rounded(random.float(), dtype).to_bits()).collect()
            })
            .collect();
        self.fill_indices(&mut ins, &mut random);
        Data { ins, weights }
    }

    /// The dtype of operand `i` on a device: pixels, rotation tables and logits are f32 on every one.
    pub fn dtype_on(&self, i: usize, device: DType) -> DType {
        match (&self.op, i, self.ins[i].dtype) {
            (_, _, DType::I32) => DType::I32,
            (Op::PatchEmbed { .. } | Op::Sample, 0, _) | (Op::RopeAppend { .. }, 3, _) => DType::F32,
            _ => device,
        }
    }

    fn weight(&self, i: usize, device: DType, random: &mut Random) -> Weight {
        let [rows, cols] = self.weights[i];
        // Devices keep vectors, and the few rows of class and positions, in f32.
        let matrix = match self.op {
            Op::PatchEmbed { .. } => i == 0,
            Op::Linear { bias, ref pairs, .. } | Op::GatedLinear { bias, ref pairs } => {
                let (matrices, own) = Op::matrices(self.weights.len(), bias, pairs);
                i < matrices || i >= own
            }
            // Its table is gathered from, though it be a single newline.
            Op::EmbedRows => true,
            _ => rows > 1,
        };
        let values: Vec<f32> = (0..rows * cols)
            .map(|_| if matrix { rounded(random.float(), device) } else { random.float() })
            .collect();
        let len = values.len() * self.dtype.size();
        let mut bytes = vec![0u8; 1 + len];
        self.dtype.round_to(&values, &mut bytes[1..]);
        let storage = Arc::new(Storage::Owned(bytes.into_boxed_slice()));
        let bytes = WeightBytes::new(storage, 1, len).unwrap();
        Weight { name: format!("[{rows}, {cols}]"), dtype: self.dtype, rows, cols, bytes }
    }

    /// Index operands get indices that exist.
    fn fill_indices(&self, ins: &mut [Vec<u32>], random: &mut Random) {
        let tokens = self.bindings.tokens;
        let mut table: Vec<u32> = (0..self.bindings.pages as u32).collect();
        for i in (1..table.len()).rev() {
            table.swap(i, random.below(i + 1));
        }
        let positions: Vec<u32> = (0..tokens).map(|t| (self.past + t) as u32).collect();
        match self.op {
            Op::RopeAppend { .. } => {
                let slot = |&p: &u32| table[p as usize / PAGE] * PAGE as u32 + p % PAGE as u32;
                ins[2] = positions.iter().map(slot).collect();
                ins[1] = positions;
            }
            Op::PagedAttention { .. } => {
                ins[1] = positions;
                ins[2].fill(0);
                ins[3].copy_from_slice(&table[..self.bindings.table_entries]);
            }
            Op::EmbedTokens => {
                let vocab = self.weights[0][0];
                ins[0].iter_mut().for_each(|id| *id = random.below(vocab) as u32);
            }
            Op::EmbedRows => {
                let vocab = self.weights[0][0];
                ins[0].iter_mut().for_each(|id| *id = random.below(vocab) as u32);
                let image_rows = ins[2].len() / self.weights[0][1];
                for source in &mut ins[1] {
                    *source = if random.below(2) == 0 { u32::MAX } else { random.below(image_rows) as u32 };
                }
            }
            Op::SelectRows { select: Select::Index } => {
                ins[1].iter_mut().for_each(|row| *row = random.below(tokens) as u32);
            }
            Op::Sample => {
                for words in ins[1].chunks_exact_mut(SAMPLE_PARAMS) {
                    let params = SampleParams {
                        temperature: 0.0,
                        top_k: 0,
                        top_p: 1.0,
                        min_p: 0.0,
                        repetition_penalty: 1.3,
                        seed_low: 1,
                        seed_high: 2,
                        position: 3,
                    };
                    words.copy_from_slice(bytemuck::cast_slice(&[params]));
                }
            }
            _ => {}
        }
    }

    /// Runs the case.
    pub fn run(&self, backend: Arc<dyn Backend>, data: &Data) -> Results {
        let mut prepared = self.prepare(backend, data);
        prepared.run();
        prepared.results()
    }

    /// Puts the case on a backend, ready to run any number of times.
    pub fn prepare(&self, backend: Arc<dyn Backend>, data: &Data) -> Prepared {
        let device = backend.dtype();
        let mut b = GraphBuilder::new(&*backend);
        let mut states = Vec::new();
        let ins: Vec<_> = (0..self.ins.len())
            .map(|i| {
                let ty = TensorType { dtype: self.dtype_on(i, device), ..self.ins[i] };
                if !matches!(ty.rows, Rows::Pages | Rows::Context) {
                    return b.input("in", ty);
                }
                let bytes = encode(&self.pages_on(i, device, &data.ins[i]), ty.dtype);
                let buffer = backend.alloc("state", bytes.len()).unwrap();
                // SAFETY: the buffer was just allocated with this size.
                unsafe { backend.upload(buffer.addr, &bytes).unwrap() };
                states.push((i, ty.dtype, buffer));
                b.state("state".into(), ty)
            })
            .collect();
        let outs = b.push_all("op", self.op.clone(), &ins, &data.weights).unwrap();
        outs.iter().for_each(|out| b.keep(*out));
        let graph = Arc::new(b.finish());
        let plan = spread(Plan::new(&graph, &*backend, self.bindings), &graph, &self.bindings);
        let arena = Arc::new(backend.alloc("arena", plan.bytes).unwrap());
        // What an op does not write, and what it reads before it writes, shows.
        // SAFETY: the arena was just allocated with this size.
        unsafe { backend.upload(arena.addr, &poison(plan.bytes)).unwrap() };
        let addrs: Vec<_> = states.iter().map(|(_, _, buffer)| buffer.addr).collect();
        let mut executor = Executor::new(graph.clone(), backend.clone(), plan, arena.clone(), &addrs);
        for (&value, words) in ins.iter().zip(&data.ins) {
            if graph.value(value).source == Source::Input {
                executor.write(value, &encode(words, graph.ty(value).dtype)).unwrap();
            }
        }
        Prepared { case: self.clone(), executor, outs, states, arena, backend }
    }

    /// Operand `i` as the device lays it out. On the CPU a page of keys is `[kv head][E][PAGE]`, on a
    /// device of 16 bits `[kv head][PAGE][E]`; the table speaks of the former.
    fn pages_on(&self, i: usize, device: DType, words: &[u32]) -> Vec<u32> {
        self.transposed(i, device, words, |e| (e, PAGE))
    }

    /// The inverse of [`pages_on`](Case::pages_on).
    fn pages_from(&self, i: usize, device: DType, words: &[u32]) -> Vec<u32> {
        self.transposed(i, device, words, |e| (PAGE, e))
    }

    fn transposed(
        &self,
        i: usize,
        device: DType,
        words: &[u32],
        shape: impl Fn(usize) -> (usize, usize),
    ) -> Vec<u32> {
        let head_dim = match self.op {
            Op::RopeAppend { head_dim, .. } | Op::PagedAttention { head_dim, .. } => head_dim,
            _ => return words.to_vec(),
        };
        if i != 4 || device == DType::F32 {
            return words.to_vec();
        }
        let (rows, cols) = shape(head_dim);
        let heads = words.chunks_exact(rows * cols);
        heads
            .flat_map(|head| (0..cols).flat_map(move |c| (0..rows).map(move |r| head[r * cols + c])))
            .collect()
    }
}

/// Bytes between two blocks of an arena that nobody may touch.
const GUARD: usize = 256;

/// The plan with a guard after every block, the workspace included.
fn spread(plan: Plan, graph: &Graph, bindings: &Bindings) -> Plan {
    let workspace = plan.bytes - plan.workspace;
    let mut end = 0;
    let offsets = (plan.offsets.iter().enumerate())
        .map(|(i, offset)| {
            offset.map(|_| {
                let at = end;
                end = (at + graph.values[i].ty.bytes(bindings) + GUARD).next_multiple_of(256);
                at
            })
        })
        .collect();
    Plan { offsets, indices: 0, workspace: end, bytes: end + workspace + GUARD, ..plan }
}

/// Bytes of NaN, in f32 as in f16 and bf16.
fn poison(bytes: usize) -> Vec<u8> {
    vec![0xff; bytes]
}

/// Floats, or indices, given as words, as elements of `dtype`.
fn encode(words: &[u32], dtype: DType) -> Vec<u8> {
    if dtype == DType::I32 {
        return bytemuck::cast_slice(words).to_vec();
    }
    let mut bytes = vec![0; words.len() * dtype.size()];
    dtype.round_to(&words.iter().map(|bits| f32::from_bits(*bits)).collect::<Vec<_>>(), &mut bytes);
    bytes
}

/// The inverse of [`encode`].
fn decode(bytes: &[u8], dtype: DType) -> Vec<u32> {
    match dtype {
        DType::I32 => bytemuck::pod_collect_to_vec(bytes),
        _ => dtype.widen(bytes).into_iter().map(f32::to_bits).collect(),
    }
}

fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 | DType::I32 => x,
        DType::F16 => half::f16::from_f32(x).to_f32(),
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// A case on a backend.
pub struct Prepared {
    case: Case,
    executor: Executor,
    outs: Vec<ValueId>,
    /// Which operands are states, with their dtypes on the device.
    states: Vec<(usize, DType, Buffer)>,
    arena: Arc<Buffer>,
    backend: Arc<dyn Backend>,
}

impl Prepared {
    /// What one run does.
    #[allow(dead_code, reason = "each program uses a part")]
    pub fn cost(&self) -> Cost {
        let kv = KvExtent::of(self.case.past, self.case.bindings.tokens);
        self.executor.graph().cost(0..1, &self.case.bindings, kv)
    }

    /// Runs it once.
    pub fn run(&mut self) {
        // SAFETY: `fill_indices` named rows that exist; the states live in `states`, which is ours.
        unsafe {
            self.executor
                .run(&self.case.bindings, &Control::default())
                .unwrap_or_else(|e| panic!("{}: {e}", self.case))
        };
    }

    /// The results, and the KV caches as they are now. Checks that no guard was touched.
    pub fn results(&self) -> Results {
        self.check_guards();
        let mut results: Results = self
            .outs
            .iter()
            .map(|&out| {
                let view = self.executor.view(out, &self.case.bindings);
                let mut bytes = vec![0u8; view.bytes()];
                self.executor.read(out, &self.case.bindings, &mut bytes).unwrap();
                decode(&bytes, view.dtype)
            })
            .collect();
        for (i, dtype, buffer) in &self.states {
            let words = decode(&self.download(buffer, 0..buffer.bytes), *dtype);
            results.push(self.case.pages_from(*i, self.backend.dtype(), &words));
        }
        results
    }

    fn check_guards(&self) {
        // Only the guards: in between there may be what nothing has written.
        let intact = |at| self.download(&self.arena, at..at + GUARD).iter().all(|byte| *byte == 0xff);
        let plan = self.executor.plan();
        let graph = self.executor.graph();
        for (value, offset) in graph.values.iter().zip(&plan.offsets) {
            let Some(offset) = offset else { continue };
            let end = offset + value.ty.bytes(&self.case.bindings);
            assert!(intact(end), "{}: behind `{}` something was written", self.case, value.name);
        }
        assert!(intact(plan.bytes - GUARD), "{}: behind the workspace something was written", self.case);
    }

    fn download(&self, buffer: &Buffer, range: std::ops::Range<usize>) -> Vec<u8> {
        let mut bytes = vec![0u8; range.len()];
        assert!(range.end <= buffer.bytes);
        // SAFETY: a part of a buffer of ours (asserted); nothing runs.
        unsafe { self.backend.download(buffer.addr + range.start, &mut bytes).unwrap() };
        bytes
    }
}
