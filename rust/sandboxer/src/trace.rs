//! Writes the daemon's spans to a file that Chrome (`chrome://tracing`) and Perfetto show, to see where time
//! goes.
//!
//! The file is a JSON array with one event a line. Neither viewer needs its last bracket, and the daemon
//! never writes it: they can read the file of a daemon that was killed.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::{self, Write},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use serde_json::{Map, Value, json};
use tracing::{
    Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id},
};
use tracing_subscriber::{
    Layer,
    filter::{FilterFn, filter_fn},
    layer::Context,
    registry::LookupSpan,
};

/// Writes spans.
pub struct ChromeTrace {
    began: Instant,
    state: Mutex<State>,
}

struct State {
    file: File,
    /// In each lane, the spans that are open, outermost first. A lane shows one thing at a time and what that
    /// consists of; what goes on beside it has a lane of its own.
    lanes: Vec<Vec<u64>>,
}

/// The lane that shows a span, and the pod that it belongs to.
struct Place {
    lane: usize,
    pod: Option<Value>,
}

/// The span that everything done for a pod is in; its field `id` says which pod.
const POD: &str = "pod";

impl ChromeTrace {
    /// Writes to this file, from its beginning.
    ///
    /// # Errors
    /// When it cannot be created.
    #[expect(clippy::disallowed_methods, reason = "the administrator names this file")]
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut file = File::create(path)?;
        file.write_all(b"[\n")?;
        let state = Mutex::new(State { file, lanes: Vec::new() });
        Ok(Self { began: Instant::now(), state })
    }

    /// Filter that passes every span of the daemon's own, whatever the log's filter is.
    #[must_use]
    pub fn filter() -> FilterFn {
        fn ours(metadata: &Metadata<'_>) -> bool {
            metadata.is_span() && metadata.target().starts_with("vmm_sandboxer")
        }
        filter_fn(ours)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Writes an event with what `describe` adds to it, and changes the lanes.
    fn record(&self, change: impl FnOnce(&mut State) -> Value) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let event = change(&mut state);
        // A full disk is no reason to stop a pod.
        let _ = state.file.write_all(format!("{event},\n").as_bytes());
    }
}

impl State {
    /// The lane for a new span: its parent's, if nothing else goes on there, or a free one.
    fn place(&mut self, span: u64, parent: Option<(u64, usize)>) -> usize {
        let beside = |lane: &Vec<u64>, parent: u64| lane.last() == Some(&parent);
        let inside =
            parent.filter(|(parent, lane)| self.lanes.get(*lane).is_some_and(|lane| beside(lane, *parent)));
        let lane = match inside {
            Some((_, lane)) => lane,
            None => self.lanes.iter().position(Vec::is_empty).unwrap_or(self.lanes.len()),
        };
        if lane == self.lanes.len() {
            self.lanes.push(Vec::new());
        }
        if let Some(spans) = self.lanes.get_mut(lane) {
            spans.push(span);
        }
        lane
    }
}

impl<S> Layer<S> for ChromeTrace
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let parent = span.parent().and_then(|parent| {
            let extensions = parent.extensions();
            let place = extensions.get::<Place>()?;
            Some((parent.id().into_u64(), place.lane, place.pod.clone()))
        });
        let mut fields = Fields(Map::new());
        attributes.record(&mut fields);
        let (ts, name) = (self.now(), span.name());
        let own = fields.0.get("id").filter(|_| name == POD).cloned();
        let pod = own.or_else(|| parent.as_ref()?.2.clone());
        if let Some(pod) = &pod {
            fields.0.insert(POD.to_owned(), pod.clone());
        }
        self.record(|state| {
            let lane = state.place(id.into_u64(), parent.map(|(parent, lane, _)| (parent, lane)));
            span.extensions_mut().insert(Place { lane, pod });
            json!({"ph": "B", "name": name, "ts": ts, "pid": 1, "tid": lane, "args": fields.0})
        });
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let Some(lane) = span.extensions().get::<Place>().map(|place| place.lane) else { return };
        let (ts, name) = (self.now(), span.name());
        self.record(|state| {
            if let Some(spans) = state.lanes.get_mut(lane) {
                spans.retain(|open| *open != id.into_u64());
            }
            json!({"ph": "E", "name": name, "ts": ts, "pid": 1, "tid": lane})
        });
    }
}

/// A span's fields, as texts.
struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        let _ = write!(text, "{value:?}");
        self.0.insert(field.name().to_owned(), text.into());
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn spans_become_events_and_what_goes_on_beside_has_its_own_lane() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let layer = ChromeTrace::create(&path).unwrap().with_filter(ChromeTrace::filter());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let pod = tracing::info_span!("pod", id = "p1");
            let _in_pod = pod.enter();
            let first = tracing::trace_span!("first");
            let second = tracing::trace_span!("second");
            drop(first);
            drop(second);
            tracing::info!("events are not wanted");
            drop(tracing::trace_span!(target: "hyper", "foreign"));
            drop(tracing::trace_span!("third"));
        });
        let text = std::fs::read_to_string(path).unwrap();
        let events: Vec<Value> = serde_json::from_str(&format!("{}]", text.trim_end_matches(",\n"))).unwrap();
        let brief: Vec<String> = events
            .iter()
            .map(|event| format!("{} {} {}", event["ph"], event["name"], event["tid"]).replace('"', ""))
            .collect();
        assert_eq!(
            brief,
            [
                "B pod 0",
                "B first 0",
                "B second 1",
                "E first 0",
                "E second 1",
                "B third 0",
                "E third 0",
                "E pod 0"
            ]
        );
        assert_eq!((&events[0]["args"]["pod"], &events[2]["args"]["pod"]), (&"p1".into(), &"p1".into()));
        assert!(events[7]["ts"].as_u64() >= events[0]["ts"].as_u64());
    }
}
