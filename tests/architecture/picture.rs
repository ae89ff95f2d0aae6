//! The picture at the head of `src/lib.rs`: what it names exists under that name, and it is drawn once.

use kvarn::format::PlanArray;
use std::path::Path;

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The names in the row of the picture that says which arrays each verb reads.
fn named_arrays(lib: &str) -> Vec<&str> {
    let rows = lib.lines().map(|line| line.trim_start_matches("//!"));
    let mut rows = rows.skip_while(|row| !row.contains("append ->")).skip(1);
    let row = rows.find(|row| row.contains(',')).expect("a row of names under the verbs");
    row.split([',', ' ']).filter(|name| !name.is_empty()).collect()
}

#[test]
fn the_picture_names_arrays_that_a_plan_has() {
    let lib = read("src/lib.rs");
    let named = named_arrays(&lib);
    assert!(named.len() >= 6, "{named:?}");
    let known = PlanArray::ALL.map(PlanArray::name);
    let unknown: Vec<_> = named.iter().filter(|name| !known.contains(name)).collect();
    assert!(unknown.is_empty(), "{unknown:?} are not among {known:?}");
}

#[test]
fn a_name_that_no_array_has_is_found() {
    let lib = "//! append -> page\n//!   ^   ^\n//!  slots, seq_lens  opens\n//!  a, b";
    assert_eq!(named_arrays(lib), ["slots", "seq_lens", "opens"]);
}

#[test]
fn the_picture_is_drawn_once() {
    for page in ["README.md", "docs/design/README.md"] {
        let text = read(page);
        assert!(text.contains("src/lib.rs") && !text.contains("--seal-->"), "{page} draws what src/lib.rs draws");
    }
}
