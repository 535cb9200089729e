//! Image placeholders become as many tokens as their image has rows, before anything runs.

use crate::error::{Error, Result};

/// A prompt as the language model sees it: every position known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prompt {
    /// Token ids; at the positions of an image, the image token's id.
    pub ids: Vec<u32>,
    /// Where each image's rows stand, in the order of the images.
    pub images: Vec<ImageSpan>,
}

/// The positions of one image in [`Prompt::ids`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ImageSpan {
    /// The first position.
    pub start: usize,
    /// How many.
    pub len: usize,
}

/// Puts `tokens_per_image[i]` copies of `image_token` in place of the `i`-th one in `ids`. A prompt that
/// was expanded already, as the processors of Hugging Face do, is taken as it is.
///
/// # Errors
/// [`Error::Prompt`] with the number of images, of placeholders and of the tokens expected, if neither
/// reading fits.
pub fn expand(ids: &[u32], image_token: Option<u32>, tokens_per_image: &[usize]) -> Result<Prompt> {
    let Some(image_token) = image_token else {
        return match tokens_per_image.len() {
            0 => Ok(Prompt { ids: ids.to_vec(), images: Vec::new() }),
            n => Err(Error::Prompt(format!("this model reads text only, but {n} images were given"))),
        };
    };
    let placeholders = ids.iter().filter(|&&id| id == image_token).count();
    if placeholders == tokens_per_image.len() {
        return Ok(expand_each(ids, image_token, tokens_per_image));
    }
    expanded_already(ids, image_token, tokens_per_image).ok_or_else(|| {
        Error::Prompt(format!(
            "{} images were given, but {placeholders} image placeholders (token {image_token}) were found; \
             expected one for each image, or as many in a row as the image has tokens: {tokens_per_image:?}",
            tokens_per_image.len(),
        ))
    })
}

/// The prompt of a text that was cut at its images and tokenised piece by piece, as the original LLaVA does:
/// between two pieces stand as many `filler`s as the image has tokens. No embedding of a filler is looked up.
///
/// # Errors
/// [`Error::Prompt`] with both counts, if there is not one image between each two pieces.
pub fn splice(pieces: &[Vec<u32>], filler: u32, tokens_per_image: &[usize]) -> Result<Prompt> {
    let placeholders = pieces.len().saturating_sub(1);
    if placeholders != tokens_per_image.len() {
        return Err(Error::Prompt(format!(
            "{} images were given, but {placeholders} image placeholders were found; expected one for each image",
            tokens_per_image.len(),
        )));
    }
    let mut prompt = Prompt::default();
    for (i, piece) in pieces.iter().enumerate() {
        if let Some(&len) = i.checked_sub(1).and_then(|before| tokens_per_image.get(before)) {
            prompt.images.push(ImageSpan { start: prompt.ids.len(), len });
            prompt.ids.resize(prompt.ids.len() + len, filler);
        }
        prompt.ids.extend_from_slice(piece);
    }
    Ok(prompt)
}

fn expand_each(ids: &[u32], image_token: u32, tokens_per_image: &[usize]) -> Prompt {
    let mut prompt = Prompt::default();
    let mut lengths = tokens_per_image.iter();
    for &id in ids {
        if id == image_token {
            let len = *lengths.next().expect("as many lengths as placeholders");
            prompt.images.push(ImageSpan { start: prompt.ids.len(), len });
            prompt.ids.resize(prompt.ids.len() + len, id);
        } else {
            prompt.ids.push(id);
        }
    }
    prompt
}

/// The reading in which every image has its run of placeholders already; images may adjoin.
fn expanded_already(ids: &[u32], image_token: u32, tokens_per_image: &[usize]) -> Option<Prompt> {
    let mut images = Vec::with_capacity(tokens_per_image.len());
    let mut end = 0;
    for &len in tokens_per_image {
        let start = end + ids[end..].iter().position(|&id| id == image_token)?;
        end = start.checked_add(len).filter(|&end| end <= ids.len())?;
        if ids[start..end].iter().any(|&id| id != image_token) {
            return None;
        }
        images.push(ImageSpan { start, len });
    }
    (!ids[end..].contains(&image_token)).then(|| Prompt { ids: ids.to_vec(), images })
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: u32 = 9;

    #[test]
    fn both_conventions_and_their_mismatches() {
        let span = |start, len| ImageSpan { start, len };
        type Expanded<'a> = Option<(&'a [u32], Vec<ImageSpan>)>;
        let cases: [(&[u32], &[usize], Expanded<'_>); 12] = [
            (&[1, 2], &[], Some((&[1, 2], vec![]))),
            (&[], &[], Some((&[], vec![]))),
            (&[1, 9, 2], &[3], Some((&[1, 9, 9, 9, 2], vec![span(1, 3)]))),
            (&[1, 9, 9, 9, 2], &[3], Some((&[1, 9, 9, 9, 2], vec![span(1, 3)]))),
            (&[9, 9], &[2, 1], Some((&[9, 9, 9], vec![span(0, 2), span(2, 1)]))),
            (&[9, 9, 9], &[2, 1], Some((&[9, 9, 9], vec![span(0, 2), span(2, 1)]))),
            (&[9, 9, 5, 9, 9, 9], &[2, 3], Some((&[9, 9, 5, 9, 9, 9], vec![span(0, 2), span(3, 3)]))),
            (&[9, 5, 9, 9, 9, 9], &[2, 3], None),
            (&[1, 9, 9, 2], &[3], None),
            (&[1, 9, 9, 9, 9, 2], &[3], None),
            (&[1, 2], &[3], None),
            (&[1, 9], &[], None),
        ];
        for (ids, lengths, expected) in cases {
            let expected = expected.map(|(ids, images)| Prompt { ids: ids.to_vec(), images });
            assert_eq!(expand(ids, Some(IMAGE), lengths).ok(), expected, "{ids:?} with {lengths:?}");
        }
    }

    #[test]
    fn a_mismatch_is_told_with_all_numbers() {
        let error = expand(&[1, 9, 9, 2], Some(IMAGE), &[576]).unwrap_err().to_string();
        for part in ["1 images", "2 image placeholders", "token 9", "[576]"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(expand(&[1], None, &[576]).unwrap_err().to_string().contains("text only"));
    }
}
