//! Just enough of JSON Schema to hold what the program prints against `docs/schema`. A keyword that is not known
//! here is an error, so none is passed over.

use serde_json::Value;

/// What is wrong with `value`; nothing if it is as the schema says.
pub fn problems(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, value, "$", &mut found);
    found
}

/// The schema of this name.
pub fn schema(name: &str) -> Value {
    let path = format!("{}/docs/schema/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn check(schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let schema = schema.as_object().expect("a schema is an object");
    for (keyword, rule) in schema {
        let good = match keyword.as_str() {
            "$schema" | "title" | "description" => true,
            "type" => match rule {
                Value::String(name) => is(value, name),
                names => list(names).iter().any(|name| is(value, name.as_str().unwrap())),
            },
            "enum" => list(rule).contains(value),
            "minimum" => value.as_f64().is_none_or(|x| x >= rule.as_f64().unwrap()),
            "anyOf" => list(rule).iter().any(|schema| problems(schema, value).is_empty()),
            "items" => {
                let items = value.as_array().into_iter().flatten().enumerate();
                items.for_each(|(i, item)| check(rule, item, &format!("{at}[{i}]"), found));
                true
            }
            "required" => list(rule)
                .iter()
                .all(|key| value.as_object().is_none_or(|object| object.contains_key(key.as_str().unwrap()))),
            "properties" => {
                for (key, schema) in rule.as_object().unwrap() {
                    value.get(key).into_iter().for_each(|v| check(schema, v, &format!("{at}.{key}"), found));
                }
                true
            }
            "additionalProperties" => {
                assert_eq!(rule, false);
                let known = schema["properties"].as_object().unwrap();
                value.as_object().is_none_or(|object| object.keys().all(|key| known.contains_key(key)))
            }
            other => panic!("{at}: the keyword {other} is not known"),
        };
        if !good {
            found.push(format!("{at}: {keyword} {rule}: {value}"));
        }
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn is(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("no such type: {other}"),
    }
}
