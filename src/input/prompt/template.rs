//! Chat templates: the checkpoint's own Jinja program makes one text of a conversation.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use minijinja::machinery::{CodeGenerator, Instructions, Vm, WhitespaceConfig, make_string_output, parse};
use minijinja::{AutoEscape, Environment, context};
use serde_json::{Map, Value, json};

use super::message::{Content, Message, Part};
use super::styles::Style;
use super::{budget, functions, message};
use crate::error::{Error, Result};
use crate::folder::{Folder, read_file};

/// Instructions a template may execute, a tenth of a second. Real templates need some ten thousand at the
/// start (macros for tools) and about a hundred for a message. This ends every loop; memory is bounded by
/// [`budget`].
const FUEL: u64 = 1_000_000;
/// Nested macro calls and loops; real templates stay below ten.
const RECURSION: usize = 64;
/// The longest template in bytes; real ones have up to 30 kB.
const MAX_TEMPLATE: usize = 128 << 10;
/// Stack for the template engine, which descends into expressions and values without looking how deep they
/// are: room for one level per byte of [`MAX_TEMPLATE`], or per few instructions of [`FUEL`]. Only pages
/// that are touched take memory.
const STACK: usize = 512 << 20;

/// A compiled chat template with the special tokens it may name.
pub struct ChatTemplate {
    /// Where it came from, for errors and `inspect`.
    name: String,
    source: String,
    environment: Environment<'static>,
    /// `bos_token` and its like, for the template to write.
    special_tokens: Map<String, Value>,
    takes: ContentForm,
    /// What a built-in template is filled with.
    style: Option<&'static Style>,
}

/// The form of a message's content that a template reads; the other form it drops or fails on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ContentForm {
    String,
    List,
    Either,
}

/// A rendered conversation.
#[derive(Debug, PartialEq)]
pub struct Rendered {
    /// The whole text.
    pub text: String,
    /// The bytes of `text` that messages brought, as sorted, disjoint ranges; the others are the
    /// template's. `None` if that cannot be told, because the template looks into the texts.
    pub user: Option<Vec<Range<usize>>>,
}

impl ChatTemplate {
    /// The template of the checkpoint in `folder`: `chat_template.jinja`, else `chat_template.json`, else
    /// the one in `tokenizer_config.json`, else Vicuna's as LLaVA-1.5 has it.
    ///
    /// # Errors
    /// [`Error::Template`], [`Error::Config`] or [`Error::Checkpoint`] if the first of these files that
    /// exists, or `tokenizer_config.json`, is malformed.
    pub fn load(folder: &Folder) -> Result<Self> {
        const JINJA: &str = "chat_template.jinja";
        let special_tokens = special_tokens(folder)?;
        if let Some(bytes) = folder.read(JINJA)? {
            let file = folder.path(JINJA);
            return Self::compile(&file.display().to_string(), text(bytes, &file)?, special_tokens, None);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let file = folder.path(name);
            let config = read_object(folder, name)?;
            if let Some(template) = config.get("chat_template").filter(|template| !template.is_null()) {
                let source = default_source(template, &file)?;
                return Self::compile(&file.display().to_string(), source, special_tokens, None);
            }
        }
        Self::built_in(Style::vicuna(), special_tokens)
    }

    /// The template of an original LLaVA, which its names tell, the first that does. Templates in its files are those
    /// of the language model that it was made from, and not looked at.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if `tokenizer_config.json` is malformed.
    pub fn of_original<S: AsRef<str>>(names: &[S], folder: &Folder) -> Result<Self> {
        Self::built_in(Style::of_original(names), special_tokens(folder)?)
    }

    /// The template that a user names instead of the checkpoint's: a conversation style by one of its names
    /// (`vicuna`, and those of the original's `conversation.py`), or a Jinja file. The special tokens it may write are still those of the checkpoint in `folder`.
    ///
    /// # Errors
    /// [`Error::Option`] if it is neither, [`Error::Template`] if it is malformed.
    pub fn named(name: &str, folder: &Folder) -> Result<Self> {
        let special_tokens = special_tokens(folder)?;
        if let Some(style) = Style::find(name) {
            return Self::built_in(style, special_tokens);
        }
        match read_file(Path::new(name))? {
            Some(bytes) => Self::compile(name, text(bytes, Path::new(name))?, special_tokens, None),
            None => Err(Error::option(
                "--template",
                format!("a conversation style ({}) or a Jinja file", Style::list()),
                name,
            )),
        }
    }

    fn built_in(style: &'static Style, special_tokens: Map<String, Value>) -> Result<Self> {
        Self::compile(style.names[0], style.source.into(), special_tokens, Some(style))
    }

    fn compile(
        name: &str,
        source: String,
        special_tokens: Map<String, Value>,
        style: Option<&'static Style>,
    ) -> Result<Self> {
        if source.len() > MAX_TEMPLATE {
            let problem = format!("{} bytes long, expected at most {MAX_TEMPLATE}", source.len());
            return Err(Error::Template { name: name.into(), problem });
        }
        let mut environment = Environment::new();
        environment.set_recursion_limit(RECURSION);
        environment.set_fuel(Some(FUEL));
        functions::add_to(&mut environment);
        budget::add_to(&mut environment);
        let source = functions::without_generation_blocks(&source);
        let source = on_deep_stack(name, || {
            let source = budget::without_constants(&source)?;
            program(&source)?;
            Ok(source)
        })?;
        let mut template = ChatTemplate {
            name: name.into(),
            source,
            environment,
            special_tokens,
            takes: ContentForm::Either,
            style,
        };
        template.takes = template.probe();
        Ok(template)
    }

    /// Which form of content the template shows. Text models are written for strings and fail on lists
    /// or print their structure; LLaVA's are written for lists and silently drop strings.
    fn probe(&self) -> ContentForm {
        const TEXT: &str = "probe-text-3141592653";
        const STRUCTURE: &str = "probe-structure-2718281828";
        let shows = |content: Value| {
            let text = self.run(json!([{"role": "user", "content": content}])).unwrap_or_default();
            text.contains(TEXT) && !text.contains(STRUCTURE)
        };
        match (shows(json!(TEXT)), shows(json!([{"type": "text", "text": TEXT, "extra": STRUCTURE}]))) {
            (true, true) => ContentForm::Either,
            (false, true) => ContentForm::List,
            // A template that shows neither wants more than one user turn; most of those take strings.
            (_, false) => ContentForm::String,
        }
    }

    /// Renders a conversation, up to the point where the assistant speaks. Where the template has no
    /// place of its own for an image, `image_token` is written.
    ///
    /// # Errors
    /// [`Error::Template`] if the template fails, refuses the conversation, loops or writes without end;
    /// [`Error::Prompt`] for a role that is no name.
    pub fn render(&self, messages: &[Message], image_token: &str) -> Result<Rendered> {
        for (i, message) in messages.iter().enumerate() {
            message::check_role(&message.role, &format!("messages[{i}]"))?;
        }
        let as_is = |text: &str| text.to_string();
        let text = self.run(self.messages(messages, image_token, &as_is))?;

        // The same once more with marks around the users' texts shows where they came to stand. A
        // template that decides by the texts themselves may write something else: then nothing is known.
        let marks = Marks::absent_from(messages);
        let marked = self.run(self.messages(messages, image_token, &|text| marks.around(text)));
        let user = marked.ok().and_then(|marked| marks.find(&marked));
        let user = user.filter(|(unmarked, _)| *unmarked == text).map(|(_, ranges)| ranges);
        Ok(Rendered { text, user })
    }

    /// Where the template came from: a file, or the name of a style.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether this is no checkpoint's or user's template: it leaves BOS to the tokenizer.
    pub(super) fn is_built_in(&self) -> bool {
        self.style.is_some()
    }

    /// What ends an answer in this style, besides the model's end tokens: a token, or words.
    pub fn stop(&self) -> Option<&'static str> {
        self.style?.stop
    }

    fn run(&self, messages: Value) -> Result<String> {
        on_deep_stack(&self.name, || {
            let context = context! {
                messages,
                add_generation_prompt => true,
                tools => (),
                documents => (),
                system => self.style.map_or("", |style| style.system),
                separator => self.style.map_or("", |style| style.separator),
                ..minijinja::Value::from_serialize(&self.special_tokens)
            };
            let (instructions, blocks) = program(&self.source)?;
            let mut text = String::new();
            let mut out = make_string_output(&mut text);
            Vm::new(&self.environment).eval(&instructions, context, &blocks, &mut out, AutoEscape::None)?;
            drop(out);
            budget::bounded(text)
        })
    }

    /// The messages in the form that the template takes, `user` applied to each text.
    fn messages(&self, messages: &[Message], image_token: &str, user: &dyn Fn(&str) -> String) -> Value {
        let content = |content: &Content| match (content, self.takes) {
            (Content::Text(text), ContentForm::List) => json!([{"type": "text", "text": user(text)}]),
            (Content::Text(text), _) => json!(user(text)),
            (Content::Parts(parts), ContentForm::String) => json!(as_string(parts, image_token, user)),
            (Content::Parts(parts), _) => as_list(parts, image_token, user),
        };
        messages.iter().map(|m| json!({"role": m.role, "content": content(&m.content)})).collect()
    }
}

/// Parts for a template that reads lists; an inline image joins the texts on its sides.
fn as_list(parts: &[Part], image_token: &str, user: &dyn Fn(&str) -> String) -> Value {
    let mut list: Vec<Value> = Vec::new();
    let mut joins = false;
    for part in parts {
        let (text, inline) = match part {
            Part::Image => {
                list.push(json!({"type": "image"}));
                joins = false;
                continue;
            }
            Part::Text(text) => (user(text), false),
            Part::InlineImage => (image_token.into(), true),
        };
        match list.last_mut().and_then(|last| last.get_mut("text")) {
            Some(Value::String(before)) if joins || inline => before.push_str(&text),
            _ => list.push(json!({"type": "text", "text": text})),
        }
        joins = inline;
    }
    list.into()
}

/// Parts for a template that reads strings: images first, as LLaVA was trained, then the texts.
fn as_string(parts: &[Part], image_token: &str, user: &dyn Fn(&str) -> String) -> String {
    let images = parts.iter().filter(|part| **part == Part::Image).count();
    let texts = as_list(parts, image_token, user);
    let texts: Vec<&str> =
        texts.as_array().into_iter().flatten().filter_map(|t| t["text"].as_str()).collect();
    format!("{image_token}\n").repeat(images) + &texts.join("\n")
}

/// Two strings that stand in no message, to be put around what users wrote.
struct Marks {
    open: String,
    close: String,
}

impl Marks {
    /// Private-use characters around a number: no case, no white space, nothing to escape.
    fn absent_from(messages: &[Message]) -> Self {
        let marks =
            |n: u32| Marks { open: format!("\u{E000}{n}\u{E001}"), close: format!("\u{E001}{n}\u{E000}") };
        let is_absent = |marks: &Marks| {
            let mut texts = messages.iter().flat_map(Message::texts);
            !texts.any(|text| text.contains(&marks.open) || text.contains(&marks.close))
        };
        (0..).map(marks).find(is_absent).expect("a finite text lacks some number")
    }

    /// `text` with marks inside its outer white space, which templates trim and which is no token.
    fn around(&self, text: &str) -> String {
        let core = text.trim();
        if core.is_empty() {
            return text.into();
        }
        let start = text.len() - text.trim_start().len();
        [&text[..start], &self.open, core, &self.close, &text[start + core.len()..]].concat()
    }

    /// The text without marks, and what stood between them; `None` if they are not in pairs.
    fn find(&self, marked: &str) -> Option<(String, Vec<Range<usize>>)> {
        let mut text = String::with_capacity(marked.len());
        let mut ranges = Vec::new();
        let mut sections = marked.split(&self.open);
        text.push_str(sections.next()?);
        for section in sections {
            let (user, template) = section.split_once(&self.close)?;
            ranges.push(text.len()..text.len() + user.len());
            text.push_str(user);
            text.push_str(template);
        }
        (!text.contains(&self.close)).then_some((text, ranges))
    }
}

/// A compiled template with its blocks, paying for what it makes. White space is treated as by transformers.
#[allow(clippy::type_complexity)]
fn program(
    source: &str,
) -> std::result::Result<(Instructions<'_>, BTreeMap<&str, Instructions<'_>>), minijinja::Error> {
    let blanks = WhitespaceConfig { trim_blocks: true, lstrip_blocks: true, ..Default::default() };
    let tree = parse(source, "template", Default::default(), blanks)?;
    let mut generator = CodeGenerator::new("template", source);
    generator.compile_stmt(&tree);
    let (instructions, blocks) = generator.finish();
    let blocks = blocks.iter().map(|(name, block)| (*name, budget::metered(block))).collect();
    Ok((budget::metered(&instructions), blocks))
}

/// A template as JSON has it: a string, or a list of named ones, of which `default` is meant.
fn default_source(template: &Value, file: &Path) -> Result<String> {
    let named =
        |name: &str| template.as_array()?.iter().find(|entry| entry["name"] == name)?["template"].as_str();
    let source = template.as_str().or_else(|| named("default"));
    source.map(String::from).ok_or_else(|| Error::Config {
        file: file.into(),
        key: "chat_template".into(),
        expected: "a string, or a list of {name, template} with one named \"default\"".into(),
        found: template.to_string().chars().take(200).collect(),
    })
}

/// `bos_token` and its like of `tokenizer_config.json`, each a string or an object with `content`.
fn special_tokens(folder: &Folder) -> Result<Map<String, Value>> {
    let config = read_object(folder, "tokenizer_config.json")?;
    let tokens = config.into_iter().filter(|(key, _)| key.ends_with("_token"));
    let text = |value: Value| value.as_str().or(value["content"].as_str()).map(|text| json!(text));
    Ok(tokens.filter_map(|(key, value)| Some((key, text(value)?))).collect())
}

/// The JSON object in a file; empty if there is no such file.
fn read_object(folder: &Folder, name: &str) -> Result<Map<String, Value>> {
    let Some(bytes) = folder.read(name)? else { return Ok(Map::new()) };
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::checkpoint(folder.path(name), format!("expected a JSON object: {e}")))
}

/// The text in the bytes of `file`.
fn text(bytes: Vec<u8>, file: &Path) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| Error::checkpoint(file, "expected UTF-8 text"))
}

/// Runs the template engine on a stack of [`STACK`] bytes.
fn on_deep_stack<T: Send>(
    name: &str,
    work: impl FnOnce() -> std::result::Result<T, minijinja::Error> + Send,
) -> Result<T> {
    let error = |problem| Error::Template { name: name.into(), problem };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK);
        let thread = thread.spawn_scoped(scope, || work().map_err(|e| words(&e)));
        let thread = thread.map_err(|e| error(format!("no thread to run it: {e}")))?;
        thread.join().unwrap_or_else(|_| Err("the template engine failed".into())).map_err(error)
    })
}

/// An error of the template engine with its causes.
fn words(error: &minijinja::Error) -> String {
    let mut problem = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        problem = format!("{problem}: {inner}");
        cause = inner.source();
    }
    problem
}
