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

/// Every way in which a program can turn, through the rewriting that makes it pay.
#[test]
fn programs() {
    for (template, expected) in [
        ("{% if false %}a{% elif 1 < 2 <= 2 %}b{% else %}c{% endif %}", "b"),
        ("{% for i in [] %}a{% else %}none{% endfor %}", "none"),
        (
            "{% for i in range(5) if i != 1 %}{% if i == 3 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "024",
        ),
        ("{% for a, b in {'x': 1, 'y': 2}.items() %}{{ loop.index }}{{ a }}{{ b }} {% endfor %}", "1x1 2y2 "),
        ("{% for n in [[1, [2]], [3]] recursive %}{{ loop(n) if n is sequence else n }}{% endfor %}", "123"),
        ("{% macro m(a, b='-') %}<{{ a }}{{ b }}>{% endmacro %}{{ m(1) ~ m(2, b='+') }}", "<1-><2+>"),
        ("{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}in{% endcall %}", "[in]"),
        ("{% set x %}a{{ 1 + 1 }}b{% endset %}{{ x | upper }}", "A2B"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}", "AB"),
        ("{{ 2 * 3 }} {{ 2 * 1.5 }} {{ 'ab' * 2 }} {{ 2 * 'ab' }} {{ [1] * 2 }}", "6 3.0 abab abab [1, 1]"),
        ("{{ 'abc'[::-1] }}{{ [1, 2, 3][1:] }}{{ (1, 2) + (3,) }}", "cba[2, 3][1, 2, 3]"),
        ("{{ 'a' ~ 1 ~ none ~ missing }}{{ 1 + 2 ** 2 * 3 }}", "a1None13"),
        (
            "{% macro m(a, b) %}{{ a * b }}{% endmacro %}{{ m(*[2, 'x*+~']) }}{{ -2|abs * 3 }} * + ~",
            "x*+~x*+~6 * + ~",
        ),
        ("{{ '' or 'x' and 'y' }}{{ 'p' if missing else 'q' }}", "yq"),
        (
            "{% set ns = namespace(x=1) %}{% for i in [1, 2] %}{% set ns.x = ns.x * 3 %}{% endfor %}{{ ns.x }}",
            "9",
        ),
        ("{% set a, b = [1, 2] %}{{ a }}{{ b }}{% with c = 3 %}{{ c }}{% endwith %}{{ c }}", "123"),
        ("{% block b %}x{{ 'y' ~ 'z' }}{% endblock %}", "xyz"),
        ("{{ 'a-b-c'.replace('-', '+') ~ 'a b'.split()[1] ~ '-'.join(['x', 'y']) }}", "a+b+cbx-y"),
        ("{{ 'a\nb' | indent(2) ~ ('x', 'y') | join(', ') ~ '%s!' | format(1) }}", "a\n  bx, y1!"),
        ("{{ messages | map(attribute='role') | list | length }}", "1"),
        ("{% raw %}{{ x }}{% endraw %}{# no #}", "{{ x }}"),
    ] {
        let dir = checkpoint(&[("chat_template.jinja", template)]);
        let prompter = Prompter::load(&dir.path().into(), 448, Some(430)).unwrap();
        let text = prompter.render(&[Message::text("user", "Q")]).unwrap().text;
        assert_eq!(text, expected, "{template}");
    }
}

/// Small programs that make much: each is told so, and none gets to make it.
#[test]
fn templates_that_would_fill_the_memory() {
    let often = |loops: &str| {
        format!(
            "{{% set ns = namespace(x=['a']) %}}{{% for i in range(64) %}}{loops}{{% endfor %}}{{{{ ns.x }}}}"
        )
    };
    let again = |start: &str, step: &str| format!("{{% set x = {start} %}}{}{{{{ x }}}}", step.repeat(64));
    let long = "x".repeat(60_000);
    for (template, part) in [
        (often("{% set ns.x = ns.x ~ ns.x %}"), "longer than 4 MiB"),
        (often("{% set ns.x = ns.x + ns.x %}"), "more than 32 MiB"),
        (often("{% set ns.x = [ns.x, ns.x] %}"), "more than 32 MiB"),
        (often("{% set ns.x = {'a': ns.x, 'b': ns.x} %}"), "more than 32 MiB"),
        (often("{% set ns.x = dict(a=ns.x, b=ns.x) %}"), "more than 32 MiB"),
        (often("{% set ns.x = ns.x | chain(ns.x) %}"), "more than 32 MiB"),
        (often("{% set ns.x = namespace(a=ns.x) %}"), "a namespace"),
        (often("{% set ns.x = ns.x + [('a' * 999999) ~ i] %}"), "more than 32 MiB"),
        (again("'a'", "{% set x = x ~ x %}"), "longer than 4 MiB"),
        (again("'a'", "{% set x = x + x %}"), "longer than 4 MiB"),
        (again("'a'", "{% set x %}{{ x }}{{ x }}{% endset %}"), "longer than 4 MiB"),
        (again("'a'", "{% set x = x.replace('', x) %}"), "more than 32 MiB"),
        (again("['a']", "{% set x = [x, x] | tojson %}"), "longer than 4 MiB"),
        (
            format!(
                "{{% macro m(x) %}}{{{{ x }}}}{{{{ x }}}}{{% endmacro %}}{{{{ {}'a'{} }}}}",
                "m(".repeat(64),
                ")".repeat(64)
            ),
            "longer than 4 MiB",
        ),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".into(), "a namespace"),
        ("{{ [namespace()] }}".into(), "a namespace"),
        ("{{ namespace(a=1) | items | list }}".into(), "a namespace"),
        ("{{ 'a' * 999999999 }}".into(), "more than 32 MiB"),
        ("{{ 999999999 * 'a' }}".into(), "more than 32 MiB"),
        ("{{ ([0] * 999999999) | length }}".into(), "more than 32 MiB"),
        (
            format!(
                "{{% if false %}}{{{{ {}1 }}}}{{% endif %}}{{{{ 'a' * 99999999 }}}}",
                "'a' * 99999999 ~ ".repeat(999)
            ),
            "more than 32 MiB",
        ),
        ("{{ 'a' | indent(999999999, true) }}".into(), "more than 32 MiB"),
        ("{{ 'a' | indent(width=999999999, first=true) }}".into(), "more than 32 MiB"),
        ("{{ [1] | batch(999999999, 0) }}".into(), "more than 32 MiB"),
        ("{{ [1] | slice(999999999) }}".into(), "more than 32 MiB"),
        ("{{ '%999999999d' | format(1) }}".into(), "width"),
        ("{{ '{:>999999999}'.format(1) }}".into(), "width"),
        ("{{ ('a' * 9999) | replace('a', 'b' * 9999) }}".into(), "more than 32 MiB"),
        ("{{ ('a' * 9999).replace('a', 'b' * 9999) }}".into(), "more than 32 MiB"),
        ("{{ range(9999) | join('a' * 99999) }}".into(), "more than 32 MiB"),
        ("{{ ('a' * 99999).join(range(9999)) }}".into(), "more than 32 MiB"),
        ("{{ ('a' * 3999999) | list | length }}".into(), "more than 32 MiB"),
        ("{{ (['a' * 9999] * 99) | map('replace', 'a', 'b' * 999) | list }}".into(), "more than 32 MiB"),
        ("{{ 'a'.count('') }}".into(), "not empty"),
        ("{{ debug() }}".into(), "debug is unknown"),
        (format!("{{% for i in range(9999) %}}{long}{{% endfor %}}"), "more than 32 MiB"),
        (
            format!("{{% set x %}}{{% for i in range(9999) %}}{long}{{% endfor %}}{{% endset %}}"),
            "more than 32 MiB",
        ),
        (format!("{{% for i in range(99) %}}{long}{{% endfor %}}"), "longer than 4 MiB"),
    ] {
        let error = render_with(&template).map(|text| text.len()).unwrap_err();
        assert!(matches!(error, Error::Template { .. }), "{error}");
        let start = &template[..template.len().min(200)];
        assert!(error.to_string().contains(part), "{start}: {error} does not tell of {part}");
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
