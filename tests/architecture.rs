//! Do imports point down, do the doors stay shut, is every file small enough to read?
//!
//! [`check`] takes `(path, text)` pairs and returns what is wrong with them, so the tests below can hand it a violation
//! of each kind and see it found, and then the real tree. The rules are the three tables; `docs/design/` says why.

#[path = "architecture/circles.rs"]
mod circles;
#[path = "architecture/layers.rs"]
mod layers;
#[path = "architecture/picture.rs"]
mod picture;
#[path = "architecture/python_source.rs"]
mod python_source;
#[path = "architecture/rust_source.rs"]
mod rust_source;

use layers::LAYERS;
use rust_source::Source;
use std::path::Path;

/// A file of the project: its path from the root, with `/`, and its text.
type File = (String, String);
/// The same, written out in a test.
type Pairs<'a> = &'a [(&'a str, &'a str)];

/// Paths that one place alone may name: the path, and the prefix of the files that may.
const DOORS: &[(&[&str], &str)] =
    &[(&["pyo3"], "src/py/"), (&["cudarc"], "src/backend/cuda/"), (&["std", "env"], "src/config/env.rs")];

/// Python packages that importing `kvarn_rs` must not import.
const OPTIONAL_PACKAGES: &[&str] = &["torch", "transformers", "numpy", "vllm", "gguf", "accelerate"];

/// Where vLLM may be imported, and what the files there are called that may import its internals.
const VLLM_DOOR: &str = "python/kvarn_rs/vllm/";
const VLLM_INTERNALS: &str = "python/kvarn_rs/vllm/compat";

/// Lines in a file. One over it is a module that wants a name.
const MAX_LINES: usize = 400;

/// Lines in a stub: an extension module is described in one file.
const MAX_STUB_LINES: usize = 850;

/// What is wrong with `files`, one line each: `path:line: why`.
fn check(files: &[File]) -> Vec<String> {
    let mut found = Vec::new();
    let reexports = files
        .iter()
        .find(|(path, _)| path == "src/lib.rs")
        .map_or_else(Vec::new, |(_, text)| Source::new("src/lib.rs", text).public_uses());
    for (path, text) in files {
        check_length(path, text, &mut found);
        if path.starts_with("src/") && is_kind(path, "rs") && !is_test_file(path) {
            let source = Source::new(path, text);
            check_doors(path, &source, &mut found);
            check_core_only(path, &source, &mut found);
            check_layers(path, &source, &reexports, &mut found);
        }
    }
    check_python(files, &mut found);
    found
}

fn check_length(path: &str, text: &str, found: &mut Vec<String>) {
    let (lines, limit) = (text.lines().count(), if is_kind(path, "pyi") { MAX_STUB_LINES } else { MAX_LINES });
    if lines > limit {
        found.push(format!("{path}:{lines}: {lines} lines, over the limit of {limit}: split it"));
    }
}

fn check_doors(path: &str, source: &Source, found: &mut Vec<String>) {
    for (door, owner) in DOORS {
        if path.starts_with(owner) {
            continue;
        }
        for (line, used) in source.paths_from(door[0]) {
            if used.iter().zip(*door).filter(|(a, b)| a == b).count() == door.len() {
                found.push(format!("{path}:{line}: `{}` belongs in {owner} alone", door.join("::")));
            }
        }
    }
}

/// `src/format` says what bytes mean, and computes nothing: `core` is enough for it.
fn check_core_only(path: &str, source: &Source, found: &mut Vec<String>) {
    if path.starts_with("src/format/") {
        let uses = source.paths_from("std");
        found.extend(uses.iter().map(|(line, used)| format!("{path}:{line}: `{}`: use `core` here", used.join("::"))));
    }
}

fn check_layers(path: &str, source: &Source, reexports: &[Vec<String>], found: &mut Vec<String>) {
    let Some(own) = source.module.first() else { return };
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| name == own) else {
        found.push(format!("{path}:1: module `{own}` has no layer: add it to LAYERS, at its place"));
        return;
    };
    for (line, import) in source.crate_paths() {
        let is_layer = import.first().is_some_and(|first| LAYERS.iter().any(|(name, _)| name == first));
        let reexport = reexports.iter().find(|path| path.last() == import.first());
        let Some(target) = (if is_layer { Some(&import) } else { reexport }) else {
            let name = import.join("::");
            found.push(format!("{path}:{line}: `crate::{name}` names no layer: import from the module itself"));
            continue;
        };
        let full = target.join("::");
        let open = |entry: &&str| full == **entry || full.starts_with(&format!("{entry}::"));
        if &target[0] != own && !allowed.iter().any(open) {
            found.push(format!("{path}:{line}: `{own}` may not import `{full}`; it may import {allowed:?}"));
        }
    }
}

fn check_python(files: &[File], found: &mut Vec<String>) {
    let package: Vec<&File> =
        files.iter().filter(|(path, _)| path.starts_with("python/") && is_kind(path, "py")).collect();
    for (path, chain, line, name) in python_source::imported_with(&package, "kvarn_rs") {
        if OPTIONAL_PACKAGES.contains(&name.as_str()) {
            found.push(format!("{path}:{line}: `import kvarn_rs` would import {name} (by {chain})"));
        }
    }
    for (path, text) in package {
        for import in python_source::imports(text) {
            let vllm = import.level == 0 && import.module.split('.').next() == Some("vllm");
            let door = if import.module.contains('.') { VLLM_INTERNALS } else { VLLM_DOOR };
            if vllm && !path.starts_with(door) {
                found.push(format!("{path}:{}: vLLM is imported in {door}*.py alone", import.line));
            }
        }
    }
}

/// `src/**/tests.rs` and `src/**/tests/`: the body of a `#[cfg(test)] mod tests`, which may import anything.
fn is_test_file(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

fn is_kind(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

/// The files that the rules speak of, as they are on disk. Generated ones are no one's to split.
fn real_tree() -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "python", "tests", "benches", "kernels", "examples"] {
        collect(root, &root.join(folder), &mut files);
    }
    files.retain(|(path, _)| !path.ends_with("format.cuh") && !path.starts_with("kernels/prebuilt/"));
    files
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<File>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("a readable folder").path();
        let name = path.strip_prefix(root).expect("a path under the root").to_string_lossy().replace('\\', "/");
        if path.is_dir() {
            collect(root, &path, files);
        } else if ["rs", "py", "pyi", "cu", "cuh", "h", "c", "sh"].iter().any(|kind| is_kind(&name, kind)) {
            files.push((name, std::fs::read_to_string(&path).expect("a source file in UTF-8")));
        }
    }
}

#[test]
fn the_tree_keeps_the_rules() {
    let files = real_tree();
    assert!(files.iter().any(|(path, _)| path == "src/lib.rs"), "the tree was not found");
    let found = check(&files);
    assert!(found.is_empty(), "{} violations:\n  {}", found.len(), found.join("\n  "));
}

#[test]
fn every_layer_imports_only_layers_below_it() {
    for (index, (name, allowed)) in LAYERS.iter().enumerate() {
        for entry in *allowed {
            let target = entry.split("::").next().expect("a name");
            let below = LAYERS[..index].iter().any(|(lower, _)| *lower == target);
            assert!(below, "{name} lists {entry}, which is not below it");
        }
    }
}

fn files(pairs: Pairs<'_>) -> Vec<File> {
    pairs.iter().map(|&(path, text)| (path.to_owned(), text.to_owned())).collect()
}

/// Each case: its name, the files, and a part of what must be said of them.
fn assert_each_is_found(cases: &[(&str, Pairs, &str)]) {
    for (name, pairs, expected) in cases {
        let found = check(&files(pairs));
        assert!(found.iter().any(|line| line.contains(expected)), "{name}: expected {expected:?}, found {found:#?}");
    }
}

#[test]
fn an_import_that_points_up_is_found() {
    let lib = ("src/lib.rs", "pub mod cache;\npub use cache::Cache;");
    assert_each_is_found(&[
        (
            "an import that points up",
            &[("src/format/kind.rs", "use crate::error::Error;")],
            "src/format/kind.rs:1: `format` may not import `error::Error`",
        ),
        (
            "one among many",
            &[("src/plan/mod.rs", "use crate::{error::Result,\n paging::BlockId, backend::{cpu, view::V}};")],
            "src/plan/mod.rs:2: `plan` may not import `backend::cpu`",
        ),
        (
            "a path without `use`",
            &[("src/quant/mod.rs", "fn f() { crate::cache::g() }")],
            "`quant` may not import `cache::g`",
        ),
        (
            "by way of super",
            &[("src/backend/cpu/mod.rs", "use super::super::cache::Cache;")],
            "`backend` may not import `cache::Cache`",
        ),
        (
            "by way of super in an inline module",
            &[("src/error.rs", "mod a { use super::super::format; }")],
            "`error` may not import `format`",
        ),
        (
            "by way of a re-export",
            &[lib, ("src/plan/mod.rs", "use crate::Cache;")],
            "`plan` may not import `cache::Cache`",
        ),
        ("a glob of the root", &[("src/error.rs", "use super::*;")], "`crate::*` names no layer"),
        (
            "a name of a module that is open in part",
            &[("src/backend/mod.rs", "use crate::paging::BlockPool;")],
            "`backend` may not import `paging::BlockPool`",
        ),
        (
            "std in the words",
            &[("src/format/emit.rs", "use std::fmt;")],
            "src/format/emit.rs:1: `std::fmt`: use `core`",
        ),
        ("a module without a layer", &[("src/utils.rs", "")], "module `utils` has no layer"),
    ]);
}

#[test]
fn a_door_left_open_is_found() {
    assert_each_is_found(&[
        (
            "pyo3 outside its door",
            &[("src/cache.rs", "use pyo3::prelude::*;")],
            "src/cache.rs:1: `pyo3` belongs in src/py/",
        ),
        ("pyo3 in an attribute", &[("src/cache.rs", "#[pyo3::pyclass]\nstruct S;")], "`pyo3` belongs in src/py/"),
        (
            "cudarc outside its door",
            &[("src/backend/cpu/mod.rs", "\nuse cudarc::driver;")],
            "src/backend/cpu/mod.rs:2: `cudarc` belongs in",
        ),
        (
            "the environment, in full",
            &[("src/plan/split.rs", "fn f() { std::env::var(\"X\"); }")],
            "`std::env` belongs in src/config/env.rs",
        ),
        ("the environment, imported", &[("src/lib.rs", "use std::{fmt, env};")], "src/lib.rs:1: `std::env` belongs in"),
    ]);
}

#[test]
fn a_long_file_is_found() {
    let too_long = "x\n".repeat(MAX_LINES + 1);
    assert_each_is_found(&[
        ("a long Rust file", &[("tests/x.rs", &too_long)], "tests/x.rs:401: 401 lines"),
        ("a long Python file", &[("python/kvarn_rs/x.py", &too_long)], "401 lines"),
    ]);
}

#[test]
fn a_python_import_out_of_place_is_found() {
    let init = ("python/kvarn_rs/__init__.py", "from .errors import KvarnError\n");
    assert_each_is_found(&[
        (
            "torch at once",
            &[("python/kvarn_rs/__init__.py", "\nimport os, torch")],
            "python/kvarn_rs/__init__.py:2: `import kvarn_rs` would import torch",
        ),
        (
            "numpy by a submodule",
            &[
                init,
                (
                    "python/kvarn_rs/errors.py",
                    "try:\n    import numpy.linalg as la\nexcept ImportError:\n    la = None",
                ),
            ],
            "python/kvarn_rs/errors.py:2: `import kvarn_rs` would import numpy",
        ),
        (
            "transformers in a class body",
            &[("python/kvarn_rs/__init__.py", "class A:\n    from transformers import (\n  Cache)")],
            ":2: `import kvarn_rs` would import transformers",
        ),
        (
            "a package whose name is from-imported",
            &[
                ("python/kvarn_rs/__init__.py", "from . import hf"),
                ("python/kvarn_rs/hf/__init__.py", "from ..a import b"),
                ("python/kvarn_rs/a.py", "import torch"),
            ],
            "python/kvarn_rs/a.py:1: `import kvarn_rs` would import torch (by kvarn_rs -> kvarn_rs.hf -> kvarn_rs.a)",
        ),
        (
            "vLLM outside its door",
            &[("python/kvarn_rs/vllm/backend.py", "def f():\n    from vllm.v1 import x")],
            "python/kvarn_rs/vllm/backend.py:2: vLLM is imported in",
        ),
    ]);
}

#[test]
fn what_is_allowed_is_not_reported() {
    let cases: &[(&str, Pairs)] = &[
        (
            "imports down",
            &[("src/cache.rs", "use crate::{backend::Backend, plan::StepPlan};\npub(crate) use super::error;")],
        ),
        (
            "one's own module",
            &[(
                "src/paging/prefix.rs",
                "use super::BlockId;\nuse crate::paging::ids;\npub(in crate::paging) fn f() {}",
            )],
        ),
        ("an open name", &[("src/backend/mod.rs", "use crate::paging::BlockId;\nuse crate::paging::ids::X;")]),
        (
            "tests inside",
            &[(
                "src/format/mod.rs",
                "#[cfg(test)]\nmod tests {\n use crate::cache::Cache;\n fn f() { std::env::args(); }\n}\n#[cfg(test)]\nuse crate::cache::Cache;",
            )],
        ),
        ("tests beside", &[("src/format/tests.rs", "use crate::cache::Cache;")]),
        (
            "comments and strings",
            &[(
                "src/format/mod.rs",
                "//! [`crate::cache`], it's pyo3\n/* std::env /* nested */ */\nconst S: &str = r#\"crate::cache \" pyo3\"#; const C: char = '\"'; fn f<'a>(x: &'a str) { \"\\\" std::env\"; }",
            )],
        ),
        (
            "a re-export of a lower layer",
            &[
                ("src/lib.rs", "mod error;\npub use error::{Error, Result};"),
                ("src/paging/mod.rs", "use crate::Error;"),
            ],
        ),
        (
            "the doors' owners",
            &[
                ("src/py/mod.rs", "use pyo3::prelude::*;"),
                ("src/backend/cuda/mod.rs", "use cudarc::driver;"),
                ("src/config/env.rs", "use std::env;"),
            ],
        ),
        ("env! and other envs", &[("src/error.rs", "const V: &str = env!(\"CARGO_PKG_VERSION\"); use std::io;")]),
        ("exactly the limit", &[("src/error.rs", &"\n".repeat(MAX_LINES))]),
        (
            "lazy and typing imports",
            &[(
                "python/kvarn_rs/__init__.py",
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    '''\nimport torch\n    '''\n    import torch\nX = '''\nimport numpy\n'''  # import numpy",
            )],
        ),
        (
            "torch where nobody at the root looks",
            &[("python/kvarn_rs/__init__.py", ""), ("python/kvarn_rs/hf/__init__.py", "import torch")],
        ),
        (
            "vLLM at its door",
            &[
                ("python/kvarn_rs/vllm/compat_metrics.py", "import vllm"),
                ("python/kvarn_rs/cli/doctor.py", "from .. import vllm"),
            ],
        ),
    ];
    for (name, pairs) in cases {
        let found = check(&files(pairs));
        assert!(found.is_empty(), "{name}: {found:#?}");
    }
}
