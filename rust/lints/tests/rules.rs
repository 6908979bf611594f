//! The rules, run over this repository.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;

use kuasar_lints::{circles, comments, promises, root, rust_files};

const CRATES: [&str; 7] = ["common", "derive", "image", "lints", "sandboxer", "shim", "task"];

/// Circles that are known: two files of each, and the number of its files. One that is opened or shrinks is
/// changed here, and none is added or grows.
const KNOWN: [(&str, &str, &str, usize); 13] = [
    ("sandboxer", "config", "vmm", 34),
    ("sandboxer", "container::tree", "container::tree::mount", 2),
    ("sandboxer", "containerd", "pod::collect", 2),
    ("sandboxer", "network", "network::read", 9),
    ("sandboxer", "vmm::config", "vmm::root", 2),
    ("shim", "pump", "stdio", 10),
    ("shim", "create", "task", 2),
    ("task", "boot", "role", 2),
    ("task", "cgroup", "cgroup_v1", 5),
    ("task", "container", "events", 5),
    ("task", "devices", "devices::sysfs", 2),
    ("task", "stdio::registry", "streaming::names", 2),
    ("task", "storage", "storage::drivers", 2),
];

#[test]
fn files_of_a_crate_form_no_new_circle() {
    let mut found = Vec::new();
    for name in CRATES {
        for circle in circles::of_crate(&root().join("rust").join(name).join("src")).unwrap() {
            found.push((name, circle));
        }
    }
    for (name, circle) in &found {
        let has = |file: &str| circle.iter().any(|other| other == file);
        let known = KNOWN.iter().find(|known| known.0 == *name && has(known.1) && has(known.2));
        let size = known.map_or(0, |known| known.3);
        assert_eq!(size, circle.len(), "files of {name} import each other: {}", circle.join(", "));
    }
    assert_eq!(found.len(), KNOWN.len(), "a circle was opened: take it from the list");
}

#[test]
fn every_crate_is_looked_at() {
    let mut found: Vec<_> =
        fs::read_dir(root().join("rust")).unwrap().flatten().map(|e| e.file_name()).collect();
    found.sort();
    assert_eq!(found, CRATES);
}

/// A promise without its test is a hope.
#[test]
fn every_test_that_the_specification_names_exists() {
    let document = fs::read_to_string(root().join("docs/specification.md")).unwrap();
    let mut known = std::collections::BTreeSet::new();
    for folder in ["rust", "tests"] {
        for file in rust_files(&root().join(folder)).unwrap() {
            known.extend(promises::functions(&fs::read_to_string(file).unwrap()));
        }
    }
    let named = promises::named(&document);
    assert!(named.len() > 50, "only {} tests are named", named.len());
    let missing: Vec<_> = named.into_iter().filter(|name| !known.contains(name)).collect();
    assert!(missing.is_empty(), "docs/specification.md names tests that are not there: {missing:?}");
}

/// One in fifty doc comments at most opens with a question's word: the rest are noun phrases, or name who
/// does something.
#[test]
fn doc_comments_open_plainly() {
    let (mut all, mut found) = (0, Vec::new());
    for folder in ["rust", "tests"] {
        for file in rust_files(&root().join(folder)).unwrap() {
            let openings = comments::openings(&fs::read_to_string(&file).unwrap());
            all += openings.all;
            found.extend(openings.interrogative.iter().map(|line| format!("{}:{line}", file.display())));
        }
    }
    assert!(all > 3000, "only {all} doc comments were found");
    assert!(found.len() * 50 < all, "{} of {all} doc comments: {}", found.len(), found.join(" "));
}

#[test]
fn no_comment_is_wider_than_code() {
    let mut wide = Vec::new();
    for folder in ["rust", "tests"] {
        for file in rust_files(&root().join(folder)).unwrap() {
            let lines = comments::wide(&fs::read_to_string(&file).unwrap(), 110);
            wide.extend(lines.iter().map(|line| format!("{}:{line}", file.display())));
        }
    }
    assert!(wide.is_empty(), "{}", wide.join("\n"));
}
