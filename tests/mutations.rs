//! Damaged checkpoint files through the whole program: a byte changed, or the end cut off, in any of the
//! files of a checkpoint; then the model is loaded and makes three tokens. It works or it is an error;
//! nothing panics, and what is allocated stays in proportion.

mod spoilt;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;
use spoilt::{Checkpoint, WEIGHTS};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;

/// Remembers the largest single request of this thread: no file makes us ask for gigabytes at once.
struct Largest;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(bytes: usize) {
    // A thread that is ending has no cell any more.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
}

// SAFETY: every request goes to the system allocator unchanged; the counter is a plain thread-local cell.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller keeps `alloc`'s contract, which is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as for `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as for `alloc`; `pointer` came from this allocator with this layout.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` above with this layout, by the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

/// The rotation table, the largest vector there is, of 4096 positions and 128 columns has 2 MiB; pixels of
/// the largest picture have 192 MiB.
const MOST: usize = 256 << 20;

#[derive(Clone, Debug)]
enum Damage {
    /// Another byte somewhere.
    Byte(Index, u8),
    /// A digit in place of a digit: what keeps JSON valid and changes what it says.
    Digit(Index, u8),
    /// The end cut off.
    Cut(Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        3 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        3 => (any::<Index>(), b'0'..=b'9').prop_map(|(at, digit)| Damage::Digit(at, digit)),
        1 => any::<Index>().prop_map(Damage::Cut),
    ]
}

impl Damage {
    /// Spoils the first `len` bytes.
    fn apply(&self, bytes: &mut Vec<u8>, len: usize) {
        match self {
            Damage::Byte(at, byte) => bytes[at.index(len)] = *byte,
            Damage::Digit(at, digit) => {
                let digits: Vec<_> = (0..len).filter(|&i| bytes[i].is_ascii_digit()).collect();
                if !digits.is_empty() {
                    bytes[digits[at.index(digits.len())]] = *digit;
                }
            }
            Damage::Cut(at) => bytes.truncate(at.index(len)),
        }
    }
}

/// `cases` random damages to `file` of `checkpoint`, `header` telling how many of its bytes may be hit;
/// how many of the damaged checkpoints still answered.
fn survive(checkpoint: &Checkpoint, file: &str, cases: u32, header: impl Fn(&[u8]) -> usize) -> usize {
    let path = checkpoint.path(file);
    let good = fs::read(&path).unwrap();
    let answered = Cell::new(0);
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let result = TestRunner::new(config).run(&damage(), |damage| {
        let mut bytes = good.clone();
        damage.apply(&mut bytes, header(&good));
        fs::write(&path, &bytes).unwrap();
        LARGEST.set(0);
        let answer = checkpoint.answer();
        let largest = LARGEST.get();
        prop_assert!(largest <= MOST, "{file}: asked for {largest} bytes; {answer:?}");
        match answer {
            Ok(_) => answered.set(answered.get() + 1),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
        Ok(())
    });
    fs::write(&path, &good).unwrap();
    result.unwrap_or_else(|error| panic!("{file}: {error}"));
    answered.get()
}

const CASES: u32 = 150;

#[test]
fn damaged_text_files_never_panic() {
    let checkpoint = Checkpoint::copy();
    let files = [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ];
    for file in files {
        let answered = survive(&checkpoint, file, CASES, <[u8]>::len);
        println!("{file}: {answered} of {CASES} answered");
    }
    checkpoint.answer().expect("what was damaged has been restored");
}

#[test]
fn damaged_headers_never_panic() {
    let checkpoint = Checkpoint::copy();
    let header = |bytes: &[u8]| 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let answered = survive(&checkpoint, WEIGHTS, 2 * CASES, header);
    println!("{WEIGHTS}: {answered} of {} answered", 2 * CASES);
    checkpoint.answer().expect("what was damaged has been restored");
}

/// The weights themselves may be any bits: numbers, or NaN, and an error then.
#[test]
fn damaged_weights_never_panic() {
    let checkpoint = Checkpoint::copy();
    let answered = survive(&checkpoint, WEIGHTS, CASES, <[u8]>::len);
    println!("{WEIGHTS}: {answered} of {CASES} answered");
    assert!(answered > 0);
}
