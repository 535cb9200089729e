//! Whole models on CUDA devices, beside the processor: what 16 bits may cost and no more, the first node that
//! strays, the same bits in any company, and decode steps that are recorded and replayed.

#[allow(dead_code, reason = "each test program uses a part")]
mod data;
mod devices;

use data::Case;
use devices::watched::{Watched, change};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tessera::backend::cpu::CpuBackend;
use tessera::backend::{Backend, Buffer};
use tessera::graph::diff::{Stray, first_stray, sound};
use tessera::graph::{Control, Executor, Graph, Plan, ValueId};
use tessera::model::lora::Lora;
use tessera::op::PAGE;
use tessera::runtime::{Advance, Clip, Engine, Input, LoadOptions, Model, Phase, Pixels, Request, Sampling};
use tessera::runtime::{Sequence, Session, SessionOptions, Source, Want};
use tessera::tensor::{Bindings, DType};

/// Models small enough for the emulated device: every attention and every projector there is, tiles, adapters, f32, f16
/// and bf16.
const CASES: [&str; 15] = [
    "a_llava15_new_bf16",
    "b_llava15_old_f16_sharded",
    "j_llama_chatml_f32",
    "features_concat_full",
    "text_mqa_bias_tied_llama3",
    "rope_linear_mixed_dtypes",
    "g_llava_next_bf16",
    "next_llama3",
    "e1_original_linear",
    "e3_original_inside",
    "e4_original_identity",
    "h_lora_on_a",
    "e2_original_marks",
    "e6_original_anyres",
    "lora_two",
];

fn load(backend: Arc<dyn Backend>, source: &Source) -> Arc<Model> {
    Arc::new(Model::load_on(backend, source, &LoadOptions::default()).unwrap())
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(None).unwrap())
}

fn session(model: &Arc<Model>) -> Session {
    let options = SessionOptions {
        context: Some(512.min(model.config().text.max_positions)),
        prefill_chunk: 256,
        max_sequences: 3,
        all_logits: true,
        ..SessionOptions::default()
    };
    Session::new(model.clone(), options).unwrap()
}

/// The logits from which each of `tokens` was, or would be, chosen: teacher-forced.
fn logits(engine: &mut Engine, request: &Request, tokens: &[u32]) -> Vec<Vec<f32>> {
    let prompt = engine.prompt(&request.input, &request.images).unwrap();
    let spans = prompt.images.iter().map(|s| s.start..s.start + s.len);
    let images = spans.zip(request.images.iter().map(|i| i.encoded.clone())).collect();
    let session = engine.session_mut();
    let mut sequence = session.sequence(&prompt.ids, images, Sampling::GREEDY).unwrap();
    let step = |sequence: &mut Sequence, session: &mut Session, phase| {
        let tokens = sequence.pending();
        let advance = Advance { sequence, tokens, want: Want::Next, phase };
        session.step(&mut [advance], &Control::default()).unwrap();
        let mut row = vec![0.0; session.model().config().text.vocab_size];
        session.logits(0, 0, &mut row).unwrap();
        row
    };
    let mut rows = vec![step(&mut sequence, session, Phase::Prefill)];
    for &token in &tokens[..tokens.len() - 1] {
        sequence.push(token);
        rows.push(step(&mut sequence, session, Phase::Decode));
    }
    rows
}

/// A question to a model, with the pictures it needs.
struct Question {
    source: Source,
    adapters: Vec<Lora>,
    prompt: Input,
    pictures: Vec<Vec<u8>>,
    tokens: usize,
}

impl Question {
    /// The tokens that the processor answers with.
    fn answer(&self, engine: &mut Engine) -> Vec<u32> {
        let request = self.request(engine);
        engine.generate(&request, |_| {}).unwrap().token_ids
    }

    fn request(&self, engine: &mut Engine) -> Request {
        let images = self.pictures.iter().map(|bytes| engine.image("a picture", bytes).unwrap()).collect();
        Request {
            images,
            max_tokens: Some(self.tokens),
            ignore_eos: true,
            ..Request::new(self.prompt.clone())
        }
    }

    fn engine(&self, backend: Arc<dyn Backend>) -> Engine {
        let options = LoadOptions { lora: self.adapters.clone(), ..LoadOptions::default() };
        Engine::new(session(&Arc::new(Model::load_on(backend, &self.source, &options).unwrap())))
    }

    fn logits(&self, backend: Arc<dyn Backend>, tokens: &[u32]) -> Vec<Vec<f32>> {
        let mut engine = self.engine(backend);
        let request = self.request(&mut engine);
        logits(&mut engine, &request, tokens)
    }

    /// Logits on a device differ from the processor's by no more than twice what 16 bits cost by themselves, and
    /// the same token is chosen wherever the processor's choice is clearer than that.
    fn check(&self, name: &str, backend: Arc<dyn Backend>) {
        let dtype = backend.dtype();
        let tokens = self.answer(&mut self.engine(cpu()));
        let exact = self.logits(cpu(), &tokens);
        let apart = |rows: &[Vec<f32>]| {
            let pairs = rows.iter().flatten().zip(exact.iter().flatten());
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |m: f32, d| if d.is_nan() { d } else { m.max(d) })
        };
        let cost = apart(&self.logits(Watched::rounding(dtype), &tokens));
        let ours = self.logits(backend, &tokens);
        let deviation = apart(&ours);
        println!("{name} in {dtype}: logits deviate by {deviation:.2e}, 16 bits alone cost {cost:.2e}");
        assert!(deviation <= 2.0 * cost, "{name} in {dtype}: {deviation:e} > 2 x {cost:e}");
        for (ours, exact) in ours.iter().zip(&exact) {
            let best = argmax(exact);
            let second = exact.iter().enumerate().filter(|(i, _)| *i != best).map(|(_, x)| *x);
            let gap = exact[best] - second.fold(f32::NEG_INFINITY, f32::max);
            assert!(gap <= 2.0 * cost || argmax(ours) == best, "{name} in {dtype}: another token, gap {gap}");
        }
    }
}

fn argmax(row: &[f32]) -> usize {
    let first = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).fold(0, first)
}

fn fixture(name: &str) -> Question {
    let case = Case::load(name);
    let request = &case.requests()[0];
    Question {
        source: Source::Directory(case.model()),
        adapters: case.lora(),
        prompt: Input::Raw(request.prompt.clone()),
        pictures: request.images.iter().map(|image| case.image(image)).collect(),
        tokens: request.max_new_tokens.min(12),
    }
}

#[test]
fn fixtures_lose_no_more_than_16_bits_cost() {
    for tested in devices::drivers() {
        for (i, name) in CASES.iter().enumerate() {
            let dtype = [DType::BF16, DType::F16][i % 2];
            fixture(name).check(name, Arc::new(tested.backend(dtype)));
        }
    }
}

/// CLIP's towers by themselves, both ways of pooling a text: unit vectors of a picture and of a text.
#[test]
fn clip_loses_no_more_than_16_bits_cost() {
    for (name, picture) in [("f_clip_zeroshot", "cat.png"), ("clip_first_end", "fox.png")] {
        let folder = std::path::Path::new("tests/data").join(name);
        let bytes = std::fs::read(folder.join("images").join(picture)).unwrap();
        let source = Source::Directory(folder.join("model"));
        let vectors = |backend: Arc<dyn Backend>| {
            let mut clip = Clip::load_on(backend, &source, &LoadOptions::default()).unwrap();
            [clip.image(picture, &bytes).unwrap().unit, clip.text("a photo of a cat").unwrap().unit].concat()
        };
        let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let exact = vectors(cpu());
        for tested in devices::drivers() {
            for dtype in [DType::BF16, DType::F16] {
                let cost = apart(&vectors(Watched::rounding(dtype)), &exact);
                let ours = vectors(Arc::new(tested.backend(dtype)));
                let deviation = apart(&ours, &exact);
                println!(
                    "{name} in {dtype}: vectors deviate by {deviation:.2e}, 16 bits alone cost {cost:.2e}"
                );
                assert!(ours.iter().all(|x| x.is_finite()), "{name} in {dtype}");
                assert!(deviation <= 2.0 * cost, "{name} in {dtype}: {deviation:e} > 2 x {cost:e}");
            }
        }
    }
}

#[test]
fn the_demo_loses_no_more_than_16_bits_cost() {
    let picture = std::fs::read("assets/samples/scene1.png").unwrap();
    let question = Question {
        source: Source::Demo,
        adapters: Vec::new(),
        prompt: Input::Raw("USER: <image>\nWhere is the circle? ASSISTANT:".into()),
        pictures: vec![picture],
        tokens: 8,
    };
    for tested in devices::drivers() {
        question.check("demo", Arc::new(tested.backend(DType::BF16)));
    }
}

/// The vision graph of a fixture on a device and on the processor, from the same pixels.
fn vision_stray(backend: Arc<dyn Backend>) -> Option<Stray> {
    let bound = sound(backend.dtype());
    let models = [backend, cpu()].map(|backend| load(backend, &fixture(CASES[0]).source));
    let bindings = Bindings { images: 1, ..Bindings::default() };
    let mut pair = models.map(|model| {
        let part = model.vision().unwrap().clone();
        let mut executor = executor(model.backend(), &part.graph, bindings, &[]);
        let pixels = executor.view(part.pixels, &bindings).len();
        let pixels: Vec<f32> = (0..pixels).map(|i| ((i * 7919) % 1013) as f32 / 500.0 - 1.0).collect();
        executor.write(part.pixels, &pixels).unwrap();
        executor
    });
    let [ours, reference] = &mut pair;
    // SAFETY: the graph has no index inputs and no states; both arenas are ours.
    unsafe { first_stray(ours, reference, &bindings, |_| bound).unwrap() }
}

fn executor(backend: &Arc<dyn Backend>, graph: &Arc<Graph>, max: Bindings, states: &[usize]) -> Executor {
    let plan = Plan::new(graph, &**backend, max);
    let arena = Arc::new(backend.alloc("arena", plan.bytes).unwrap());
    Executor::new(graph.clone(), backend.clone(), plan, arena, states)
}

#[cfg_attr(not(feature = "emu"), allow(dead_code, reason = "a test on the emulated device frees a state"))]
/// The language graph of a model with memory of its own, ready for a step of `tokens` rows from position 0.
struct Language {
    executor: Executor,
    bindings: Bindings,
    /// The rotation table, then the pages of every layer.
    states: Vec<Buffer>,
}

impl Language {
    fn new(model: &Model, tokens: usize, decode: bool) -> Language {
        let (backend, config) = (model.backend(), &model.config().text);
        let pages = tokens.div_ceil(PAGE);
        let (decode, decode_outputs) = if decode { (tokens, 1) } else { (0, 0) };
        let (outputs, images, table_entries, context) = (1, 0, pages, tokens);
        let bindings =
            Bindings { tokens, decode, outputs, decode_outputs, images, table_entries, pages, context };

        let angles = tokens * config.head_dim;
        let half = pages * config.num_kv_heads * config.head_dim * PAGE * backend.dtype().size();
        let mut states = vec![backend.alloc("rope", angles * 4).unwrap()];
        states.extend((0..2 * config.num_layers).map(|_| backend.alloc("pages", half).unwrap()));
        // Any rotation does for a comparison.
        let table: Vec<f32> = (0..angles).map(|i| if i % 2 == 0 { 0.6 } else { 0.8 }).collect();
        // SAFETY: the whole of a buffer that was just allocated.
        unsafe { backend.upload(states[0].addr, bytemuck::cast_slice(&table)).unwrap() };

        let addrs: Vec<_> = states.iter().map(|buffer| buffer.addr).collect();
        let mut executor = executor(backend, model.language(), bindings, &addrs);
        let ends = model.llama();
        let mut write = |value: ValueId, data: Vec<i32>| executor.write(value, &data).unwrap();
        let rows = |n: usize| (0..n as i32).collect::<Vec<_>>();
        write(ends.ids, rows(tokens).iter().map(|i| i * 31 % config.vocab_size as i32).collect());
        write(ends.sources, vec![-1; tokens]);
        write(ends.positions, rows(tokens));
        write(ends.slots, rows(tokens));
        write(ends.table_starts, vec![0; tokens]);
        write(ends.tables, rows(pages));
        write(ends.select, vec![tokens as i32 - 1]);
        write(ends.params, bytemuck::cast_slice(&[Sampling::GREEDY.params(tokens)]).to_vec());
        write(ends.seen, vec![0; config.vocab_size.div_ceil(32)]);
        Language { executor, bindings, states }
    }

    #[cfg(feature = "emu")]
    fn run(&mut self) -> tessera::Result<()> {
        // SAFETY: every index input was written by `new` with rows, slots and pages that exist. (One test frees
        // a state, on a device that notices.)
        unsafe { self.executor.run(&self.bindings, &Control::default()) }
    }
}

/// The language graph of a fixture on a device and on the processor, in one phase.
fn language_stray(backend: Arc<dyn Backend>, tokens: usize, decode: bool) -> Option<Stray> {
    let bound = sound(backend.dtype());
    let models = [backend, cpu()].map(|backend| load(backend, &fixture(CASES[0]).source));
    let [mut ours, mut reference] = models.map(|model| Language::new(&model, tokens, decode));
    let bindings = ours.bindings;
    // SAFETY: as for `Language::run`.
    unsafe { first_stray(&mut ours.executor, &mut reference.executor, &bindings, |_| bound).unwrap() }
}

#[test]
fn no_node_strays() {
    for tested in devices::drivers() {
        for dtype in [DType::BF16, DType::F16] {
            assert_eq!(vision_stray(Arc::new(tested.backend(dtype))), None);
            for decode in [false, true] {
                assert_eq!(language_stray(Arc::new(tested.backend(dtype)), 21, decode), None);
            }
        }
    }
}

/// A fault planted in one node is found there and nowhere else.
#[test]
fn a_planted_fault_is_named() {
    for tested in devices::drivers() {
        for fault in [3, 12] {
            let backend = Watched::new(
                Arc::new(tested.backend(DType::BF16)),
                Box::new(move |backend, op, call| {
                    if op == fault {
                        // One row in many is lost.
                        change(backend, &call.outs[0], |x| x[..call.outs[0].cols].fill(0.0));
                    }
                }),
            );
            let model = load(cpu(), &fixture(CASES[0]).source);
            let name = &model.vision().unwrap().graph.nodes[fault].name;
            assert_eq!(&vision_stray(backend).expect("a stray").node, name);
        }
    }
}

fn prompt(model: &Model, len: usize, salt: u32) -> Vec<u32> {
    let vocab = model.config().text.vocab_size as u32;
    (0..len as u32).map(|i| (i * 7919 + salt * 104729 + i * i * 31) % vocab).collect()
}

/// The bits of the last row's logits of the i-th sequence of the last step.
fn bits(session: &Session, i: usize) -> Vec<u32> {
    let mut row = vec![0f32; session.model().config().text.vocab_size];
    session.logits(i, session.output_rows(i) - 1, &mut row).unwrap();
    row.into_iter().map(f32::to_bits).collect()
}

fn step(session: &mut Session, sequences: &mut [&mut Sequence], chunk: usize, phase: Phase) {
    let mut batch: Vec<_> = sequences
        .iter_mut()
        .map(|sequence| Advance { tokens: sequence.pending().min(chunk), sequence, want: Want::Next, phase })
        .collect();
    session.step(&mut batch, &Control::default()).unwrap();
}

/// In each phase a row has the same bits in any chunk, in any batch, on any pages and in any order of execution.
#[test]
fn company_changes_no_bit() {
    for tested in devices::drivers() {
        let model = load(Arc::new(tested.backend(DType::BF16)), &fixture(CASES[1]).source);
        let mut session = session(&model);
        let ids: Vec<_> = (0..3).map(|salt| prompt(&model, 37 + 5 * salt as usize, salt)).collect();
        let begin =
            |session: &Session, ids: &[u32]| session.sequence(ids, Vec::new(), Sampling::GREEDY).unwrap();
        let mut alone = Vec::new();
        for ids in &ids {
            let mut sequence = begin(&session, ids);
            step(&mut session, &mut [&mut sequence], 128, Phase::Prefill);
            let mut rows = vec![bits(&session, 0)];
            for token in 5..9 {
                sequence.push(token);
                step(&mut session, &mut [&mut sequence], 1, Phase::Decode);
                rows.push(bits(&session, 0));
            }
            alone.push(rows);
        }
        (tested.reseed)(99);
        let mut sequences: Vec<_> = ids.iter().map(|ids| begin(&session, ids)).collect();
        let mut together = vec![Vec::new(); 3];
        // Chunks that mix their pages; the last one of each ends the prompt.
        while sequences.iter().any(|s| s.pending() > 0) {
            for (i, sequence) in sequences.iter_mut().enumerate().filter(|(_, s)| s.pending() > 0) {
                step(&mut session, &mut [sequence], 11, Phase::Prefill);
                together[i] = vec![bits(&session, 0)];
            }
        }
        for token in 5..9 {
            let mut all: Vec<_> = sequences.iter_mut().collect();
            all.iter_mut().for_each(|sequence| sequence.push(token));
            step(&mut session, &mut all, 1, Phase::Decode);
            (0..3).for_each(|i| together[i].push(bits(&session, i)));
        }
        assert_eq!(together, alone);
    }
}

/// Decode steps are recorded at the second and replayed from then on, over page boundaries, with the bits that
/// steps have that run node by node.
#[test]
fn replayed_steps_are_the_same_steps() {
    for tested in devices::drivers() {
        let recording = Watched::new(Arc::new(tested.backend(DType::BF16)), Box::new(|_, _, _| {}));
        let mut made = Vec::new();
        for one_by_one in [Some(tested.backend(DType::BF16).check_launches(true)), None] {
            let replays = one_by_one.is_none();
            let backend =
                one_by_one.map_or(recording.clone() as Arc<dyn Backend>, |backend| Arc::new(backend));
            let model = load(backend, &fixture(CASES[1]).source);
            let mut session = session(&model);
            let mut a = session.sequence(&prompt(&model, 13, 1), Vec::new(), Sampling::GREEDY).unwrap();
            let mut b = session.sequence(&prompt(&model, 30, 2), Vec::new(), Sampling::GREEDY).unwrap();
            let mut rows = Vec::new();
            step(&mut session, &mut [&mut a, &mut b], 128, Phase::Prefill);
            for round in 0..24 {
                for (i, sequence) in [&mut a, &mut b].into_iter().enumerate() {
                    sequence.push(session.next(i));
                }
                let counts = || {
                    let Watched { ops, uploads, downloads, fetched, .. } = &*recording;
                    [ops, uploads, downloads, fetched].map(|count| count.load(Ordering::Relaxed))
                };
                let before = counts();
                step(&mut session, &mut [&mut a, &mut b], 1, Phase::Decode);
                let after = counts();
                if replays && round >= 2 {
                    // No op of its own; all inputs in one copy, and the two tokens back in another.
                    let step: Vec<_> =
                        before.iter().zip(after).map(|(before, after)| after - before).collect();
                    assert_eq!(step, [0, 1, 1, 8], "step {round}");
                }
                rows.push([bits(&session, 0), bits(&session, 1)]);
            }
            made.push(rows);
        }
        assert_eq!(recording.replays.load(Ordering::Relaxed), 23);
        assert!(made[0] == made[1], "a replayed step has other bits");
    }
}

/// The tower is recorded at the second picture, and makes of every later one what it makes node by node.
#[test]
fn replayed_pictures_are_the_same_pictures() {
    for tested in devices::drivers() {
        let one_by_one: Arc<dyn Backend> = Arc::new(tested.backend(DType::F16).check_launches(true));
        let recording = Watched::new(Arc::new(tested.backend(DType::F16)), Box::new(|_, _, _| {}));
        let made = [one_by_one, recording.clone()].map(|backend| {
            let model = load(backend, &fixture(CASES[0]).source);
            let mut session = session(&model);
            let side = model.preprocess().unwrap().side();
            let picture = |n: usize| -> Vec<f32> {
                (0..3 * side * side).map(|i| ((i * 7919 + n * 331) % 1013) as f32 / 500.0 - 1.0).collect()
            };
            let mut encode = |n| {
                let values = &picture(n);
                let pixels = Pixels { values, order: None, digest: [n as u8; 32], keep_hidden: false };
                let fetched = recording.fetched.load(Ordering::Relaxed);
                let encoded = session.encode(pixels, &Control::default()).unwrap();
                assert_eq!(recording.fetched.load(Ordering::Relaxed), fetched, "rows stay on the device");
                session.image_rows(&encoded.image).unwrap()
            };
            [encode(1), encode(2), encode(3), encode(1)]
        });
        // Tower and projector are two recordings.
        assert_eq!(recording.replays.load(Ordering::Relaxed), 6);
        assert!(made[0] == made[1] && made[1][0] == made[1][3], "a replayed picture has other bits");
    }
}

/// A device that cannot record goes on op by op, to the same tokens, and says why once it is asked.
#[test]
fn a_device_that_cannot_record_goes_on() {
    for tested in devices::drivers() {
        let made = [false, true].map(|fails| {
            let backend = Watched::new(Arc::new(tested.backend(DType::BF16)), Box::new(|_, _, _| {}));
            backend.cannot_record.store(fails, Ordering::Relaxed);
            let model = load(backend.clone(), &fixture(CASES[1]).source);
            let mut session = session(&model);
            let mut a = session.sequence(&prompt(&model, 13, 1), Vec::new(), Sampling::GREEDY).unwrap();
            step(&mut session, &mut [&mut a], 128, Phase::Prefill);
            for _ in 0..5 {
                a.push(session.next(0));
                step(&mut session, &mut [&mut a], 1, Phase::Decode);
            }
            let told = session.unrecorded().map(ToString::to_string);
            assert_eq!(told.is_some_and(|told| told.contains("nothing can be recorded")), fails);
            assert_eq!(backend.replays.load(Ordering::Relaxed), if fails { 0 } else { 4 });
            bits(&session, 0)
        });
        assert!(made[0] == made[1], "other bits without recording");
    }
}

/// A recording that outlives memory that it points to: the emulated device notices at the first access.
#[cfg(feature = "emu")]
#[test]
fn a_stale_pointer_in_a_recording_is_caught() {
    use tessera::backend::cuda::{CudaBackend, emu::Emulator};
    let emulator = Emulator::new(3, Emulator::LIMITS).unwrap();
    let backend = CudaBackend::new(Arc::new(emulator), DType::F16).unwrap();
    let recording = Watched::new(Arc::new(backend), Box::new(|_, _, _| {}));
    let model = load(recording.clone(), &fixture(CASES[1]).source);
    let mut language = Language::new(&model, 2, true);
    for _ in 0..4 {
        language.run().unwrap();
    }
    assert_eq!(recording.replays.load(Ordering::Relaxed), 3, "recorded at the second step");
    language.states.pop();
    let error = language.run().unwrap_err().to_string();
    println!("{error}");
    assert!(error.contains("rope_append"), "{error}");
}
