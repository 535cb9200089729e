//! Conversations: roles, texts and places for images; read from the OpenAI chat format.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde_json::Value;

use crate::error::{Error, Result};

/// How a prompt marks the place of an image, whatever the checkpoint's own token is called.
pub const IMAGE_MARK: &str = "<image>";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who speaks: `user`, `assistant`, `system`, or whatever else the chat template knows.
    /// Letters, digits, `_` and `-` only, because templates write it next to control tokens.
    pub role: String,
    /// What is said and shown.
    pub content: Content,
}

/// The content of a message. Which of the two forms a chat template is given depends on the template;
/// where it takes both, the form written here is kept.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Texts and images in order.
    Parts(Vec<Part>),
}

/// A part of a message's content.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Plain text: nothing in it is ever a placeholder or a control token.
    Text(String),
    /// An image, shown where the chat template shows images.
    Image,
    /// An image at this very place between its neighbouring texts.
    InlineImage,
}

/// Where the bytes of a conversation's image come from.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageSource {
    /// A local file.
    Path(PathBuf),
    /// The decoded bytes of a `data:` URL.
    Bytes(Vec<u8>),
    /// The part names no source: the next image that was given apart from the conversation.
    Given,
}

/// Messages with their images in order of appearance.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// The turns, oldest first.
    pub messages: Vec<Message>,
    /// One for each [`Part::Image`] and [`Part::InlineImage`].
    pub images: Vec<ImageSource>,
}

impl Message {
    /// A text message.
    pub fn text(role: &str, text: impl Into<String>) -> Self {
        Message { role: role.into(), content: Content::Text(text.into()) }
    }

    /// A user's turn with `images` images. Where the text holds `<image>`, the images stand at those
    /// places; otherwise they come first, as the chat template orders them.
    ///
    /// # Errors
    /// [`Error::Prompt`] with both counts if the text places another number of images than given.
    pub fn prompt(text: &str, images: usize) -> Result<Self> {
        let placed = text.matches(IMAGE_MARK).count();
        if placed > 0 && placed != images {
            return Err(Error::Prompt(format!(
                "the text places {placed} images with {IMAGE_MARK}, but {images} were given; \
                 give as many images as there are marks, or leave the marks out to have the images first"
            )));
        }
        let mut parts = vec![Part::Image; if placed == 0 { images } else { 0 }];
        for (i, chunk) in text.split(IMAGE_MARK).enumerate() {
            if i > 0 {
                parts.push(Part::InlineImage);
            }
            if placed == 0 || !chunk.is_empty() {
                parts.push(Part::Text(chunk.into()));
            }
        }
        Ok(Message { role: "user".into(), content: Content::Parts(parts) })
    }

    /// Images that this message shows.
    pub fn images(&self) -> usize {
        match &self.content {
            Content::Text(_) => 0,
            Content::Parts(parts) => parts.iter().filter(|p| !matches!(p, Part::Text(_))).count(),
        }
    }

    /// The texts of this message, in order.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        let (text, parts) = match &self.content {
            Content::Text(text) => (Some(text.as_str()), &[][..]),
            Content::Parts(parts) => (None, parts.as_slice()),
        };
        text.into_iter().chain(parts.iter().filter_map(|part| match part {
            Part::Text(text) => Some(text.as_str()),
            Part::Image | Part::InlineImage => None,
        }))
    }
}

impl Conversation {
    /// Reads the OpenAI chat format: a list of messages, or an object with a `messages` list. A
    /// message has a `role` and a `content`, which is a string or a list of parts:
    /// `{"type": "text", "text": ...}`, `{"type": "image_url", "image_url": {"url": ...}}`, or
    /// `{"type": "image"}` with the source under `image`, `path` or `url`, or with none. Images are
    /// local files, relative to `base`, or base64 `data:` URLs; nothing is fetched.
    ///
    /// # Errors
    /// [`Error::Prompt`] naming the place in the JSON, what was expected there and what was found.
    pub fn parse(json: &str, base: &Path) -> Result<Self> {
        let root: Value = serde_json::from_str(json)
            .map_err(|e| Error::Prompt(format!("the conversation is not valid JSON: {e}")))?;
        let list = root.get("messages").unwrap_or(&root);
        let list = list.as_array().ok_or_else(|| unexpected("messages", "a list of messages", list))?;
        if list.is_empty() {
            return Err(Error::Prompt("messages: expected at least one message, found an empty list".into()));
        }
        let mut images = Vec::new();
        let messages = list
            .iter()
            .enumerate()
            .map(|(i, m)| message(m, &format!("messages[{i}]"), base, &mut images))
            .collect::<Result<_>>()?;
        Ok(Conversation { messages, images })
    }
}

fn message(value: &Value, at: &str, base: &Path, images: &mut Vec<ImageSource>) -> Result<Message> {
    let object = value.as_object().ok_or_else(|| unexpected(at, "an object with role and content", value))?;
    let role = field(value, "role", at)?;
    check_role(&role, at)?;
    let content = match object.get("content").unwrap_or(&Value::Null) {
        Value::String(text) => Content::Text(text.clone()),
        Value::Array(parts) => Content::Parts(
            parts
                .iter()
                .enumerate()
                .map(|(i, p)| part(p, &format!("{at}.content[{i}]"), base, images))
                .collect::<Result<_>>()?,
        ),
        other => return Err(unexpected(&format!("{at}.content"), "a string or a list of parts", other)),
    };
    Ok(Message { role, content })
}

/// A role is written next to control tokens, so it may not hold anything that could be part of one.
pub(super) fn check_role(role: &str, at: &str) -> Result<()> {
    if !role.is_empty() && role.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
        return Ok(());
    }
    Err(Error::Prompt(format!(
        "{at}.role: expected a name such as system, user or assistant, found {}",
        quoted(role)
    )))
}

fn part(value: &Value, at: &str, base: &Path, images: &mut Vec<ImageSource>) -> Result<Part> {
    if !value.is_object() {
        return Err(unexpected(at, "an object with a type", value));
    }
    let source = match field(value, "type", at)?.as_str() {
        "text" => return Ok(Part::Text(field(value, "text", at)?)),
        "image_url" => match &value["image_url"] {
            Value::String(url) => source(url, &format!("{at}.image_url"), base)?,
            object => {
                let at = format!("{at}.image_url");
                source(&field(object, "url", &at)?, &at, base)?
            }
        },
        "image" => match ["image", "path", "url"].into_iter().find(|key| value.get(key).is_some()) {
            Some(key) => source(&field(value, key, at)?, &format!("{at}.{key}"), base)?,
            None => ImageSource::Given,
        },
        other => {
            return Err(Error::Prompt(format!(
                "{at}.type: expected text, image or image_url, found {}",
                quoted(other)
            )));
        }
    };
    images.push(source);
    Ok(Part::Image)
}

/// An image's source from a file name, a `file://` URL or a base64 `data:` URL.
fn source(url: &str, at: &str, base: &Path) -> Result<ImageSource> {
    if let Some(data) = url.strip_prefix("data:") {
        let Some((_, payload)) = data.split_once(";base64,") else {
            let expected = "data:image/...;base64,... ";
            return Err(Error::Prompt(format!("{at}: expected {expected}, found {}", quoted(url))));
        };
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(payload.trim())
            .map_err(|e| Error::Prompt(format!("{at}: the data: URL is not valid base64: {e}")))?;
        return Ok(ImageSource::Bytes(bytes));
    }
    let path = url.strip_prefix("file://").unwrap_or(url);
    if path.contains("://") {
        return Err(Error::Prompt(format!(
            "{at}: expected a local file or a data: URL, found {}; images are not fetched, download it first",
            quoted(url)
        )));
    }
    if path.is_empty() || path.contains('\0') {
        return Err(Error::Prompt(format!("{at}: expected a file name, found {}", quoted(url))));
    }
    Ok(ImageSource::Path(base.join(path)))
}

/// The string under `key` of an object.
fn field(value: &Value, key: &str, at: &str) -> Result<String> {
    let found = value.get(key).unwrap_or(&Value::Null);
    let text = found.as_str().ok_or_else(|| unexpected(&format!("{at}.{key}"), "a string", found))?;
    Ok(text.into())
}

fn unexpected(at: &str, expected: &str, found: &Value) -> Error {
    let found = match found {
        Value::Null => "nothing".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => quoted(s),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    };
    Error::Prompt(format!("{at}: expected {expected}, found {found}"))
}

/// `text` in quotes and on one line, cut after 60 characters: it may be a whole image in base64.
fn quoted(text: &str) -> String {
    let head: String = text.chars().take(60).collect();
    let rest = if head.len() < text.len() { "..." } else { "" };
    format!("{head:?}{rest}")
}
