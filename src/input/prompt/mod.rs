//! Prompts: a conversation or a raw text to token ids with every image token in place, and ids back to
//! text as they are made.
//!
//! A conversation goes through the checkpoint's chat template ([`ChatTemplate`]), the text through its
//! tokenizer ([`Tokenizer`]), and each image's placeholder becomes the image's tokens ([`expand`]). What
//! users write is text and nothing else: it is never a placeholder or a control token.
//!
//! CLIP's text tower reads no conversations, and has a tokenizer of its own ([`ClipTokenizer`]).

mod budget;
mod clip;
mod expand;
mod functions;
mod message;
mod sentencepiece;
mod stop;
mod stream;
mod styles;
mod template;
mod tokenizer;

pub use clip::{ClipTokenizer, ClipTokens, byte_vocabulary};
pub use expand::{ImageSpan, Prompt, expand, splice};
pub use message::{Content, Conversation, IMAGE_MARK, ImageSource, Message, Part};
pub use stop::StopStrings;
pub use stream::TextStream;
pub use template::{ChatTemplate, Rendered};
pub use tokenizer::Tokenizer;

use crate::error::{Error, Result};
use crate::folder::Folder;
use std::ops::Range;

/// Makes prompts for one model.
pub struct Prompter {
    template: ChatTemplate,
    tokenizer: Tokenizer,
    pictures: Pictures,
}

/// What decides about the prompts of an original LLaVA.
#[derive(Clone, Debug)]
pub struct Original {
    /// Its names: they tell the template, and which of its tokenizers the original code loads. The first that
    /// tells a template decides.
    pub names: Vec<String>,
    /// If there are any, a vocabulary that lacks them gets them, in this order, and a picture stands between
    /// `<im_start>` and `<im_end>`.
    pub picture_tokens: &'static [&'static str],
    /// Whether a text is tokenised as a whole, as transformers would, with a token for each picture.
    pub whole: bool,
}

/// How a text says where its pictures are.
enum Pictures {
    /// It has none: the model reads text only.
    None,
    /// A token of the vocabulary stands for a picture, as in transformers: the text is tokenised as a whole.
    Token {
        /// Its id.
        id: u32,
        /// How it is written.
        text: String,
        /// What templates write for a picture: the token, perhaps between two others.
        written: String,
    },
    /// The text is cut where a mark stands and each piece is tokenised by itself, as in the original.
    Cut {
        /// What is cut out.
        at: String,
        /// What templates write for a picture: the mark, perhaps between two tokens of its own.
        written: String,
        /// The id in the prompt at a picture's rows, which is never looked up.
        filler: u32,
    },
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
        let pictures = match image_token {
            None => Pictures::None,
            Some(id) => {
                let text = tokenizer.token(id).unwrap_or_default();
                Pictures::Token { id, written: text.clone(), text }
            }
        };
        Ok(Prompter { template: ChatTemplate::load(folder)?, tokenizer, pictures })
    }

    /// Template and tokenizer of an original LLaVA, whose language model is in `folder`.
    ///
    /// # Errors
    /// As for [`load`](Self::load), and [`Error::Tokenizer`] if the embedding has no rows for picture tokens.
    pub fn load_original(folder: &Folder, vocab_size: usize, original: &Original) -> Result<Self> {
        let mut tokenizer = match original.whole {
            true => Tokenizer::load(folder, vocab_size, None)?,
            false => Tokenizer::load_original(folder, vocab_size, &original.names)?,
        };
        tokenizer.add_special(original.picture_tokens, vocab_size)?;
        let mark = IMAGE_MARK.to_string();
        let written = match original.picture_tokens {
            [] => mark.clone(),
            _ => format!("<im_start>{mark}<im_end>"),
        };
        let pictures = match original.whole {
            false => Pictures::Cut { at: mark, written, filler: 0 },
            // No row of the embedding is its own, and none is looked up.
            true => {
                tokenizer.add_special(&[IMAGE_MARK], usize::MAX)?;
                Pictures::Token { id: tokenizer.id(IMAGE_MARK).unwrap_or_default(), text: mark, written }
            }
        };
        let template = ChatTemplate::of_original(&original.names, folder)?;
        Ok(Prompter { template, tokenizer, pictures })
    }

    /// The same, but text beside a picture is tokenised as the original does, piece by piece.
    pub fn cut_at_pictures(self) -> Self {
        let pictures = match self.pictures {
            Pictures::Token { id, text, written } => Pictures::Cut { at: text, written, filler: id },
            other => other,
        };
        Prompter { pictures, ..self }
    }

    /// Whether the text beside a picture is tokenised piece by piece.
    pub fn cuts_at_pictures(&self) -> bool {
        matches!(self.pictures, Pictures::Cut { .. })
    }

    /// The id of a token that ends an answer because the template says so.
    pub fn stop_token(&self) -> Option<u32> {
        self.tokenizer.id(self.template.stop()?)
    }

    /// Words that end an answer because the template says so.
    pub fn stop_words(&self) -> Option<&'static str> {
        self.template.stop().filter(|stop| self.tokenizer.id(stop).is_none())
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
        let written = match &self.pictures {
            Pictures::None => IMAGE_MARK,
            Pictures::Token { written, .. } | Pictures::Cut { written, .. } => written,
        };
        self.template.render(messages, written)
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
        let add_special = !matches!(self.pictures, Pictures::None) || self.template.is_built_in();
        self.prompt(&rendered.text, &user, add_special, tokens_per_image)
    }

    /// The prompt of a text that is taken verbatim: `<image>` is a placeholder, and special tokens are
    /// what the tokenizer says. BOS is added by the tokenizer, unless the text begins with it.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`] and [`expand`].
    pub fn raw(&self, text: &str, tokens_per_image: &[usize]) -> Result<Prompt> {
        match &self.pictures {
            Pictures::None => self.prompt(text, &[], true, tokens_per_image),
            Pictures::Token { text: mark, .. } | Pictures::Cut { at: mark, .. } => {
                self.prompt(&text.replace(IMAGE_MARK, mark), &[], true, tokens_per_image)
            }
        }
    }

    /// The prompt of `text`, of which the ranges `user` are plain text.
    fn prompt(
        &self,
        text: &str,
        user: &[Range<usize>],
        add_special: bool,
        tokens_per_image: &[usize],
    ) -> Result<Prompt> {
        let whole = || self.tokenizer.encode_with_user_text(text, user, add_special);
        match &self.pictures {
            Pictures::None => expand(&whole()?, None, tokens_per_image),
            Pictures::Token { id, .. } => expand(&whole()?, Some(*id), tokens_per_image),
            Pictures::Cut { at, filler, .. } => {
                let mut pieces = Vec::new();
                for piece in cut(text, user, at) {
                    let inside =
                        user.iter().filter(|user| piece.start <= user.start && user.end <= piece.end);
                    let inside: Vec<_> =
                        inside.map(|user| user.start - piece.start..user.end - piece.start).collect();
                    let begins = pieces.is_empty();
                    let mut ids =
                        self.tokenizer.encode_with_user_text(&text[piece], &inside, add_special && begins)?;
                    // BOS stands before the first piece alone, what a tokenizer puts behind a text after each.
                    if add_special && !begins {
                        ids.extend_from_slice(self.tokenizer.ending());
                    }
                    pieces.push(ids);
                }
                splice(&pieces, *filler, tokens_per_image)
            }
        }
    }

    /// No range at all, if no text of `messages` holds a control token.
    fn without_control_tokens(&self, messages: &[Message]) -> Result<Vec<std::ops::Range<usize>>> {
        let texts = || messages.iter().flat_map(Message::texts);
        let mark = match &self.pictures {
            Pictures::Cut { at, .. } => Some(at.as_str()),
            Pictures::None | Pictures::Token { .. } => None,
        };
        let mut control = self.tokenizer.control_tokens().chain(mark);
        match control.find(|token| texts().any(|text| text.contains(token))) {
            None => Ok(Vec::new()),
            Some(token) => Err(Error::Prompt(format!(
                "a text holds {token:?}, and the chat template {} changes texts in a way that hides whose it \
                 is; remove it, or write the whole prompt with --raw",
                self.template.name()
            ))),
        }
    }
}

/// The pieces of `text` between the places where `mark` stands outside the ranges `user`.
fn cut(text: &str, user: &[Range<usize>], mark: &str) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices(mark) {
        let span = at..at + mark.len();
        if !tokenizer::overlaps(&span, user) {
            pieces.push(start..span.start);
            start = span.end;
        }
    }
    pieces.push(start..text.len());
    pieces
}
