//! The rules, run over this repository.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;

use kuasar_lints::{circles, promises, root, rust_files};

const CRATES: [&str; 7] = ["common", "derive", "image", "lints", "sandboxer", "shim", "task"];

/// Circles that are known, by the first two files of each. One that is opened goes from here, and none is
/// added.
const KNOWN: [(&str, &str, &str); 13] = [
    ("sandboxer", "config", "container::disks"),
    ("sandboxer", "container::mount", "container::remove"),
    ("sandboxer", "container::nodes", "container::spec"),
    ("sandboxer", "containerd", "pod::collect"),
    ("sandboxer", "network", "network::existing"),
    ("sandboxer", "vmm::config", "vmm::root"),
    ("shim", "pump", "pump::source"),
    ("task", "boot", "role"),
    ("task", "cgroup", "cgroup_v1"),
    ("task", "container", "events"),
    ("task", "devices", "devices::sysfs"),
    ("task", "stdio::registry", "streaming::names"),
    ("task", "storage", "storage::drivers"),
];

#[test]
fn files_of_a_crate_form_no_new_circle() {
    let mut found = Vec::new();
    for name in CRATES {
        for circle in circles::of_crate(&root().join("rust").join(name).join("src")).unwrap() {
            found.push((name.to_owned(), circle));
        }
    }
    for (name, circle) in &found {
        let is_known = KNOWN.iter().any(|known| {
            known.0 == name
                && circle.first().is_some_and(|a| a == known.1)
                && circle.get(1).is_some_and(|b| b == known.2)
        });
        assert!(is_known, "files of {name} import each other: {}", circle.join(", "));
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
