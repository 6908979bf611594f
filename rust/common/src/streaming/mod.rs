//! containerd's `Streaming` service, as a server sees it: frames, one stream's connection, and the bridge to
//! a process.
//!
//! Written by hand, frame by frame: ttrpc's own server cannot close one direction of a stream, nor the
//! connection of one that has ended, which containerd up to 2.2 leaves to the server. One connection is one
//! stream.

pub mod bridge;
pub mod frame;
pub mod route;
pub mod wire;

/// The parameter of a stream's URL that is its id.
const PARAMETER: &str = "streaming_id=";

/// The streaming id in `stdin`, `stdout` or `stderr` of a Task request, if it is a stream's URL.
#[must_use]
pub fn id_of(url: &str) -> Option<&str> {
    let (_, id) = url.split_once(PARAMETER)?;
    let id = id.split(['&', '#']).next().unwrap_or_default();
    (!id.is_empty()).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_in_urls() {
        assert_eq!(id_of("ttrpc+hvsock:///p/vsock.sock:1024?streaming_id=c1-stdout"), Some("c1-stdout"));
        assert_eq!(id_of("unix:////p.sock?streaming_id=e-stdin&x=1"), Some("e-stdin"));
        for none in ["", "vsock", "/run/fifo", "x?streaming_id=", "x?stream_id=a"] {
            assert_eq!(id_of(none), None, "{none}");
        }
    }
}
