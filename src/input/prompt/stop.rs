//! Stop strings: text is held back while it may be the beginning of one, across any token borders.

use crate::error::{Error, Result};

/// Watches a text that comes in pieces for the first stop string in it: the one that is complete first.
pub struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far: the longest that may begin a stop string.
    held: String,
}

impl StopStrings {
    /// Watches for `stops`; there may be none.
    ///
    /// # Errors
    /// [`Error::Option`] for an empty stop string, which would stop everything.
    pub fn new(stops: &[String]) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::option("--stop", "a text of at least one character", "an empty one"));
        }
        Ok(StopStrings { stops: stops.to_vec(), held: String::new() })
    }

    /// Takes more text. Returns the text that can be shown now, and whether a stop string is complete:
    /// then the text shown in all ends where that stop string begins, and nothing more may be pushed.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop)?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = found.min() {
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| self.begun(stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text still held back, when the text has ended without a stop string.
    pub fn finish(self) -> String {
        self.held
    }

    /// The length of the longest proper beginning of `stop` that the held text ends with.
    fn begun(&self, stop: &str) -> usize {
        let beginnings = stop.char_indices().map(|(length, _)| length).rev();
        beginnings.into_iter().find(|&length| self.held.ends_with(&stop[..length])).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Where the text ends, by looking at all of it: before the stop string that ends first, and of
    /// those that end at one place the longest.
    fn naive(text: &str, stops: &[String]) -> Option<usize> {
        text.char_indices().map(|(i, c)| i + c.len_utf8()).find_map(|end| {
            let ending = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
            ending.map(|stop| end - stop.len()).min()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn as_if_the_whole_text_were_known(
            pieces in prop::collection::vec("[abé]{0,4}", 0..20),
            stops in prop::collection::vec("[abé]{1,5}", 0..4),
        ) {
            let text = pieces.concat();
            let mut watch = StopStrings::new(&stops).unwrap();
            let mut shown = String::new();
            let mut stopped = false;
            for piece in &pieces {
                let (more, stop) = watch.push(piece);
                shown.push_str(&more);
                prop_assert!(text.starts_with(&shown));
                if stop {
                    stopped = true;
                    break;
                }
                // No more is held back than may yet become a stop string.
                prop_assert!(watch.held.is_empty() || stops.iter().any(|s| s.starts_with(&watch.held)));
            }
            if !stopped {
                shown.push_str(&watch.finish());
            }
            let end = naive(&text, &stops);
            prop_assert_eq!(stopped, end.is_some());
            prop_assert_eq!(shown, &text[..end.unwrap_or(text.len())]);
        }
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        assert!(StopStrings::new(&["###".into(), String::new()]).is_err());
    }
}
