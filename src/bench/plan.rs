//! What is to be run: lists and ranges as llama-bench spells them, and the tests they make.

use std::fmt;

/// One test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// Pictures to rows of embeddings: decode, resize, tower, projector.
    Image {
        /// How many pictures, one after another.
        images: usize,
    },
    /// A prompt of random tokens, and generated tokens after it; either may be none.
    Text {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens generated after it.
        generate: usize,
        /// Tokens that are cached before the clock starts.
        depth: usize,
        /// Sequences that advance side by side.
        batch: usize,
    },
    /// From a picture file and a prompt to the first token.
    FirstToken {
        /// Pictures.
        images: usize,
        /// Tokens of text.
        prompt: usize,
    },
    /// A text to the vector that a CLIP makes of it.
    Caption {
        /// Tokens of the text, what begins and ends it among them.
        tokens: usize,
    },
}

impl Test {
    /// Positions that one sequence of the test reaches, given the positions that a picture takes.
    pub fn positions(&self, image_tokens: usize) -> usize {
        match *self {
            Test::Image { .. } | Test::Caption { .. } => 0,
            Test::Text { prompt, generate, depth, .. } => depth + prompt + generate,
            Test::FirstToken { images, prompt } => images * image_tokens + prompt,
        }
    }

    /// Sequences that run side by side.
    pub fn batch(&self) -> usize {
        match *self {
            Test::Text { batch, .. } => batch,
            Test::Image { .. } | Test::FirstToken { .. } | Test::Caption { .. } => 1,
        }
    }

    /// Whether the result is embeddings, and no token is chosen.
    pub fn embeds(&self) -> bool {
        matches!(self, Test::Image { .. } | Test::Caption { .. })
    }
}

/// `img1`, `pp640`, `tg128 @ d640`, `pp64+tg16`, `tg128 b4`, `ttft img1+pp64`, `txt77`.
impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Test::Image { images } => write!(f, "img{images}"),
            Test::Caption { tokens } => write!(f, "txt{tokens}"),
            Test::FirstToken { images, prompt } => write!(f, "ttft img{images}+pp{prompt}"),
            Test::Text { prompt, generate, depth, batch } => {
                match (prompt, generate) {
                    (p, 0) => write!(f, "pp{p}")?,
                    (0, g) => write!(f, "tg{g}")?,
                    (p, g) => write!(f, "pp{p}+tg{g}")?,
                }
                if batch > 1 {
                    write!(f, " b{batch}")?;
                }
                if depth > 0 { write!(f, " @ d{depth}") } else { Ok(()) }
            }
        }
    }
}

/// The lists of options; every combination is a test.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// `-p`: lengths of prompts; 0 is none.
    pub prompts: Vec<usize>,
    /// `-n`: numbers of generated tokens; 0 is none.
    pub generates: Vec<usize>,
    /// `-pg`: prompts with tokens generated after them.
    pub pairs: Vec<(usize, usize)>,
    /// `-d`: cached tokens beforehand.
    pub depths: Vec<usize>,
    /// `-b`: sequences side by side.
    pub batches: Vec<usize>,
    /// `--images`: numbers of pictures; 0 is none.
    pub images: Vec<usize>,
    /// `--ttft`: tokens of text after the pictures, to the first token.
    pub first_tokens: Vec<usize>,
}

impl Plan {
    /// All tests of a language model, pictures first.
    pub fn tests(&self) -> Vec<Test> {
        let images = || self.images.iter().copied().filter(|&images| images > 0);
        let mut tests = self.pictures();
        for &depth in &self.depths {
            for &batch in &self.batches {
                let text = |prompt, generate| Test::Text { prompt, generate, depth, batch };
                tests.extend(self.prompts.iter().filter(|&&p| p > 0).map(|&p| text(p, 0)));
                tests.extend(self.generates.iter().filter(|&&g| g > 0).map(|&g| text(0, g)));
                tests.extend(self.pairs.iter().map(|&(p, g)| text(p, g)));
            }
        }
        for images in images() {
            let ttft = self.first_tokens.iter().filter(|&&p| p > 0);
            tests.extend(ttft.map(|&prompt| Test::FirstToken { images, prompt }));
        }
        tests
    }

    /// All tests of pictures alone.
    pub fn pictures(&self) -> Vec<Test> {
        self.images.iter().filter(|&&images| images > 0).map(|&images| Test::Image { images }).collect()
    }

    /// Prompts as texts of a CLIP that reads at most so many positions: a longer one is cut off there.
    pub fn captions(&self, positions: usize) -> Vec<Test> {
        let prompts = self.prompts.iter().filter(|&&p| p > 0);
        // Not less than what begins and ends a text.
        let mut tests: Vec<_> =
            prompts.map(|&p| Test::Caption { tokens: p.clamp(2, positions.max(2)) }).collect();
        tests.dedup();
        tests
    }
}

/// Most numbers that one list makes.
const MAX_LIST: usize = 1000;

/// `512`, `16,32`, `128-512+128` (every 128th), `1-8*2` (doubling), `1-4` (every one).
///
/// # Errors
/// What was expected, for the person who wrote it.
pub fn parse_list(text: &str) -> Result<Vec<usize>, String> {
    let mut list = Vec::new();
    for item in text.split(',') {
        match item.split_once('-') {
            None => list.push(number(item)?),
            Some((first, rest)) => {
                let (last, next): (_, &dyn Fn(usize) -> usize) = match rest.split_once(['+', '*']) {
                    None => (number(rest)?, &|n| n + 1),
                    Some((last, step)) => {
                        let (last, step) = (number(last)?, number(step)?);
                        match rest.contains('+') {
                            true if step > 0 => (last, &move |n| n + step),
                            false if step > 1 && number(first)? > 0 => (last, &move |n| n * step),
                            _ => return Err(format!("{item:?} never ends")),
                        }
                    }
                };
                let mut n = number(first)?;
                if n > last {
                    return Err(format!("{item:?} is empty: {n} is more than {last}"));
                }
                while n <= last && list.len() <= MAX_LIST {
                    list.push(n);
                    n = next(n);
                }
            }
        }
        if list.len() > MAX_LIST {
            return Err(format!("{item:?} makes more than {MAX_LIST} numbers"));
        }
    }
    Ok(list)
}

/// `512,128`: a prompt and what is generated after it.
///
/// # Errors
/// As for [`parse_list`].
pub fn parse_pair(text: &str) -> Result<(usize, usize), String> {
    match text.split_once(',') {
        Some((prompt, generate)) => match (number(prompt)?, number(generate)?) {
            (0, _) | (_, 0) => Err(format!("{text:?}: both must be at least 1")),
            pair => Ok(pair),
        },
        None => Err(format!("expected PROMPT,GENERATE such as 512,128, found {text:?}")),
    }
}

/// A count: at most a million, so that sums of a few of them mean something.
fn number(text: &str) -> Result<usize, String> {
    let expected =
        || format!("expected a number up to 1000000, a list 16,32 or a range 128-512+128, found {text:?}");
    text.parse().ok().filter(|n| *n <= 1_000_000).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges() {
        let good: [(&str, &[usize]); 6] = [
            ("512", &[512]),
            ("16,32", &[16, 32]),
            ("1-4", &[1, 2, 3, 4]),
            ("128-512+128", &[128, 256, 384, 512]),
            ("1-9*2", &[1, 2, 4, 8]),
            ("0,8-8", &[0, 8]),
        ];
        for (text, list) in good {
            assert_eq!(parse_list(text).as_deref(), Ok(list), "{text}");
        }
        for text in
            ["", "x", "1,,2", "4-1", "1-5+0", "1-5*1", "0-5*2", "-1", "1-1000000", "99999999999999999999"]
        {
            assert!(parse_list(text).is_err(), "{text}");
        }
        assert_eq!(parse_pair("512,128"), Ok((512, 128)));
        assert!(parse_pair("512").is_err() && parse_pair("0,1").is_err());
    }

    #[test]
    fn every_combination_is_a_test() {
        let plan = Plan {
            prompts: vec![640],
            generates: vec![128, 0],
            pairs: vec![(64, 16)],
            depths: vec![0, 640],
            batches: vec![1, 4],
            images: vec![1],
            first_tokens: vec![64],
        };
        let names: Vec<_> = plan.tests().iter().map(Test::to_string).collect();
        assert_eq!(names.len(), 2 + 4 * 3);
        for name in ["img1", "pp640", "tg128 @ d640", "pp64+tg16 b4 @ d640", "tg128 b4", "ttft img1+pp64"] {
            assert!(names.iter().any(|n| n == name), "{name} of {names:?}");
        }
        let captions = Plan { prompts: vec![0, 1, 16, 128, 512], ..plan }.captions(77);
        assert_eq!(captions, [2, 16, 77].map(|tokens| Test::Caption { tokens }));
        assert_eq!(captions[2].to_string(), "txt77");
        let ttft = Test::FirstToken { images: 2, prompt: 64 };
        assert_eq!((ttft.positions(576), ttft.batch()), (1216, 1));
    }
}
