//! `tessera bench startup`: from process start to ready and to the first token.

use super::options::{Load, ModelArgs, PictureArgs};
use crate::bench::startup::{self, Start};
use crate::bench::stats::percentile;
use crate::error::{Error, Result};
use crate::runtime::Source;
use clap::{Args, ValueEnum};
use serde_json::json;

/// Options of `tessera bench startup`.
#[derive(Debug, Args)]
pub struct Startup {
    /// Without --load-mode both are measured
    #[command(flatten)]
    model: ModelArgs,
    /// Starts of each kind
    #[arg(short = 'r', value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Startup {
    pub fn run(self) -> Result<()> {
        let (source, _) = self.model.load_options()?;
        let program = std::env::current_exe().map_err(|error| Error::io("this program", error))?;
        let modes = self.model.load_mode.map_or(vec![Load::Mmap, Load::Read], |mode| vec![mode]);
        let mut text = String::from(
            "| page cache | load mode | starts | ready ms p50 | p90 | first token ms p50 | p90 |\n\
             | --- | --- | ---: | ---: | ---: | ---: | ---: |\n",
        );
        let (mut objects, mut notes) = (Vec::new(), Vec::new());
        let files = match &source {
            Source::Directory(dir) => Some(dir.as_path()),
            _ => {
                notes.push("no cold starts: this model has no files".to_string());
                None
            }
        };
        for mode in modes {
            let args = child_args(&self.model, mode);
            // Once for nobody, so that the program itself and what it links are in memory.
            startup::start(&program, &args)?;
            for dir in [None].into_iter().chain(files.map(Some)) {
                if let Some(Err(reason)) = dir.map(startup::forget) {
                    notes.push(format!("no cold starts: {reason}"));
                    continue;
                }
                let mut starts = Vec::new();
                for _ in 0..self.repetitions {
                    if let Some(dir) = dir {
                        // It was possible before.
                        let _ = startup::forget(dir);
                    }
                    starts.push(startup::start(&program, &args)?);
                }
                let (cache, mode) = (if dir.is_some() { "cold" } else { "warm" }, spelt(&mode));
                text += &line(cache, &mode, &starts);
                objects.push(json!({"page_cache": cache, "load_mode": mode, "args": args, "starts": starts}));
            }
        }
        notes.dedup();
        notes.iter().for_each(|note| super::say(format_args!("note: {note}")));
        super::print(&if self.json { format!("{}\n", json!(objects)) } else { text })
    }
}

fn line(cache: &str, mode: &str, starts: &[Start]) -> String {
    let ms = |f: fn(&Start) -> f64, p| percentile(&starts.iter().map(f).collect::<Vec<_>>(), p);
    let (ready, first) = (|s: &Start| s.ready_ms, |s: &Start| s.first_token_ms);
    format!(
        "| {cache} | {mode} | {} | {:.1} | {:.1} | {:.1} | {:.1} |\n",
        starts.len(),
        ms(ready, 50.0),
        ms(ready, 90.0),
        ms(first, 50.0),
        ms(first, 90.0)
    )
}

/// The options a child is given: all of ours that say which model, where and how.
fn child_args(model: &ModelArgs, load_mode: Load) -> Vec<String> {
    let ModelArgs {
        model: name,
        base,
        lora,
        device,
        threads,
        load_mode: _,
        template,
        pictures,
        dtype,
        check_launches,
    } = model;
    let PictureArgs { image_mode, vision_tower, reference } = pictures;
    let mut args: Vec<String> = ["--model", name, "--prompt", "Hello"].map(String::from).into();
    let mut give = |option: &str, value: String| args.extend([option.to_string(), value]);
    give("--device", device.to_string());
    give("--load-mode", spelt(&load_mode));
    give("--dtype", spelt(dtype));
    give("--image-mode", spelt(image_mode));
    give("--reference", spelt(reference));
    base.iter().for_each(|dir| give("--base", dir.display().to_string()));
    lora.iter().for_each(|lora| give("--lora", format!("{}:{}", lora.dir.display(), lora.scale)));
    threads.iter().for_each(|threads| give("--threads", threads.to_string()));
    template.iter().for_each(|template| give("--template", template.clone()));
    vision_tower.iter().for_each(|dir| give("--vision-tower", dir.display().to_string()));
    if *check_launches {
        args.push("--check-launches".into());
    }
    args
}

/// A value as the command line spells it.
fn spelt(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or(String::new(), |value| value.get_name().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        startup: Startup,
    }

    #[test]
    fn every_option_reaches_the_child() {
        let given = "x --model preset:llava-tiny --threads 3 --device cuda:1 --dtype bf16 --template chatml_direct --lora a:0.5 --base b \
                     --image-mode pad --reference original --vision-tower t --check-launches";
        let line = Line::parse_from(given.split_whitespace());
        let args = child_args(&line.startup.model, Load::Read).join(" ");
        for option in given.split(" --").skip(1) {
            assert!(args.contains(&format!("--{}", option.trim())), "{option} in {args}");
        }
        assert!(args.contains("--load-mode read"));
    }
}
