//! A roofline plot: every op of a run as a point, its intensity to the right, its speed upwards, under the
//! roof that the ceilings make.

use super::trace::OpTime;
use crate::backend::Ceilings;
use std::fmt::Write;

/// The drawing's size and the edges of its plot.
const SIZE: (f64, f64) = (960.0, 560.0);
const PLOT: (f64, f64, f64, f64) = (76.0, 50.0, 660.0, 500.0);
/// Most names that are written beside points: those that took longest.
const LABELS: usize = 8;
/// Colours that are distinct to colour-blind eyes (Okabe and Ito).
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"];

/// A mark at a place: each kind of op, in order of appearance, has a colour and an outline that no other has.
fn mark(kind: usize, (x, y): (f64, f64), radius: f64) -> String {
    let colour = COLOURS[kind % COLOURS.len()];
    let r = radius;
    let outline = match kind / COLOURS.len() {
        0 => format!(r#"circle cx="{x:.1}" cy="{y:.1}" r="{r:.1}""#),
        1 => format!(
            r#"rect x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}""#,
            x - r,
            y - r,
            2.0 * r,
            2.0 * r
        ),
        _ => format!(
            r#"polygon points="{x:.1},{:.1} {:.1},{:.1} {:.1},{:.1}""#,
            y - r,
            x + r,
            y + r,
            x - r,
            y + r
        ),
    };
    format!(r#"<{outline} fill="{colour}" fill-opacity="0.75" stroke="{colour}""#)
}

/// What rates are counted in: the roof is a number that people read.
struct Unit {
    per_s: f64,
    name: &'static str,
}

impl Unit {
    fn of(flops_per_s: f64) -> Self {
        if flops_per_s < 1e12 {
            Unit { per_s: 1e9, name: "GFLOP/s" }
        } else {
            Unit { per_s: 1e12, name: "TFLOP/s" }
        }
    }
}

/// Two logarithmic axes.
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    fn place(&self, intensity: f64, rate: f64) -> (f64, f64) {
        let at = |value: f64, (low, high): (f64, f64)| (value.log10() - low) / (high - low);
        let (left, top, right, bottom) = PLOT;
        (left + at(intensity, self.x) * (right - left), bottom - at(rate, self.y) * (bottom - top))
    }
}

/// The plot as an SVG document, light and legible on any background. Ops that compute nothing have no
/// place in it. Under the roof lie two slopes: memory's, and, dashed, that of the nearest cache, where known.
pub fn svg(title: &str, ops: &[OpTime], ceilings: Ceilings) -> String {
    let points: Vec<Point> = ops.iter().filter_map(Point::of).collect();
    let roof = ceilings.flops_per_s;
    let unit = Unit::of(roof);
    let ridge = roof / ceilings.bytes_per_s;
    let decades = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, 0f64), |(l, h), v| (l.min(v), h.max(v)));
        (low.log10().floor(), (high.log10() + 0.1).ceil())
    };
    let axes = Axes {
        x: decades(&mut points.iter().map(|p| p.intensity).chain([ridge, ridge * 10.0])),
        y: decades(&mut points.iter().map(|p| p.rate).chain([roof])),
    };

    let mut out = String::new();
    let (width, height) = SIZE;
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">
<rect width="{width}" height="{height}" fill="#ffffff"/>
<text x="{}" y="28" font-size="16" fill="#222222">{}</text>"##,
        PLOT.0,
        escape(title)
    );
    grid(&mut out, &axes, &unit);
    if ceilings.cached_per_s[0] > ceilings.bytes_per_s {
        slope(
            &mut out,
            &axes,
            roof,
            ceilings.cached_per_s[0],
            r#" stroke-dasharray="5 4" stroke-width="1.2""#,
            "cache",
        );
    }
    slope(&mut out, &axes, roof, ceilings.bytes_per_s, r#" stroke-width="2""#, "memory");
    let (right, top) = axes.place(10f64.powf(axes.x.1), roof);
    let _ = writeln!(
        out,
        r##"<text x="{:.1}" y="{:.1}" text-anchor="end" fill="#222222">{:.0} {}</text>"##,
        right - 4.0,
        top - 7.0,
        roof / unit.per_s,
        unit.name,
    );
    draw(&mut out, &points, &axes, &unit);
    out + "</svg>\n"
}

/// An op that has a place in the plot.
struct Point<'a> {
    op: &'a OpTime,
    seconds: f64,
    /// FLOPs of a byte.
    intensity: f64,
    /// FLOPs of a second.
    rate: f64,
}

impl<'a> Point<'a> {
    fn of(op: &'a OpTime) -> Option<Self> {
        let seconds = op.seconds.filter(|seconds| *seconds > 0.0 && op.flops > 0 && op.bytes > 0)?;
        let (intensity, rate) = (op.flops as f64 / op.bytes as f64, op.flops as f64 / seconds);
        Some(Point { op, seconds, intensity, rate })
    }
}

/// What a rate of bytes allows, up to the roof.
fn slope(out: &mut String, axes: &Axes, roof: f64, bytes_per_s: f64, style: &str, name: &str) {
    let (x_low, x_high) = (10f64.powf(axes.x.0), 10f64.powf(axes.x.1));
    // It begins where it enters the plot.
    let start = x_low.max(10f64.powf(axes.y.0) / bytes_per_s);
    let [from, corner, to] = [(start, start * bytes_per_s), (roof / bytes_per_s, roof), (x_high, roof)]
        .map(|(intensity, rate)| axes.place(intensity, rate));
    let _ = writeln!(
        out,
        r##"<path d="M{:.1} {:.1} L{:.1} {:.1} L{:.1} {:.1}" fill="none" stroke="#222222"{style}/>
<text x="{:.1}" y="{:.1}" fill="#222222" transform="rotate({:.1} {:.1} {:.1})">{name} {:.0} GB/s</text>"##,
        from.0,
        from.1,
        corner.0,
        corner.1,
        to.0,
        to.1,
        from.0 + 12.0,
        from.1 - 14.0,
        (corner.1 - from.1).atan2(corner.0 - from.0).to_degrees(),
        from.0,
        from.1,
        bytes_per_s / 1e9,
    );
}

/// The points, numbers beside those that took longest, and what both mean.
fn draw(out: &mut String, points: &[Point<'_>], axes: &Axes, unit: &Unit) {
    let (mut kinds, mut labels): (Vec<&str>, Vec<(f64, f64)>) = (Vec::new(), Vec::new());
    let total: f64 = points.iter().map(|point| point.seconds).sum();
    for (i, point) in points.iter().enumerate() {
        let Point { op, seconds, intensity, rate } = *point;
        let kind = kinds.iter().position(|k| *k == op.op).unwrap_or_else(|| {
            kinds.push(op.op);
            kinds.len() - 1
        });
        let (x, y) = axes.place(intensity, rate);
        let radius = 3.5 + 12.0 * (seconds / total).sqrt();
        let (name, shape) = (op.op, escape(&op.shape));
        let _ = writeln!(
            out,
            "{}><title>{name} {shape}: {:.1} {}, {:.1} GB/s, {:.1} % of the time</title></{}>",
            mark(kind, (x, y), radius),
            rate / unit.per_s,
            unit.name,
            op.bytes as f64 / seconds / 1e9,
            100.0 * seconds / total,
            ["circle", "rect", "polygon"][(kind / COLOURS.len()).min(2)],
        );
        if i < LABELS {
            let (x, y) = free(&labels, (x + radius + 3.0, y + 4.0));
            labels.push((x, y));
            let _ = writeln!(
                out,
                r##"<text x="{x:.1}" y="{y:.1}" font-weight="bold" fill="#222222">{}</text>"##,
                i + 1
            );
        }
    }
    legend(out, points, &kinds, total);
}

/// Decades as lines, with their values.
fn grid(out: &mut String, axes: &Axes, unit: &Unit) {
    let (left, top, right, bottom) = PLOT;
    for decade in axes.x.0 as i32..=axes.x.1 as i32 {
        let value = 10f64.powi(decade);
        let (x, _) = axes.place(value, 10f64.powf(axes.y.0));
        let _ = writeln!(
            out,
            r##"<path d="M{x:.1} {top} V{bottom}" stroke="#dddddd"/><text x="{x:.1}" y="{}" text-anchor="middle" fill="#444444">{value}</text>"##,
            bottom + 16.0
        );
    }
    for decade in axes.y.0 as i32..=axes.y.1 as i32 {
        let rate = 10f64.powi(decade);
        let (_, y) = axes.place(10f64.powf(axes.x.0), rate);
        let _ = writeln!(
            out,
            r##"<path d="M{left} {y:.1} H{right}" stroke="#dddddd"/><text x="{}" y="{:.1}" text-anchor="end" fill="#444444">{}</text>"##,
            left - 6.0,
            y + 4.0,
            (rate / unit.per_s * 1e6).round() / 1e6
        );
    }
    let _ = writeln!(
        out,
        r##"<text x="{}" y="{}" text-anchor="middle" fill="#444444">FLOP per byte</text>
<text x="18" y="{}" text-anchor="middle" fill="#444444" transform="rotate(-90 18 {})">{}</text>"##,
        (left + right) / 2.0,
        bottom + 38.0,
        (top + bottom) / 2.0,
        (top + bottom) / 2.0,
        unit.name
    );
}

/// The place at `x`, `y`, to the right of it or in the rows below, where a number stands in the plot and covers none
/// of those written before.
fn free(labels: &[(f64, f64)], (x, mut y): (f64, f64)) -> (f64, f64) {
    const NUMBER: (f64, f64) = (11.0, 13.0);
    let covers = |(x, y): (f64, f64)| {
        labels.iter().any(|label| (label.0 - x).abs() < NUMBER.0 && (label.1 - y).abs() < NUMBER.1)
    };
    let most = PLOT.2 - NUMBER.0;
    loop {
        let mut at = x.min(most);
        while covers((at, y)) {
            at += NUMBER.0;
        }
        if at <= most {
            return (at, y);
        }
        y += NUMBER.1;
    }
}

/// The marks of the kinds, and the names of the numbered points.
fn legend(out: &mut String, points: &[Point<'_>], kinds: &[&str], total: f64) {
    let x = PLOT.2 + 20.0;
    let mut y = PLOT.1 + 8.0;
    for (kind, name) in kinds.iter().enumerate() {
        let mark = mark(kind, (x, y - 4.0), 5.0);
        let _ = writeln!(out, r##"{mark}/><text x="{}" y="{y}" fill="#222222">{name}</text>"##, x + 12.0);
        y += 19.0;
    }
    y += 12.0;
    for (i, point) in points.iter().take(LABELS).enumerate() {
        let _ = writeln!(
            out,
            r##"<text x="{x}" y="{y}" font-size="12" fill="#222222"><tspan font-weight="bold">{}</tspan> {} {:.0} %</text>"##,
            i + 1,
            escape(&point.op.shape),
            100.0 * point.seconds / total
        );
        y += 17.0;
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn op(op: &'static str, flops: u64, bytes: u64, seconds: f64) -> OpTime {
        let shape = "1x<2>".into();
        OpTime { op, shape, calls: 1, seconds: Some(seconds), flops, bytes, floor: None, bound_by: None }
    }

    #[test]
    fn a_point_under_its_roof_is_drawn_there() {
        let ceilings = Ceilings { flops_per_s: 1e11, bytes_per_s: 1e10, ..Ceilings::default() };
        // 10 GFLOP/s at 1 FLOP a byte: on the slope, half way up two decades.
        let drawing = svg(
            "a & b",
            &[op("Linear", 10_000_000_000, 10_000_000_000, 1.0), op("Select", 0, 5, 0.1)],
            ceilings,
        );
        let axes = Axes { x: (0.0, 3.0), y: (10.0, 12.0) };
        let (x, y) = axes.place(1.0, 1e10);
        assert!(drawing.contains(&format!(r#"<circle cx="{x:.1}" cy="{y:.1}""#)), "{drawing}");
        assert!(
            drawing.contains("a &amp; b") && drawing.contains("1x&lt;2&gt;") && !drawing.contains("Select")
        );
        assert!(
            drawing.contains("100 GFLOP/s")
                && drawing.contains("memory 10 GB/s")
                && !drawing.contains("cache")
        );
        assert_eq!(drawing.matches("<svg").count(), drawing.matches("</svg>").count());
    }

    #[test]
    fn numbers_do_not_cover_one_another() {
        let mut labels: Vec<(f64, f64)> = Vec::new();
        for at in [(50.0, 50.0), (52.0, 49.0), (50.0, 55.0), (50.0, 80.0)] {
            labels.push(free(&labels, at));
        }
        assert_eq!(labels[3], (50.0, 80.0), "what has room stays");
        // Beside large products at the right edge, where the legend begins.
        for at in
            [(630.0, 128.0), (640.0, 128.0), (645.0, 129.0), (655.0, 128.0), (659.0, 127.0), (670.0, 128.0)]
        {
            labels.push(free(&labels, at));
        }
        for (i, a) in labels.iter().enumerate() {
            assert!(a.0 + 11.0 <= PLOT.2, "outside: {labels:?}");
            assert!(
                labels[..i].iter().all(|b| (a.0 - b.0).abs() >= 11.0 || (a.1 - b.1).abs() >= 13.0),
                "{labels:?}"
            );
        }
    }

    #[test]
    fn every_kind_of_op_has_a_mark_of_its_own() {
        let marks: HashSet<_> = (0..20).map(|kind| mark(kind, (0.0, 0.0), 5.0)).collect();
        assert_eq!(marks.len(), 20, "there are 14 kinds");
    }

    #[test]
    fn a_gpu_is_drawn_in_teraflops_and_a_cache_has_its_slope() {
        let mut ceilings = Ceilings { flops_per_s: 6e14, bytes_per_s: 4e12, ..Ceilings::default() };
        ceilings.cached_per_s[0] = 8e12;
        let drawing = svg("gpu", &[op("Linear", 1 << 40, 1 << 30, 0.01)], ceilings);
        for text in ["600 TFLOP/s", "memory 4000 GB/s", "cache 8000 GB/s"] {
            assert!(drawing.contains(text), "{text}");
        }
    }
}
