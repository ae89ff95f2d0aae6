//! The committed headers of the kernels are what the code says.

use kvarn::backend::cuda::layout;

fn compare(file: &str, now: &str) {
    let path = format!("{}/kernels/{file}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("KVARN_BLESS").is_some() {
        std::fs::write(&path, now).expect("write the header");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == now, "kernels/{file} is stale: run `just gen`, then `just kernels`");
}

#[test]
fn the_committed_header_of_the_kernels_is_what_the_code_says() {
    compare("layout.cuh", &layout::header());
}

#[test]
fn the_committed_assertions_of_the_kernels_are_what_the_code_says() {
    compare("layout_check.cu", &layout::check());
}
