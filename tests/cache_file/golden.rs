//! The bytes are a format: a file that another program wrote, from the description alone, is read, means what it says,
//! and is written again byte by byte. See `tests/golden/make_cache_file.py`.

use super::{contents, step};
use kvarn::CacheConfig;
use kvarn::cache::file;
use kvarn::format::Format;
use kvarn::paging::SequenceId;
use kvarn::quant::rotate;
use sha2::{Digest, Sha256};

const GOLDEN: &[u8] = include_bytes!("../golden/cache_file.safetensors");
/// What changes here is the format: raise the version of the file, or `FORMAT_VERSION`, and say so in the changelog.
const SHA256: &str = "68a983874ceb3e291d21d1af8efa1480a2e123f25f18543adb8b35cfbe2b3859";
const HEADS: usize = 2;
const CHANNELS: usize = 32;
const BLOCK: usize = 16;

#[test]
fn the_golden_file_is_written_byte_by_byte() {
    let digest: Vec<String> = Sha256::digest(GOLDEN).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digest.concat(), SHA256, "the golden file is another");
    let (caches, note) = file::from_bytes(GOLDEN).expect("a valid file");
    assert_eq!(note, "a \"golden\" note");
    let written = file::to_bytes(&caches.iter().collect::<Vec<_>>(), &note).expect("nothing is open");
    assert!(written == GOLDEN, "the same cache makes other bytes");
}

/// K and V `[CHANNELS]` of a token of block 0, which is sealed.
fn tile_rows(head: usize, t: usize) -> [Vec<f32>; 2] {
    let number = |n: usize| n as f32;
    let k = |d: usize| {
        let code = number((3 * t + 5 * d + head) % 16);
        (code * number(1 + d % 4) / 8.0 - number(d % 5) / 4.0) * (number(1 + t % 3) / 2.0)
    };
    let v = |d: usize| match t {
        0 => number(3 * d % 256) / 16.0 - 4.0,
        _ => number((7 * t + d + head) % 16) * number(1 + t % 2) / 4.0 - 1.0,
    };
    let [mut k, mut v] = [(0..CHANNELS).map(k).collect(), (0..CHANNELS).map(v).collect::<Vec<f32>>()];
    if head == 1 {
        rotate(&mut k);
    }
    rotate(&mut v);
    [k, v]
}

/// Those of a token of an open block.
fn page_rows(block: usize, head: usize, t: usize) -> [Vec<f32>; 2] {
    let number = |n: usize| n as f32;
    let k = |d: usize| {
        let code = number((5 * t + 3 * d + head + block) % 255) - 127.0;
        number(d % 3) - 1.0 + number(1 + d % 2) / 2.0 * (number(1 + t) / 64.0) * code
    };
    let v = |d: usize| number((11 * t + d + head + block) % 256) * number(1 + t % 2) / 128.0 - number(t) / 2.0;
    let mut v: Vec<f32> = (0..CHANNELS).map(v).collect();
    rotate(&mut v);
    [(0..CHANNELS).map(k).collect(), v]
}

#[test]
fn the_golden_file_means_what_it_says() {
    let (mut caches, _) = file::from_bytes(GOLDEN).expect("a valid file");
    let mut cache = caches.pop().expect("one cache");
    let expected = CacheConfig {
        format: Format::Int4,
        block_size: BLOCK,
        num_blocks: Some(64),
        window: Some(4096),
        ..CacheConfig::new(1, HEADS, CHANNELS)
    };
    assert_eq!((cache.config(), cache.sequences()), (&expected, vec![SequenceId(1), SequenceId(4)]));
    for (sequence, len, last) in [(1, 20, 1), (4, 18, 2)] {
        let row = |head: usize, t: usize| {
            if t < BLOCK { tile_rows(head, t) } else { page_rows(last, head, t - BLOCK) }
        };
        let of = |half: usize| (0..HEADS).flat_map(move |head| (0..len).flat_map(move |t| row(head, t)[half].clone()));
        let expected: Vec<f32> = of(0).chain(of(1)).collect();
        assert!(contents(&cache, SequenceId(sequence)) == expected, "sequence {sequence}");
    }
    assert_eq!(cache.stats().unwrap().blocks_in_use, 3);
    step(&mut cache, SequenceId(4), 40, 1);
    assert_eq!(cache.new_sequence(), SequenceId(5));
}
