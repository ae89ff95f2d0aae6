//! The compiled kernels are those of the sources.

use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::Path;

const MODULES: &str = "modules";

fn kernels() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels"))
}

fn manifest() -> Value {
    let text = std::fs::read_to_string(kernels().join("manifest.json")).expect("kernels/manifest.json");
    serde_json::from_str(&text).expect("kernels/manifest.json is JSON")
}

fn hash(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Names of files of a folder that end so, without the ending.
fn stems(folder: &Path, ending: &str) -> BTreeSet<String> {
    let files = std::fs::read_dir(folder).into_iter().flatten();
    let names = files.map(|file| file.expect("a file").file_name().into_string().expect("a name in UTF-8"));
    names.filter_map(|name| name.strip_suffix(ending).map(str::to_owned)).collect()
}

fn differing(manifest: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for (name, module) in manifest[MODULES].as_object().expect("modules") {
        for (file, known) in module["sources"].as_object().expect("sources") {
            if hash(&kernels().join(file)) != *known {
                found.push(format!("{name}: kernels/{file} has changed"));
            }
        }
        for (target, known) in module["results"].as_object().into_iter().flatten() {
            let file = format!("prebuilt/{name}.{target}.zst");
            if hash(&kernels().join(&file)) != *known {
                found.push(format!("{name}: kernels/{file} is not what was compiled"));
            }
        }
    }
    found
}

#[test]
fn the_compiled_kernels_are_those_of_the_sources() {
    let found = differing(&manifest());
    assert!(found.is_empty(), "{found:#?}: run `just kernels`");
}

#[test]
fn every_module_is_compiled_and_nothing_else_is_there() {
    let manifest = manifest();
    let modules = manifest[MODULES].as_object().expect("modules");
    let names: BTreeSet<String> = modules.keys().cloned().collect();
    assert_eq!(names, stems(kernels(), ".cu"), "run `just kernels`");
    let results = |(name, module): (&String, &Value)| {
        let targets = module["results"].as_object().into_iter().flatten().map(|(target, _)| target.clone());
        targets.map(|target| format!("{name}.{target}")).collect::<Vec<_>>()
    };
    let results: BTreeSet<String> = modules.iter().flat_map(results).collect();
    assert_eq!(results, stems(&kernels().join("prebuilt"), ".zst"), "run `just kernels`");
}

#[test]
fn no_kernel_spills_registers() {
    for module in manifest()[MODULES].as_object().expect("modules").values() {
        for (kernel, targets) in module["kernels"].as_object().into_iter().flatten() {
            for (target, numbers) in targets.as_object().expect("targets") {
                assert_eq!(numbers[2], 0, "bytes that {kernel} spills on {target}");
            }
        }
    }
}

#[test]
fn a_source_that_has_changed_is_seen() {
    let mut manifest = manifest();
    manifest[MODULES]["layout_check"]["sources"]["order.cuh"] = Value::from("0");
    assert_eq!(differing(&manifest), ["layout_check: kernels/order.cuh has changed"]);
}
