//! Checks what no compiler does: who may import whom, how long a file may be, where unsafe code may stand.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Longest file, in lines, without its tests.
const MAX_LINES: usize = 800;

/// Modules of crates/raft-sqlite and what each may name (`crate::X`). `error`, `config` and the crate's root are everybody's.
const ARROWS: &[(&str, &[&str])] = &[
    ("page", &[]),
    ("vfs", &["page"]),
    ("database", &["page", "vfs"]),
    ("log", &[]),
    ("network", &[]),
    ("state_machine", &["database", "page"]),
    ("consensus", &["log", "state_machine", "network", "database"]),
    ("client", &["consensus", "database", "network", "node", "page", "state_machine"]),
    ("node", &["client", "consensus", "database", "log", "network", "page", "state_machine"]),
];

/// Modules of crates/kine-adapter.
const KINE_ARROWS: &[(&str, &[&str])] = &[
    ("index", &[]),
    ("schema", &["index"]),
    ("kv", &["index", "schema", "proto"]),
    ("watch", &["kv", "index", "proto"]),
    ("lease", &["kv", "index", "proto"]),
    ("rpc", &["kv", "watch", "lease", "proto", "index"]),
    ("http", &["kv", "watch", "lease", "rpc", "proto"]),
];

/// Reports everything that is wrong, and fails if anything is.
pub fn check(root: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    arrows(root, "crates/raft-sqlite/src", ARROWS, &mut wrong)?;
    arrows(root, "crates/kine-adapter/src", KINE_ARROWS, &mut wrong)?;
    let mut files = Vec::new();
    for folder in ["crates", "tests", "benches"] {
        rust_files(&root.join(folder), &mut files)?;
    }
    for file in &files {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let name = file.strip_prefix(root).unwrap_or(file).display().to_string();
        let code = without_tests(&text);
        let lines = code.lines().count();
        let is_test = name.ends_with("tests.rs") || name.contains("/tests/");
        if lines > MAX_LINES && !is_test {
            wrong.push(format!("{name}: {lines} lines without tests, {MAX_LINES} at most"));
        }
        let may_be_unsafe = name.contains("/vfs/") || name.contains("xtask/src/tidy.rs");
        if !may_be_unsafe && code.lines().any(is_unsafe) {
            wrong.push(format!("{name}: unsafe code outside vfs/"));
        }
        if name.contains("/src/")
            && !text.starts_with("//!")
            && !name.contains("/generated/")
            && !text.trim().is_empty()
        {
            wrong.push(format!("{name}: no module header (//!)"));
        }
    }
    if wrong.is_empty() {
        eprintln!("tidy: {} files in order", files.len());
        return Ok(());
    }
    for line in &wrong {
        eprintln!("tidy: {line}");
    }
    bail!("{} things to tidy up", wrong.len())
}

fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or(line);
    code.contains("unsafe {")
        || code.contains("unsafe fn")
        || code.contains("unsafe impl")
        || code.contains("allow(unsafe_code)")
}

/// The file up to its test module.
fn without_tests(text: &str) -> &str {
    text.find("\n#[cfg(test)]\nmod ").map_or(text, |at| &text[..at])
}

fn arrows(root: &Path, folder: &str, allowed: &[(&str, &[&str])], wrong: &mut Vec<String>) -> Result<()> {
    let allowed: BTreeMap<&str, &[&str]> = allowed.iter().copied().collect();
    for (module, may) in &allowed {
        let mut files = Vec::new();
        let path = root.join(folder).join(module);
        if path.is_dir() {
            rust_files(&path, &mut files)?;
        }
        let single = path.with_extension("rs");
        if single.is_file() {
            files.push(single);
        }
        for file in files {
            let text = fs::read_to_string(&file)?;
            for (number, line) in without_tests(&text).lines().enumerate() {
                let code = line.split("//").next().unwrap_or(line);
                for named in code.split("crate::").skip(1) {
                    let target: String =
                        named.chars().take_while(|c| c.is_alphanumeric() || matches!(c, '_' | ':')).collect();
                    let first = target.split("::").next().unwrap_or("");
                    let known = allowed.contains_key(first);
                    let fine = first == *module || !known || may.iter().any(|may| target.starts_with(may));
                    if !fine {
                        let name = file.strip_prefix(root).unwrap_or(&file).display();
                        wrong.push(format!("{name}:{}: {module} may not import {first}", number + 1));
                    }
                }
            }
        }
    }
    Ok(())
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target" && name != "node_modules") {
                rust_files(&path, found)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forbidden_import_is_found() {
        let folder = std::env::temp_dir().join(format!("tidy-{}", std::process::id()));
        fs::create_dir_all(folder.join("src/log")).unwrap();
        fs::write(folder.join("src/log/mod.rs"), "//! x\nuse crate::state_machine::Machine;\nuse crate::error::X;\n")
            .unwrap();
        let mut wrong = Vec::new();
        arrows(&folder, "src", ARROWS, &mut wrong).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(wrong, ["src/log/mod.rs:2: log may not import state_machine"]);
    }

    #[test]
    fn unsafe_code_is_found_and_comments_are_not() {
        assert!(is_unsafe("    unsafe { x() }"));
        assert!(!is_unsafe("// unsafe { x() }"));
    }
}
