//! Dual scaling against an oracle in f64 that follows the description to the letter.

#[path = "golden/inputs.rs"]
mod inputs;

use inputs::{keys, loud_keys, transposed, turned};
use kvarn::quant::{DualScaleOptions, dual_scale};

/// Dual scaling in f64, with the logarithms of the description: r, c and I.
fn dual_scale_f64(m: &[f32], tokens: usize, options: DualScaleOptions) -> (Vec<f64>, Vec<f64>, f64) {
    let channels = m.len() / tokens;
    let mean_square = m.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / m.len() as f64;
    let g = if options.rms_step && mean_square > 0.0 { mean_square.sqrt() / 4.0 } else { 1.0 };
    let std = |values: &mut dyn Iterator<Item = f64>| {
        let values: Vec<f64> = values.collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        (squares / (values.len() - 1) as f64).sqrt().clamp(1e-3, 1e3)
    };
    let (mut log_r, mut log_c) = (vec![0f64; channels], vec![0f64; tokens]);
    let at = |log_r: &[f64], log_c: &[f64], d: usize, t: usize| {
        f64::from(m[d * tokens + t]) / g / (log_r[d] + log_c[t]).exp()
    };
    let columns = |log_r: &[f64], log_c: &[f64]| -> Vec<f64> {
        (0..tokens).map(|t| std(&mut (0..channels).map(|d| at(log_r, log_c, d, t)))).collect()
    };
    let rows = |log_r: &[f64], log_c: &[f64]| -> Vec<f64> {
        (0..channels).map(|d| std(&mut (0..tokens).map(|t| at(log_r, log_c, d, t)))).collect()
    };
    let spread =
        |std: &[f64]| std.iter().fold(0.0, |a: f64, &b| a.max(b)) / std.iter().fold(1e9, |a: f64, &b| a.min(b));
    let imbalance = |log_r: &[f64], log_c: &[f64]| spread(&columns(log_r, log_c)) + spread(&rows(log_r, log_c));
    let mut best = (log_r.clone(), log_c.clone(), imbalance(&log_r, &log_c));
    for _ in 0..options.iterations {
        for (log, std) in log_c.clone().iter().zip(columns(&log_r, &log_c)).map(|(a, b)| a + b.ln()).enumerate() {
            log_c[log] = std.clamp(-0.3, 10.0);
        }
        for (log, std) in log_r.clone().iter().zip(rows(&log_r, &log_c)).map(|(a, b)| a + b.ln()).enumerate() {
            log_r[log] = std.clamp(-0.3, 10.0);
        }
        let now = imbalance(&log_r, &log_c);
        if now <= best.2 {
            best = (log_r.clone(), log_c.clone(), now);
        }
    }
    (best.0.iter().map(|x| x.exp() * g).collect(), best.1.iter().map(|x| x.exp()).collect(), best.2)
}

#[test]
fn dual_scaling_is_that_of_float64() {
    let scaled = |k: &[f32], factor: f32| -> Vec<f32> { k.iter().map(|x| x * factor).collect() };
    let with_means: Vec<f32> = keys(64, 128).iter().enumerate().map(|(i, x)| x + 40.0 * (i % 64 % 9) as f32).collect();
    for (name, k, head_dim) in [
        ("keys", keys(64, 128), 64),
        ("wide keys", keys(128, 128), 128),
        ("rotated keys", turned(&keys(64, 128), 64), 64),
        ("loud keys", loud_keys(96, 32), 96),
        ("channels with large means", with_means, 64),
        ("small keys", scaled(&keys(64, 128), 1e-6), 64),
        ("large keys", scaled(&keys(64, 16), 1e6), 64),
        ("zeros", vec![0.0; 64 * 16], 64),
    ] {
        let (m, tokens) = (transposed(&k, head_dim), k.len() / head_dim);
        for options in [DualScaleOptions::SEALED, DualScaleOptions { iterations: 1, rms_step: false }] {
            let ours = dual_scale(&m, tokens, options);
            let (r, c, imbalance) = dual_scale_f64(&m, tokens, options);
            let close = |ours: &[f32], theirs: &[f64]| {
                ours.iter().zip(theirs).all(|(&a, b)| (f64::from(a) / b - 1.0).abs() < 1e-4)
            };
            assert!((f64::from(ours.imbalance) / imbalance - 1.0).abs() < 1e-3, "{name}: {}", ours.imbalance);
            assert!(close(&ours.channel, &r) && close(&ours.token, &c), "{name}, {options:?}");
        }
    }
}

#[test]
fn small_keys_are_balanced_as_large_ones_are() {
    let m = transposed(&keys(64, 128), 64);
    let small: Vec<f32> = m.iter().map(|x| x / 4096.0).collect();
    let tokens = |m: &[f32], options| dual_scale(m, 128, options).token;
    assert_eq!(tokens(&m, DualScaleOptions::SEALED), tokens(&small, DualScaleOptions::SEALED));
    // without the division by g every scale is at its floor
    let floored = tokens(&small, DualScaleOptions { iterations: 2, rms_step: false });
    assert!(floored.iter().all(|&c| c == floored[0]), "{floored:?}");
}

#[test]
fn the_best_iterate_is_kept_be_it_the_start() {
    let with_means: Vec<f32> =
        keys(64, 128).iter().enumerate().map(|(i, x)| if (i % 64).is_multiple_of(9) { x + 20.0 } else { *x }).collect();
    for (name, k, best) in
        [("large means", with_means, 0), ("keys", keys(64, 128), 1), ("loud keys", loud_keys(64, 32), 2)]
    {
        let (m, tokens) = (transposed(&k, 64), k.len() / 64);
        let after = |iterations| dual_scale(&m, tokens, DualScaleOptions { iterations, rms_step: true });
        let kept = after(best);
        for iterations in 0..6 {
            let scales = after(iterations);
            assert_eq!(scales == kept, iterations >= best, "{name}: {} after {iterations}", scales.imbalance);
        }
    }
}
