//! What a chat template may use of memory and time, however hostile it is.
//!
//! The template engine counts instructions, and one instruction can double a string. So the compiled program is
//! rewritten: whatever makes a value is followed by a call that weighs the value and pays for it from a budget,
//! and what could make much from little (repetition, replacement, padding) pays beforehand. A value weighs
//! what it would if nothing in it were shared, so that no text made of it is much longer than its weight; all
//! that a rendering ever makes is then bounded by [`MEMORY`].
//!
//! The rewriting needs the engine's `unstable_machinery`, whose version `Cargo.toml` fixes.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use minijinja::machinery::{Instruction, Instructions, Token, WhitespaceConfig, tokenize};
use minijinja::value::{Object, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, filters};
use minijinja_contrib::pycompat;

/// Bytes of all values and texts that one rendering makes, each counted whenever it is made. Templates make a
/// conversation some ten times over.
const MEMORY: u64 = 32 << 20;
/// The longest text in bytes, of a value or rendered: some two hundred contexts of 4096 tokens.
const MAX_TEXT: usize = 4 << 20;
/// What a value takes besides its text.
const VALUE: u64 = 32;
/// A rendering takes milliseconds; this ends one that compares long texts over and over.
const TIME: Duration = Duration::from_secs(10);

/// Names of the functions that rewritten programs call; no template can write them.
const WEIGHED: &str = "(weighed)";
const HELD: &str = "(held)";
const FACTORS: &str = "(factors)";
const CONCAT: &str = "(concat)";
const ITEM: &str = "(item)";

/// Makes `environment` keep to the budget, in programs that [`metered`] has rewritten.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_function(WEIGHED, |state: &State, value: Value| weighed(state, value, false));
    environment.add_function(HELD, |state: &State, value: Value| weighed(state, value, true));
    environment.add_function(FACTORS, factors);
    environment.add_function(CONCAT, concat);
    environment.add_function(ITEM, |state: &State, item: Value| spend(state, VALUE).map(|()| item));
    environment.set_formatter(write_value);
    // It prints everything there is.
    environment.remove_global("debug");

    let mut pay_before = |name: &'static str, filter: Value| {
        environment.add_filter(name, move |state: &State, args: Rest<Value>| {
            spend(state, made_beside(name, &args)?)?;
            filter.call(state, &args)
        });
    };
    pay_before("batch", Value::from_function(filters::batch));
    pay_before("chain", Value::from_function(filters::chain));
    pay_before("format", Value::from_function(filters::format));
    pay_before("indent", Value::from_function(filters::indent));
    pay_before("items", Value::from_function(filters::items));
    pay_before("join", Value::from_function(filters::join));
    pay_before("lines", Value::from_function(filters::lines));
    pay_before("list", Value::from_function(filters::list));
    pay_before("replace", Value::from_function(filters::replace));
    pay_before("reverse", Value::from_function(filters::reverse));
    pay_before("slice", Value::from_function(filters::slice));
    pay_before("split", Value::from_function(filters::split));
    pay_before("zip", Value::from_function(filters::zip));
    environment.set_unknown_method_callback(|state, value, method, args| {
        let all: Vec<Value> = std::iter::once(value).chain(args).cloned().collect();
        spend(state, made_beside(method, &all)?)?;
        pycompat::unknown_method_callback(state, value, method, args)
    });
}

/// The longest tag in words; real ones have a hundred. The compiler's time grows with the square of it.
const MAX_WORDS: usize = 20_000;

/// A filter that only stands in sources: see [`without_constants`].
const MADE: &str = "made_when_it_runs";

/// The source, with a mark in front of every operator that makes much of little: where both sides are constants, the
/// compiler would do it, and pay for nothing.
pub(super) fn without_constants(source: &str) -> Result<String, Error> {
    let mut marked = String::with_capacity(source.len());
    let (mut done, mut is_first, mut words) = (0, true, 0);
    for token in tokenize(source, false, Default::default(), WhitespaceConfig::default()) {
        let (token, span) = token?;
        words = if matches!(token, Token::VariableStart | Token::BlockStart) { 0 } else { words + 1 };
        if words > MAX_WORDS {
            return Err(refused(format!("an expression of more than {MAX_WORDS} words")));
        }
        // A star in front of a term spreads a list.
        if !is_first && matches!(token, Token::Mul | Token::Plus | Token::Tilde) {
            let at = span.start_offset as usize;
            marked.extend([&source[done..at], "|", MADE, " "]);
            done = at;
        }
        is_first = matches!(token, Token::Comma | Token::ParenOpen | Token::BracketOpen);
    }
    marked.push_str(&source[done..]);
    Ok(marked)
}

/// The same program, paying for what it makes.
pub(super) fn metered<'a>(program: &Instructions<'a>) -> Instructions<'a> {
    use Instruction as I;
    let mut paying = Instructions::new(program.name(), program.source());
    let mut places = Vec::with_capacity(program.len() + 1);
    for at in 0..program.len() as u32 {
        places.push(paying.len() as u32);
        let call = |function, arguments| I::CallFunction(function, Some(arguments));
        let weigh = call(WEIGHED, 1);
        let code = match program.get(at).expect("an instruction at every place").clone() {
            I::ApplyFilter(MADE, ..) => vec![],
            // As a value it goes through `write_value`.
            I::EmitRaw(text) => vec![I::LoadConst(text.into()), I::Emit],
            I::StringConcat => vec![call(CONCAT, 2), weigh],
            // Of two values that are unpacked the first lies on top.
            I::Mul => {
                vec![I::BuildList(Some(2)), call(FACTORS, 1), I::UnpackList(2), I::Swap, I::Mul, weigh]
            }
            // The namespace lies on the value.
            I::SetAttr(name) => vec![I::Swap, call(HELD, 1), I::Swap, I::SetAttr(name)],
            I::Iterate(end) => vec![I::Iterate(end), call(ITEM, 1)],
            makes @ (I::Add
            | I::Slice
            | I::BuildList(_)
            | I::BuildMap(_)
            | I::ApplyFilter(..)
            | I::CallFunction(..)
            | I::CallMethod(..)
            | I::CallObject(_)
            | I::EndCapture) => vec![makes, weigh],
            other => vec![other],
        };
        for instruction in code {
            match program.get_line(at) {
                Some(line) => paying.add_with_line(instruction, line as u16),
                None => paying.add(instruction),
            };
        }
    }
    places.push(paying.len() as u32);
    for at in 0..paying.len() as u32 {
        let target = match paying.get_mut(at) {
            Some(
                I::Iterate(to)
                | I::Jump(to)
                | I::JumpIfFalse(to)
                | I::JumpIfFalseOrPop(to)
                | I::JumpIfTrueOrPop(to)
                | I::BuildMacro(_, to, _),
            ) => to,
            _ => continue,
        };
        *target = places[*target as usize];
    }
    paying
}

/// A rendered text that is not too long.
pub(super) fn bounded(text: String) -> Result<String, Error> {
    if text.len() > MAX_TEXT { Err(too_long()) } else { Ok(text) }
}

/// What is left of a rendering's budget.
#[derive(Debug)]
struct Budget {
    left: AtomicU64,
    end: Instant,
}

impl Object for Budget {}

fn budget(state: &State) -> std::sync::Arc<Budget> {
    state.get_or_set_temp_object("budget", || Budget {
        left: AtomicU64::new(MEMORY),
        end: Instant::now() + TIME,
    })
}

fn spend(state: &State, bytes: u64) -> Result<(), Error> {
    let budget = budget(state);
    let left = budget.left.load(Ordering::Relaxed).checked_sub(bytes).ok_or_else(too_much)?;
    budget.left.store(left, Ordering::Relaxed);
    match Instant::now() < budget.end {
        true => Ok(()),
        false => Err(refused(format!("it takes longer than {} seconds", TIME.as_secs()))),
    }
}

fn refused(problem: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}

fn too_much() -> Error {
    refused(format!("it makes more than {} MiB of text", MEMORY >> 20))
}

fn too_long() -> Error {
    refused(format!("it makes a text longer than {} MiB", MAX_TEXT >> 20))
}

/// Pays for a value, which may be going to stand `inside` of another.
fn weighed(state: &State, value: Value, inside: bool) -> Result<Value, Error> {
    let mut left = budget(state).left.load(Ordering::Relaxed);
    let all = left;
    weigh(&value, inside, &mut left)?;
    spend(state, all - left)?;
    Ok(value)
}

/// Takes what `value` weighs from `left`. A namespace, whose weight changes, may not stand `inside` of another
/// value.
fn weigh(value: &Value, inside: bool, left: &mut u64) -> Result<(), Error> {
    let text = value.as_bytes().map_or(0, <[u8]>::len);
    if text > MAX_TEXT {
        return Err(too_long());
    }
    *left = left.checked_sub(VALUE + text as u64).ok_or_else(too_much)?;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.try_for_each(|item| weigh(&item, true, left))
        }
        ValueKind::Map if inside => {
            immutable(value)?;
            weigh_pairs(value, left)
        }
        ValueKind::Map => weigh_pairs(value, left),
        _ => Ok(()),
    }
}

fn weigh_pairs(map: &Value, left: &mut u64) -> Result<(), Error> {
    let pairs = map.as_object().and_then(|object| object.try_iter_pairs());
    pairs.into_iter().flatten().try_for_each(|(key, value)| {
        weigh(&key, true, left)?;
        weigh(&value, true, left)
    })
}

/// Refuses a namespace, which is no mapping in Jinja either.
fn immutable(value: &Value) -> Result<(), Error> {
    match value.as_object() {
        Some(object) if object.type_name().ends_with("::Namespace") => {
            Err(refused("a namespace is used as a value; its attributes can be".into()))
        }
        _ => Ok(()),
    }
}

/// Pays for a product before it is made, if a factor is a text or a list.
fn factors(state: &State, factors: Value) -> Result<Value, Error> {
    let items: Vec<Value> = factors.try_iter()?.collect();
    let mut left = MEMORY;
    for (item, other) in [(&items[0], &items[1]), (&items[1], &items[0])] {
        if let (None, Some(times)) = (item.as_usize(), other.as_usize()) {
            let before = left;
            weigh(item, false, &mut left)?;
            spend(state, (before - left).saturating_mul(times as u64))?;
        }
    }
    Ok(factors)
}

fn concat(left: Value, right: Value) -> Result<String, Error> {
    let mut text = Bounded { out: String::new(), left: MAX_TEXT };
    write!(text, "{left}{right}").map_err(|_| too_long())?;
    Ok(text.out)
}

/// Writes what a template prints, into the result or into a value.
fn write_value(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    let mut text = Bounded { out, left: MAX_TEXT };
    write!(text, "{value}").map_err(|_| too_long())?;
    let written = MAX_TEXT - text.left;
    spend(state, written as u64)
}

/// A text that may grow by `left` bytes.
struct Bounded<W> {
    out: W,
    left: usize,
}

impl<W: Write> Write for Bounded<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.left = self.left.checked_sub(text.len()).ok_or(fmt::Error)?;
        self.out.write_str(text)
    }
}

/// Bytes that a filter or method may make beside the weight of its arguments, of which the first is its subject.
fn made_beside(name: &str, args: &[Value]) -> Result<u64, Error> {
    let text = |i: usize| args.get(i).and_then(Value::as_str).unwrap_or_default();
    let pieces = |text: &str, between: &str| text.matches(between).count() as u64 + 1;
    let items = |i: usize| args.get(i).and_then(Value::len).unwrap_or(0) as u64;
    Ok(match name {
        "items" | "keys" | "values" | "chain" | "zip" | "reverse" => {
            args.iter().try_for_each(immutable)?;
            0
        }
        "replace" => pieces(text(0), text(1)).saturating_mul(text(2).len() as u64),
        // The filter's subject is the list, the method's is what stands between.
        "join" => (items(0) * text(1).len() as u64).max(items(1) * text(0).len() as u64),
        "indent" => pieces(text(0), "\n").saturating_mul(largest_number(args)),
        "batch" | "slice" => VALUE.saturating_mul(largest_number(args).saturating_add(items(0))),
        "list" => VALUE * text(0).len() as u64,
        "lines" | "splitlines" => VALUE * pieces(text(0), "\n"),
        "split" if text(1).is_empty() => VALUE * text(0).len() as u64,
        "split" => VALUE * pieces(text(0), text(1)),
        "format" => {
            let widths = text(0).split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 3);
            if widths || text(0).contains('*') {
                return Err(refused("a format with a width above 999".into()));
            }
            let mut left = MEMORY;
            args.iter().try_for_each(|arg| weigh(arg, true, &mut left))?;
            text(0).len() as u64 * (1000 + MEMORY - left)
        }
        // The engine's own would count for ever.
        "count" if args.len() > 1 && args[1].as_str() == Some("") => {
            return Err(refused("count: expected a text that is not empty".into()));
        }
        _ => 0,
    })
}

/// The largest integer among arguments, those with names included.
fn largest_number(args: &[Value]) -> u64 {
    let named = args.iter().filter(|arg| arg.is_kwargs()).flat_map(|arg| {
        let names: Vec<Value> = arg.try_iter().into_iter().flatten().collect();
        names.into_iter().filter_map(move |name| arg.get_item(&name).ok())
    });
    args.iter().cloned().chain(named).filter_map(|arg| arg.as_usize()).max().unwrap_or(0) as u64
}
