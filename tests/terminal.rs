//! The program among signals, closed pipes, and people who type: it stops when asked, says why when it
//! cannot go on, and keeps what it has made.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn asset(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets").join(name).display().to_string()
}

fn start(args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_tessera"))
        .args(args)
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs the program with lines to read.
fn talk(args: &[&str], lines: &str) -> Output {
    let mut child = start(args);
    // A program that has ended does not read the rest.
    let _ = child.stdin.take().unwrap().write_all(lines.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A run that goes on for as long as the context lasts.
const LONG: [&str; 6] = ["run", "--prompt", "Where is the circle?", "--ignore-eos", "--max-tokens", "900"];

#[cfg(unix)]
fn interrupt(child: &Child) {
    // SAFETY: sends a signal to a child that has not been waited for, so the id is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
}

/// Ctrl-C during an answer keeps what was made, and is no failure.
#[cfg(unix)]
#[test]
fn ctrl_c_ends_an_answer_with_what_was_made() {
    let whole = text(&talk(&[&LONG[..], &["--quiet"]].concat(), "").stdout);
    let mut child = start(&LONG);
    let mut stdout = child.stdout.take().unwrap();
    // Text that is out was made by a decode that is under way, with nearly all of it before it.
    let mut made = vec![0; 8];
    stdout.read_exact(&mut made).unwrap();
    interrupt(&child);
    stdout.read_to_end(&mut made).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{:?}: {}", output.status, text(&output.stderr));
    let made = text(&made);
    let partial = made.trim_end();
    assert!(partial.len() < whole.trim_end().len(), "it ended by itself");
    assert!(whole.starts_with(partial), "{partial}");
}

/// A reader that has gone ends an answer early and quietly.
#[test]
fn a_closed_stdout_ends_an_answer() {
    let mut child = start(&LONG);
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 8]).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let stderr = text(&output.stderr);
    assert!(!stderr.contains("panicked") && !stderr.contains("error"), "{stderr}");
}

#[test]
fn a_template_that_loops_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("loop.jinja");
    for body in [
        "{% for i in range(10000000) %}{% for j in range(10000000) %}x{% endfor %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'x' * 100000000000 }}",
        "{% if %}",
    ] {
        std::fs::write(&file, body).unwrap();
        let output = talk(&["run", "--prompt", "x", "--template", &file.display().to_string()], "");
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{body}: {stderr}");
        assert!(stderr.contains("chat template") && stderr.contains("loop.jinja"), "{body}: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

/// A template that doubles a text cannot take the process down where memory is short.
#[cfg(unix)]
#[test]
fn a_template_cannot_fill_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("double.jinja");
    let double =
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    std::fs::write(&file, double).unwrap();
    let file = file.display().to_string();
    let output = shell("ulimit -v 3000000; exec \"$0\" run --prompt x --template \"$1\"", &[&file]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("longer than"), "{}", text(&output.stderr));
}

/// Runs a line of shell in which `$0` is the program.
#[cfg(unix)]
fn shell(line: &str, args: &[&str]) -> Output {
    Command::new("sh").args(["-c", line, env!("CARGO_BIN_EXE_tessera")]).args(args).output().unwrap()
}

/// Where stderr is closed or full, remarks and errors go nowhere, and the exit code tells.
#[cfg(unix)]
#[test]
fn remarks_that_cannot_be_written_are_no_failure() {
    let image = asset("samples/scene1.png");
    for to in ["2>&-", "2>/dev/full"] {
        for (command, code) in [
            ("run --prompt 'Where is the circle?' --seed 1 --image \"$1\"", 0),
            ("run --prompt x --image no-such-file.png", 1),
            ("run --nonsense", 2),
            ("--help", 0),
            ("run --prompt x --top-p 2", 2),
        ] {
            let output = shell(&format!("exec \"$0\" {command} {to}"), &[&image]);
            assert_eq!(output.status.code(), Some(code), "{command} {to}");
        }
    }
}

/// What was asked for and cannot be written is a failure, and told.
#[cfg(target_os = "linux")]
#[test]
fn a_full_stdout_is_an_error() {
    for command in ["run --prompt x", "run --prompt x --json", "inspect", "devices", "--help", "run --help"] {
        let output = shell(&format!("exec \"$0\" {command} >/dev/full"), &[]);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command}: {stderr}");
        assert!(stderr.starts_with("error: stdout: "), "{command}: {stderr}");
        let output = shell(&format!("exec \"$0\" {command} >&-"), &[]);
        assert!(output.status.code().is_some_and(|code| code < 2), "{command}: {}", text(&output.stderr));
    }
}

/// A decoder that gives up on a damaged file is an error and nothing else: no traces of how it was found.
#[test]
fn damaged_files_make_no_noise() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokenizer.json");
    let mut bytes = std::fs::read(asset("demo/tokenizer.json")).unwrap();
    // A prefix longer than the merges makes the library panic.
    let at = bytes.windows(9).position(|w| w == b"\"merges\":").unwrap();
    let prefix = b"\"continuing_subword_prefix\":\"################\",";
    bytes.splice(at..at, prefix.iter().copied());
    std::fs::write(&file, bytes).unwrap();
    for name in ["config.json", "model.safetensors", "preprocessor_config.json"] {
        std::fs::copy(asset(&format!("demo/{name}")), dir.path().join(name)).unwrap();
    }
    let output = talk(&["run", "--prompt", "x", "--model", &dir.path().display().to_string()], "");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: tokenizer ") && stderr.lines().count() == 1, "{stderr}");
}

/// Ctrl-C while the prompt is read: nothing was made, so nothing is left behind. Whenever the signal comes, the
/// dump is whole or not there.
#[cfg(unix)]
#[test]
fn ctrl_c_leaves_no_half_dump() {
    use std::os::unix::process::ExitStatusExt;
    let prompt = "Where is the circle? ".repeat(100);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dump.safetensors");
    let dump = file.display().to_string();
    let args = ["run", "--prompt", &prompt, "--max-tokens", "1", "--prefill-chunk", "1", "--dump", &dump];
    let (mut stopped, mut wait) = (false, std::time::Duration::from_millis(5));
    loop {
        let child = start(&args);
        std::thread::sleep(wait);
        interrupt(&child);
        let output = child.wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        match output.status.signal() {
            // It came before the program listened.
            Some(signal) => assert_eq!(signal, libc::SIGINT),
            None if stderr.contains("stopped") && !stderr.contains("tokens/s") => {
                assert!(output.status.success() && output.stdout.is_empty(), "{stderr}");
                assert!(!file.exists());
                stopped = true;
            }
            None => {
                assert!(output.status.success(), "{stderr}");
                let bytes = std::fs::read(&file).unwrap();
                let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                let rows = tensors.tensor("input_ids").unwrap().shape()[0];
                assert_eq!(tensors.tensor("logits").unwrap().shape()[0], rows);
                break;
            }
        }
        let _ = std::fs::remove_file(&file);
        wait = wait.mul_f64(1.5);
    }
    assert!(stopped, "no signal came while the prompt was read");
}

#[test]
fn chat_commands() {
    let image = asset("samples/scene1.png");
    let circle = "The circle is at the top left.";
    let chat = |args: &[&str], lines: &str| talk(&[&["chat", "--quiet"], args].concat(), lines);

    // Blank lines are nothing; the end of the input is the end of the talk.
    let output = chat(&["--image", &image], "\n  \nWhere is the circle?\n\n");
    assert!(output.status.success());
    assert_eq!(text(&output.stdout).trim_end(), circle);

    // /reset forgets pictures too.
    let ask = format!("/image {image}\nWhere is the circle?\n");
    let output = chat(&[], &format!("{ask}/reset\n{ask}/exit\nWhere is the circle?\n"));
    assert_eq!(text(&output.stdout).lines().collect::<Vec<_>>(), [circle, circle]);

    // For a script, a mistake is a failure that says what was wrong.
    for (lines, word) in [
        ("/frobnicate now\n", "/frobnicate is no command"),
        ("/image\n", "/image FILE"),
        ("/image no-such-file.png\n", "no-such-file.png"),
        ("Where is the <image> circle?\n", "1 images"),
    ] {
        let output = chat(&[], lines);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{lines}: {stderr}");
        assert!(stderr.contains(word), "{lines}: {stderr}");
        assert!(output.stdout.is_empty());
    }
    let long = "Where is the circle? ".repeat(1000) + "\n";
    let stderr = text(&chat(&[], &long).stderr);
    assert!(stderr.contains("positions are needed"), "{stderr}");
}

/// Text comes as it is made, not when all is done: the first words arrive while the program runs.
#[test]
fn answers_of_a_talk_come_before_it_ends() {
    let mut child = start(&["chat", "--quiet", "--image", &asset("samples/scene1.png")]);
    let mut stdin = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        writeln!(stdin, "Where is the circle?").unwrap();
        assert!(lines.next().unwrap().unwrap().contains("circle"));
    }
    drop(stdin);
    assert!(lines.next().is_none());
    assert!(child.wait().unwrap().success());
}

/// A dump that cannot be written is told before the work, not after it.
#[test]
fn a_dump_that_cannot_be_written_is_told_first() {
    let output = talk(&["run", "--prompt", "x", "--max-tokens", "3", "--dump", "no/such/folder/x"], "");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error: no/such/folder/x"), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "");
}
