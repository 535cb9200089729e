//! Chat templates: what they render, where they come from, and those that are refused.

use std::fs;
use std::path::Path;

use tessera::Error;
use tessera::input::prompt::{ChatTemplate, Message, Prompter};

/// A checkpoint directory with the tokenizer of (a) and the files given.
fn checkpoint(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/a_llava15_new_bf16/model/tokenizer.json");
    fs::copy(tokenizer, dir.path().join("tokenizer.json")).unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

/// What a template makes of "Q" with one image, or why it does not.
fn render_with(template: &str) -> Result<String, Error> {
    let dir = checkpoint(&[("chat_template.jinja", template)]);
    let prompter = Prompter::load(&dir.path().into(), 448, Some(430))?;
    Ok(prompter.render(&[Message::prompt("Q", 1).unwrap()])?.text)
}

#[test]
fn templates() {
    for (template, expected) in [
        // String content, list content.
        ("{{ messages[0]['content'] }}!", "<image>\nQ!"),
        ("{{ messages[0]['role'] + messages[0]['content'] }}", "user<image>\nQ"),
        ("{% for p in messages[0]['content'] %}{{ p['type'] }}{{ p['text'] }},{% endfor %}", "image,textQ,"),
        // White space as Hugging Face's environment treats it.
        ("a\n  {% if true %}\nb\n  {% endif %}\n{{ messages[0]['content'] }}\n", "a\nb\n<image>\nQ"),
        ("{% generation %}a{% endgeneration %} {{ messages[0].content }}", "a <image>\nQ"),
        // Python's methods, and loop controls.
        ("{{ messages[0]['content'].split('\\n')[1].upper().strip() }}", "Q"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ messages[0].content }}",
            "01<image>\nQ",
        ),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n ~ messages[0].content }}", "3<image>\nQ"),
        (
            "{{ {'a': ['<', 1.5, none], 'b': 'é'} | tojson }}{{ messages[0].content }}",
            "{\"a\": [\"<\", 1.5, null], \"b\": \"é\"}<image>\nQ",
        ),
        ("{{ [1] | tojson(indent=2) }}{{ messages[0].content }}", "[\n  1\n]<image>\nQ"),
        ("{{ strftime_now('%%') }}{{ 'tools' if tools }}{{ messages[0].content }}", "%<image>\nQ"),
        ("{{ bos_token is defined }}{{ messages[0].content }}", "False<image>\nQ"),
    ] {
        assert_eq!(render_with(template).unwrap(), expected, "{template}");
    }
}

#[test]
fn templates_that_are_refused() {
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000));
    for (template, part) in [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "fuel"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion"),
        ("{% for a in range(9999) %}{{ 'a' * 99999 }}{% endfor %}", "longer than"),
        ("{{ 'a' * 999999999999 }}", "too large"),
        ("{{ strftime_now('%Q') }}", "%Q"),
        ("{% if %}", "syntax"),
        ("{% include 'other' %}", "other"),
        ("{{ messages[0].content | nothing }}", "nothing"),
        (&nested, "recursion"),
        (&" ".repeat(200_000), "at most 131072"),
    ] {
        let error = render_with(template).unwrap_err();
        assert!(matches!(error, Error::Template { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error} does not tell of {part}");
    }
}

/// Expressions and values so deep that an ordinary stack would overflow, which no error could report.
#[test]
fn templates_of_great_depth() {
    let grow = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}";
    for template in [
        format!("{{{{ {}1 }}}}", "1+".repeat(65_000)),
        format!("{{{{ {}1 }}}}", "-".repeat(130_000)),
        format!("{{{{ {}1 }}}}", "not ".repeat(30_000)),
        format!("{{{{ 1{} }}}}", "|e".repeat(65_000)),
        format!("{{{{ messages{} }}}}", ".a".repeat(65_000)),
        format!("{{% if true %}}{}{{% endif %}}", "{% elif true %}".repeat(8_000)),
        grow.to_string(),
        format!("{grow}{{{{ ns.x | string | length }}}}"),
        format!("{grow}{{{{ ns.x | tojson }}}}"),
    ] {
        match render_with(&template) {
            Ok(_) => {}
            Err(error) => assert!(matches!(error, Error::Template { .. }), "{error}"),
        }
    }
}

#[test]
fn where_templates_come_from() {
    let jinja = ("chat_template.jinja", "jinja {{ messages[0].content }}");
    let json = ("chat_template.json", r#"{"chat_template": "json {{ messages[0].content }}"}"#);
    let config = (
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<s>"}, "chat_template": "config {{ bos_token }}"}"#,
    );
    let list = (
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "x", "template": "x"}, {"name": "default", "template": "list"}]}"#,
    );
    for (files, expected) in [
        (&[jinja, json, config][..], "jinja <image>\nQ"),
        (&[json, config], "json <image>\nQ"),
        (&[config], "config <s>"),
        (&[list], "list"),
        (&[("tokenizer_config.json", r#"{"chat_template": null}"#)], "USER: <image>\nQ ASSISTANT:"),
        (&[], "USER: <image>\nQ ASSISTANT:"),
    ] {
        let dir = checkpoint(files);
        let prompter = Prompter::load(&dir.path().into(), 448, Some(430)).unwrap();
        assert_eq!(prompter.render(&[Message::prompt("Q", 1).unwrap()]).unwrap().text, expected);
    }
    for files in [
        [("chat_template.json", "{")],
        [("chat_template.json", r#"{"chat_template": 3}"#)],
        [("tokenizer_config.json", "[]")],
        [("tokenizer_config.json", r#"{"chat_template": [{"name": "x", "template": "x"}]}"#)],
        [("chat_template.jinja", "{% for %}")],
    ] {
        let error = ChatTemplate::load(&checkpoint(&files).path().into()).err().unwrap().to_string();
        assert!(error.contains(files[0].0), "{error}");
    }
    let dir = checkpoint(&[jinja]);
    let file = dir.path().join("chat_template.jinja");
    assert!(ChatTemplate::named(file.to_str().unwrap(), &dir.path().into()).is_ok());
    assert!(matches!(ChatTemplate::named("alpaca", &dir.path().into()), Err(Error::Option { .. })));
}

/// Templates that change the texts: trimmed and repeated texts are still known, others are not.
#[test]
fn texts_that_templates_change() {
    for (template, text, held) in [
        ("{{ messages[0].content | trim }}|{{ messages[0].content }}", "  <s>a ", true),
        ("{{ messages[0].content.upper() }}", "</S>", true),
        (
            "{% if messages[0].content.startswith('<s>') %}a{% endif %}{{ messages[0].content }}",
            "<s>b",
            false,
        ),
        ("{{ messages[0].content.split('</s>')[0] }}", "x</s>y", false),
    ] {
        let dir = checkpoint(&[("chat_template.jinja", template)]);
        let prompter = Prompter::load(&dir.path().into(), 448, Some(430)).unwrap();
        let ids = prompter.conversation(&[Message::text("user", text)], &[]);
        match ids {
            Ok(prompt) => assert!(held && prompt.ids.iter().all(|&id| id == 1 || id > 2), "{template}"),
            Err(error) => assert!(!held && error.to_string().contains("s>"), "{error}"),
        }
        // Without control tokens there is nothing to know.
        assert!(prompter.conversation(&[Message::text("user", "plain")], &[]).is_ok());
    }
}
