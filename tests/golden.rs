//! Whole models against values from Hugging Face transformers: every case of `tests/data` that has a
//! checkpoint. Equal tokens prove little, so the logits' bound is the test; tokens must be equal too.

mod data;
mod oracle;

use data::{Case, Worst};
use oracle::Oracle;
use std::sync::Arc;
use tessera::backend::Backend;
use tessera::backend::cpu::CpuBackend;
use tessera::runtime::{Advance, Engine, ImageHandle, Input, LoadOptions, Model, Request, Session};
use tessera::runtime::{Phase, SessionOptions, Source, Want};

/// Every case, and how many kinds of tensors it compares: a case that compares less than it holds is a
/// defect of the test.
const CASES: [(&str, usize); 22] = [
    ("a_llava15_new_bf16", 4),
    ("b_llava15_old_f16_sharded", 4),
    ("c_chat_on_a", 1),
    ("d_batch_on_a", 1),
    ("h_lora_on_a", 2),
    ("g_llava_next_bf16", 3),
    ("j_llama_chatml_f32", 1),
    ("names_saved_v5", 4),
    ("names_memory_v5", 4),
    ("features_concat_full", 4),
    ("feature_layer_positive", 4),
    ("text_mqa_bias_tied_llama3", 2),
    ("next_mistral", 4),
    ("next_llama3", 4),
    ("rope_linear_mixed_dtypes", 2),
    ("e1_original_linear", 4),
    ("e2_original_marks", 4),
    ("e3_original_inside", 4),
    ("e4_original_identity", 4),
    ("e5_original_lora", 4),
    ("e6_original_anyres", 4),
    ("lora_two", 2),
];

fn engine(case: &Case, backend: Arc<dyn Backend>) -> Engine {
    let kv_memory = Some(256 << 20);
    let options = SessionOptions { all_logits: true, kv_memory, max_sequences: 4, ..Default::default() };
    let source = Source::Directory(case.model());
    let load = LoadOptions { lora: case.lora(), base: case.base(), ..LoadOptions::default() };
    let model = Model::load_on(backend, &source, &load).unwrap();
    let mut engine = Engine::new(Session::new(Arc::new(model), options).unwrap());
    engine.keep_intermediates = true;
    engine
}

fn images(engine: &mut Engine, case: &Case, names: &[String]) -> Vec<ImageHandle> {
    names.iter().map(|name| engine.image(name, &case.image(name)).unwrap()).collect()
}

#[test]
fn models_agree_with_the_reference() {
    check(&CASES, &|| Arc::new(CpuBackend::new(None).unwrap()));
}

/// The oracle of the op tests is held to the same values, on the smaller cases.
#[test]
fn the_oracle_agrees_with_the_reference() {
    check(&CASES[6..], &|| Arc::new(Oracle));
}

fn check(cases: &[(&str, usize)], backend: &dyn Fn() -> Arc<dyn Backend>) {
    for &(name, kinds) in cases {
        let case = Case::load(name);
        let mut engine = engine(&case, backend());
        let mut worst = Worst::default();
        for request in case.requests() {
            let images = images(&mut engine, &case, &request.images);
            for (image, sha256) in images.iter().zip(&request.pixels_sha256) {
                assert_eq!(&image.pixels_sha256, sha256, "{name} {}: pixels", image.name);
            }
            check_vision(&case, &request.name, &images, &mut worst);
            let input = Input::Raw(request.prompt.clone());
            let ours = Request {
                images,
                max_tokens: Some(request.max_new_tokens),
                prompt_logits: case.has(&format!("{}.logits_all", request.name)),
                ..Request::new(input)
            };
            let answer = engine.generate(&ours, |_| {}).unwrap();
            let r = &request.name;
            let ids = if case.is_original() { marked(&engine, &ours) } else { answer.prompt_ids };
            assert_eq!(ids, case.ids(&format!("{r}.input_ids")), "{name} {r}: prompt ids");
            if ours.prompt_logits {
                let expected = case.f32s(&format!("{r}.logits_all"));
                worst.compare("logits_all", &answer.prompt_logits, &expected, request.logits_bound());
            }
            assert_eq!(
                answer.token_ids,
                case.ids(&format!("{r}.greedy_tokens")),
                "{name} {r}: greedy tokens"
            );
            let generated = greedy_logits(&mut engine, &ours, &answer.token_ids);
            let expected = case.f32s(&format!("{r}.greedy_logits"));
            worst.compare("greedy_logits", &generated, &expected, request.logits_bound());
            if let Some(text) = &request.expected_text {
                assert_eq!(&answer.text, text, "{name} {r}: text");
            }
            if let Some(question) = &request.question {
                let chat = Request::ask(question, &ours.images).unwrap();
                let prompt = engine.prompt(&chat.input, &ours.images).unwrap();
                let expected = engine.prompt(&ours.input, &ours.images).unwrap();
                assert_eq!(prompt, expected, "{name} {r}: the style of the model's name");
            }
        }
        println!("{name}: {worst}");
        worst.must_have_compared(kinds);
    }
}

/// The prompt as the original code holds it: one mark, -200, for a picture.
fn marked(engine: &Engine, request: &Request) -> Vec<u32> {
    let prompt = engine.prompt(&request.input, &request.images).unwrap();
    let mut ids = Vec::new();
    for (position, &id) in prompt.ids.iter().enumerate() {
        match prompt.images.iter().find(|span| (span.start..span.start + span.len).contains(&position)) {
            Some(span) if span.start == position => ids.push(-200i32 as u32),
            Some(_) => {}
            None => ids.push(id),
        }
    }
    ids
}

fn check_vision(case: &Case, request: &str, images: &[ImageHandle], worst: &mut Worst) {
    let kept = |part: fn(&tessera::runtime::engine::Kept) -> &Vec<f32>| -> Vec<f32> {
        images.iter().flat_map(|image| part(image.kept.as_ref().unwrap()).clone()).collect()
    };
    let parts: [(&str, Vec<f32>); 2] =
        [("vision.selected", kept(|k| &k.hidden)), ("image_features", kept(|k| &k.features))];
    for (part, ours) in parts {
        let tensor = format!("{request}.{part}");
        if case.has(&tensor) && !images.is_empty() {
            worst.compare(part, &ours, &case.f32s(&tensor), 1e-4);
        }
    }
}

/// The distribution that each of `tokens` was picked from, teacher-forced, one token a step.
fn greedy_logits(engine: &mut Engine, request: &Request, tokens: &[u32]) -> Vec<f32> {
    let prompt = engine.prompt(&request.input, &request.images).unwrap();
    let spans = prompt.images.iter().map(|s| s.start..s.start + s.len);
    let images = spans.zip(request.images.iter().map(|i| i.encoded.clone())).collect();
    let vocab = engine.model().config().text.vocab_size;
    let control = engine.control.clone();
    let session = engine.session_mut();
    let mut sequence = session.sequence(&prompt.ids, images, request.sampling).unwrap();
    let mut all = Vec::new();
    for &token in tokens {
        let n = sequence.pending();
        let phase = if all.is_empty() { Phase::Prefill } else { Phase::Decode };
        let advance = Advance { sequence: &mut sequence, tokens: n, want: Want::Next, phase };
        session.step(&mut [advance], &control).unwrap();
        let start = all.len();
        all.resize(start + vocab, 0.0);
        session.logits(0, 0, &mut all[start..]).unwrap();
        sequence.push(token);
    }
    all
}

/// The four prompts of one case advance in one batch and make the tokens they make alone.
#[test]
fn a_batch_makes_the_tokens_of_its_members() {
    let case = Case::load("d_batch_on_a");
    let source = Source::Directory(case.model());
    let model = Arc::new(Model::load(&source, &LoadOptions::default()).unwrap());
    let options = SessionOptions { kv_memory: Some(64 << 20), max_sequences: 4, ..Default::default() };
    let mut engine = Engine::new(Session::new(model, options).unwrap());
    let requests = case.requests();
    let mut sequences = Vec::new();
    for request in &requests {
        let images = images(&mut engine, &case, &request.images);
        let prompt = engine.prompt(&Input::Raw(request.prompt.clone()), &images).unwrap();
        let spans = prompt.images.iter().map(|s| s.start..s.start + s.len);
        let images = spans.zip(images.iter().map(|i| i.encoded.clone())).collect();
        sequences.push(engine.session().sequence(&prompt.ids, images, Default::default()).unwrap());
    }
    let control = engine.control.clone();
    for _ in 0..requests[0].max_new_tokens {
        let mut batch: Vec<_> = sequences
            .iter_mut()
            .map(|sequence| Advance {
                tokens: sequence.pending(),
                sequence,
                want: Want::Next,
                phase: Phase::Prefill,
            })
            .collect();
        engine.session_mut().step(&mut batch, &control).unwrap();
        for (i, sequence) in sequences.iter_mut().enumerate() {
            let id = engine.session().next(i);
            sequence.push(id);
        }
    }
    for (request, sequence) in requests.iter().zip(&sequences) {
        let expected = case.ids(&format!("{}.greedy_tokens", request.name));
        let made = &sequence.ids()[sequence.ids().len() - request.max_new_tokens..];
        assert_eq!(made[..expected.len()], expected, "{}", request.name);
    }
    let pages = engine.session().pages().clone();
    pages.check_integrity(sequences.iter().map(|s| s.page_table())).unwrap();
    drop(sequences);
    assert_eq!(pages.free(), pages.total(), "pages leaked");
}
