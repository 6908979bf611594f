//! Turns serde's "unknown field" into advice.

/// Adds the nearest known key to an error about an unknown key or an unknown value.
pub(super) fn explain(error: &str) -> String {
    let error = error.trim_end();
    match suggestion(error) {
        Some(known) => format!("{error}\ndid you mean `{known}`?"),
        None => error.to_owned(),
    }
}

fn suggestion(error: &str) -> Option<&str> {
    let from = error.find("unknown field `").or_else(|| error.find("unknown variant `"))?;
    // Every second piece of a text cut at backticks was inside them: the culprit first, then what was
    // expected.
    let mut quoted = error.get(from..)?.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    quoted
        .map(|known| (strsim::jaro_winkler(unknown, known), known))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}
