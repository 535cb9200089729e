//! A step allocates nothing: forward pass and sampling, prefill chunk and decode, greedy and drawn.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tessera::graph::Control;
use tessera::model::lora::Lora;
use tessera::runtime::{Advance, LoadOptions, Model, Phase, Sampling, Session, SessionOptions, Source, Want};

/// The folder of the goldens.
fn data() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// Counts allocations of every thread while it is told to.
struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Ordering::Relaxed) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's obligation.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's obligation.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(f: impl FnOnce()) -> usize {
    COUNT.store(0, Ordering::SeqCst);
    COUNTING.store(true, Ordering::SeqCst);
    f();
    COUNTING.store(false, Ordering::SeqCst);
    COUNT.load(Ordering::SeqCst)
}

#[test]
fn a_step_allocates_nothing() {
    assert!(count(|| drop(vec![1u8; 100])) > 0, "the counter counts");
    let adapters = ["one", "two"].map(|name| Lora { dir: data().join("lora_two").join(name), scale: 1.0 });
    for (source, threads, lora) in [
        (Source::Demo, 2, vec![]),
        (Source::Directory(data().join("b_llava15_old_f16_sharded/model")), 1, vec![]),
        (Source::Directory(data().join("j_llama_chatml_f32/model")), 3, vec![]),
        (Source::Directory(data().join("names_saved_v5/model")), 2, adapters.to_vec()),
    ] {
        let options = LoadOptions { threads: Some(threads), lora, ..LoadOptions::default() };
        let model = Arc::new(Model::load(&source, &options).unwrap());
        let options = SessionOptions {
            context: Some(200),
            kv_memory: Some(32 << 20),
            prefill_chunk: 64,
            max_sequences: 3,
            all_logits: false,
            ..SessionOptions::default()
        };
        let mut session = Session::new(model, options).unwrap();
        let drawn = Sampling {
            temperature: 0.8,
            top_k: 50,
            top_p: 0.9,
            min_p: 0.01,
            repetition_penalty: 1.1,
            seed: 7,
        };
        let ids: Vec<u32> = (5..90).collect();
        let mut sequences = [Sampling::GREEDY, drawn, drawn]
            .map(|sampling| session.sequence(&ids, Vec::new(), sampling).unwrap());
        let control = Control::default();
        let allocations = count(|| {
            for step in 0..30 {
                let mut batch = sequences.each_mut().map(|sequence| {
                    let tokens = sequence.pending().min(21);
                    let phase = if tokens == 1 { Phase::Decode } else { Phase::Prefill };
                    let want = if step < 4 { Want::Nothing } else { Want::Next };
                    Advance { sequence, tokens, want, phase }
                });
                session.step(&mut batch, &control).unwrap();
                for (i, sequence) in sequences.iter_mut().enumerate() {
                    if sequence.pending() == 0 {
                        let id = if step < 4 { 5 } else { session.next(i) };
                        sequence.push(id);
                    }
                }
            }
        });
        assert_eq!(allocations, 0, "{source} with {threads} threads");
    }
}
