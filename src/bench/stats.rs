//! What samples say: mean, spread, percentiles, and how two sets of them compare.

use serde::Serialize;

/// The arithmetic mean; 0 of nothing.
pub fn mean(samples: &[f64]) -> f64 {
    if samples.is_empty() { 0.0 } else { samples.iter().sum::<f64>() / samples.len() as f64 }
}

/// The sample standard deviation (divided by n - 1), as llama-bench has it; 0 of fewer than two.
pub fn stddev(samples: &[f64]) -> f64 {
    if samples.len() < 2 {
        return 0.0;
    }
    let mean = mean(samples);
    (samples.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (samples.len() - 1) as f64).sqrt()
}

/// The value below which `p` percent of the samples lie, interpolated between neighbours as NumPy does
/// by default; 0 of nothing.
pub fn percentile(samples: &[f64], p: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = p / 100.0 * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

/// A ratio and the interval that holds it with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// The ratio of the geometric means.
    pub ratio: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// How many times as large `b` is as `a`: Welch's t interval on the logarithms, because a ratio's errors
/// multiply. With a single sample on either side nothing is known of the spread, and the interval is
/// everything.
///
/// # Panics
/// If a side has no samples, or one that is not positive.
pub fn ratio(a: &[f64], b: &[f64]) -> Ratio {
    let (a, b) = (logs(a), logs(b));
    let difference = mean(&b) - mean(&a);
    if a.len() < 2 || b.len() < 2 {
        return Ratio { ratio: difference.exp(), low: 0.0, high: f64::INFINITY };
    }
    let (n, m) = (a.len() as f64, b.len() as f64);
    let (va, vb) = (stddev(&a).powi(2) / n, stddev(&b).powi(2) / m);
    let variance = va + vb;
    // Welch-Satterthwaite.
    let degrees = match variance > 0.0 {
        true => variance.powi(2) / (va.powi(2) / (n - 1.0) + vb.powi(2) / (m - 1.0)),
        false => f64::INFINITY,
    };
    let margin = t_975(degrees) * variance.sqrt();
    Ratio { ratio: difference.exp(), low: (difference - margin).exp(), high: (difference + margin).exp() }
}

/// The same of samples that were taken in pairs, one of each side close together: Student's t interval on the
/// logarithms of the pairs' ratios, from which what both sides share, a slow machine or a drift, is gone.
///
/// # Panics
/// If the sides differ in length, or as [`ratio`].
pub fn paired_ratio(a: &[f64], b: &[f64]) -> Ratio {
    assert_eq!(a.len(), b.len(), "samples in pairs");
    let differences: Vec<f64> = logs(a).iter().zip(logs(b)).map(|(a, b)| b - a).collect();
    let (mean, n) = (mean(&differences), differences.len() as f64);
    if differences.len() < 2 {
        return Ratio { ratio: mean.exp(), low: 0.0, high: f64::INFINITY };
    }
    let margin = t_975(n - 1.0) * stddev(&differences) / n.sqrt();
    Ratio { ratio: mean.exp(), low: (mean - margin).exp(), high: (mean + margin).exp() }
}

fn logs(samples: &[f64]) -> Vec<f64> {
    assert!(!samples.is_empty() && samples.iter().all(|x| *x > 0.0), "positive samples");
    samples.iter().map(|x| x.ln()).collect()
}

/// The 97.5th percentile of Student's t: the published table up to 30 degrees of freedom, taken at the
/// whole number below, then the leading term of its expansion, which is right to three digits there.
fn t_975(degrees: f64) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
        2.045, 2.042,
    ];
    const NORMAL: f64 = 1.959_964;
    match degrees {
        d if d < 31.0 => TABLE[(d.max(1.0) as usize - 1).min(29)],
        d => NORMAL + (NORMAL.powi(3) + NORMAL) / (4.0 * d),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_percentiles() {
        let samples = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(mean(&samples), 2.5);
        // Squared distances 2.25 + 2.25 + 0.25 + 0.25 = 5, over 3.
        assert!((stddev(&samples) - (5.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(percentile(&samples, 50.0), 2.5);
        assert_eq!(percentile(&samples, 0.0), 1.0);
        assert_eq!(percentile(&samples, 100.0), 4.0);
        // 0.9 * 3 = 2.7: between 3 and 4.
        assert!((percentile(&samples, 90.0) - 3.7).abs() < 1e-12);
        assert_eq!((mean(&[]), stddev(&[7.0]), percentile(&[7.0], 99.0)), (0.0, 0.0, 7.0));
    }

    #[test]
    fn ratios_have_intervals() {
        // Logarithms 0, 0.2 and 1, 1.2: means differ by 1, variances of the means 0.01 each, 2 degrees.
        let e = |x: f64| x.exp();
        let r = ratio(&[e(0.0), e(0.2)], &[e(1.0), e(1.2)]);
        let margin = 4.303 * 0.02f64.sqrt();
        assert!((r.ratio - e(1.0)).abs() < 1e-12);
        assert!((r.low.ln() - (1.0 - margin)).abs() < 1e-9, "{}", r.low.ln());
        assert!((r.high.ln() - (1.0 + margin)).abs() < 1e-9);
        let sure = ratio(&[2.0, 2.0], &[3.0, 3.0]);
        assert!([sure.ratio, sure.low, sure.high].iter().all(|x| (x - 1.5).abs() < 1e-12), "{sure:?}");
        let one = ratio(&[2.0], &[3.0, 3.1]);
        assert_eq!((one.low, one.high), (0.0, f64::INFINITY));
        // Pairs differ by 0.1, 0.2 and 0.3: 0.1 of spread, over the root of 3, 2 degrees; what they share is gone.
        let pairs = paired_ratio(&[e(0.0), e(5.0), e(-3.0)], &[e(0.1), e(5.2), e(-2.7)]);
        let margin = 4.303 * 0.1 / 3f64.sqrt();
        assert!((pairs.ratio.ln() - 0.2).abs() < 1e-9, "{pairs:?}");
        assert!((pairs.low.ln() - (0.2 - margin)).abs() < 1e-9, "{pairs:?}");
        assert!((pairs.high.ln() - (0.2 + margin)).abs() < 1e-9, "{pairs:?}");
        assert_eq!(paired_ratio(&[2.0], &[3.0]).high, f64::INFINITY);
        assert!((t_975(60.0) - 2.000).abs() < 2e-3 && (t_975(f64::INFINITY) - 1.96).abs() < 1e-4);
    }
}
