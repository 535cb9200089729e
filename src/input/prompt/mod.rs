//! Prompts: a conversation or a raw text to token ids with every image token in place, and ids back to
//! text as they are made.
//!
//! A conversation goes through the checkpoint's chat template ([`ChatTemplate`]), the text through its
//! tokenizer ([`Tokenizer`]), and each image's placeholder becomes the image's tokens ([`expand`]). What
//! users write is text and nothing else: it is never a placeholder or a control token.
//!
//! CLIP's text tower reads no conversations, and has a tokenizer of its own ([`ClipTokenizer`]).

mod clip;
mod expand;
mod functions;
mod message;
mod stop;
mod stream;
mod template;
mod tokenizer;

pub use clip::{ClipTokenizer, ClipTokens};
pub use expand::{ImageSpan, Prompt, expand};
pub use message::{Content, Conversation, IMAGE_MARK, ImageSource, Message, Part};
pub use stop::StopStrings;
pub use stream::TextStream;
pub use template::{ChatTemplate, Rendered};
pub use tokenizer::Tokenizer;

use crate::error::{Error, Result};
use crate::folder::Folder;

/// Makes prompts for one model.
pub struct Prompter {
    template: ChatTemplate,
    tokenizer: Tokenizer,
    image_token: Option<ImageToken>,
}

/// The image placeholder: its id, and how it is written.
struct ImageToken {
    id: u32,
    text: String,
}

impl Prompter {
    /// Template and tokenizer of the checkpoint in `folder`. `vocab_size` is the number of rows of the
    /// model's embedding, `image_token` the id of its image placeholder, `None` for a text model.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], [`Error::Template`], [`Error::Config`] or [`Error::Io`] for a file that is
    /// malformed, or does not fit the model.
    pub fn load(folder: &Folder, vocab_size: usize, image_token: Option<u32>) -> Result<Self> {
        let tokenizer = Tokenizer::load(folder, vocab_size, image_token)?;
        let image_token =
            image_token.map(|id| ImageToken { id, text: tokenizer.token(id).unwrap_or_default() });
        Ok(Prompter { template: ChatTemplate::load(folder)?, tokenizer, image_token })
    }

    /// The same with another template than the checkpoint's.
    pub fn with_template(self, template: ChatTemplate) -> Self {
        Prompter { template, ..self }
    }

    /// The template in use.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The text of a conversation as the template writes it, up to where the assistant speaks; each
    /// image is one placeholder.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::render`].
    pub fn render(&self, messages: &[Message]) -> Result<Rendered> {
        self.template.render(messages, self.image_token.as_ref().map_or(IMAGE_MARK, |token| &token.text))
    }

    /// The prompt of a conversation. `tokens_per_image` has an entry for each image in it, in order.
    ///
    /// BOS is added as Hugging Face does: for a model with images by the tokenizer, unless the template
    /// wrote it; for a text model the template has the only say.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::render`] and [`expand`], and [`Error::Prompt`] if a text holds a control
    /// token that cannot be told from the template's own.
    pub fn conversation(&self, messages: &[Message], tokens_per_image: &[usize]) -> Result<Prompt> {
        let rendered = self.render(messages)?;
        let user = match rendered.user {
            Some(user) => user,
            None => self.without_control_tokens(messages)?,
        };
        let add_special = self.image_token.is_some() || self.template.is_built_in();
        let ids = self.tokenizer.encode_with_user_text(&rendered.text, &user, add_special)?;
        self.expand(&ids, tokens_per_image)
    }

    /// The prompt of a text that is taken verbatim: `<image>` is a placeholder, and special tokens are
    /// what the tokenizer says. BOS is added by the tokenizer, unless the text begins with it.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`] and [`expand`].
    pub fn raw(&self, text: &str, tokens_per_image: &[usize]) -> Result<Prompt> {
        let ids = match &self.image_token {
            Some(token) => self.tokenizer.encode(&text.replace(IMAGE_MARK, &token.text), true)?,
            None => self.tokenizer.encode(text, true)?,
        };
        self.expand(&ids, tokens_per_image)
    }

    fn expand(&self, ids: &[u32], tokens_per_image: &[usize]) -> Result<Prompt> {
        expand(ids, self.image_token.as_ref().map(|token| token.id), tokens_per_image)
    }

    /// No range at all, if no text of `messages` holds a control token.
    fn without_control_tokens(&self, messages: &[Message]) -> Result<Vec<std::ops::Range<usize>>> {
        let texts = || messages.iter().flat_map(Message::texts);
        match self.tokenizer.control_tokens().find(|token| texts().any(|text| text.contains(token))) {
            None => Ok(Vec::new()),
            Some(token) => Err(Error::Prompt(format!(
                "a text holds {token:?}, and the chat template {} changes texts in a way that hides whose it \
                 is; remove it, or write the whole prompt with --raw",
                self.template.name()
            ))),
        }
    }
}
