//! Just enough of Rust's syntax to see which paths a file names: no comments, no literals, no test-only items.

use std::collections::BTreeMap;

/// A file as its rules see it.
pub struct Source {
    /// The module that the file is: `["backend", "cpu"]`; empty for the crate root.
    pub module: Vec<String>,
    tokens: Vec<Token>,
}

#[derive(Debug, Clone)]
struct Token {
    line: usize,
    text: String,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Self {
        Self { module: module_of(path), tokens: without_tests(&tokenize(&without_literals(text))) }
    }

    /// Every path that starts with `root`, use trees expanded, with its line.
    pub fn paths_from(&self, root: &str) -> Vec<(usize, Vec<String>)> {
        let mut paths = Vec::new();
        for start in 0..self.tokens.len() {
            if self.text(start) == root && (start == 0 || self.text(start - 1) != "::") {
                self.expand(start, &[], &mut paths);
            }
        }
        paths
    }

    /// Every path of this crate that the file names through `crate`, `self` or `super`, from the root.
    pub fn crate_paths(&self) -> Vec<(usize, Vec<String>)> {
        let mut resolved = Vec::new();
        let mut inline: Vec<Option<String>> = Vec::new();
        for start in 0..self.tokens.len() {
            match self.text(start) {
                "{" => {
                    let named = start >= 2 && self.text(start - 2) == "mod";
                    inline.push(named.then(|| self.text(start - 1).to_owned()));
                }
                "}" => drop(inline.pop()),
                "crate" | "super" | "self"
                    if self.text(start + 1) == "::" && (start == 0 || self.text(start - 1) != "::") =>
                {
                    let mut paths = Vec::new();
                    self.expand(start, &[], &mut paths);
                    let here: Vec<String> =
                        self.module.iter().cloned().chain(inline.iter().flatten().cloned()).collect();
                    resolved.extend(paths.into_iter().map(|(line, path)| (line, resolve(&here, &path))));
                }
                _ => {}
            }
        }
        resolved
    }

    /// What `pub use` puts into this module, as paths from the crate root (this file is the root).
    pub fn public_uses(&self) -> Vec<Vec<String>> {
        let mut paths = Vec::new();
        for start in 1..self.tokens.len() {
            if self.text(start) == "use" && self.text(start - 1) == "pub" {
                self.expand(start + 1, &[], &mut paths);
            }
        }
        paths.into_iter().map(|(_, path)| resolve(&[], &path)).collect()
    }

    /// The names that `use` items bring into this module, and the paths from the crate root that they stand for.
    ///
    /// A path that starts with another word is taken for one of a part of this module.
    pub fn imports(&self) -> BTreeMap<String, Vec<String>> {
        let (mut paths, mut at, mut depth) = (Vec::new(), 0, 0_usize);
        while at < self.tokens.len() {
            let text = self.text(at);
            depth = (depth + usize::from(text == "{")).saturating_sub(usize::from(text == "}"));
            at = if text == "use" && depth == 0 { self.expand(at + 1, &[], &mut paths) } else { at + 1 };
        }
        let resolved = paths.into_iter().map(|(_, path)| resolve(&self.module, &path));
        resolved.filter_map(|path| Some((path.last()?.clone(), path))).collect()
    }

    fn text(&self, index: usize) -> &str {
        self.tokens.get(index).map_or("", |token| &token.text)
    }

    /// Expands the path or use tree at `start`; returns the index after it.
    fn expand(&self, start: usize, prefix: &[String], paths: &mut Vec<(usize, Vec<String>)>) -> usize {
        let mut path = prefix.to_vec();
        let mut at = start;
        loop {
            if self.text(at) == "{" {
                at += 1;
                while !matches!(self.text(at), "}" | "") {
                    at = self.expand(at, &path, paths);
                    while !matches!(self.text(at), "," | "}" | "") {
                        at += 1; // `as name`
                    }
                    at += usize::from(self.text(at) == ",");
                }
                return at + 1;
            }
            path.push(self.text(at).to_owned());
            let next = self.text(at + 2);
            if self.text(at + 1) != "::" || !(is_word(next) || matches!(next, "{" | "*")) {
                paths.push((self.tokens[at.min(self.tokens.len() - 1)].line, path));
                return at + 1;
            }
            at += 2;
        }
    }
}

/// `src/backend/cpu/mod.rs` is `["backend", "cpu"]`.
fn module_of(path: &str) -> Vec<String> {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    if inner == "lib" { Vec::new() } else { inner.split('/').map(str::to_owned).collect() }
}

fn resolve(here: &[String], path: &[String]) -> Vec<String> {
    let mut at = here.to_vec();
    for (index, word) in path.iter().enumerate() {
        match word.as_str() {
            "crate" if index == 0 => at.clear(),
            "super" => drop(at.pop()),
            "self" => {}
            _ => at.push(word.clone()),
        }
    }
    at
}

/// `text` with comments and the insides of string and character literals blanked, line breaks kept.
fn without_literals(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let rest = &chars[at..];
        let skip = match rest {
            ['/', '/', ..] => rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => block_comment(rest),
            ['"', ..] => quoted(rest),
            ['r', '"' | '#', ..] if at == 0 || !is_word_char(chars[at - 1]) || chars[at - 1] == 'b' => raw_string(rest),
            ['\'', '\\', ..] => 3 + rest[3..].iter().position(|&c| c == '\'').map_or(0, |end| end + 1),
            ['\'', _, '\'', ..] => 3,
            _ => 0,
        };
        if skip == 0 {
            out.push(chars[at]);
            at += 1;
        } else {
            out.push(' ');
            out.extend(rest[..skip].iter().filter(|&&c| c == '\n'));
            at += skip;
        }
    }
    out
}

fn block_comment(rest: &[char]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at + 1 < rest.len() {
        match (rest[at], rest[at + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

fn quoted(rest: &[char]) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != '"' {
        at += 1 + usize::from(rest[at] == '\\');
    }
    (at + 1).min(rest.len())
}

/// Length of the raw string at `rest`, or 0 when it is not one (`r#type`).
fn raw_string(rest: &[char]) -> usize {
    let hashes = rest[1..].iter().take_while(|&&c| c == '#').count();
    if rest.get(1 + hashes) != Some(&'"') {
        return 0;
    }
    let mut end = vec!['"'];
    end.extend(std::iter::repeat_n('#', hashes));
    let body = &rest[2 + hashes..];
    let found = body.windows(end.len()).position(|window| window == end.as_slice());
    found.map_or(rest.len(), |at| 2 + hashes + at + end.len())
}

fn tokenize(text: &str) -> Vec<Token> {
    let mut tokens: Vec<Token> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let length = if is_word_char(first) {
                rest.find(|c| !is_word_char(c)).unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            tokens.push(Token { line: number + 1, text: rest[..length].to_owned() });
            rest = rest[length..].trim_start();
        }
    }
    tokens
}

/// Drops every item under a `#[cfg(...)]` that names `test`: up to its closing brace, or its semicolon.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let mut kept = Vec::with_capacity(tokens.len());
    let mut at = 0;
    while at < tokens.len() {
        let is = |offset: usize, text: &str| tokens.get(at + offset).is_some_and(|token| token.text == text);
        if is(0, "#") && is(1, "[") && is(2, "cfg") {
            let end = at + tokens[at..].iter().position(|token| token.text == "]").unwrap_or(tokens.len() - at - 1);
            let names = |word: &str| tokens[at..end].iter().any(|token| token.text == word);
            if names("test") && !names("not") {
                at = after_item(tokens, end + 1);
                continue;
            }
        }
        kept.push(tokens[at].clone());
        at += 1;
    }
    kept
}

fn after_item(tokens: &[Token], start: usize) -> usize {
    let mut depth = 0_usize;
    for (index, token) in tokens.iter().enumerate().skip(start) {
        match token.text.as_str() {
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                // A use tree's brace is not the end of its item: the semicolon is.
                if depth == 0 && tokens.get(index + 1).is_none_or(|next| next.text != ";") {
                    return index + 1;
                }
            }
            ";" if depth == 0 => return index + 1,
            _ => {}
        }
    }
    tokens.len()
}

fn is_word(text: &str) -> bool {
    text.chars().next().is_some_and(is_word_char)
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}
