//! Pictures on their way through a session: tiles in batches, the same picture twice, lengths known before
//! anything runs, and models that see tiles told not to.

mod spoilt;

use serde_json::json;
use spoilt::Checkpoint;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tessera::backend::cpu::CpuBackend;
use tessera::backend::{Backend, Buffer, Call, Prepared};
use tessera::input::image::{ImageMode, Picture};
use tessera::input::prompt::{Content, Message, Part};
use tessera::op::{Op, WeightType};
use tessera::runtime::{Engine, ImageHandle, Input, LoadOptions, Model, Request, Session, SessionOptions};
use tessera::tensor::{DType, View, Weight};
use tessera::{Error, Result};

const SMALL_NEXT: &str = "tests/data/next_mistral/model";
const SMALL: &str = "tests/data/names_saved_v5/model";

/// The CPU, counting the squares that begin their way through a tower.
struct Counting {
    cpu: CpuBackend,
    squares: Arc<AtomicUsize>,
}

impl Backend for Counting {
    fn describe(&self) -> String {
        self.cpu.describe()
    }

    fn dtype(&self) -> DType {
        self.cpu.dtype()
    }

    fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer> {
        self.cpu.alloc(what, bytes)
    }

    fn prepare(&self, op: &Op, weights: &[Weight]) -> Result<Vec<Prepared>> {
        self.cpu.prepare(op, weights)
    }

    fn workspace(&self, op: &Op, ins: &[View], weights: &[WeightType], outs: &[View]) -> usize {
        self.cpu.workspace(op, ins, weights, outs)
    }

    unsafe fn run(&self, call: &Call<'_>) -> Result<()> {
        if matches!(call.op, Op::PatchEmbed { .. }) {
            self.squares.fetch_add(call.ins[0].rows, Ordering::Relaxed);
        }
        // SAFETY: passed on from the caller.
        unsafe { self.cpu.run(call) }
    }

    unsafe fn upload(&self, addr: usize, bytes: &[u8]) -> Result<()> {
        // SAFETY: passed on from the caller.
        unsafe { self.cpu.upload(addr, bytes) }
    }

    unsafe fn download(&self, addr: usize, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: passed on from the caller.
        unsafe { self.cpu.download(addr, bytes) }
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()> {
        // SAFETY: passed on from the caller.
        unsafe { self.cpu.copy(from, to, bytes) }
    }
}

/// An engine that counts, for a model of the repository.
fn counting(model: &str, load: LoadOptions, session: SessionOptions) -> (Engine, Arc<AtomicUsize>) {
    let squares = Arc::new(AtomicUsize::new(0));
    let backend = Counting { cpu: CpuBackend::new(Some(2)).unwrap(), squares: squares.clone() };
    let source = Checkpoint::copy_of(model);
    let model = Model::load_on(Arc::new(backend), &source.source(), &load).unwrap();
    (Engine::new(Session::new(Arc::new(model), session).unwrap()), squares)
}

fn noise(width: usize, height: usize) -> Picture {
    Picture { width, height, rgb: (0..width * height * 3).map(|i| ((i * 7919) >> 3) as u8).collect() }
}

fn see(engine: &mut Engine, width: usize, height: usize) -> ImageHandle {
    engine.picture("noise", &noise(width, height)).unwrap()
}

fn ask(images: &[ImageHandle]) -> Request {
    Request { max_tokens: Some(3), logprobs: Some(2), ..Request::ask("What is it?", images).unwrap() }
}

#[test]
fn a_picture_is_encoded_once_for_as_long_as_somebody_holds_it() {
    for (model, each) in [(SMALL, 1), (SMALL_NEXT, 4)] {
        let (mut engine, squares) = counting(model, LoadOptions::default(), SessionOptions::default());
        let count = || squares.swap(0, Ordering::Relaxed);
        // 84 x 28 is seen whole and in three tiles.
        let first = see(&mut engine, 84, 28);
        assert_eq!(count(), each, "{model}");
        let again = engine.picture("another name", &noise(84, 28)).unwrap();
        assert_eq!((count(), again.name.as_str()), (0, "another name"));
        assert!(Arc::ptr_eq(&first.encoded, &again.encoded));
        assert_eq!(first.pixels_sha256, again.pixels_sha256);
        assert_eq!(again.timings.vision, std::time::Duration::ZERO);

        // Twice in a request, and in the next turn of the conversation.
        let both = ask(&[first.clone(), again.clone()]);
        let answer = engine.generate(&both, |_| {}).unwrap();
        assert_eq!(answer.image_tokens, 2 * first.encoded.len);
        let Input::Chat(mut messages) = both.input.clone() else {
            unreachable!("`ask` makes a conversation")
        };
        let answered = Content::Parts(vec![Part::Text(answer.text.trim().into())]);
        messages.push(Message { role: "assistant".into(), content: answered });
        messages.push(Message::prompt("And this?", 1).unwrap());
        let third = see(&mut engine, 84, 28);
        let turn = Request { images: vec![first, again, third], ..Request::new(Input::Chat(messages)) };
        let turn = Request { max_tokens: Some(3), ..turn };
        let next = engine.generate(&turn, |_| {}).unwrap();
        assert!(next.reused_tokens > answer.image_tokens, "{} reused", next.reused_tokens);
        assert_eq!(count(), 0, "{model}");

        // Any other picture is another one: a pixel, or the same bytes in another shape.
        let mut changed = noise(84, 28);
        changed.rgb[99] ^= 1;
        let changed = engine.picture("changed", &changed).unwrap();
        let turned = see(&mut engine, 28, 84);
        assert_eq!(count(), 2 * each, "{model}");
        // The last that held it is gone, so it must be looked at again. The engine's cache holds one.
        drop((both, turn, changed, turned));
        engine.generate(&ask(&[]), |_| {}).unwrap();
        let handle = see(&mut engine, 84, 28);
        assert_eq!(count(), each, "{model}");
        // What is to be kept for a dump and was not is computed.
        engine.keep_intermediates = true;
        let kept = see(&mut engine, 84, 28).kept.clone().unwrap();
        assert_eq!((count(), kept.squares), (each, each));
        assert_eq!(kept.features, engine.session().image_rows(&handle.encoded).unwrap());
    }
}

/// However many squares pass through the tower together, the rows have the same bits.
#[test]
fn batches_of_tiles_make_the_same_rows() {
    let sizes = [(84, 28), (56, 56), (20, 90), (300, 7), (1, 1), (61, 23)];
    let rows = |vision_batch| {
        let options = SessionOptions { vision_batch, ..SessionOptions::default() };
        let (mut engine, squares) = counting(SMALL_NEXT, LoadOptions::default(), options);
        engine.keep_intermediates = true;
        assert_eq!(engine.session().vision().unwrap().plan().max.images, vision_batch.min(5));
        let images: Vec<_> = sizes.iter().map(|&(w, h)| see(&mut engine, w, h)).collect();
        let tokens: usize = images.iter().map(|image| image.encoded.len).sum();
        let kept: Vec<_> = images.iter().map(|image| image.kept.clone().unwrap()).collect();
        let squares = squares.load(Ordering::Relaxed);
        assert_eq!(squares, kept.iter().map(|kept| kept.squares).sum::<usize>());
        let answer = engine.generate(&ask(&images), |_| {}).unwrap();
        assert_eq!(answer.image_tokens, tokens);
        let parts: Vec<_> = kept.iter().map(|kept| (kept.hidden.clone(), kept.features.clone())).collect();
        (squares, parts, answer.logprobs)
    };
    let together = rows(8);
    assert_eq!(together.0, 4 + 5 + 4 + 4 + 3 + 4);
    for vision_batch in [1, 2, 3, 5] {
        assert!(rows(vision_batch) == together, "{vision_batch} at a time");
    }
    let model = Arc::new(Checkpoint::copy_of(SMALL_NEXT).load().unwrap());
    let none = SessionOptions { vision_batch: 0, ..SessionOptions::default() };
    let error = Session::new(model, none).err().unwrap().to_string();
    assert!(error.contains("vision_batch"), "{error}");
}

/// A prompt's ids, and whether it fits, follow from the sizes of its pictures alone.
#[test]
fn lengths_are_known_before_anything_runs() {
    for model in [SMALL, SMALL_NEXT] {
        let (mut engine, squares) = counting(model, LoadOptions::default(), SessionOptions::default());
        let sizes = [(84, 28), (3, 5), (640, 480)];
        let message = Message::prompt("<image> and <image> and <image>", 3).unwrap();
        let input = Input::Chat(vec![message]);
        let prompt = engine.prompt_about(&input, &sizes).unwrap();
        let fits = Request { max_tokens: Some(3), ..Request::new(input.clone()) };
        engine.admit(&fits, &sizes).unwrap();
        let long = Request { max_tokens: Some(512), ..fits.clone() };
        let context = engine.session().context();
        let error = engine.admit(&long, &sizes).unwrap_err();
        let new = 512;
        assert!(
            matches!(error, Error::Context { prompt: p, new: n, context: c, .. }
                if (p, n, c) == (prompt.ids.len(), new, context)),
            "{error}"
        );
        assert!(matches!(engine.admit(&fits, &sizes[1..]), Err(Error::Prompt(_))));
        assert_eq!(
            (squares.load(Ordering::Relaxed), engine.control.progress()),
            (0, (0, 0)),
            "nothing has run"
        );

        let images = sizes.map(|(width, height)| see(&mut engine, width, height));
        let spans: Vec<_> = prompt.images.iter().map(|span| span.len).collect();
        assert_eq!(spans, images.each_ref().map(|image| image.encoded.len), "{model}");
        let answer = engine.generate(&Request { images: images.into(), ..fits }, |_| {}).unwrap();
        assert_eq!(answer.prompt_ids, prompt.ids, "{model}");
    }
}

/// With crop or pad a model that sees tiles sees one square, as the original code does.
#[test]
fn tiles_can_be_left_out() {
    let load = |image_mode| LoadOptions { image_mode, ..LoadOptions::default() };
    let options = SessionOptions::default();
    let (mut tiled, _) = counting(SMALL_NEXT, load(None), options);
    tiled.keep_intermediates = true;
    let rows = tiled.model().config().square_rows();
    for mode in [ImageMode::Crop, ImageMode::Pad] {
        let (mut engine, squares) = counting(SMALL_NEXT, load(Some(mode)), options);
        engine.keep_intermediates = true;
        let image = see(&mut engine, 84, 28);
        assert_eq!((squares.load(Ordering::Relaxed), image.encoded.len), (1, rows), "{mode:?}");
        assert_eq!(engine.session().memory().squares, 0, "no room is made for tiles");
        assert_eq!(engine.generate(&ask(&[image]), |_| {}).unwrap().image_tokens, rows);
        // A square picture is the same whole, whatever the mode.
        let whole = see(&mut engine, 50, 50).kept.clone().unwrap();
        let of_many = see(&mut tiled, 50, 50).kept.clone().unwrap();
        assert_eq!(whole.features.len(), rows * engine.model().config().text.hidden_size);
        assert_eq!(whole.features, of_many.features[..whole.features.len()], "{mode:?}");
    }
}

#[test]
fn numbers_that_are_not_finite_are_an_error_that_names_the_node() {
    let bias = "model.multi_modal_projector.linear_2.bias";
    let spoilt =
        Checkpoint::copy_of("tests/data/next_llama3/model").tensor(bias, |t| t.fill(f32::NAN, false));
    let mut engine = spoilt.engine().unwrap();
    let error = engine.picture("noise", &noise(84, 28)).unwrap_err();
    assert!(matches!(&error, Error::NonFinite { node, .. } if node == "projector.linear_2"), "{error}");
}

#[test]
fn a_session_tells_what_tiles_cost() {
    let tiled = Checkpoint::copy_of(SMALL_NEXT).engine().unwrap();
    let config = tiled.model().config();
    let plan = tiled.session().memory();
    let tiling = config.tiling.as_ref().unwrap();
    assert_eq!(
        plan.squares as usize,
        tiling.max_squares() * config.square_rows() * config.text.hidden_size * 4
    );
    assert!(plan.vision_arena > 0 && plan.vision_arena <= plan.arena);
    assert_eq!(plan.total(), plan.weights + plan.kv + plan.arena + plan.squares);
    let one = SessionOptions { vision_batch: 1, ..SessionOptions::default() };
    let one = Session::new(tiled.model().clone(), one).unwrap();
    assert!(one.memory().vision_arena < plan.vision_arena);
}

#[test]
fn files_that_disagree_about_tiles_are_errors() {
    const PROCESSOR: &str = "preprocessor_config.json";
    const KEY: &str = "image_grid_pinpoints";
    for other in [json!([[28, 56]]), json!([[56, 28], [28, 56]]), json!([[28]]), json!("x"), json!([])] {
        let spoilt = Checkpoint::copy_of(SMALL_NEXT).json(PROCESSOR, |json| json[KEY] = other.clone());
        let error = spoilt.load().err().unwrap().to_string();
        assert!(error.contains(PROCESSOR) && error.contains(KEY), "{other}: {error}");
    }
    // One that has none is not asked.
    let silent = |json: &mut serde_json::Value| {
        json.as_object_mut().unwrap().remove(KEY);
    };
    Checkpoint::copy_of(SMALL_NEXT).json(PROCESSOR, silent).load().unwrap();
    let lost = Checkpoint::copy_of(SMALL_NEXT).tensors(|all| all.retain(|t| t.name != "image_newline"));
    let error = lost.load().err().unwrap().to_string();
    assert!(error.contains("`image_newline`") && error.contains("no such tensor"), "{error}");
    let wide =
        Checkpoint::copy_of(SMALL_NEXT).json("config.json", |json| json[KEY] = json!([[28, 84], [28, 30]]));
    let error = wide.load().err().unwrap().to_string();
    assert!(error.contains("config.json") && error.contains("multiples of the tile, 28"), "{error}");
}
