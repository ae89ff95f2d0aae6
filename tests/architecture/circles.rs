//! Circles between files: groups of which each names, in the end, itself. None of them can be read on its own.

use super::rust_source::Source;
use super::{File, Pairs, files, is_kind, is_test_file, real_tree};
use std::collections::{BTreeMap, BTreeSet};

/// The circles that there are, to be opened one after the other: a list that only gets shorter.
const KNOWN: &[&[&str]] = &[];

/// The groups of two or more files under `src/` that name each other, directly or by others, each sorted.
///
/// A path counts for the file that defines what it names, behind re-exports. A file and the module that it is in do not
/// make a circle: in Rust a module's items are in scope for its parts. But who names a module names its parts.
fn circles(tree: &[File]) -> Vec<Vec<String>> {
    let sources: BTreeMap<Vec<String>, (&str, Source)> = tree
        .iter()
        .filter(|(path, _)| path.starts_with("src/") && is_kind(path, "rs") && !is_test_file(path))
        .map(|(path, text)| (path.as_str(), Source::new(path, text)))
        .map(|(path, source)| (source.module.clone(), (path, source)))
        .collect();
    let imports: Imports = sources.iter().map(|(module, (_, source))| (module, source.imports())).collect();
    let mut reached: BTreeMap<&[String], BTreeSet<&[String]>> = BTreeMap::new();
    for (module, (_, source)) in &sources {
        let named = source.crate_paths().into_iter().map(|(_, path)| defining_file(&path, &imports));
        let parts = imports.keys().filter(|part| part.len() == module.len() + 1 && part.starts_with(module));
        let outside = named.filter(|target| !module.starts_with(target));
        // The crate root names everything, and nothing names it.
        let edges = outside.chain(parts.map(|part| part.as_slice())).filter(|_| !module.is_empty());
        reached.insert(module, edges.collect());
    }
    close(&mut reached);
    let groups: BTreeSet<Vec<&[String]>> = reached
        .iter()
        .map(|(module, targets)| targets.iter().copied().filter(|other| reached[other].contains(module)).collect())
        .collect();
    let path_of = |module: &&[String]| sources[*module].0.to_owned();
    groups.iter().filter(|group| !group.is_empty()).map(|group| group.iter().map(path_of).collect()).collect()
}

/// Of each module, the names that its `use` items bring in, and the paths that they stand for.
type Imports<'a> = BTreeMap<&'a Vec<String>, BTreeMap<String, Vec<String>>>;

/// The module of the file that defines the item at a path from the crate root.
fn defining_file<'a>(path: &[String], imports: &Imports<'a>) -> &'a [String] {
    let mut path = path.to_vec();
    for _ in 0..imports.len() {
        let length = (0..=path.len()).rev().find(|&end| imports.contains_key(&path[..end].to_vec())).unwrap_or(0);
        let (module, uses) = imports.get_key_value(&path[..length].to_vec()).expect("the crate root, at least");
        let Some(target) = path.get(length).and_then(|name| uses.get(name)) else { return module };
        path = target.iter().chain(&path[length + 1..]).cloned().collect();
    }
    panic!("{} is re-exported in a circle", path.join("::"))
}

/// Adds to what each module reaches what those reach.
fn close(reached: &mut BTreeMap<&[String], BTreeSet<&[String]>>) {
    loop {
        let before: usize = reached.values().map(BTreeSet::len).sum();
        for module in reached.keys().copied().collect::<Vec<_>>() {
            let further: Vec<&[String]> =
                reached[module].iter().filter_map(|other| reached.get(other)).flatten().copied().collect();
            reached.get_mut(module).expect("a key").extend(further);
        }
        if reached.values().map(BTreeSet::len).sum::<usize>() == before {
            return;
        }
    }
}

#[test]
fn the_files_of_the_crate_make_no_circle_but_the_known_ones() {
    let found = circles(&real_tree());
    assert_eq!(found, KNOWN, "open the circles that are on the left alone; take off KNOWN what is on the right alone");
}

#[test]
fn a_circle_is_found() {
    let cases: &[(&str, Pairs, &[&str])] = &[
        (
            "two files, through `super` and `crate`",
            &[("src/p/a.rs", "use super::b::X;"), ("src/p/b.rs", "use crate::p::a::Y;")],
            &["src/p/a.rs", "src/p/b.rs"],
        ),
        (
            "paths without `use`",
            &[("src/p/a.rs", "fn f() { super::b::g() }"), ("src/p/b.rs", "fn g(x: super::a::Y) {}")],
            &["src/p/a.rs", "src/p/b.rs"],
        ),
        (
            "by re-exports of the module that they are in",
            &[
                ("src/p/mod.rs", "mod a;\nmod b;\npub use a::{self, Y};\nuse b::X;"),
                ("src/p/a.rs", "use super::X;"),
                ("src/p/b.rs", "use super::Y;"),
            ],
            &["src/p/a.rs", "src/p/b.rs"],
        ),
        (
            "by a re-export of the crate root",
            &[
                ("src/lib.rs", "pub use p::a::Y;"),
                ("src/p/mod.rs", ""),
                ("src/p/a.rs", "use super::b::X;"),
                ("src/p/b.rs", "use crate::Y;"),
            ],
            &["src/p/a.rs", "src/p/b.rs"],
        ),
        (
            "three files",
            &[
                ("src/p/a.rs", "use super::b::X;"),
                ("src/p/b.rs", "use super::c::Y;"),
                ("src/p/c.rs", "mod inner { use super::super::a::Z; }"),
            ],
            &["src/p/a.rs", "src/p/b.rs", "src/p/c.rs"],
        ),
        (
            "by a part of a module",
            &[("src/p/a.rs", "use super::q::X;"), ("src/p/q/mod.rs", ""), ("src/p/q/b.rs", "use super::super::a::Y;")],
            &["src/p/a.rs", "src/p/q/mod.rs", "src/p/q/b.rs"],
        ),
    ];
    for (name, pairs, expected) in cases {
        assert_eq!(circles(&tree(pairs)), [expected.to_vec()], "{name}");
    }
}

#[test]
fn files_without_a_circle_pass() {
    let cases: &[(&str, Pairs)] = &[
        (
            "a module and its parts",
            &[
                ("src/p/mod.rs", "mod a;\nuse a::X;\npub struct Y;"),
                ("src/p/a.rs", "use super::Y;\nfn f() { crate::p::Y; }"),
            ],
        ),
        (
            "a diamond",
            &[
                ("src/p/a.rs", "use super::{b::X, c::Y};"),
                ("src/p/b.rs", "use super::c::Y;"),
                ("src/p/c.rs", "use std::fmt;"),
            ],
        ),
        (
            "the other's tests",
            &[
                ("src/p/a.rs", "use super::b::X;"),
                ("src/p/b.rs", "#[cfg(test)]\nmod tests { use super::super::a::Y; }"),
                ("src/p/b/tests.rs", "use crate::p::a::Y;"),
            ],
        ),
        ("words in comments", &[("src/p/a.rs", "//! [`super::b`]"), ("src/p/b.rs", "use super::a::X;")]),
    ];
    for (name, pairs) in cases {
        assert_eq!(circles(&tree(pairs)), [[""; 0]; 0], "{name}");
    }
}

/// Files, and a crate root if there is none among them.
fn tree(pairs: Pairs<'_>) -> Vec<File> {
    let mut tree = files(pairs);
    if !tree.iter().any(|(path, _)| path == "src/lib.rs") {
        tree.push(("src/lib.rs".to_owned(), String::new()));
    }
    tree
}
