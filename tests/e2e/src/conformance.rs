//! `docs/cri-conformance.md`: for people the verdict, for the test what it expects.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

const FIRST: &str = "spec";
const LAST: &str = "reason";
/// Text before the words of a failure in its reason. A broken runtime fails as well, but with other words.
const SAYS: &str = "It says \"";

/// Outcome of a spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It passes.
    Passes,
    /// It fails, or could not run.
    Fails,
    /// The suite itself found that it does not apply.
    Skipped,
}

impl State {
    /// As in the table.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Passes => "passes",
            Self::Fails => "fails",
            Self::Skipped => "skipped",
        }
    }
}

/// A spec's result.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its name, with those of all that it is in.
    pub spec: String,
    /// Its outcome.
    pub state: State,
    /// Reason, in the words of the suite.
    pub message: String,
    /// Time that it took.
    pub seconds: f64,
}

/// The document: text, a table, text.
#[derive(Debug)]
pub struct Table {
    before: String,
    columns: Vec<String>,
    rows: Vec<Row>,
    after: String,
}

#[derive(Clone, Debug)]
struct Row {
    spec: String,
    cells: Vec<String>,
    reason: String,
}

/// Comparison of an outcome with the table's.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    AsExpected,
    /// It is not, for this reason.
    Wrong(String),
}

impl Table {
    /// From a file.
    ///
    /// # Errors
    /// When it cannot be read or holds no table.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("parsing {}", path.display()))
    }

    /// To a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.text()).with_context(|| format!("writing {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let head = format!("| {FIRST} |");
        let start =
            if text.starts_with(&head) { Some(0) } else { text.find(&format!("\n{head}")).map(|at| at + 1) };
        let start = start.context("it has no table of specs")?;
        let (before, rest) = text.split_at_checked(start).context("a torn table")?;
        let end = rest.find("\n\n").map_or(rest.len(), |at| at + 1);
        let (table, after) = rest.split_at_checked(end).context("a torn table")?;
        let mut lines = table.lines();
        let mut columns = cells(lines.next().unwrap_or_default());
        columns.remove(0);
        if columns.pop().as_deref() != Some(LAST) {
            bail!("the last column of the table is not `{LAST}`");
        }
        lines.next();
        let rows = lines.map(|line| Row::parse(line, columns.len())).collect::<Result<_>>()?;
        Ok(Self { before: before.into(), columns, rows, after: after.into() })
    }

    fn text(&self) -> String {
        let mut text = self.before.clone();
        let line = |cells: &[&str]| format!("| {} |\n", cells.join(" | "));
        let names: Vec<_> = self.columns.iter().map(String::as_str).collect();
        text.push_str(&line(&[&[FIRST], &*names, &[LAST]].concat()));
        text.push_str(&format!("|{}\n", "---|".repeat(names.len() + 2)));
        for row in &self.rows {
            let spec = row.spec.replace('|', "\\|");
            let cells: Vec<_> = row.cells.iter().map(String::as_str).collect();
            text.push_str(&line(&[&[&*spec], &*cells, &[&*row.reason]].concat()));
        }
        text.push_str(&self.after);
        text
    }

    /// All specs.
    pub fn specs(&self) -> impl Iterator<Item = &str> {
        self.rows.iter().map(|row| row.spec.as_str())
    }

    /// Compares an outcome with a column.
    #[must_use]
    pub fn judge(&self, column: &str, outcome: &Outcome) -> Verdict {
        let Some(index) = self.columns.iter().position(|name| name == column) else {
            return Verdict::Wrong(format!("the table has no column `{column}`"));
        };
        let Some(row) = self.rows.iter().find(|row| row.spec == outcome.spec) else {
            return Verdict::Wrong("the table has no such spec".into());
        };
        // Nothing is excused that has not been seen to fail.
        let cell = row.cells.get(index).filter(|cell| !cell.is_empty());
        let expected = cell.map_or(State::Passes.word(), String::as_str);
        if expected != outcome.state.word() {
            return Verdict::Wrong(format!("it {}; the table has `{expected}`", says(outcome.state)));
        }
        if outcome.state != State::Passes && row.reason.is_empty() {
            return Verdict::Wrong(format!("it {}, and the table has no reason", says(outcome.state)));
        }
        match (outcome.state, row.words()) {
            (State::Fails, None) => {
                Verdict::Wrong(format!("it fails, and the reason does not end with what it says: {SAYS}…\"."))
            }
            (State::Fails, Some(words)) if !outcome.message.contains(words) => {
                Verdict::Wrong(format!("it fails for another reason: it does not say \"{words}\""))
            }
            _ => Verdict::AsExpected,
        }
    }

    /// Returns true if an outcome differs from what the table has seen, or is a failure that it has not seen:
    /// it may be the machine's.
    #[must_use]
    pub fn doubts(&self, column: &str, outcome: &Outcome) -> bool {
        let index = self.columns.iter().position(|name| name == column);
        let row = self.rows.iter().find(|row| row.spec == outcome.spec);
        match index.and_then(|index| row?.cells.get(index)).filter(|cell| !cell.is_empty()) {
            Some(cell) if cell == outcome.state.word() => {
                let words = row.and_then(Row::words).unwrap_or_default();
                outcome.state == State::Fails && !outcome.message.contains(words)
            }
            Some(_) => true,
            None => outcome.state == State::Fails,
        }
    }

    /// Specs that the table has results for and the suite has not.
    #[must_use]
    pub fn missing(&self, column: &str, outcomes: &[Outcome]) -> Vec<String> {
        let index = self.columns.iter().position(|name| name == column);
        let has =
            |row: &&Row| index.and_then(|index| row.cells.get(index)).is_some_and(|cell| !cell.is_empty());
        let known = |row: &&Row| outcomes.iter().any(|outcome| outcome.spec == row.spec);
        self.rows.iter().filter(has).filter(|row| !known(row)).map(|row| row.spec.clone()).collect()
    }

    /// Takes over what came out. With `all`, rows that the suite has not any more lose their result.
    pub fn bless(&mut self, column: &str, outcomes: &[Outcome], all: bool) {
        let index = self.columns.iter().position(|name| name == column).unwrap_or_else(|| {
            self.columns.push(column.to_owned());
            for row in &mut self.rows {
                row.cells.push(String::new());
            }
            self.columns.len() - 1
        });
        if all {
            for cell in self.rows.iter_mut().filter_map(|row| row.cells.get_mut(index)) {
                cell.clear();
            }
        }
        for outcome in outcomes {
            if !self.rows.iter().any(|row| row.spec == outcome.spec) {
                let cells = vec![String::new(); self.columns.len()];
                self.rows.push(Row { spec: outcome.spec.clone(), cells, reason: String::new() });
            }
            let row = self.rows.iter_mut().find(|row| row.spec == outcome.spec);
            if let Some(cell) = row.and_then(|row| row.cells.get_mut(index)) {
                *cell = outcome.state.word().to_owned();
            }
        }
        self.rows.retain(|row| row.cells.iter().any(|cell| !cell.is_empty()));
        for row in &mut self.rows {
            if row.cells.iter().all(|cell| cell.is_empty() || cell == State::Passes.word()) {
                row.reason.clear();
            }
        }
        self.rows.sort_by(|a, b| a.spec.cmp(&b.spec));
    }
}

fn says(state: State) -> &'static str {
    match state {
        State::Skipped => "was skipped",
        state => state.word(),
    }
}

impl Row {
    /// A part of what the suite says when the spec fails for the row's reason.
    fn words(&self) -> Option<&str> {
        let (_, words) = self.reason.split_once(SAYS)?;
        words.split_once('"').map(|(words, _)| words).filter(|words| !words.is_empty())
    }

    fn parse(line: &str, columns: usize) -> Result<Self> {
        let mut cells = cells(line);
        if cells.len() != columns + 2 {
            bail!("a row with {} cells instead of {}: {line}", cells.len(), columns + 2);
        }
        let reason = cells.pop().unwrap_or_default();
        let spec = cells.remove(0);
        Ok(Self { spec, cells, reason })
    }
}

/// The cells of a line of a table; `\|` is a bar inside of one.
fn cells(line: &str) -> Vec<String> {
    let hidden = line.trim().replace("\\|", "\u{0}");
    let inner = hidden.trim_start_matches('|').trim_end_matches('|');
    inner.split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMN: &str = "runc, containerd 2.1";
    const TEXT: &str = "# Title\n\n| spec | runc, containerd 2.1 | reason |\n|---|---|---|\n\
                        | a | passes |  |\n| b Uid\\|Username | fails | no such thing. It says \"no thing\". |\n\nAfter.\n";

    fn outcome(spec: &str, state: State) -> Outcome {
        saying(spec, state, "rpc error: no thing here")
    }

    fn saying(spec: &str, state: State, message: &str) -> Outcome {
        Outcome { spec: spec.into(), state, message: message.into(), seconds: 0.0 }
    }

    #[test]
    fn a_failure_for_another_reason_is_wrong_and_in_doubt() {
        let table = Table::parse(TEXT).unwrap();
        let of = |message| saying("b Uid|Username", State::Fails, message);
        assert_eq!(table.judge(COLUMN, &of("x: no thing")), Verdict::AsExpected);
        assert!(!table.doubts(COLUMN, &of("x: no thing")));
        let Verdict::Wrong(why) = table.judge(COLUMN, &of("connection refused")) else {
            panic!("it is taken")
        };
        assert_eq!(why, "it fails for another reason: it does not say \"no thing\"");
        assert!(table.doubts(COLUMN, &of("connection refused")));
        // And a reason without words excuses nothing.
        let table = Table::parse(&TEXT.replace("It says", "It may say")).unwrap();
        let Verdict::Wrong(why) = table.judge(COLUMN, &of("no thing")) else { panic!("it is taken") };
        assert!(why.contains("does not end with what it says"), "{why}");
    }

    #[test]
    fn a_table_is_written_as_it_was_read() {
        assert_eq!(Table::parse(TEXT).unwrap().text(), TEXT);
    }

    #[test]
    fn what_differs_from_the_table_is_wrong_in_both_directions() {
        let table = Table::parse(TEXT).unwrap();
        let judge = |spec, state| table.judge(COLUMN, &outcome(spec, state)) == Verdict::AsExpected;
        assert!(judge("a", State::Passes) && judge("b Uid|Username", State::Fails));
        assert!(!judge("a", State::Fails) && !judge("a", State::Skipped));
        assert!(!judge("b Uid|Username", State::Passes));
        assert!(!judge("c", State::Passes));
        assert!(table.judge("runc, containerd 9.9", &outcome("a", State::Passes)) != Verdict::AsExpected);
        let mut empty = table;
        empty.bless(COLUMN, &[outcome("a", State::Passes)], true);
        empty.bless("other", &[outcome("b", State::Passes)], false);
        let judge = |state| empty.judge(COLUMN, &outcome("b", state)) == Verdict::AsExpected;
        assert!(judge(State::Passes) && !judge(State::Fails) && !judge(State::Skipped));
        let table = Table::parse(TEXT).unwrap();
        assert_eq!(table.missing(COLUMN, &[outcome("a", State::Passes)]), ["b Uid|Username"]);
    }

    #[test]
    fn what_the_table_has_not_seen_is_in_doubt() {
        let table = Table::parse(TEXT).unwrap();
        let doubts = |column, spec, state| table.doubts(column, &outcome(spec, state));
        assert!(doubts(COLUMN, "a", State::Fails) && doubts(COLUMN, "c", State::Fails));
        assert!(doubts("runc, containerd 9.9", "b Uid|Username", State::Fails));
        assert!(doubts(COLUMN, "b Uid|Username", State::Passes) && doubts(COLUMN, "a", State::Skipped));
        assert!(!doubts(COLUMN, "b Uid|Username", State::Fails) && !doubts(COLUMN, "a", State::Passes));
        assert!(!doubts(COLUMN, "c", State::Passes));
    }

    #[test]
    fn what_does_not_pass_needs_a_reason() {
        let mut table = Table::parse(TEXT).unwrap();
        table.bless(COLUMN, &[outcome("a", State::Skipped)], false);
        assert!(table.judge(COLUMN, &outcome("a", State::Skipped)) != Verdict::AsExpected);
    }

    #[test]
    fn blessing_adds_columns_and_keeps_reasons() {
        let mut table = Table::parse(TEXT).unwrap();
        table.bless(
            "kuasar, containerd 2.1",
            &[outcome("a", State::Passes), outcome("c", State::Fails)],
            true,
        );
        assert_eq!(
            table.text().lines().skip(2).take(5).collect::<Vec<_>>(),
            [
                "| spec | runc, containerd 2.1 | kuasar, containerd 2.1 | reason |",
                "|---|---|---|---|",
                "| a | passes | passes |  |",
                "| b Uid\\|Username | fails |  | no such thing. It says \"no thing\". |",
                "| c |  | fails |  |",
            ]
        );
    }

    #[test]
    fn a_torn_row_is_seen() {
        assert!(Table::parse("| spec | x | reason |\n|---|---|---|\n| a | passes |\n").is_err());
    }
}
