//! `docs/specification.md`: rows of a promise and the tests that keep it.

use std::collections::BTreeSet;

/// Names of tests in the last column of the document's tables: each in backquotes.
#[must_use]
pub fn named(document: &str) -> Vec<String> {
    let mut names = Vec::new();
    for row in document.lines().filter(|line| line.starts_with("| ") && !line.contains("---")) {
        let last = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        names.extend(last.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    names
}

/// Names of functions in Rust or Python text, which tests are.
#[must_use]
pub fn functions(text: &str) -> BTreeSet<String> {
    let words: Vec<&str> = text.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    let after = |pair: &[&str]| match pair {
        ["fn" | "def", name] => Some((*name).to_owned()),
        _ => None,
    };
    words.windows(2).filter_map(after).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_in_the_last_column() {
        let document = "| promise `x` | test |\n|---|---|\n| a `b` c | `one`, `two_2` |\ntext `no`\n";
        assert_eq!(named(document), ["one", "two_2"]);
    }

    #[test]
    fn functions_are_found_by_their_keyword() {
        let text = "async fn one(a: B) {}\n    def test_two(self):\nfn three<T>() {}";
        assert_eq!(functions(text), ["one", "test_two", "three"].map(str::to_owned).into());
    }
}
