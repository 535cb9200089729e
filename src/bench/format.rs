//! How rows are written: a table for people, and what scripts read.

use super::report::Row;
use crate::backend::Ceilings;
use serde_json::Value;

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A table for people.
    Md,
    /// Comma-separated values with a header.
    Csv,
    /// A list of objects.
    Json,
    /// An object a line.
    Jsonl,
}

/// All rows in a format.
pub fn write(rows: &[Row], format: Format) -> String {
    match format {
        Format::Md => table(rows),
        Format::Csv => csv(rows),
        Format::Json => serde_json::to_string_pretty(rows).expect("rows are plain data") + "\n",
        Format::Jsonl => {
            rows.iter().map(|row| serde_json::to_string(row).expect("rows are plain data") + "\n").collect()
        }
    }
}

/// The columns of llama-bench, then ours; what happened inside; what the figures stand on.
fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| model | size | params | backend | threads | test | t/s | ms | floor ms | of ceiling | ops/step |\n\
         | --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for row in rows {
        let s = &row.subject;
        let number = |x: Option<f64>, digits: usize| x.map_or("-".into(), |x| format!("{x:.digits$}"));
        let timed = row.ceilings.is_some();
        let rate =
            if timed { format!("{:.2} ± {:.2}", row.avg_ts, row.stddev_ts) } else { "not timed".into() };
        text += &format!(
            "| {} | {} | {} | {} | {} | {} | {rate} | {} | {} | {} | {:.0} |\n",
            s.model_type,
            size(s.model_size),
            params(s.model_n_params),
            s.backends,
            s.n_threads,
            row.test,
            number(timed.then_some(row.avg_ns as f64 / 1e6), 2),
            number(row.floor_ms, 2),
            row.percent_of_ceiling.zip(row.bound_by).map_or("-".into(), |(p, by)| format!("{p:.0} % ({by})")),
            row.launches_per_step,
        );
    }
    events(&mut text, rows);
    if let Some(c) = rows.iter().filter_map(|row| row.ceilings).reduce(Ceilings::max) {
        text += &format!(
            "\nceilings of this run: {:.1} GFLOP/s, {:.1} GB/s read from memory{}\n",
            c.flops_per_s / 1e9,
            c.bytes_per_s / 1e9,
            match c.cached_per_s[0] {
                0.0 => String::new(),
                rate => format!(", {:.1} GB/s from the nearest cache", rate / 1e9),
            }
        );
    } else {
        text += "\nnothing is timed on this device: counts only\n";
    }
    if let Some(row) = rows.first() {
        let (s, e) = (&row.subject, &row.environment);
        text += &format!("device: {}; build {} ({})\n", s.device, s.build_commit, e.build_flags);
        text += &format!("caches: {}\n", row.cache_state);
    }
    for (row, counts) in rows.iter().filter_map(|row| Some((row, row.device_counts?))) {
        text += &format!(
            "counted {}: {} kernels, {} barriers, {} accesses\n",
            row.test, counts.launches, counts.barriers, counts.accesses
        );
    }
    for row in rows {
        row.doubts.iter().for_each(|doubt| text += &format!("doubt {}: {doubt}\n", row.test));
    }
    text
}

/// The table of single events, if there are any.
fn events(text: &mut String, rows: &[Row]) {
    if rows.iter().all(|row| row.latencies.is_empty()) {
        return;
    }
    *text += "\n| test | event | count | mean ms | p50 | p90 | p99 |\n\
              | --- | --- | ---: | ---: | ---: | ---: | ---: |\n";
    for (row, l) in rows.iter().flat_map(|row| row.latencies.iter().map(move |l| (row, l))) {
        *text += &format!(
            "| {} | {} | {} | {:.3} ± {:.3} | {:.3} | {:.3} | {:.3} |\n",
            row.test, l.what, l.count, l.mean_ms, l.stddev_ms, l.p50_ms, l.p90_ms, l.p99_ms
        );
    }
}

/// Bytes as llama-bench writes them.
fn size(bytes: u64) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib < 1024.0 { format!("{mib:.2} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

/// Parameters as llama-bench writes them.
fn params(n: u64) -> String {
    if n < 1_000_000_000 { format!("{:.2} M", n as f64 / 1e6) } else { format!("{:.2} B", n as f64 / 1e9) }
}

/// The flat fields in the order of the struct; lists and objects as JSON.
fn csv(rows: &[Row]) -> String {
    let mut text = String::new();
    for (i, row) in rows.iter().enumerate() {
        let value = serde_json::to_value(row).expect("rows are plain data");
        let fields = value.as_object().expect("a row is an object");
        if i == 0 {
            text += &(fields.keys().cloned().collect::<Vec<_>>().join(",") + "\n");
        }
        let cells: Vec<String> = fields
            .values()
            .map(|value| {
                let cell = match value {
                    Value::String(text) => text.clone(),
                    // As llama-bench has it.
                    Value::Bool(yes) => u8::from(*yes).to_string(),
                    other => other.to_string(),
                };
                format!("\"{}\"", cell.replace('"', "\"\""))
            })
            .collect();
        text += &(cells.join(",") + "\n");
    }
    text
}
