//! `tessera eval`: exact-match accuracy over a file of questions.

use super::options::{ModelArgs, SessionArgs};
use super::progress;
use crate::error::{Error, Result};
use crate::runtime::{Engine, ImageHandle, Request};
use clap::Args;
use serde::Deserialize;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// The questions that the demo model is held against, in the project's folder.
const OWN: &str = "assets/eval/questions.jsonl";

/// Options of `tessera eval`.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// One JSON object a line: image (relative to the file), question, answer, type
    #[arg(long, value_name = "FILE.jsonl", default_value = OWN)]
    questions: PathBuf,
    /// Another model's answers, line for line (image, question, answer): reports how many agree
    #[arg(long, value_name = "FILE.jsonl")]
    against: Option<PathBuf>,
    /// Ask only the first N questions
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Most tokens of one answer
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// No progress
    #[arg(long)]
    quiet: bool,
}

/// A line of the questions file.
#[derive(Debug, Deserialize)]
struct Question {
    image: PathBuf,
    question: String,
    answer: String,
    #[serde(rename = "type", default = "untyped")]
    kind: String,
}

fn untyped() -> String {
    "question".into()
}

/// A line of another model's answers.
#[derive(Debug, Deserialize)]
struct Given {
    question: String,
    answer: String,
}

/// Right answers of a type of question.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    asked: usize,
    right: usize,
    agree: usize,
}

impl Count {
    fn percent(of: usize, all: usize) -> f64 {
        if all == 0 { 0.0 } else { 100.0 * of as f64 / all as f64 }
    }
}

impl Eval {
    pub fn run(self) -> Result<()> {
        if self.questions == Path::new(OWN) && !self.questions.exists() {
            return Err(Error::option("--questions", "a file, or the project's folder, which has one", OWN));
        }
        let mut questions: Vec<Question> = lines(&self.questions)?;
        questions.truncate(self.limit.unwrap_or(usize::MAX));
        if questions.is_empty() {
            return Err(Error::checkpoint(
                &self.questions,
                "no question is left to ask; a line is one question",
            ));
        }
        let given: Option<Vec<Given>> = self.against.as_deref().map(lines).transpose()?;
        let (source, load) = self.model.load_options()?;
        let mut engine = Engine::load(&source, &load, self.session.session_options())?;
        super::ask::stop_on_ctrl_c(&engine.control)?;

        let base = self.questions.parent().unwrap_or(Path::new(""));
        let mut images: HashMap<PathBuf, ImageHandle> = HashMap::new();
        let mut counts: BTreeMap<String, Count> = BTreeMap::new();
        let bar = match self.quiet {
            true => indicatif::ProgressBar::hidden(),
            false => progress::bar("asking", questions.len() as u64),
        };
        for (i, q) in questions.iter().enumerate() {
            if !images.contains_key(&q.image) {
                let path = base.join(&q.image);
                let image = match engine.image(&path.display().to_string(), &super::read(&path)?) {
                    // Ctrl-C here, as below, reports on the questions that were answered.
                    Err(Error::Cancelled) => break,
                    image => image?,
                };
                images.insert(q.image.clone(), image);
            }
            let request = Request::ask(&q.question, &[images[&q.image].clone()])?;
            let answer =
                engine.generate(&Request { max_tokens: Some(self.max_tokens), ..request }, |_| {})?;
            if engine.control.is_cancelled() {
                break;
            }
            let count = counts.entry(q.kind.clone()).or_default();
            let text = answer.text.trim();
            count.asked += 1;
            count.right += (text == q.answer.trim()) as usize;
            count.agree += self.agrees(given.as_deref(), i, q, text)? as usize;
            bar.inc(1);
        }
        bar.finish_and_clear();
        self.report(&counts)
    }

    fn agrees(&self, given: Option<&[Given]>, i: usize, q: &Question, text: &str) -> Result<bool> {
        let Some(given) = given else { return Ok(false) };
        match given.get(i) {
            Some(line) if line.question == q.question => Ok(line.answer.trim() == text),
            _ => Err(Error::checkpoint(
                self.against.clone().unwrap_or_default(),
                format!("line {} does not answer {:?}", i + 1, q.question),
            )),
        }
    }

    fn report(&self, counts: &BTreeMap<String, Count>) -> Result<()> {
        let mut all = Count::default();
        for count in counts.values() {
            all.asked += count.asked;
            all.right += count.right;
            all.agree += count.agree;
        }
        let rows = counts.iter().map(|(kind, count)| (kind.as_str(), *count)).chain([("all", all)]);
        if self.json {
            let types: serde_json::Map<_, _> = rows
                .map(|(kind, c)| {
                    let mut row = json!({"asked": c.asked, "right": c.right});
                    if self.against.is_some() {
                        row["agree"] = json!(c.agree);
                    }
                    (kind.to_string(), row)
                })
                .collect();
            return super::print(&format!("{}\n", json!({ "model": self.model.model, "types": types })));
        }
        let mut text = format!("{:<16} {:>6} {:>6} {:>8}", "type", "asked", "right", "accuracy");
        text += if self.against.is_some() { "    agree\n" } else { "\n" };
        for (kind, c) in rows {
            text += &format!(
                "{kind:<16} {:>6} {:>6} {:>7.1}%",
                c.asked,
                c.right,
                Count::percent(c.right, c.asked)
            );
            if self.against.is_some() {
                text += &format!(" {:>7.1}%", Count::percent(c.agree, c.asked));
            }
            text.push('\n');
        }
        super::print(&text)
    }
}

/// The objects of a JSON-lines file.
fn lines<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Vec<T>> {
    let bytes = super::read(path)?;
    bytes
        .split(|&b| b == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.trim_ascii().is_empty())
        .map(|(i, line)| {
            serde_json::from_slice(line).map_err(|error| {
                // Its own line number is that of the line by itself.
                let (column, error) = (error.column(), error.to_string());
                let what = error.split(" at line ").next().unwrap_or_default();
                Error::checkpoint(path, format!("line {}, column {column}: {what}", i + 1))
            })
        })
        .collect()
}
