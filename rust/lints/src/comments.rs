//! Doc comments: how they open, and how wide comments are.

/// Words that open a free relative clause, where a noun phrase or a verb belongs.
const INTERROGATIVES: [&str; 9] =
    ["What", "Who", "Whoever", "Whose", "Whom", "How", "Where", "Whether", "Which"];

/// Counts of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Openings {
    /// Doc comments.
    pub all: usize,
    /// Numbers of the lines that open one with an interrogative.
    pub interrogative: Vec<usize>,
}

/// Doc comments of a file, and those that open with an interrogative.
#[must_use]
pub fn openings(text: &str) -> Openings {
    let mut found = Openings::default();
    let mut inside = false;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim_start();
        let content = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"));
        if let (Some(content), false) = (content, inside) {
            found.all += 1;
            let first = content.split_whitespace().next().unwrap_or_default();
            if INTERROGATIVES.contains(&first) {
                found.interrogative.push(number);
            }
        }
        inside = content.is_some();
    }
    found
}

/// Numbers of the lines whose comment is wider than `most` columns. Rows of tables are left out. A line that
/// is one long word, such as an address, cannot be broken.
#[must_use]
pub fn wide(text: &str, most: usize) -> Vec<usize> {
    let is_wide = |line: &str| {
        let comment = line.trim_start();
        let is_row = comment.starts_with("/// |") || comment.starts_with("//! |");
        let words = comment.split_whitespace().count();
        comment.starts_with("//") && !is_row && line.chars().count() > most && words > 2
    };
    (1..).zip(text.lines()).filter(|(_, line)| is_wide(line)).map(|(number, _)| number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_word_of_a_doc_comment_counts() {
        let text =
            "/// What it is.\nfn a() {}\n/// Releases disks.\n/// What is left stays.\nfn b() {}\n// How\n";
        assert_eq!(openings(text), Openings { all: 2, interrogative: vec![1] });
        assert_eq!(openings("//! Whatever it takes.\n").interrogative, Vec::<usize>::new());
    }

    #[test]
    fn wide_comments_are_found_and_code_is_not() {
        let text =
            "// 456 89\nlet x = \"a long line of code\";\n    /// 0123 56\n// https://address.that.is.long\n";
        assert_eq!(wide(text, 8), [1, 3]);
    }
}
