//! Calibrations: what they learn from observed tokens, and when they freeze.

mod common;

use common::Random;
use kvarn::Error;
use kvarn::calibration::{Calibration, FIRST_TOKENS, HeadShape, QUERY_TOKENS, State};
use kvarn::quant::LayerCalibration;
use kvarn::quant::{Feedback, HeadFeedback, rotate};
use std::sync::Arc;

const SHAPE: HeadShape = HeadShape { num_q_heads: 6, num_kv_heads: 2, head_dim: 16 };

/// Largest difference of two factorings, over the largest value: deviations by recursion and in two passes differ in
/// the last bits of f64, the factors are f32.
const SAME_FACTORS: f64 = 1e-5;

/// Queries and keys of one layer, token by token: channels that move together, of different sizes and means.
struct Tokens {
    shape: HeadShape,
    q: Vec<f32>,
    k: Vec<f32>,
}

impl Tokens {
    fn new(shape: HeadShape, n: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut rows = |heads: usize| -> Vec<f32> {
            let mut rows = Vec::new();
            for index in 0..n * heads {
                let (shared, head) = (random.normal(), (index % heads) as f32);
                for d in 0..shape.head_dim as u32 {
                    let size = 1.0 + f64::from(d % 5) as f32 + 0.3 * head;
                    rows.push(size * (random.normal() + shared * (f64::from(d) as f32 + head).sin()) + 0.5 * head);
                }
            }
            rows
        };
        Self { shape, q: rows(shape.num_q_heads), k: rows(shape.num_kv_heads) }
    }

    fn q(&self, from: usize, to: usize) -> &[f32] {
        let width = self.shape.num_q_heads * self.shape.head_dim;
        &self.q[from * width..to * width]
    }

    fn k(&self, from: usize, to: usize) -> &[f32] {
        let width = self.shape.num_kv_heads * self.shape.head_dim;
        &self.k[from * width..to * width]
    }

    fn show(&self, calibration: &Calibration, layer: usize, from: usize, to: usize) {
        calibration.observe(layer, self.shape, self.q(from, to), self.k(from, to)).expect("rows of the shape");
    }

    /// K of one head, `[n, head_dim]`.
    fn keys(&self, head: usize, n: usize) -> Vec<f32> {
        let HeadShape { num_kv_heads, head_dim, .. } = self.shape;
        (0..n).flat_map(|t| self.k[(t * num_kv_heads + head) * head_dim..][..head_dim].to_vec()).collect()
    }

    /// The feedback of one head by the definition, of the first `n` tokens; `in_group(query head, kv head)`.
    fn expected(&self, head: usize, n: usize, in_group: impl Fn(usize, usize) -> bool) -> HeadFeedback {
        let HeadShape { num_q_heads, head_dim, .. } = self.shape;
        let mut moment = vec![0.0; head_dim * head_dim];
        let mut count = 0.0;
        for row in 0..n * num_q_heads {
            if !in_group(row % num_q_heads, head) {
                continue;
            }
            let q = &self.q[row * head_dim..][..head_dim];
            for i in 0..head_dim {
                for j in 0..head_dim {
                    moment[i * head_dim + j] += f64::from(q[i]) * f64::from(q[j]);
                }
            }
            count += 1.0;
        }
        moment.iter_mut().for_each(|x| *x /= count);
        let plain = self.keys(head, n);
        let mut rotated = plain.clone();
        rotated.chunks_exact_mut(head_dim).for_each(rotate);
        HeadFeedback::factor(&moment, &deviations(&plain, head_dim), &deviations(&rotated, head_dim)).expect("a moment")
    }
}

fn deviations(rows: &[f32], head_dim: usize) -> Vec<f64> {
    let n = (rows.len() / head_dim) as f64;
    let column = |d: usize| rows.iter().skip(d).step_by(head_dim).map(|&x| f64::from(x));
    let deviation = |d: usize| {
        let mean = column(d).sum::<f64>() / n;
        (column(d).map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()
    };
    (0..head_dim).map(deviation).collect()
}

fn difference(a: &Feedback, b: &Feedback) -> f64 {
    let largest = |xs: &[f32]| xs.iter().fold(0f64, |most, &x| most.max(f64::from(x).abs()));
    let apart = |a: &[f32], b: &[f32]| {
        let differences: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
        largest(&differences) / largest(b)
    };
    if a.order != b.order {
        return f64::INFINITY;
    }
    [(&a.matrix, &b.matrix), (&a.error_scale, &b.error_scale), (&vec![a.loss_scale], &vec![b.loss_scale])]
        .iter()
        .map(|(a, b)| apart(a, b))
        .fold(0.0, f64::max)
}

fn frozen_after(tokens: &Tokens, chunk: usize) -> Calibration {
    let calibration = Calibration::new();
    let mut from = 0;
    while calibration.wanted(0) > 0 {
        tokens.show(&calibration, 0, from, from + chunk);
        from += chunk;
    }
    calibration
}

fn only_layer(calibration: &Calibration) -> Arc<LayerCalibration> {
    calibration.layer(0).expect("a factored layer")
}

#[test]
fn the_feedback_is_that_of_the_mean_product_of_a_head_s_own_group_of_queries() {
    let tokens = Tokens::new(SHAPE, 300, 1);
    let calibration = Calibration::new();
    tokens.show(&calibration, 0, 0, 300);
    let found = calibration.for_seal(0).expect("factors").expect("300 tokens");
    for (head, found) in found.heads().iter().enumerate() {
        let expected = tokens.expected(head, 300, |q_head, kv_head| q_head / 3 == kv_head);
        assert!(difference(&found.feedback.plain, &expected.plain) < SAME_FACTORS);
        assert!(difference(&found.feedback.rotated, &expected.rotated) < SAME_FACTORS);
        let interleaved = tokens.expected(head, 300, |q_head, kv_head| q_head % 2 == kv_head);
        assert!(
            difference(&found.feedback.plain, &interleaved.plain) > 100.0 * SAME_FACTORS,
            "the test sees no groups"
        );
    }
}

#[test]
fn splitting_tokens_into_calls_changes_no_bit() {
    let tokens = Tokens::new(SHAPE, QUERY_TOKENS + 700, 2);
    let whole = frozen_after(&tokens, QUERY_TOKENS).to_bytes("f", "m").expect("frozen");
    for chunk in [1, 7, 512, 700] {
        assert!(frozen_after(&tokens, chunk).to_bytes("f", "m").expect("frozen") == whole, "in chunks of {chunk}");
    }
}

#[test]
fn the_last_call_is_cut_at_2048_tokens_exactly() {
    let tokens = Tokens::new(SHAPE, 2100, 3);
    let exact = Calibration::new();
    tokens.show(&exact, 0, 0, QUERY_TOKENS);
    let over = Calibration::new();
    tokens.show(&over, 0, 0, 2000);
    assert_eq!(over.wanted(0), 48);
    assert_eq!(over.state(), State::No);
    tokens.show(&over, 0, 2000, 2100);
    assert_eq!((over.wanted(0), over.state()), (0, State::Frozen));
    assert_eq!(only_layer(&over), only_layer(&exact));
}

#[test]
fn for_seal_returns_nothing_then_the_prompt_s_then_the_frozen_calibration() {
    let tokens = Tokens::new(SHAPE, 3000, 4);
    let calibration = Calibration::new();
    let for_seal = || calibration.for_seal(5).expect("factors");
    assert_eq!(for_seal(), None);
    tokens.show(&calibration, 5, 0, FIRST_TOKENS - 1);
    assert_eq!(for_seal(), None);
    tokens.show(&calibration, 5, FIRST_TOKENS - 1, 200);
    assert_eq!(calibration.layer(5), None, "asking does not factor");
    assert_eq!(calibration.state(), State::No);

    let first = for_seal().expect("200 tokens");
    assert_eq!(calibration.state(), State::OwnPrompt);
    tokens.show(&calibration, 5, 200, 399);
    assert!(Arc::ptr_eq(&first, &for_seal().expect("the same")), "not factored again before the tokens have doubled");
    tokens.show(&calibration, 5, 399, 2000);
    assert!(Arc::ptr_eq(&first, &calibration.layer(5).expect("the same")), "asking does not factor");
    let second = for_seal().expect("2,000 tokens");
    assert_ne!(first, second);
    assert!(Arc::ptr_eq(&second, &calibration.layer(5).expect("the second")));

    tokens.show(&calibration, 5, 2000, 2048);
    let frozen = for_seal().expect("frozen");
    assert_ne!(second, frozen);
    assert_eq!(calibration.state(), State::Frozen);
    tokens.show(&calibration, 5, 2048, 3000);
    assert!(Arc::ptr_eq(&frozen, &for_seal().expect("frozen")), "later traffic changes nothing");
}

#[test]
fn early_factoring_does_not_change_the_frozen_calibration() {
    let tokens = Tokens::new(SHAPE, QUERY_TOKENS, 5);
    let (asked, not_asked) = (Calibration::new(), Calibration::new());
    for from in (0..QUERY_TOKENS).step_by(128) {
        tokens.show(&asked, 0, from, from + 128);
        tokens.show(&not_asked, 0, from, from + 128);
        asked.for_seal(0).expect("factors").expect("128 tokens");
    }
    assert_eq!(only_layer(&asked), only_layer(&not_asked));
}

#[test]
fn non_finite_rows_are_skipped_and_not_counted() {
    let tokens = Tokens::new(SHAPE, 300, 6);
    let clean = Calibration::new();
    let mut dirty = Tokens::new(SHAPE, 300, 6);
    for (t, bad) in [(0, f32::NAN), (17, f32::INFINITY), (299, f32::NEG_INFINITY), (130, f32::MAX)] {
        dirty.k[t * 32 + t % 32] = bad;
    }
    dirty.q[40 * 96 + 95] = f32::NAN;
    for t in (0..300).filter(|t| ![0, 17, 40, 130, 299].contains(t)) {
        tokens.show(&clean, 0, t, t + 1);
    }
    let shown = Calibration::new();
    dirty.show(&shown, 0, 0, 300);
    assert_eq!(shown.wanted(0), QUERY_TOKENS - 295);
    assert_eq!(shown.for_seal(0), clean.for_seal(0));
}

#[test]
fn a_large_mean_does_not_cancel_the_deviation() {
    let mut tokens = Tokens::new(SHAPE, 1000, 8);
    tokens.k.iter_mut().for_each(|x| *x += 5e4);
    let calibration = Calibration::new();
    tokens.show(&calibration, 0, 0, 1000);
    let found = calibration.for_seal(0).expect("factors").expect("1000 tokens");
    for (head, found) in found.heads().iter().enumerate() {
        let expected = tokens.expected(head, 1000, |q_head, kv_head| q_head / 3 == kv_head);
        assert!(difference(&found.feedback.plain, &expected.plain) < SAME_FACTORS);
    }
}

#[test]
fn heads_that_cannot_be_factored_have_no_feedback() {
    for size in [0.0, 1e-30, 1e30] {
        let mut tokens = Tokens::new(SHAPE, 200, 9);
        tokens.q.iter_mut().chain(&mut tokens.k).for_each(|x| *x *= size);
        let calibration = Calibration::new();
        tokens.show(&calibration, 0, 0, 200);
        let found = calibration.for_seal(0).expect("no error").expect("200 tokens");
        assert!(found.heads().iter().all(|head| head.feedback == HeadFeedback::none(16)), "of size {size}");
    }
}

#[test]
fn the_state_is_that_of_the_least_advanced_layer_and_each_is_listed() {
    let tokens = Tokens::new(SHAPE, QUERY_TOKENS, 10);
    let calibration = Calibration::new();
    assert_eq!((calibration.state(), calibration.layers()), (State::No, vec![]));
    tokens.show(&calibration, 9, 0, QUERY_TOKENS);
    assert_eq!(calibration.state(), State::Frozen);
    tokens.show(&calibration, 2, 0, 150);
    assert_eq!(calibration.state(), State::No);
    calibration.for_seal(2).expect("factors");
    assert_eq!(calibration.state(), State::OwnPrompt);
    let listed: Vec<_> = calibration.layers().iter().map(|l| (l.layer, l.query_tokens, l.state)).collect();
    assert_eq!(listed, [(2, 150, State::OwnPrompt), (9, 2048, State::Frozen)]);
    let names = [State::No, State::OwnPrompt, State::Frozen, State::File].map(State::name);
    assert_eq!(names, ["no", "own prompt", "frozen", "file"]);
}

#[test]
fn freeze_is_all_or_nothing() {
    let tokens = Tokens::new(SHAPE, 500, 11);
    let calibration = Calibration::new();
    assert!(matches!(calibration.freeze(), Err(Error::Config(_))), "nothing seen");
    tokens.show(&calibration, 0, 0, 500);
    tokens.show(&calibration, 1, 0, 127);
    let message = calibration.freeze().expect_err("layer 1 has seen too little").to_string();
    assert!(["layer 1", "127", "128"].iter().all(|word| message.contains(word)), "{message}");
    assert_eq!(calibration.wanted(0), QUERY_TOKENS - 500, "not frozen");

    tokens.show(&calibration, 1, 127, 128);
    calibration.freeze().expect("each has seen enough");
    let frozen = only_layer(&calibration);
    tokens.show(&calibration, 0, 0, 500);
    assert!(Arc::ptr_eq(&frozen, &only_layer(&calibration)));
    assert_eq!((calibration.wanted(0), calibration.wanted(1), calibration.wanted(2)), (0, 0, QUERY_TOKENS));
}

#[test]
fn a_layer_of_another_shape_is_refused_naming_both() {
    let tokens = Tokens::new(SHAPE, QUERY_TOKENS, 12);
    for seen in [1, QUERY_TOKENS] {
        let calibration = Calibration::new();
        tokens.show(&calibration, 3, 0, seen);
        let before = calibration.layers();
        for other in [HeadShape { num_kv_heads: 3, ..SHAPE }, HeadShape { head_dim: 32, ..SHAPE }] {
            let (q, k) = (vec![1.0; 6 * other.head_dim], vec![1.0; other.num_kv_heads * other.head_dim]);
            let error = calibration.observe(3, other, &q, &k).expect_err("another model");
            assert_eq!(Err(error.clone()), calibration.check(3, other.num_kv_heads, other.head_dim));
            assert!(matches!(error, Error::Config(_)));
            let message = error.to_string();
            let given = format!("{} kv heads of head_dim {}", other.num_kv_heads, other.head_dim);
            assert!(message.contains(&given) && message.contains("has 2 of head_dim 16"), "{message}");
        }
        assert_eq!(calibration.layers(), before);
        assert_eq!(calibration.check(3, 2, 16), Ok(()));
        assert_eq!(calibration.check(4, 7, 48), Ok(()), "any shape will do for a layer that was not seen");
    }
}

#[test]
fn rows_that_do_not_fit_their_shape_are_refused() {
    let calibration = Calibration::new();
    let refused = |shape: HeadShape, q: usize, k: usize| {
        calibration.observe(0, shape, &vec![1.0; q], &vec![1.0; k]).expect_err("no rows of this shape").to_string()
    };
    assert!(refused(SHAPE, 96, 31).contains("k: expected shape [n, 2, 16], got [31]"));
    assert!(refused(SHAPE, 95, 32).contains("q: expected shape [n, 6, 16], got [95]"));
    assert!(refused(SHAPE, 96, 64).contains("q: expected shape [2, 6, 16], got [96]"));
    assert!(refused(HeadShape { head_dim: 24, ..SHAPE }, 0, 0).contains("head_dim 24"));
    assert!(refused(HeadShape { num_q_heads: 7, ..SHAPE }, 112, 32).contains("7 query heads are no multiple of 2"));
    assert!(refused(HeadShape { num_kv_heads: 0, ..SHAPE }, 0, 0).contains("0 kv heads"));
    let many = HeadShape { num_q_heads: usize::MAX - 1, num_kv_heads: 2, head_dim: 16 };
    assert!(refused(many, 32, 32).contains("expected shape"));
    assert_eq!(calibration.observe(0, SHAPE, &[], &[]), Ok(()));
    assert_eq!(calibration.layers(), [], "no layer comes of no rows");
}

#[test]
fn concurrent_factoring_does_not_deadlock_pool_workers() {
    use rayon::prelude::*;
    let shape = HeadShape { num_q_heads: 16, num_kv_heads: 8, head_dim: 64 };
    let tokens = Tokens::new(shape, 512, 13);
    let alone = Calibration::new();
    tokens.show(&alone, 0, 0, 512);
    let expected = alone.for_seal(0).expect("factors");
    let calibration = Calibration::new();
    (0..4usize).into_par_iter().for_each(|layer| tokens.show(&calibration, layer, 0, 512));
    let sealed: Vec<_> = (0..64usize).into_par_iter().map(|task| calibration.for_seal(task % 4)).collect();
    assert!(sealed.iter().all(|found| found == &Ok(expected.clone())));
    let same = |task: usize| Arc::as_ptr(sealed[task].as_ref().expect("factors").as_ref().expect("512 tokens"));
    assert!((0..64).all(|task| same(task) == same(task % 4)), "one answer for each layer");
}

#[test]
fn a_rank_has_its_heads_alone() {
    let whole = frozen_after(&Tokens::new(SHAPE, QUERY_TOKENS, 41), QUERY_TOKENS);
    let heads = only_layer(&whole).heads().to_vec();
    for num_ranks in [1, heads.len(), 2 * heads.len()] {
        for rank in 0..num_ranks {
            let part = whole.shard(rank, num_ranks).unwrap();
            let count = (heads.len() / num_ranks).max(1);
            assert_eq!(only_layer(&part).heads(), &heads[rank * heads.len() / num_ranks..][..count]);
            assert_eq!(part.state(), State::Frozen);
        }
    }
    assert!(matches!(whole.shard(1, 1), Err(Error::Config(_))));
    assert!(matches!(Calibration::new().shard(0, 2), Ok(empty) if empty.layers().is_empty()));
}
