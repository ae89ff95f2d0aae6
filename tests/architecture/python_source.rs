//! Just enough of Python's syntax to see what importing a package imports.

use super::File;

/// One `import` or `from ... import` statement.
#[derive(Debug, Clone)]
pub struct Import {
    pub line: usize,
    /// Leading dots: 0 for an absolute import.
    pub level: usize,
    /// The module after `import` or `from`.
    pub module: String,
    /// The names after `from ... import`.
    names: Vec<String>,
    /// Does importing the module run it: not inside a function, not under `TYPE_CHECKING`?
    eager: bool,
}

/// Everything outside the package that `import {package}` imports: (file, chain of modules, line, top-level name).
pub fn imported_with(files: &[&File], package: &str) -> Vec<(String, String, usize, String)> {
    let mut found = Vec::new();
    let mut queue = vec![(package.to_owned(), package.to_owned())];
    let mut seen = vec![package.to_owned()];
    while let Some((module, chain)) = queue.pop() {
        let Some((path, text)) = file_of(files, &module) else { continue };
        for import in imports(text).into_iter().filter(|import| import.eager) {
            let target = absolute(&module, path.ends_with("/__init__.py"), &import);
            let top = target.split('.').next().expect("a name").to_owned();
            if top != package {
                found.push((path.clone(), chain.clone(), import.line, top));
                continue;
            }
            let names = import.names.iter().map(|name| format!("{target}.{name}"));
            for reached in parents(&target).into_iter().chain(names) {
                if !seen.contains(&reached) {
                    seen.push(reached.clone());
                    queue.push((reached.clone(), format!("{chain} -> {reached}")));
                }
            }
        }
    }
    found
}

fn file_of<'a>(files: &[&'a File], module: &str) -> Option<&'a File> {
    let base = format!("python/{}", module.replace('.', "/"));
    let names = [format!("{base}.py"), format!("{base}/__init__.py")];
    files.iter().find(|(path, _)| names.contains(path)).copied()
}

/// `a.b.c` runs `a`, `a.b` and `a.b.c`.
fn parents(module: &str) -> Vec<String> {
    let ends = module.match_indices('.').map(|(at, _)| at).chain([module.len()]);
    ends.map(|end| module[..end].to_owned()).collect()
}

fn absolute(module: &str, is_package: bool, import: &Import) -> String {
    if import.level == 0 {
        return import.module.clone();
    }
    let mut base: Vec<&str> = module.split('.').collect();
    base.truncate((base.len() + usize::from(is_package)).saturating_sub(import.level));
    base.extend(import.module.split('.').filter(|name| !name.is_empty()));
    base.join(".")
}

/// The import statements of `text`, in order, one for each module.
pub fn imports(text: &str) -> Vec<Import> {
    let mut found = Vec::new();
    let mut blocks: Vec<(usize, bool)> = Vec::new(); // indentation of a header, and is its body eager
    for (line, statement) in statements(text) {
        let indent = statement.len() - statement.trim_start().len();
        while blocks.last().is_some_and(|(header, _)| *header >= indent) {
            blocks.pop();
        }
        let eager = blocks.iter().all(|(_, eager)| *eager);
        let words = statement.trim();
        if words.ends_with(':') {
            let lazy = ["def ", "async def ", "if TYPE_CHECKING", "if typing.TYPE_CHECKING"];
            blocks.push((indent, !lazy.iter().any(|start| words.starts_with(start))));
        }
        found.extend(parse(words).into_iter().map(|(level, module, names)| Import {
            line,
            level,
            module,
            names,
            eager,
        }));
    }
    found
}

fn parse(statement: &str) -> Vec<(usize, String, Vec<String>)> {
    let first = |item: &str| item.split_whitespace().next().unwrap_or("").to_owned();
    let list = |items: &str| items.replace(['(', ')'], " ").split(',').map(first).filter(|x| !x.is_empty()).collect();
    if let Some(items) = statement.strip_prefix("import ") {
        let modules: Vec<String> = list(items);
        return modules.into_iter().map(|module| (0, module, Vec::new())).collect();
    }
    let from = statement.strip_prefix("from ").and_then(|rest| rest.split_once(" import"));
    from.map_or_else(Vec::new, |(module, names)| {
        let module = module.trim();
        let name = module.trim_start_matches('.');
        vec![(module.len() - name.len(), name.trim().to_owned(), list(names))]
    })
}

/// Logical lines: comments and strings blanked, brackets and backslashes joined, semicolons split; with their line.
fn statements(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut current = String::new();
    let (mut start, mut depth) = (1, 0_usize);
    let plain = without_strings(text).replace("\\\n", " \u{1}");
    let mut line = 1;
    for c in plain.chars().chain(['\n']) {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if (c == '\n' || c == ';') && depth == 0 {
            if !current.trim().is_empty() {
                found.push((start, std::mem::take(&mut current).trim_end().to_owned()));
            }
            current.clear();
        } else if c == '\n' || c == '\u{1}' {
            current.push(' ');
        } else {
            if current.trim().is_empty() && !c.is_whitespace() {
                start = line;
            }
            current.push(c);
        }
        line += usize::from(c == '\n' || c == '\u{1}');
    }
    found
}

fn without_strings(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skip = if c == '#' {
            rest.find('\n').unwrap_or(rest.len())
        } else if c == '"' || c == '\'' {
            let triple = c.to_string().repeat(3);
            if rest.starts_with(&triple) { string_end(rest, &triple) } else { string_end(rest, &triple[..1]) }
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        out.extend(rest[..skip].chars().filter(|&c| c == '\n').map(|_| '\u{1}'));
        rest = &rest[skip..];
    }
    out
}

fn string_end(rest: &str, quote: &str) -> usize {
    let mut at = quote.len();
    while at < rest.len() && !rest[at..].starts_with(quote) {
        let escape = usize::from(rest[at..].starts_with('\\'));
        at += rest[at..].chars().take(1 + escape).map(char::len_utf8).sum::<usize>();
    }
    (at + quote.len()).min(rest.len())
}
