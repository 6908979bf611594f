//! The daemon's trace, read: which step of which pod took from when to when.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A step.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The pod that it is for; empty for none.
    pub pod: String,
    /// Its name.
    pub name: String,
    /// Seconds since the daemon's start.
    pub began: f64,
    /// Likewise.
    pub ended: f64,
}

impl Span {
    /// Time that it took.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.ended - self.began
    }

    /// Returns true if another one went on at the same time.
    #[must_use]
    pub fn is_beside(&self, other: &Self) -> bool {
        self.began < other.ended && other.began < self.ended
    }
}

/// Those of a daemon.
#[derive(Debug)]
pub struct Spans(Vec<Span>);

impl Spans {
    /// Reads a trace, whose last bracket is not there.
    ///
    /// # Errors
    /// When it cannot be read, or is no trace.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("parsing {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let text = format!("{}]", text.trim_end().trim_end_matches(','));
        let events: Vec<Value> = serde_json::from_str(&text)?;
        let mut open: BTreeMap<i64, Vec<Span>> = BTreeMap::new();
        let mut spans = Vec::new();
        for event in &events {
            let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
            let (lane, now) = (event["tid"].as_i64().unwrap_or(0), event["ts"].as_f64().unwrap_or(0.0) / 1e6);
            let stack = open.entry(lane).or_default();
            if text("ph") == "B" {
                let pod = event.pointer("/args/pod").and_then(Value::as_str).map(str::to_owned);
                let pod = pod.or_else(|| stack.last().map(|span| span.pod.clone())).unwrap_or_default();
                stack.push(Span { pod, name: text("name"), began: now, ended: now });
            } else if let Some(place) = stack.iter().rposition(|span| span.name == text("name")) {
                spans.push(Span { ended: now, ..stack.remove(place) });
            }
        }
        Ok(Self(spans))
    }

    /// All steps of that name for a pod.
    pub fn of<'a>(&'a self, pod: &'a str, name: &'a str) -> impl Iterator<Item = &'a Span> {
        self.0.iter().filter(move |span| span.pod == pod && span.name == name)
    }

    /// The only step of that name for a pod.
    ///
    /// # Errors
    /// When there is none, or another.
    pub fn only<'a>(&'a self, pod: &'a str, name: &'a str) -> Result<&'a Span> {
        let mut found = self.of(pod, name);
        match (found.next(), found.next()) {
            (Some(span), None) => Ok(span),
            (None, _) => bail!("the trace has no {name:?} of pod {pod}"),
            _ => bail!("the trace has more than one {name:?} of pod {pod}"),
        }
    }

    /// Seconds of all steps of that name for a pod together.
    ///
    /// # Errors
    /// When there is none.
    pub fn total(&self, pod: &str, name: &str) -> Result<f64> {
        if self.of(pod, name).next().is_none() {
            bail!("the trace has no {name:?} of pod {pod}");
        }
        Ok(self.of(pod, name).map(Span::seconds).sum())
    }

    /// Seconds of every step of these pods, by its name.
    #[must_use]
    pub fn by_name(&self, pods: &[String]) -> BTreeMap<&str, Vec<f64>> {
        let mut all: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for span in self.0.iter().filter(|span| pods.contains(&span.pod) && span.name != "pod") {
            all.entry(&span.name).or_default().push(span.seconds());
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_side_by_side_are_told_from_one_after_another() {
        let event = |ph: &str, name: &str, lane: i64, ts: i64| {
            serde_json::json!({"ph": ph, "name": name, "tid": lane, "ts": ts, "args": {"pod": "p"}})
                .to_string()
        };
        let lines = [
            event("B", "start", 0, 0),
            event("B", "a", 0, 1_000_000),
            event("B", "b", 1, 2_000_000),
            event("E", "a", 0, 3_000_000),
            event("E", "b", 1, 4_000_000),
            event("B", "c", 0, 4_000_000),
            event("E", "c", 0, 6_000_000),
        ];
        let spans = Spans::parse(&format!("[\n{},\n", lines.join(",\n"))).unwrap();
        let only = |name| spans.only("p", name).unwrap();
        assert!(only("a").is_beside(only("b")) && only("b").is_beside(only("a")));
        assert!(!only("b").is_beside(only("c")) && !only("c").is_beside(only("a")));
        assert!((spans.total("p", "c").unwrap() - 2.0).abs() < 1e-9);
        // What has not ended is not there.
        assert!(spans.only("p", "start").is_err() && spans.only("q", "a").is_err());
    }
}
