//! What the tests share: numbers from a seed, and attention in f64 as it is defined.
#![allow(dead_code)] // each test uses its part

/// `SplitMix64`: small, seeded, the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Roughly normal, of variance 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64).sum();
        (sum - 6.0) as f32
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// What one query attends to.
pub struct Reference<'a> {
    /// `[tokens, head_dim]`
    pub k: &'a [f32],
    /// `[tokens, head_dim]`
    pub v: &'a [f32],
    pub scale: f64,
    pub softcap: Option<f32>,
    pub sink: Option<f32>,
}

impl Reference<'_> {
    /// softmax(q k') v over the tokens `start..end`, in f64.
    pub fn attend(&self, q: &[f32], start: usize, end: usize) -> Vec<f64> {
        let head_dim = q.len();
        let scores: Vec<f64> = (start..end)
            .map(|t| {
                let row = &self.k[t * head_dim..(t + 1) * head_dim];
                let score: f64 = q.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let score = score * self.scale;
                self.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            })
            .collect();
        let sink = self.sink.map_or(f64::NEG_INFINITY, f64::from);
        let top = scores.iter().copied().fold(sink, f64::max);
        let total: f64 = scores.iter().map(|s| (s - top).exp()).sum::<f64>() + (sink - top).exp();
        let mut out = vec![0.0; head_dim];
        for (score, t) in scores.iter().zip(start..end) {
            let weight = (score - top).exp() / total;
            for (x, v) in out.iter_mut().zip(&self.v[t * head_dim..]) {
                *x += weight * f64::from(*v);
            }
        }
        out
    }
}

/// A folder of this test's own, empty.
pub fn folder(name: &str) -> std::path::PathBuf {
    let folder = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// Makes the last bytes of a file of kvarn's, its checksum, those of the others.
pub fn seal_file(bytes: &mut [u8]) {
    let (rest, sum) = bytes.split_at_mut(bytes.len() - 4);
    sum.copy_from_slice(&crc32fast::hash(rest).to_le_bytes());
}

/// Loads a file with every bit of it flipped, one at a time, cut at every length, longer, with sectors of it zero or
/// exchanged. `refuses` loads, and says whether that was refused as it should be.
pub fn assert_damage_is_refused(valid: &[u8], refuses: impl Fn(&[u8]) -> bool) {
    const SECTOR: usize = 512;
    let mut bytes = valid.to_vec();
    for bit in 0..valid.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(refuses(&bytes), "bit {} of byte {} of {}", bit % 8, bit / 8, valid.len());
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    for len in 0..valid.len() {
        assert!(refuses(&valid[..len]), "{len} bytes of {}", valid.len());
    }
    for more in 1..=16 {
        assert!(refuses(&[valid, &vec![0; more]].concat()), "{more} bytes of zero after it");
        assert!(refuses(&[valid, &valid[valid.len() - more..]].concat()), "its last {more} bytes twice");
    }
    for (index, sector) in valid.chunks(SECTOR).enumerate() {
        bytes[index * SECTOR..][..sector.len()].fill(0);
        assert!(refuses(&bytes) || bytes == valid, "sector {index} zero");
        bytes.copy_from_slice(valid);
        for other in index + 1..valid.len() / SECTOR {
            (0..SECTOR).for_each(|at| bytes.swap(index * SECTOR + at, other * SECTOR + at));
            assert!(refuses(&bytes) || bytes == valid, "sectors {index} and {other} exchanged");
            bytes.copy_from_slice(valid);
        }
    }
    assert!(!refuses(valid), "as it was");
}
