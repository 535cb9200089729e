//! The conversation styles that LLaVA's authors published, and which of them a checkpoint was made for.

/// A conversation style: a template, and what it is filled with.
#[derive(Debug)]
pub(super) struct Style {
    /// Its names; the first is the one that is shown.
    pub names: &'static [&'static str],
    /// The Jinja template.
    pub source: &'static str,
    /// The system prompt where the conversation has none.
    pub system: &'static str,
    /// What stands before an instruction, for templates that have such a place.
    pub separator: &'static str,
    /// What ends an answer, besides the model's end tokens.
    pub stop: Option<&'static str>,
}

const NO_STYLE: Style = Style { names: &[], source: "", system: "", separator: "", stop: None };

const TWO: &str = include_str!("styles/two.jinja");
const LLAMA_2: &str = include_str!("styles/llama_2.jinja");
const CHATML: &str = include_str!("styles/chatml.jinja");
const LLAMA_3: &str = include_str!("styles/llama_3.jinja");
const SINGLE: &str = include_str!("styles/single.jinja");

const HUMAN: &str = "A chat between a curious human and an artificial intelligence assistant. \
                     The assistant gives helpful, detailed, and polite answers to the human's questions.";
const USER: &str = "A chat between a curious user and an artificial intelligence assistant. \
                    The assistant gives helpful, detailed, and polite answers to the user's questions.";

const HELPFUL: &str = "You are a helpful language and vision assistant. You are able to understand the visual \
                       content that the user provides, and assist the user with a variety of tasks using natural \
                       language.";

/// Every style: `vicuna` as transformers has it, the others under the names of LLaVA's `conversation.py` (and
/// `llava_llama_3` of LLaVA-NeXT's). There, `v1` is what LLaVA-1.5 was trained and is evaluated with, and
/// `llava_v1` what its command line uses.
pub(super) const STYLES: [Style; 12] = [
    Style { names: &["vicuna"], source: include_str!("styles/vicuna.jinja"), ..NO_STYLE },
    Style { names: &["llava_v1"], source: TWO, system: HUMAN, ..NO_STYLE },
    Style { names: &["v1", "vicuna_v1"], source: TWO, system: USER, ..NO_STYLE },
    Style { names: &["llava_v0"], source: SINGLE, system: HUMAN, stop: Some("###"), ..NO_STYLE },
    Style {
        names: &["v0", "default"],
        source: SINGLE,
        system: include_str!("styles/vicuna_v0.txt"),
        stop: Some("###"),
        ..NO_STYLE
    },
    Style { names: &["llava_llama_2"], source: LLAMA_2, system: HELPFUL, separator: "<s>", ..NO_STYLE },
    Style {
        names: &["llama_2"],
        source: LLAMA_2,
        system: include_str!("styles/llama_2.txt"),
        separator: "<s>",
        ..NO_STYLE
    },
    Style {
        names: &["llava_llama_3"],
        source: LLAMA_3,
        system: HELPFUL,
        stop: Some("<|eot_id|>"),
        ..NO_STYLE
    },
    Style { names: &["mistral_instruct"], source: LLAMA_2, ..NO_STYLE },
    Style {
        names: &["chatml_direct", "mistral_direct", "chatml"],
        source: CHATML,
        system: "Answer the questions.",
        stop: Some("<|im_end|>"),
        ..NO_STYLE
    },
    Style {
        names: &["mpt"],
        source: CHATML,
        system: "A conversation between a user and an LLM-based AI assistant. \
                 The assistant gives helpful and honest answers.",
        stop: Some("<|im_end|>"),
        ..NO_STYLE
    },
    Style {
        names: &["plain", "v0_plain"],
        source: include_str!("styles/plain.jinja"),
        stop: Some("\n"),
        ..NO_STYLE
    },
];

impl Style {
    /// The style called `name`.
    pub fn find(name: &str) -> Option<&'static Style> {
        STYLES.iter().find(|style| style.names.contains(&name))
    }

    /// What transformers' own LLaVA-1.5 checkpoints have.
    pub fn vicuna() -> &'static Style {
        &STYLES[0]
    }

    /// The style of an original checkpoint, which its name tells: the rule of LLaVA's `run_llava.py`, and
    /// Llama 3. Of `names` the first that tells one decides; where none does, it is `llava_v0`.
    pub fn of_original<S: AsRef<str>>(names: &[S]) -> &'static Style {
        let rules = [
            ("llama-2", "llava_llama_2"),
            ("llama-3", "llava_llama_3"),
            ("llama3", "llava_llama_3"),
            ("mistral", "mistral_instruct"),
            ("v1.6-34b", "chatml_direct"),
            ("v1", "llava_v1"),
            ("mpt", "mpt"),
        ];
        let told = names.iter().find_map(|name| {
            let name = name.as_ref().to_lowercase();
            rules.iter().find(|(part, _)| name.contains(part))
        });
        Style::find(told.map_or("llava_v0", |(_, style)| style)).expect("each rule names a style")
    }

    /// All names, for a message.
    pub fn list() -> String {
        STYLES.iter().flat_map(|style| style.names).copied().collect::<Vec<_>>().join(", ")
    }
}
