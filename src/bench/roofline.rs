//! A roofline plot: every op of a run as a point, its intensity to the right, its speed upwards, under the
//! roof that the ceilings make.

use super::trace::OpTime;
use crate::backend::Ceilings;
use std::fmt::Write;

/// The drawing's size and the edges of its plot.
const SIZE: (f64, f64) = (860.0, 520.0);
const PLOT: (f64, f64, f64, f64) = (70.0, 50.0, 640.0, 460.0);
/// Most names that are written beside points: those that took longest.
const LABELS: usize = 8;
/// A colour for each kind of op, distinct to colour-blind eyes (Okabe and Ito), in order of appearance.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"];

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
/// place in it.
pub fn svg(title: &str, ops: &[OpTime], ceilings: Ceilings) -> String {
    let points: Vec<&OpTime> =
        ops.iter().filter(|op| op.flops > 0 && op.bytes > 0 && op.seconds > 0.0).collect();
    let roof = ceilings.flops_per_s;
    let intensity = |op: &OpTime| op.flops as f64 / op.bytes as f64;
    let rate = |op: &OpTime| op.flops as f64 / op.seconds;
    let ridge = roof / ceilings.bytes_per_s;
    let decades = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, 0f64), |(l, h), v| (l.min(v), h.max(v)));
        (low.log10().floor(), (high.log10() + 0.1).ceil())
    };
    let axes = Axes {
        x: decades(&mut points.iter().map(|op| intensity(op)).chain([ridge, ridge * 10.0])),
        y: decades(&mut points.iter().map(|op| rate(op)).chain([roof])),
    };

    let mut out = String::new();
    let (width, height) = SIZE;
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">
<rect width="{width}" height="{height}" fill="#ffffff"/>
<text x="{}" y="26" font-size="15" fill="#222222">{}</text>"##,
        PLOT.0,
        escape(title)
    );
    grid(&mut out, &axes);
    let (x_low, x_high) = (10f64.powf(axes.x.0), 10f64.powf(axes.x.1));
    let corner = axes.place(ridge, roof);
    let y_low = 10f64.powf(axes.y.0);
    // The slope begins where it enters the plot.
    let start = x_low.max(y_low / ceilings.bytes_per_s);
    let (from, to) = (axes.place(start, start * ceilings.bytes_per_s), axes.place(x_high, roof));
    let _ = writeln!(
        out,
        r##"<path d="M{:.1} {:.1} L{:.1} {:.1} L{:.1} {:.1}" fill="none" stroke="#222222" stroke-width="2"/>
<text x="{:.1}" y="{:.1}" text-anchor="end" fill="#222222">{:.0} GFLOP/s</text>
<text x="{:.1}" y="{:.1}" fill="#222222">{:.1} GB/s</text>"##,
        from.0,
        from.1,
        corner.0,
        corner.1,
        to.0,
        to.1,
        to.0 - 4.0,
        to.1 - 6.0,
        roof / 1e9,
        from.0 + 6.0,
        from.1 - 10.0,
        ceilings.bytes_per_s / 1e9,
    );

    let mut kinds: Vec<&str> = Vec::new();
    let total: f64 = ops.iter().map(|op| op.seconds).sum();
    for (i, op) in points.iter().enumerate() {
        let kind = kinds.iter().position(|k| *k == op.op).unwrap_or_else(|| {
            kinds.push(op.op);
            kinds.len() - 1
        });
        let (x, y) = axes.place(intensity(op), rate(op));
        let radius = 3.0 + 12.0 * (op.seconds / total).sqrt();
        let _ = writeln!(
            out,
            r##"<circle cx="{x:.1}" cy="{y:.1}" r="{radius:.1}" fill="{}" fill-opacity="0.75"><title>{} {}: {:.1} GFLOP/s, {:.1} GB/s, {:.1} % of the time</title></circle>"##,
            COLOURS[kind % COLOURS.len()],
            op.op,
            escape(&op.shape),
            rate(op) / 1e9,
            op.bytes as f64 / op.seconds / 1e9,
            100.0 * op.seconds / total,
        );
        if i < LABELS {
            let _ = writeln!(
                out,
                r##"<text x="{:.1}" y="{:.1}" font-size="10" fill="#444444">{}</text>"##,
                x + radius + 2.0,
                y + 3.0,
                i + 1
            );
        }
    }
    legend(&mut out, &points, &kinds, total);
    out + "</svg>\n"
}

/// Decades as lines, with their values.
fn grid(out: &mut String, axes: &Axes) {
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
        let (_, y) = axes.place(10f64.powf(axes.x.0), 10f64.powi(decade));
        let _ = writeln!(
            out,
            r##"<path d="M{left} {y:.1} H{right}" stroke="#dddddd"/><text x="{}" y="{:.1}" text-anchor="end" fill="#444444">{}</text>"##,
            left - 6.0,
            y + 4.0,
            10f64.powi(decade - 9)
        );
    }
    let _ = writeln!(
        out,
        r##"<text x="{}" y="{}" text-anchor="middle" fill="#444444">FLOP per byte</text>
<text x="18" y="{}" text-anchor="middle" fill="#444444" transform="rotate(-90 18 {})">GFLOP/s</text>"##,
        (left + right) / 2.0,
        bottom + 36.0,
        (top + bottom) / 2.0,
        (top + bottom) / 2.0
    );
}

/// The colours of the kinds, and the names of the numbered points.
fn legend(out: &mut String, points: &[&OpTime], kinds: &[&str], total: f64) {
    let x = PLOT.2 + 16.0;
    let mut y = PLOT.1 + 8.0;
    for (i, kind) in kinds.iter().enumerate() {
        let _ = writeln!(
            out,
            r##"<circle cx="{x}" cy="{}" r="5" fill="{}"/><text x="{}" y="{y}" fill="#222222">{kind}</text>"##,
            y - 4.0,
            COLOURS[i % COLOURS.len()],
            x + 12.0
        );
        y += 18.0;
    }
    y += 10.0;
    for (i, op) in points.iter().take(LABELS).enumerate() {
        let _ = writeln!(
            out,
            r##"<text x="{x}" y="{y}" font-size="10" fill="#444444">{} {} {:.0} %</text>"##,
            i + 1,
            escape(&op.shape),
            100.0 * op.seconds / total
        );
        y += 14.0;
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_under_its_roof_is_drawn_there() {
        let ceilings = Ceilings { flops_per_s: 1e11, bytes_per_s: 1e10 };
        let op = |op, flops, bytes, seconds| OpTime {
            op,
            shape: "1x<2>".into(),
            calls: 1,
            seconds,
            flops,
            bytes,
            floor: None,
        };
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
        assert_eq!(drawing.matches("<svg").count(), drawing.matches("</svg>").count());
    }
}
