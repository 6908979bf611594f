//! Fields of an image: each with its value and, where it is wrong, the condition that it breaks.

use std::fmt::{self, Display};

/// Number of the largest files that a report names.
pub(crate) const LARGEST: usize = 10;

/// One field of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Part of the image it belongs to.
    pub section: &'static str,
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// The condition that the value breaks, if any.
    pub problem: Option<String>,
}

/// All fields of an image, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The fields.
    pub fields: Vec<Field>,
}

impl Report {
    /// The fields that are wrong.
    pub fn problems(&self) -> impl Iterator<Item = &Field> {
        self.fields.iter().filter(|f| f.problem.is_some())
    }

    pub(crate) fn note(&mut self, section: &'static str, name: &'static str, value: impl Display) {
        self.fields.push(Field { section, name, value: value.to_string(), problem: None });
    }

    /// Adds a field that has to fulfil a condition; `wanted` says which, and why.
    pub(crate) fn check(
        &mut self,
        section: &'static str,
        name: &'static str,
        value: impl Display,
        good: bool,
        wanted: impl Display,
    ) {
        let problem = (!good).then(|| wanted.to_string());
        self.fields.push(Field { section, name, value: value.to_string(), problem });
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut section = "";
        for field in &self.fields {
            if field.section != section {
                section = field.section;
                writeln!(f, "{section}")?;
            }
            write!(f, "  {:<16} {}", field.name, field.value)?;
            match &field.problem {
                Some(problem) => writeln!(f, "   WRONG: {problem}")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
