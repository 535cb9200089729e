//! What commands that ask a model share: pictures in, an answer out as it is made, Ctrl-C.

use super::progress::Progress;
use crate::error::{Error, Result};
use crate::graph::Control;
use crate::input::prompt::ImageSource;
use crate::runtime::engine::Decoded;
use crate::runtime::request::Completion;
use crate::runtime::{Engine, ImageHandle, Request};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Answers a request, its text on stdout as it comes if `show` says so. The line is ended before anything else
/// is said, an error too.
///
/// # Errors
/// Those of [`Engine::generate`]; [`Error::Cancelled`] if there was nothing to show when it was stopped.
pub fn answer(engine: &mut Engine, request: &Request, show: bool, quiet: bool) -> Result<Completion> {
    let mut progress = Some(Progress::follow("reading the prompt", &engine.control, quiet));
    let (mut failed, mut begun) = (Ok(()), false);
    let control = engine.control.clone();
    let answer = engine.generate(request, |text| {
        progress = None;
        if show && failed.is_ok() {
            begun |= !text.is_empty();
            failed = super::print(text);
            if failed.is_err() {
                control.cancel();
            }
        }
    });
    drop(progress);
    failed?;
    if show && answer.as_ref().is_ok_and(|a| a.is_stopped() && a.token_ids.is_empty()) {
        return Err(Error::Cancelled);
    }
    if show && (begun || answer.is_ok()) {
        super::print("\n")?;
    }
    if show && !quiet && answer.as_ref().is_ok_and(Completion::is_stopped) {
        super::say(format_args!("stopped"));
    }
    answer
}

/// Decodes pictures.
pub fn decode(engine: &Engine, sources: &[ImageSource]) -> Result<Vec<Decoded>> {
    let named = |(i, source): (usize, &ImageSource)| match source {
        ImageSource::Path(path) => engine.decode(&path.display().to_string(), &super::read(path)?),
        ImageSource::Bytes(bytes) => engine.decode(&format!("#{} (data: URL)", i + 1), bytes),
        ImageSource::Given => unreachable!("`run` has put files in their places"),
    };
    sources.iter().enumerate().map(named).collect()
}

/// Encodes pictures, with a bar over the vision tower, and lets go of their pixels one after the other.
pub fn encode(engine: &mut Engine, pictures: Vec<Decoded>, quiet: bool) -> Result<Vec<ImageHandle>> {
    let mut images = Vec::with_capacity(pictures.len());
    for picture in pictures {
        let _progress = Progress::follow("looking at the picture", &engine.control, quiet);
        images.push(engine.encode(&picture)?);
    }
    Ok(images)
}

/// The first Ctrl-C stops what `control` watches, with what was made; a second one ends the process. A process
/// has one handler, so a later call takes the place of an earlier one.
pub fn stop_on_ctrl_c(control: &Control) -> Result<()> {
    static WATCHED: OnceLock<Mutex<Control>> = OnceLock::new();
    if let Some(watched) = WATCHED.get() {
        *watched.lock().unwrap_or_else(PoisonError::into_inner) = control.clone();
        return Ok(());
    }
    let watched = WATCHED.get_or_init(|| Mutex::new(control.clone()));
    let handler = move || {
        let control = watched.lock().unwrap_or_else(PoisonError::into_inner);
        if control.is_cancelled() {
            std::process::exit(130);
        }
        control.cancel();
    };
    ctrlc::set_handler(handler)
        .map_err(|error| Error::io("SIGINT handler", std::io::Error::other(error.to_string())))
}
