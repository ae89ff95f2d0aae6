//! Calibration files: round trips, and typed errors for every invalid file.

mod common;

use common::{Random, assert_damage_is_refused, folder, seal_file};
use kvarn::Error;
use kvarn::calibration::{Calibration, HeadShape, Origin, State};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

const LAYERS: [usize; 2] = [0, 7];
const HEADS: usize = 2;
const CHANNELS: usize = 16;

fn frozen() -> Calibration {
    let calibration = Calibration::new();
    let shape = HeadShape { num_q_heads: 4, num_kv_heads: HEADS, head_dim: CHANNELS };
    for layer in LAYERS {
        let mut random = Random(layer as u64);
        let (q, k) = (random.normals(200 * 4 * CHANNELS), random.normals(200 * HEADS * CHANNELS));
        calibration.observe(layer, shape, &q, &k).expect("rows");
    }
    calibration.freeze().expect("200 tokens each");
    calibration
}

fn valid() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| frozen().to_bytes("abc123", "a \"tiny\" model, ünïcode").expect("frozen layers"))
}

/// A change of a file's metadata.
type Alter = fn(&mut Value);

/// A file taken apart: its header as JSON, its data as bytes.
struct Parts {
    header: Value,
    data: Vec<u8>,
}

impl Parts {
    fn new() -> Self {
        let length = usize::try_from(u64::from_le_bytes(valid()[..8].try_into().expect("8 bytes"))).expect("small");
        let header = serde_json::from_slice(&valid()[8..8 + length]).expect("JSON");
        Self { header, data: valid()[8 + length..].to_vec() }
    }

    /// The file, under a checksum of its own.
    fn bytes(&self) -> Vec<u8> {
        let header = self.header.to_string();
        let mut bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &self.data].concat();
        seal_file(&mut bytes);
        bytes
    }

    fn refusal(&self) -> String {
        refusal(&self.bytes())
    }

    /// Where a tensor starts in the data.
    fn start(&self, tensor: &str) -> usize {
        usize::try_from(self.header[tensor]["data_offsets"][0].as_u64().expect("an offset")).expect("small")
    }

    fn set_float(&mut self, tensor: &str, index: usize, value: f32) {
        let at = self.start(tensor) + 4 * index;
        self.data[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

fn refusal(bytes: &[u8]) -> String {
    match Calibration::from_bytes(bytes, None).expect_err("not a calibration") {
        Error::Calibration(message) => message,
        other => panic!("{other:?}"),
    }
}

fn assert_refused(bytes: &[u8], expected: &str) {
    let message = refusal(bytes);
    assert!(message.contains(expected), "{message:?} does not say {expected:?}");
}

#[test]
fn a_written_calibration_is_read_back() {
    let (made, read) = (frozen(), Calibration::from_bytes(valid(), Some("abc123")).expect("a valid file"));
    for layer in LAYERS {
        assert_eq!(made.layer(layer), read.layer(layer));
        assert_eq!(read.for_seal(layer), Ok(made.layer(layer)));
        assert_eq!(read.wanted(layer), 0);
    }
    assert_eq!(read.layer(1), None);
    assert_eq!((made.state(), read.state()), (State::Frozen, State::File));
    let listed: Vec<_> = read.layers().iter().map(|l| (l.layer, l.num_kv_heads, l.head_dim, l.query_tokens)).collect();
    assert_eq!(listed, [(0, HEADS, CHANNELS, 200), (7, HEADS, CHANNELS, 200)]);
    let (fingerprint, model) = ("abc123".to_owned(), "a \"tiny\" model, ünïcode".to_owned());
    assert_eq!((made.origin(), read.origin()), (None, Some(&Origin { fingerprint, model })));
}

#[test]
fn the_same_layers_make_the_same_bytes() {
    assert!(frozen().to_bytes("abc123", "a \"tiny\" model, ünïcode").expect("frozen") == valid());
    let read = Calibration::from_bytes(valid(), None).expect("a valid file");
    assert!(read.to_bytes("abc123", "a \"tiny\" model, ünïcode").expect("loaded") == valid());
}

#[test]
fn other_programs_read_it_as_safetensors() {
    let tensors = safetensors::SafeTensors::deserialize(valid()).expect("safetensors");
    assert_eq!(tensors.len(), LAYERS.len() * 7 + 1);
    assert_eq!(tensors.tensor("checksum").expect("the last").data(), &valid()[valid().len() - 4..]);
    let feedback = tensors.tensor("layers.7.feedback").expect("a tensor");
    assert_eq!(feedback.shape(), [HEADS, 2, CHANNELS, CHANNELS]);
    let calibration = frozen().layer(7).expect("a layer");
    let rotated = &calibration.heads()[1].feedback.rotated;
    let last: Vec<u8> = rotated.matrix.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert!(feedback.data().ends_with(&last));
    let Parts { header, data } = Parts::new();
    assert!((valid().len() - data.len()).is_multiple_of(8), "tensors are aligned");
    assert_eq!(
        header["__metadata__"],
        json!({"kind": "kvarn calibration", "version": "2", "fingerprint": "abc123", "query_tokens": "200",
               "format_version": kvarn::format::FORMAT_VERSION.to_string(), "model": "a \"tiny\" model, ünïcode"})
    );
}

#[test]
fn only_frozen_layers_are_written() {
    let calibration = Calibration::new();
    let nothing = calibration.to_bytes("f", "m").expect_err("nothing is frozen");
    assert!(matches!(&nothing, Error::Config(message) if message.contains("2048")), "{nothing}");
    let shape = HeadShape { num_q_heads: 1, num_kv_heads: 1, head_dim: 16 };
    let rows = Random(1).normals(2048 * 16);
    calibration.observe(0, shape, &rows, &rows).expect("rows");
    calibration.observe(1, shape, &rows[16..], &rows[16..]).expect("rows");
    calibration.for_seal(1).expect("factors");
    let read = Calibration::from_bytes(&calibration.to_bytes("f", "m").expect("layer 0"), None).expect("a valid file");
    assert_eq!(read.layers().iter().map(|l| (l.layer, l.query_tokens)).collect::<Vec<_>>(), [(0, 2048)]);
}

#[test]
fn a_file_of_another_model_is_refused_naming_both() {
    let error = Calibration::from_bytes(valid(), Some("fed")).expect_err("another fingerprint");
    assert!(matches!(error, Error::Calibration(_)));
    let message = error.to_string();
    assert!(["abc123", "fed", "tiny"].iter().all(|word| message.contains(word)), "{message}");
}

#[test]
fn a_file_that_is_not_a_calibration_is_refused() {
    assert_refused(b"", "0 bytes");
    assert_refused(b"{\"not\": \"safetensors\"}", "not a safetensors file of 22 bytes");
    assert_refused(&u64::MAX.to_le_bytes(), "not a safetensors file");
    assert_refused(&valid()[..valid().len() - 1], "not a safetensors file");
    assert_refused(&[valid(), &[0]].concat(), "not a safetensors file");
    let altered: [(Alter, &str); 9] = [
        (
            |metadata| metadata["kind"] = json!("kvarn cache"),
            "not a file of kind \"kvarn calibration\": its kind is \"kvarn cache\"",
        ),
        (|metadata| *metadata = json!({"format": "pt"}), "a safetensors file without a kind"),
        (|metadata| metadata["version"] = json!("1"), "a kvarn calibration of version 1, this release reads version 2"),
        (|metadata| metadata["version"] = json!("one"), "version is \"one\", not a number"),
        (|metadata| metadata["format_version"] = json!(""), "format_version is \"\""),
        (|metadata| metadata["query_tokens"] = json!("127"), "query_tokens is 127"),
        (|metadata| metadata["query_tokens"] = json!("2049"), "query_tokens is 2049"),
        (|metadata| drop(metadata.as_object_mut().map(|map| map.remove("fingerprint"))), "no \"fingerprint\""),
        (|metadata| drop(metadata.as_object_mut().map(|map| map.remove("model"))), "no \"model\""),
    ];
    for (alter, expected) in altered {
        let mut parts = Parts::new();
        alter(&mut parts.header["__metadata__"]);
        assert_refused(&parts.bytes(), expected);
    }
    let mut empty = Parts::new();
    let sum = json!({"dtype": "U8", "shape": [4], "data_offsets": [0, 4]});
    empty.header = json!({"__metadata__": empty.header["__metadata__"], "checksum": sum});
    empty.data.truncate(4);
    assert!(empty.refusal().contains("no layers"));
}

#[test]
fn missing_or_malformed_tensors_are_refused() {
    let rename = |from: &str, to: &str| {
        let mut parts = Parts::new();
        let tensors = parts.header.as_object_mut().expect("an object");
        let moved = tensors.remove(from).expect("a tensor");
        tensors.insert(to.to_owned(), moved);
        parts.refusal()
    };
    assert!(rename("layers.7.order", "layers.8.order").contains("layers.7.order is missing"));
    assert!(rename("layers.0.loss_scale", "layers.0.loss").contains("unknown tensor \"layers.0.loss\""));
    for odd in ["layers.07.order", "layers.+7.order", "layers.-1.order", "layers.99999999999999999999.order", "order"] {
        assert!(rename("layers.7.order", odd).contains(&format!("unknown tensor {odd:?}")));
    }
    let reshape = |tensor: &str, dtype: &str, shape: Value| {
        let mut parts = Parts::new();
        parts.header[tensor]["dtype"] = json!(dtype);
        parts.header[tensor]["shape"] = shape;
        parts.refusal()
    };
    assert!(reshape("layers.0.order", "I16", json!([2, 2, 16])).contains("expected dtype U16, got I16"));
    assert!(reshape("layers.0.error_scale", "I32", json!([2, 2, 16])).contains("expected dtype F32, got I32"));
    assert!(reshape("layers.0.order", "U16", json!([4, 16])).contains("expected shape [2, 2, 16], got [4, 16]"));
    for shape in [json!([2, 2, 8, 32]), json!([4, 1, 16, 16]), json!([1024]), json!([1, 2, 512]), json!([16, 2, 8, 4])]
    {
        assert!(reshape("layers.7.feedback", "F32", shape).contains("is not [heads, 2, head_dim, head_dim]"));
    }
    for shape in [json!([4, 2, 1u64 << 62, 16]), json!([0, 2, 16, 16]), json!([u64::MAX])] {
        assert!(reshape("layers.7.feedback", "F32", shape).contains("not a safetensors file"));
    }
}

#[test]
fn invalid_values_are_refused() {
    let set = |tensor: &str, index: usize, value: f32| {
        let mut parts = Parts::new();
        parts.set_float(tensor, index, value);
        parts.refusal()
    };
    assert!(set("layers.0.feedback", 1, f32::NAN).contains("layers.0.feedback: element 1 is NaN, not finite"));
    // Head 1, rotated frame, row 2: the diagonal, and what is before it.
    for (j, at) in [(2, 3 * 256 + 2 * 16 + 2), (0, 3 * 256 + 2 * 16)] {
        let expected = format!("not strictly upper triangular: 0.5 at row 2, column {j}");
        assert!(set("layers.7.feedback", at, 0.5).contains(&expected));
    }
    for bad in [0.0, -1.0, f32::INFINITY, f32::NAN] {
        assert!(set("layers.7.error_scale", 9, bad).contains("element 9 is"));
        assert!(set("layers.7.loss_scale", 3, bad).contains("element 3 is"));
        assert!(set("layers.7.k_channel_deviation", 31, bad).contains("element 31 is"));
        assert!(set("layers.7.query_rms", 31, bad).contains("element 31 is"));
    }
    for bad in [f32::NEG_INFINITY, f32::NAN] {
        assert!(set("layers.0.k_channel_mean", 0, bad).contains("not finite"));
    }
    for bad in [16u16, 65535, 3] {
        let mut parts = Parts::new();
        let at = parts.start("layers.7.order") + 2 * (3 * 16); // head 1, rotated
        let at = if parts.data[at..at + 2] == 3u16.to_le_bytes() { at + 2 } else { at };
        parts.data[at..at + 2].copy_from_slice(&bad.to_le_bytes());
        let message = parts.refusal();
        assert!(message.contains(&format!("head 1, rotated frame: channel {bad} of 16")), "{message}");
    }
}

#[test]
fn every_bit_flip_is_detected() {
    assert_damage_is_refused(valid(), |bytes| {
        matches!(Calibration::from_bytes(bytes, None), Err(Error::Calibration(_)))
    });
}

#[test]
fn swapped_layers_are_refused() {
    let mut parts = Parts::new();
    let [first, second] = LAYERS.map(|layer| parts.start(&format!("layers.{layer}.feedback")));
    for at in 0..second - first {
        parts.data.swap(first + at, second + at);
    }
    let mut bytes = parts.bytes();
    let exchanged = Calibration::from_bytes(&bytes, None).expect("layers of a calibration");
    assert_eq!(exchanged.layer(LAYERS[0]), frozen().layer(LAYERS[1]));
    let sum = bytes.len() - 4;
    bytes[sum..].copy_from_slice(&valid()[valid().len() - 4..]);
    assert_refused(&bytes, "damaged: the checksum of its bytes is");
}

proptest! {
    #[test]
    fn no_byte_changed_makes_a_panic(at in 0..valid().len(), by in 1u8..=255) {
        let mut bytes = valid().to_vec();
        bytes[at] ^= by;
        seal_file(&mut bytes);
        if let Ok(read) = Calibration::from_bytes(&bytes, None) {
            let again = read.to_bytes("f", "m").expect("loaded layers are frozen");
            prop_assert!(Calibration::from_bytes(&again, None).is_ok(), "what is accepted can be written and read");
        }
    }

    #[test]
    fn no_header_byte_changed_makes_a_panic(at in 0..1200usize, by in 1u8..=255) {
        let mut bytes = valid().to_vec();
        bytes[at] ^= by;
        seal_file(&mut bytes);
        let _ = Calibration::from_bytes(&bytes, None);
    }

    #[test]
    fn a_file_cut_short_is_refused(len in 0..valid().len()) {
        prop_assert!(matches!(Calibration::from_bytes(&valid()[..len], None), Err(Error::Calibration(_))));
    }
}

#[test]
fn files_are_written_atomically() {
    let folder = folder("calibration_saved");
    let path = folder.join("tiny.safetensors");
    fs::write(&path, "what was there before").expect("a file");
    assert!(Calibration::new().save(&path, "abc123", "").is_err(), "nothing is frozen");
    assert_eq!(fs::read(&path).expect("a file"), b"what was there before");
    frozen().save(&path, "abc123", "a \"tiny\" model, ünïcode").expect("a folder to write to");
    assert!(fs::read(&path).expect("a file") == valid());
    assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 1, "nothing is left beside it");
    assert_eq!(Calibration::load(&path, Some("abc123")).expect("a valid file").state(), State::File);
}

#[test]
fn io_errors_name_the_file() {
    let folder = folder("calibration_unread");
    let refused = |path: &PathBuf, expected: &str| {
        let error = Calibration::load(path, Some("fed")).expect_err("no such calibration");
        assert!(matches!(error, Error::Calibration(_)));
        let message = error.to_string();
        assert!(message.starts_with(&path.display().to_string()) && message.contains(expected), "{message}");
    };
    refused(&folder.join("none.safetensors"), "cannot be read");
    refused(&folder, "not a file");
    for (name, bytes, expected) in [
        ("empty", &b""[..], "not a file of kind"),
        ("text", &b"some text"[..], "not a file of kind"),
        ("named", &b"a text about a kvarn calibration"[..], "not a safetensors file"),
        ("foreign", valid(), "of another model"),
    ] {
        fs::write(folder.join(name), bytes).expect("a file");
        refused(&folder.join(name), expected);
    }
    for path in [folder.join("no/such/folder/x"), folder.join("..")] {
        let message = frozen().save(&path, "f", "m").expect_err("no such folder").to_string();
        assert!(message.contains("cannot be written"), "{message}");
    }
}
