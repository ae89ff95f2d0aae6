//! The committed layouts: a change of any byte must be meant.

use kvarn::format::emit::LayoutJson;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/format.json");

#[test]
fn the_committed_layouts_are_what_the_code_says() {
    let now = LayoutJson.to_string();
    serde_json::from_str::<serde_json::Value>(&now).expect("the layouts print as JSON");
    if std::env::var_os("KVARN_BLESS").is_some() {
        std::fs::write(GOLDEN, &now).expect("write the golden layouts");
    }
    let committed = std::fs::read_to_string(GOLDEN).unwrap_or_default();
    assert!(
        committed == now,
        "tests/golden/format.json is stale: if the bytes were meant to change, raise FORMAT_VERSION and run `just gen`"
    );
}
