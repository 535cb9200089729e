//! What Hugging Face adds to Jinja for chat templates: `raise_exception`, `strftime_now`, `tojson` that
//! escapes nothing, Python's string and dict methods, and `{% generation %}` blocks.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Makes the functions, filters and methods known to `environment`.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
}

/// Turns `{% generation %}` and `{% endgeneration %}`, which mark what an assistant said for training,
/// into conditions that always hold, so that white space around them is treated as in a block.
pub(super) fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&tag.replace(word, "if true")),
            "endgeneration" => out.push_str(&tag.replace(word, "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn tojson(value: Value, indent: Option<usize>, options: Kwargs) -> Result<String, Error> {
    let indent = indent.or(options.get("indent")?);
    // Others (ensure_ascii, separators, sort_keys) are rare, and none changes what JSON is meant.
    let mut json = Vec::new();
    let written = match indent {
        Some(width) => {
            let width = " ".repeat(width.min(16));
            let pretty = PrettyFormatter::with_indent(width.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut json, pretty))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, PythonFormatter)),
    };
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    String::from_utf8(json).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// JSON with a space after `,` and `:`, as Python writes it.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// The date and time now, in UTC: the C directives that templates use (`%d %b %Y` in Llama 3.1).
fn strftime_now(format: String) -> Result<String, Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(&format, now)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, second) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil_date(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('d') => out += &format!("{day:02}"),
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", second / 3600),
            Some('M') => out += &format!("{:02}", second / 60 % 60),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('%') => out.push('%'),
            other => {
                let found = other.map_or("%".into(), |c| format!("%{c}"));
                let problem =
                    format!("strftime_now: expected one of %Y%y%m%B%b%d%A%a%H%M%S%%, found {found}");
                return Err(Error::new(ErrorKind::InvalidOperation, problem));
            }
        }
    }
    Ok(out)
}

/// Year, month and day of the month, so many days after 1 January 1970 (Howard Hinnant's
/// `civil_from_days`, for days that are not negative).
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468; // since 1 March of year 0
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        // Expected values from `date -u -d @SECONDS '+%A %d %b %Y %H:%M:%S'`.
        for (seconds, expected) in [
            (0, "Thursday 01 Jan 1970 00:00:00"),
            (951_782_399, "Monday 28 Feb 2000 23:59:59"),
            (951_782_400, "Tuesday 29 Feb 2000 00:00:00"),
            (1_735_689_599, "Tuesday 31 Dec 2024 23:59:59"),
            (4_107_542_400, "Monday 01 Mar 2100 00:00:00"),
        ] {
            assert_eq!(strftime("%A %d %b %Y %H:%M:%S", seconds).unwrap(), expected);
        }
        assert!(strftime("%Q", 0).is_err());
    }

    #[test]
    fn generation_blocks() {
        for (source, expected) in [
            ("a{% generation %}b{% endgeneration %}c", "a{% if true %}b{% endif %}c"),
            ("{%- generation -%} b {%-endgeneration+%}", "{%- if true -%} b {%-endif+%}"),
            ("{% if generation %}{% endif %}", "{% if generation %}{% endif %}"),
            ("{% generation", "{% generation"),
        ] {
            assert_eq!(without_generation_blocks(source), expected);
        }
    }
}
