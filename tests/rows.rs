//! Row independence: a row's logits have the same bits whatever rows stand beside it, in whatever chunk,
//! batch or pages it came, on however many threads. And what follows from it: forks, continuations and
//! batches that can be compared bit for bit.

use std::path::Path;
use std::sync::Arc;
use tessera::graph::Control;
use tessera::runtime::{Advance, LoadOptions, Model, Sampling, Sequence, Session, SessionOptions};
use tessera::runtime::{Phase, Source, Want};
use tessera::tensor::DType;

/// A prompt longer than several pages, with no structure that could hide a misplaced row.
fn prompt(model: &Model, len: usize, salt: u32) -> Vec<u32> {
    let vocab = model.config().text.vocab_size as u32;
    (0..len as u32).map(|i| (i * 7919 + salt * 104729 + i * i * 31) % vocab).collect()
}

fn model(threads: usize) -> Arc<Model> {
    let source = Source::Directory(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/b_llava15_old_f16_sharded/model"),
    );
    let options = LoadOptions { threads: Some(threads), ..LoadOptions::default() };
    Arc::new(Model::load(&source, &options).unwrap())
}

fn session(model: &Arc<Model>) -> Session {
    let options = SessionOptions {
        context: Some(256),
        kv_memory: Some(16 << 20),
        prefill_chunk: 128,
        max_sequences: 5,
        all_logits: true,
        ..SessionOptions::default()
    };
    Session::new(model.clone(), options).unwrap()
}

fn begin(session: &Session, ids: &[u32]) -> Sequence {
    session.sequence(ids, Vec::new(), Sampling::GREEDY).unwrap()
}

/// The bits of the logits of the i-th sequence of the last step.
fn bits(session: &Session, i: usize) -> Vec<Vec<u32>> {
    let mut row = vec![0f32; session.model().config().text.vocab_size];
    (0..session.output_rows(i))
        .map(|r| {
            session.logits(i, r, &mut row).unwrap();
            row.iter().map(|x| x.to_bits()).collect()
        })
        .collect()
}

/// All rows of a prompt's logits, processed in chunks of `chunk`.
fn in_chunks(session: &mut Session, ids: &[u32], chunk: usize) -> Vec<Vec<u32>> {
    let mut sequence = begin(session, ids);
    let mut rows = Vec::new();
    while sequence.pending() > 0 {
        let tokens = sequence.pending().min(chunk);
        let advance = Advance { sequence: &mut sequence, tokens, want: Want::All, phase: Phase::Prefill };
        session.step(&mut [advance], &Control::default()).unwrap();
        rows.extend(bits(session, 0));
    }
    rows
}

#[test]
fn chunks_and_threads_change_no_bit() {
    let reference = {
        let model = model(1);
        in_chunks(&mut session(&model), &prompt(&model, 100, 0), 100)
    };
    assert_eq!(reference.len(), 100);
    for threads in [1, 2, 3] {
        let model = model(threads);
        let mut session = session(&model);
        for chunk in [1, 7, 64, 100] {
            let rows = in_chunks(&mut session, &prompt(&model, 100, 0), chunk);
            assert_eq!(rows, reference, "{threads} threads, chunks of {chunk}");
        }
    }
}

#[test]
fn strangers_and_scattered_pages_change_no_bit() {
    let model = model(2);
    let mut session = session(&model);
    let control = Control::default();
    let ids: Vec<_> = (0..5).map(|salt| prompt(&model, 60 + 13 * salt as usize, salt)).collect();
    let alone: Vec<_> = ids.iter().map(|ids| in_chunks(&mut session, ids, 128)).collect();

    // Interleaved small steps of different sizes make every sequence's pages lie between the others'.
    let mut sequences: Vec<_> = ids.iter().map(|ids| begin(&session, ids)).collect();
    let mut together = vec![Vec::new(); ids.len()];
    for round in 0.. {
        let mut batch = Vec::new();
        let mut who = Vec::new();
        for (i, sequence) in sequences.iter_mut().enumerate() {
            let tokens = sequence.pending().min(1 + (round * 5 + i * 3) % 11);
            if tokens > 0 {
                // Decode rows are packed before prefill rows, in whatever order the batch has them.
                let phase = if (round + i) % 2 == 0 { Phase::Prefill } else { Phase::Decode };
                batch.push(Advance { sequence, tokens, want: Want::All, phase });
                who.push(i);
            }
        }
        if batch.is_empty() {
            break;
        }
        session.step(&mut batch, &control).unwrap();
        for (slot, &i) in who.iter().enumerate() {
            together[i].extend(bits(&session, slot));
        }
    }
    let consecutive = |pages: &[u32]| pages.windows(2).all(|w| w[1] == w[0] + 1);
    assert!(sequences.iter().any(|s| !consecutive(s.page_table().pages())), "pages are scattered");
    assert_eq!(together, alone);
}

/// Two continuations of one prefix are two separate runs, bit for bit, though they share its pages.
#[test]
fn forks_are_separate_runs() {
    let model = model(2);
    let mut session = session(&model);
    let control = Control::default();
    // 37 positions: two full pages that are shared, and a tail that must be copied.
    let prefix = prompt(&model, 37, 9);
    let tails = [prompt(&model, 30, 10), prompt(&model, 25, 11)];

    let mut trunk = begin(&session, &prefix);
    let advance =
        Advance { tokens: trunk.pending(), sequence: &mut trunk, want: Want::Nothing, phase: Phase::Prefill };
    session.step(&mut [advance], &control).unwrap();
    let free = session.pages().free();
    let mut forks = [session.fork(&trunk), session.fork(&trunk)];
    assert_eq!(session.pages().free(), free, "a fork takes no page");

    let mut made = [Vec::new(), Vec::new()];
    for step in 0..30 {
        let mut batch = Vec::new();
        let mut who = Vec::new();
        for (i, (fork, tail)) in forks.iter_mut().zip(&tails).enumerate() {
            if let Some(&id) = tail.get(step) {
                fork.push(id);
                batch.push(Advance { sequence: fork, tokens: 1, want: Want::All, phase: Phase::Decode });
                who.push(i);
            }
        }
        session.step(&mut batch, &control).unwrap();
        for (slot, &i) in who.iter().enumerate() {
            made[i].extend(bits(&session, slot));
        }
    }
    let tables = [&trunk, &forks[0], &forks[1]].map(|s| s.page_table());
    session.pages().check_integrity(tables).unwrap();
    assert_eq!(tables[0].pages()[..2], tables[1].pages()[..2], "full pages are shared");
    assert_ne!(tables[1].pages()[2], tables[2].pages()[2], "tails are not");

    for (tail, made) in tails.iter().zip(&made) {
        let whole: Vec<u32> = prefix.iter().chain(tail).copied().collect();
        let separate = in_chunks(&mut session, &whole, 128);
        assert_eq!(made[..], separate[prefix.len()..]);
    }
    drop((trunk, forks));
    assert_eq!(session.pages().free(), session.pages().total());
}

/// Pages that another sequence filled, even with NaN, do not reach a new one.
#[test]
fn what_a_page_held_before_does_not_matter() {
    let model = model(2);
    let mut session = session(&model);
    let ids = prompt(&model, 45, 3);
    let fresh = in_chunks(&mut session, &ids, 64);
    session.fill_kv(f32::NAN).unwrap();
    assert_eq!(in_chunks(&mut session, &ids, 7), fresh);
}

#[test]
fn a_full_cache_is_an_error_that_changes_nothing() {
    let model = model(1);
    let page_bytes = tessera::runtime::kv::page_bytes(&model.config().text, DType::F32) as u64;
    let options = SessionOptions {
        context: Some(256),
        kv_memory: Some(3 * page_bytes),
        prefill_chunk: 64,
        max_sequences: 2,
        all_logits: true,
        ..SessionOptions::default()
    };
    let mut session = Session::new(model.clone(), options).unwrap();
    let control = Control::default();
    let (mut a, mut b) = (begin(&session, &prompt(&model, 30, 1)), begin(&session, &prompt(&model, 30, 2)));
    let mut batch = [
        Advance { tokens: 30, sequence: &mut a, want: Want::Next, phase: Phase::Prefill },
        Advance { tokens: 30, sequence: &mut b, want: Want::Next, phase: Phase::Prefill },
    ];
    let text = session.step(&mut batch, &control).unwrap_err().to_string();
    assert!(text.contains("2 more pages") && text.contains("1 of 3 are free"), "{text}");
    assert_eq!((a.cached(), b.cached()), (0, 0));
    assert_eq!(session.pages().free(), 3);
    session
        .step(
            &mut [Advance { tokens: 30, sequence: &mut a, want: Want::Next, phase: Phase::Prefill }],
            &control,
        )
        .unwrap();
    assert_eq!(a.cached(), 30);
}

/// A cancelled step leaves the sequence where it was, and the same step can be taken again.
#[test]
fn a_cancelled_step_can_be_repeated() {
    let model = model(1);
    let mut session = session(&model);
    let ids = prompt(&model, 50, 4);
    let whole = in_chunks(&mut session, &ids, 128);
    let mut sequence = begin(&session, &ids);
    let control = Control::default();
    session
        .step(
            &mut [Advance {
                sequence: &mut sequence,
                tokens: 20,
                want: Want::Nothing,
                phase: Phase::Prefill,
            }],
            &control,
        )
        .unwrap();
    control.cancel();
    let advance = Advance { sequence: &mut sequence, tokens: 30, want: Want::All, phase: Phase::Prefill };
    assert!(matches!(session.step(&mut [advance], &control), Err(tessera::Error::Cancelled)));
    assert_eq!(sequence.cached(), 20);
    control.reset();
    session
        .step(
            &mut [Advance { sequence: &mut sequence, tokens: 30, want: Want::All, phase: Phase::Prefill }],
            &control,
        )
        .unwrap();
    assert_eq!(bits(&session, 0)[..], whole[20..]);
}
