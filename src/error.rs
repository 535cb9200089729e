//! The one error type. Every variant names the thing that is wrong (a file, a tensor, an option, an
//! op), what was expected, what was found, and, where there is a choice, what to do about it.
//!
//! Errors are for people: no variant carries an address, and none is made by a panic caught in
//! library code except around what reads untrusted files for us: image decoders and the tokenizers library.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, in words a user can act on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A checkpoint file is malformed or incomplete.
    #[error("{file}: {problem}", file = file.display())]
    Checkpoint {
        /// The file that is wrong.
        file: PathBuf,
        /// What is wrong with it, what was expected, and what to do.
        problem: String,
    },
    /// A value in a JSON file (config, preprocessor, generation config, index) cannot be used.
    #[error("{file}: `{key}` is {found}, expected {expected}", file = file.display())]
    Config {
        /// The JSON file.
        file: PathBuf,
        /// The key, with its parents, as `text_config.hidden_size`.
        key: String,
        /// What the value must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A tensor is missing, or has the wrong shape or dtype.
    #[error("tensor `{name}`: expected {expected}, found {found}")]
    Tensor {
        /// The tensor's name as it stands in the checkpoint.
        name: String,
        /// Shape and dtypes that would do.
        expected: String,
        /// What the checkpoint has.
        found: String,
    },
    /// Image bytes could not be turned into pixels.
    #[error("image {name}: {problem}")]
    Image {
        /// The file name, or where the bytes came from.
        name: String,
        /// What is wrong, and what would be accepted.
        problem: String,
    },
    /// A prompt or a conversation cannot be used as given.
    #[error("prompt: {0}")]
    Prompt(String),
    /// A chat template is malformed, loops, or refuses the conversation.
    #[error("chat template {name}: {problem}")]
    Template {
        /// The file the template came from.
        name: String,
        /// What the template engine said.
        problem: String,
    },
    /// A tokenizer file is malformed, or does not fit the model.
    #[error("tokenizer {file}: {problem}", file = file.display())]
    Tokenizer {
        /// The tokenizer file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An option has a value outside its range.
    #[error("option {name}: expected {expected}, found {found}")]
    Option {
        /// The option's name, as the command line spells it.
        name: String,
        /// The values it takes.
        expected: String,
        /// The value given.
        found: String,
    },
    /// The shapes or dtypes of an op's operands do not fit. A bug in a model's author or a checkpoint
    /// whose tensors contradict each other.
    #[error("op {op} `{node}`: expected {expected}, found {found}")]
    Shape {
        /// The op's name.
        op: &'static str,
        /// The graph node's name.
        node: String,
        /// What `Op::infer` wants.
        expected: String,
        /// What it was given.
        found: String,
    },
    /// A request needs more positions than the context holds.
    #[error(
        "{needed} positions are needed ({parts}), the context holds {context}; \
         shorten the prompt, lower --max-tokens or raise --context",
        parts = positions(*prompt, *new)
    )]
    Context {
        /// Prompt and new tokens together, without the last one: nothing comes after it, so it takes no position.
        needed: usize,
        /// Prompt positions, image rows included.
        prompt: usize,
        /// New tokens asked for.
        new: usize,
        /// Positions available.
        context: usize,
    },
    /// The KV page pool has no free page left.
    #[error(
        "the KV cache is full: {needed} more pages of {page_size} positions are needed, {free} of {total} are free; \
         drop a sequence or raise --kv-memory"
    )]
    KvExhausted {
        /// Pages that were asked for.
        needed: usize,
        /// Pages that are free.
        free: usize,
        /// Pages in the pool.
        total: usize,
        /// Positions in a page.
        page_size: usize,
    },
    /// The memory plan does not fit.
    #[error("{what}: {needed} bytes are needed, {available} are available{remedy}")]
    Memory {
        /// What the memory is for.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes at hand.
        available: u64,
        /// What to do, beginning with a separator, or empty.
        remedy: String,
    },
    /// A forward pass made NaN or infinity.
    #[error(
        "the step at position {position} made results that are not finite; the first node to do so is `{node}`{hint}"
    )]
    NonFinite {
        /// Positions that were cached before the step; 0 in a tower and at the start of a prompt.
        position: usize,
        /// The first bad node in execution order.
        node: String,
        /// A likely cause, beginning with a separator, or empty.
        hint: String,
    },
    /// The caller cancelled the request.
    #[error("cancelled")]
    Cancelled,
    /// A device is absent or unusable.
    #[error("device {device}: {problem}")]
    Device {
        /// The device's name, as the command line spells it.
        device: String,
        /// Why it cannot be used, and what to do.
        problem: String,
    },
}

impl Error {
    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }

    /// An [`Error::Checkpoint`] for `file`.
    pub fn checkpoint(file: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Error::Checkpoint { file: file.into(), problem: problem.into() }
    }

    /// The same [`Error::Config`] with words about what was found, if there are any.
    pub fn with_found(mut self, what: Option<&str>) -> Self {
        if let (Error::Config { found, .. }, Some(what)) = (&mut self, what) {
            *found = format!("{found} ({what})");
        }
        self
    }

    /// The same [`Error::Option`] about the option called `name`.
    pub fn about_option(mut self, option: &str) -> Self {
        if let Error::Option { name, .. } = &mut self {
            *name = option.into();
        }
        self
    }

    /// An [`Error::Image`] for the image called `name`.
    pub fn image(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Image { name: name.into(), problem: problem.into() }
    }

    /// An [`Error::Option`] for the option called `name`.
    pub fn option(name: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        Error::Option { name: name.into(), expected: expected.into(), found: found.to_string() }
    }
}

/// What positions are needed for.
fn positions(prompt: usize, new: usize) -> String {
    match new {
        0 => "the prompt alone".into(),
        1 => format!("{prompt} of prompt to generate one token"),
        _ => format!("{prompt} of prompt and all but the last of {new} tokens to generate"),
    }
}

thread_local! {
    /// Calls of [`guarded`] that this thread is inside of.
    static GUARDS: Cell<usize> = const { Cell::new(0) };
}

/// Runs a library that reads untrusted bytes for us; `None` if it panics.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    GUARDS.set(GUARDS.get() + 1);
    let done = catch_unwind(AssertUnwindSafe(work));
    GUARDS.set(GUARDS.get() - 1);
    done.ok()
}

/// Whether a panic of this thread would become an error, as a panic hook may want to know.
pub fn is_guarded() -> bool {
    GUARDS.get() > 0
}
