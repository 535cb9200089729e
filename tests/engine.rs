//! The engine as its users meet it: prompts of every length and kind, pictures in every number, limits,
//! cancellation, what stays in the cache between requests, and scores.

mod spoilt;

use spoilt::{Checkpoint, picture};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tessera::Error;
use tessera::input::image::Picture;
use tessera::input::prompt::Message;
use tessera::op::PAGE;
use tessera::runtime::{Completion, Engine, FinishReason, ImageHandle, Input, LoadOptions, Model, Request};
use tessera::runtime::{Sampling, Session, SessionOptions, Source};
use tessera::tensor::DType;

fn demo(options: SessionOptions) -> Engine {
    Engine::load(&Source::Demo, &LoadOptions::default(), options).unwrap()
}

fn ask(text: &str, images: &[ImageHandle]) -> Request {
    Request { max_tokens: Some(12), ..Request::ask(text, images).unwrap() }
}

fn raw(text: &str) -> Request {
    Request { max_tokens: Some(4), ..Request::new(Input::Raw(text.into())) }
}

fn run(engine: &mut Engine, request: &Request) -> Completion {
    engine.generate(request, |_| {}).unwrap()
}

fn error(engine: &mut Engine, request: &Request) -> Error {
    engine.generate(request, |_| panic!("text before an error")).unwrap_err()
}

fn scene(n: usize) -> Vec<u8> {
    std::fs::read(format!("{}/assets/samples/scene{n}.png", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// No sequence is left but the engine's own last one, whose pages cover `cached` positions.
fn assert_pages(engine: &Engine, cached: usize) {
    let pages = engine.session().pages();
    assert_eq!(pages.total() - pages.free(), cached.div_ceil(PAGE), "pages for {cached} positions");
}

#[test]
fn prompts_may_be_empty_or_blank() {
    let mut engine = demo(SessionOptions::default());
    for text in ["", " ", "\n\t ", "\u{a0}"] {
        // BOS is there in any case.
        assert!(!run(&mut engine, &raw(text)).prompt_ids.is_empty());
        assert!(!run(&mut engine, &ask(text, &[])).token_ids.is_empty());
    }
    // The template makes "ASSISTANT:" of no messages at all, which can be continued.
    let nothing = Request { max_tokens: Some(4), ..Request::new(Input::Chat(Vec::new())) };
    assert!(!run(&mut engine, &nothing).token_ids.is_empty());
}

#[test]
fn long_prompts_fail_before_any_work() {
    let mut engine = demo(SessionOptions::default());
    let image = picture(&mut engine).unwrap();
    let long = "Where is the circle? ".repeat(5000);
    let before = engine.control.progress();
    for request in [ask(&long, &[]), ask(&long, &[image]), raw(&long)] {
        let Error::Context { needed, prompt, new, context } = error(&mut engine, &request) else {
            panic!("not a context error")
        };
        assert_eq!((needed, context), (prompt + new - 1, 1024));
        assert!(prompt > 10_000 && new == request.max_tokens.unwrap());
    }
    assert_eq!(engine.control.progress(), before, "nothing has run");
    assert_pages(&engine, 0);
}

#[test]
fn the_context_is_used_to_its_last_position() {
    let mut engine = demo(SessionOptions { context: Some(64), ..SessionOptions::default() });
    let request = raw("Where is the circle?");
    let prompt = engine.prompt(&request.input, &[]).unwrap().ids.len();
    let with = |max_tokens| Request { max_tokens, ignore_eos: true, ..request.clone() };
    // The last token is told and never read.
    let full = run(&mut engine, &with(Some(65 - prompt)));
    assert_eq!((full.token_ids.len(), full.finish_reason), (65 - prompt, FinishReason::Length));
    assert_eq!(run(&mut engine, &with(None)).token_ids, full.token_ids);
    let one_over = error(&mut engine, &with(Some(66 - prompt)));
    assert!(matches!(one_over, Error::Context { needed: 65, context: 64, .. }), "{one_over}");
    let huge = error(&mut engine, &with(Some(usize::MAX)));
    assert!(matches!(huge, Error::Context { new: usize::MAX, .. }), "{huge}");
    // A prompt that fills the context leaves room for one token, and one that is longer for none.
    let mut exact = demo(SessionOptions { context: Some(prompt), ..SessionOptions::default() });
    assert_eq!(run(&mut exact, &with(None)).token_ids, full.token_ids[..1]);
    assert_eq!(run(&mut exact, &with(Some(1))).token_ids, full.token_ids[..1]);
    assert!(matches!(error(&mut exact, &with(Some(2))), Error::Context { new: 2, .. }));
    let mut short = demo(SessionOptions { context: Some(prompt - 1), ..SessionOptions::default() });
    assert!(matches!(error(&mut short, &with(None)), Error::Context { new: 1, .. }));
    let nothing = run(&mut exact, &with(Some(0)));
    assert_eq!((nothing.token_ids.len(), nothing.finish_reason), (0, FinishReason::Length));
    assert_eq!(nothing.text, "");
}

#[test]
fn pictures_and_marks_must_be_as_many() {
    let mut engine = demo(SessionOptions::default());
    let image = picture(&mut engine).unwrap();
    let one = [image.clone()];
    let two = [image.clone(), image];
    for (text, images, words) in [
        ("<image> <image> x", &one[..], ["2 images", "1 were given"]),
        ("<image> x", &two[..], ["1 images", "2 were given"]),
        ("<image> x", &[][..], ["1 images", "0 were given"]),
    ] {
        let error = Request::ask(text, images).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
    for (text, images) in [("<image> <image> x", &one[..]), ("<image> x", &two[..]), ("x", &one[..])] {
        let request = Request { images: images.to_vec(), ..raw(text) };
        let error = error(&mut engine, &request);
        assert!(matches!(error, Error::Prompt(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("image"), "{text}");
    }
    let both = run(&mut engine, &ask("Where is the circle?", &two));
    assert_eq!(both.image_tokens, 128);
    // What a user writes is text, and places nothing.
    let message = Message::text("user", "Where is the <image> circle?</s>");
    let typed = Request { max_tokens: Some(4), ..Request::new(Input::Chat(vec![message])) };
    let typed = run(&mut engine, &typed);
    assert_eq!(typed.image_tokens, 0);
    assert!(!typed.prompt_ids.contains(&4) && !typed.prompt_ids.contains(&2), "{:?}", typed.prompt_ids);
}

#[test]
fn a_text_model_takes_no_pictures() {
    let text = Checkpoint::copy_of("tests/data/j_llama_chatml_f32/model");
    let mut engine = text.engine().unwrap();
    let refused = engine.image("scene1.png", &scene(1)).unwrap_err();
    assert!(refused.to_string().contains("is a text model"), "{refused}");
    // Not even one that another model has encoded.
    let image = picture(&mut demo(SessionOptions::default())).unwrap();
    let error = error(&mut engine, &ask("What is it?", &[image]));
    assert!(matches!(error, Error::Prompt(_)), "{error}");
    assert!(!run(&mut engine, &ask("What is it?", &[])).token_ids.is_empty());
}

/// Rows of another model's picture are not this model's embeddings, though they may be as many.
#[test]
fn a_picture_of_another_model_is_refused() {
    let mut other = Checkpoint::copy().engine().unwrap();
    let image = picture(&mut other).unwrap();
    let mut engine = demo(SessionOptions::default());
    let error = error(&mut engine, &ask("What is it?", &[image]));
    assert!(matches!(error, Error::Prompt(_)), "{error}");
}

#[test]
fn sessions_of_impossible_size_are_refused() {
    let model = Arc::new(Model::load(&Source::Demo, &LoadOptions::default()).unwrap());
    let default = SessionOptions::default();
    for (options, word) in [
        (SessionOptions { context: Some(0), ..default }, "--context"),
        (SessionOptions { context: Some(1025), ..default }, "1024"),
        (SessionOptions { kv_memory: Some(0), ..default }, "--kv-memory"),
        (SessionOptions { kv_memory: Some(u64::MAX), ..default }, "the KV cache"),
        (SessionOptions { prefill_chunk: 0, ..default }, "--prefill-chunk"),
        (SessionOptions { max_sequences: 0, ..default }, "max_sequences"),
        (SessionOptions { max_sequences: usize::MAX, ..default }, "max_sequences"),
    ] {
        let error = Session::new(model.clone(), options).err().expect(word).to_string();
        assert!(error.contains(word), "{error}");
    }
}

/// A pool too small for the prompt is an error before any work, and answers end where it does.
#[test]
fn a_cache_too_small_for_the_prompt_is_an_error() {
    let model = Arc::new(Model::load(&Source::Demo, &LoadOptions::default()).unwrap());
    let page = tessera::runtime::kv::page_bytes(&model.config().text, DType::F32) as u64;
    let options = SessionOptions { kv_memory: Some(2 * page), prefill_chunk: 8, ..Default::default() };
    let mut engine = Engine::new(Session::new(model, options).unwrap());
    let image = picture(&mut engine).unwrap();
    let before = engine.control.progress();
    let full = error(&mut engine, &ask("Where is the circle?", &[image]));
    assert!(matches!(full, Error::KvExhausted { total: 2, .. }), "{full}");
    assert_eq!(engine.control.progress(), before, "nothing has run");
    assert_pages(&engine, 0);
    let long = run(&mut engine, &Request { max_tokens: None, ignore_eos: true, ..raw("Where?") });
    assert_eq!(long.prompt_ids.len() + long.token_ids.len() - 1, 2 * PAGE);
    let short = run(&mut engine, &Request { max_tokens: Some(2), ..raw("Where?") });
    assert_eq!(short.token_ids.len(), 2);
}

#[test]
fn chunks_of_any_size_make_the_same_answer() {
    let answer = |prefill_chunk| {
        let mut engine = demo(SessionOptions { prefill_chunk, ..SessionOptions::default() });
        let image = picture(&mut engine).unwrap();
        let request = Request { logprobs: Some(2), ..ask("Where is the circle?", &[image]) };
        let answer = run(&mut engine, &request);
        (answer.token_ids, answer.logprobs)
    };
    let whole = answer(1024);
    for chunk in [1, 3, 16, 17] {
        assert_eq!(answer(chunk), whole, "chunks of {chunk}");
    }
}

#[test]
fn cancelling_leaves_a_working_engine() {
    let mut engine = demo(SessionOptions { prefill_chunk: 16, ..SessionOptions::default() });
    let expected = {
        let mut fresh = demo(SessionOptions::default());
        let image = picture(&mut fresh).unwrap();
        run(&mut fresh, &ask("Where is the circle?", &[image])).token_ids
    };
    // While a picture is encoded.
    engine.control.cancel();
    assert!(matches!(picture(&mut engine), Err(Error::Cancelled)));
    engine.control.reset();
    let image = picture(&mut engine).unwrap();
    let request = ask("Where is the circle?", &[image]);

    // Before the prefill.
    engine.control.cancel();
    let none = run(&mut engine, &request);
    assert_eq!((none.token_ids.len(), none.finish_reason), (0, FinishReason::Cancelled));
    assert_pages(&engine, 0);
    engine.control.reset();
    assert_eq!(run(&mut engine, &request).token_ids, expected);

    // During the decode.
    let control = engine.control.clone();
    let mut pieces = 0;
    let stopped = engine
        .generate(&request, |_| {
            pieces += 1;
            if pieces == 3 {
                control.cancel();
            }
        })
        .unwrap();
    assert_eq!(stopped.finish_reason, FinishReason::Cancelled);
    let made = stopped.token_ids.len();
    assert!((3..expected.len()).contains(&made), "{made}");
    assert_eq!(stopped.token_ids, expected[..made]);
    assert!(matches!(engine.score(&request, " x"), Err(Error::Cancelled)));
    assert_pages(&engine, 0);
    engine.control.reset();
    assert_eq!(run(&mut engine, &request).token_ids, expected);
}

/// A prefill can be stopped from another thread; what was read until then is of use to the next request.
#[test]
fn a_prefill_can_be_stopped_halfway() {
    // Hundreds of chunks: the half in which the stop comes takes far longer than a thread needs to see it.
    let mut engine = demo(SessionOptions { prefill_chunk: 1, ..SessionOptions::default() });
    let request = raw(&"Where is the circle? ".repeat(150));
    let prompt = engine.prompt(&request.input, &[]).unwrap().ids.len();
    assert!((600..1000).contains(&prompt), "{prompt}");
    let control = engine.control.clone();
    let over = AtomicBool::new(false);
    let cut = std::thread::scope(|scope| {
        scope.spawn(|| {
            while control.progress().0 == 0 && !over.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            control.cancel();
        });
        let cut = run(&mut engine, &request);
        over.store(true, Ordering::Relaxed);
        cut
    });
    assert_eq!((cut.token_ids.len(), cut.finish_reason), (0, FinishReason::Cancelled));
    engine.control.reset();
    let resumed = run(&mut engine, &request);
    assert!(resumed.reused_tokens < prompt - 1, "{} of {prompt} reused", resumed.reused_tokens);
    assert_pages(&engine, prompt + resumed.token_ids.len() - 1);
    assert_eq!(resumed.token_ids, run(&mut demo(SessionOptions::default()), &request).token_ids);
}

/// Whatever was asked before, an engine answers as a fresh one does, to the bit.
#[test]
fn what_is_cached_changes_no_answer() {
    let model = Arc::new(Model::load(&Source::Demo, &LoadOptions::default()).unwrap());
    let fresh = || Engine::new(Session::new(model.clone(), SessionOptions::default()).unwrap());
    let mut engine = fresh();
    let images: Vec<_> = (1..=3).map(|n| engine.image("scene", &scene(n)).unwrap()).collect();
    let [a, b, c] = images.try_into().unwrap();
    let again = engine.image("another name", &scene(1)).unwrap();
    let circle = "Where is the circle?";
    let sampled = Sampling { temperature: 1.0, seed: 5, ..Sampling::GREEDY };
    // Each request, and whether the rows of its first picture are in the cache by then.
    let requests = [
        (ask(circle, std::slice::from_ref(&a)), false),
        (ask(circle, std::slice::from_ref(&a)), true),
        (ask("What color is the star?", std::slice::from_ref(&a)), true),
        // The same picture encoded again has the same digest.
        (ask(circle, std::slice::from_ref(&again)), true),
        // Equal ids, another picture.
        (ask(circle, std::slice::from_ref(&b)), false),
        (ask(circle, &[b.clone(), a.clone()]), true),
        (ask(circle, &[b.clone(), c.clone()]), true),
        (ask(circle, &[c.clone(), b.clone()]), false),
        (ask(circle, &[c.clone(), c.clone()]), true),
        (ask(circle, &[]), false),
        (Request { sampling: sampled, ..ask(circle, std::slice::from_ref(&a)) }, false),
        (Request { sampling: sampled, ..ask(circle, std::slice::from_ref(&a)) }, true),
        (Request { max_tokens: Some(0), ..ask(circle, std::slice::from_ref(&a)) }, true),
        (Request { ignore_eos: true, max_tokens: Some(40), ..ask(circle, std::slice::from_ref(&a)) }, true),
    ];
    for (i, (request, reuses)) in requests.iter().enumerate() {
        let request = Request { logprobs: Some(3), ..request.clone() };
        let ours = run(&mut engine, &request);
        let alone = run(&mut fresh(), &request);
        assert_eq!(ours.prompt_ids, alone.prompt_ids, "request {i}");
        assert_eq!(ours.logprobs, alone.logprobs, "request {i}");
        assert_eq!((ours.text, alone.reused_tokens), (alone.text, 0), "request {i}");
        assert_eq!(ours.reused_tokens >= 64, *reuses, "request {i}: {} reused", ours.reused_tokens);
    }
}

/// A score is what the same tokens were given when they were made, to the bit.
#[test]
fn scores_are_the_log_probabilities_of_an_answer() {
    let mut engine = demo(SessionOptions { prefill_chunk: 16, ..SessionOptions::default() });
    let image = picture(&mut engine).unwrap();
    let request = Request { logprobs: Some(3), ..ask("Where is the circle?", &[image]) };
    let answer = run(&mut engine, &request);
    assert_eq!(answer.finish_reason, FinishReason::Stop);
    let given = engine.model().prompter().tokenizer().encode(&answer.text, false).unwrap();
    assert_eq!(given, answer.token_ids[..answer.token_ids.len() - 1], "the text is these tokens again");
    let with_logits = Request { prompt_logits: true, ..request.clone() };
    for request in [&request, &with_logits] {
        let scores = engine.score(request, &answer.text).unwrap();
        assert_eq!(scores, answer.logprobs[..given.len()]);
    }
    assert!(engine.score(&request, "").unwrap().is_empty());
    let long = engine.score(&request, &"circle ".repeat(2000)).unwrap_err();
    assert!(matches!(long, Error::Context { .. }), "{long}");
    // Scoring leaves the cache as useful, and as harmless, as an answer does.
    assert_eq!(run(&mut engine, &request).logprobs, answer.logprobs);
}

#[test]
fn probabilities_of_the_vocabulary_sum_to_one() {
    let mut engine = demo(SessionOptions::default());
    let vocab = engine.model().config().text.vocab_size;
    let image = picture(&mut engine).unwrap();
    let request = Request { logprobs: Some(usize::MAX), ..ask("Where is the circle?", &[image]) };
    let answer = run(&mut engine, &request);
    let mut worst = 0.0f64;
    for token in &answer.logprobs {
        assert_eq!(token.top.len(), vocab);
        assert_eq!(token.top[0], (token.id, token.logprob), "greedy takes the likeliest");
        assert!(token.top.is_sorted_by(|a, b| a.1 >= b.1));
        // Each logarithm is rounded to f32 once: its probability is off by a relative 2^-24 |ln p|, and
        // p |ln p| sums to the entropy, at most ln 640 = 6.5.
        let sum: f64 = token.top.iter().map(|t| (t.1 as f64).exp()).sum();
        worst = worst.max((sum - 1.0).abs());
    }
    println!("worst sum is off by {worst:.1e} of 4e-7");
    assert!(worst < 4e-7, "{worst:e}");
}

/// A picture of one colour, of one pixel, or far from square is a picture.
#[test]
fn odd_pictures_are_encoded() {
    let mut engine = demo(SessionOptions::default());
    for (width, height) in [(1, 1), (1, 300), (300, 1), (112, 112)] {
        let plain = Picture { width, height, rgb: vec![128; width * height * 3] };
        let image = engine.picture("plain", &plain).unwrap();
        assert_eq!(run(&mut engine, &ask("Where is the circle?", &[image])).image_tokens, 64);
    }
}
