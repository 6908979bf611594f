//! Texts of guests, before they reach a log, an error or a person.

/// Longest text of a guest that is shown, in characters.
pub const SHOWN: usize = 512;

/// The beginning of a text, as it may be shown: no character moves a terminal's cursor, ends a line, hides,
/// or turns the direction of others around (U+202E and its like). These are escaped as Rust escapes them.
#[must_use]
pub fn printable(text: &str) -> String {
    printable_within(text, SHOWN)
}

/// As [`printable`], of at most so many characters of the text; `…` stands for those that are left out.
#[must_use]
pub fn printable_within(text: &str, limit: usize) -> String {
    let mut shown = String::new();
    let mut characters = text.chars();
    for character in characters.by_ref().take(limit) {
        match character {
            // These mislead nobody, and quotes are many in what people write.
            '"' | '\'' | '\\' => shown.push(character),
            _ => shown.extend(character.escape_debug()),
        }
    }
    if characters.next().is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_stays_as_it_is() {
        let text = "opening \"C:\\x\": it's größer als 3 — 日本語 \u{1f4a9}";
        assert_eq!(printable(text), text);
    }

    #[test]
    fn nothing_moves_hides_or_turns_around() {
        assert_eq!(printable("a\nb\r\t\0\x1b[2J\u{9b}1m\x7f"), "a\\nb\\r\\t\\0\\u{1b}[2J\\u{9b}1m\\u{7f}");
        for hidden in [
            '\u{202a}',
            '\u{202b}',
            '\u{202c}',
            '\u{202d}',
            '\u{202e}',
            '\u{2066}',
            '\u{2069}',
            '\u{200b}',
            '\u{200e}',
            '\u{200f}',
            '\u{061c}',
            '\u{2028}',
            '\u{2029}',
            '\u{feff}',
            '\u{ad}',
            '\u{e0041}',
            '\u{fff9}',
            '\u{0301}',
        ] {
            let shown = printable(&format!("a{hidden}b"));
            assert!(shown.is_ascii() && shown.starts_with("a\\u{"), "{shown:?}");
        }
    }

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(printable(&"x".repeat(SHOWN)), "x".repeat(SHOWN));
        let shown = printable(&"\n".repeat(4 << 20));
        assert_eq!(shown.chars().count(), 2 * SHOWN + 1);
        assert!(shown.ends_with('…'));
    }
}
