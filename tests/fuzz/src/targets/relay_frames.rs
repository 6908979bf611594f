//! Frames of a hostile guest's stdio and calls: whatever they are, their payload comes out whole and in
//! order, and what is no frame ends it.

use kuasar_common::{
    stdio::{Frames, MAX_FRAME, Stream, header},
    streaming::{
        bridge::{self, Policy},
        frame::{DATA, Frame, HEADER, REQUEST},
        wire::Wire,
    },
};
use kuasar_relay::{
    guest::link::{Answers, MAX_ANSWER},
    probe::output,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex, split},
    sync::mpsc,
};

use super::run_async;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let frames = [&header(5)[..], b"hello", &header(1), b"x", &header(0), b"behind"].concat();
    let answer = Frame { stream: 1, kind: DATA, flags: 0, message: b"answer".to_vec() }.encode();
    vec![frames, [&header(1)[..], b"x"].concat().repeat(100), vec![0xff; 8], answer]
}

/// The payload, frame after frame, by the shortest code that can be.
fn plain(mut raw: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    while let Some((head, rest)) = raw.split_first_chunk() {
        let length = u32::from_be_bytes(*head) as usize;
        if length == 0 || length > MAX_FRAME {
            break;
        }
        payload.extend(rest.get(..length).unwrap_or(rest));
        raw = rest.get(length..).unwrap_or_default();
    }
    payload
}

pub(crate) fn run(input: &[u8]) {
    let expected = plain(input);
    for cut in [1, 7, usize::MAX] {
        let (mut frames, mut payload) = (Frames::default(), Vec::<u8>::new());
        for part in input.chunks(cut.min(input.len().max(1))) {
            if !matches!(frames.unpack(part, |piece| payload.extend(piece)), Ok(None)) {
                break;
            }
        }
        assert_eq!(payload, expected, "cut at {cut}");
    }
    let mut answers = Answers::default();
    if answers.look(input).is_err() {
        let long = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap_or_default()) as usize > MAX_ANSWER;
        assert!(input.windows(4).any(long));
    }
    run_async(async {
        assert_eq!(plain(&output(input).await), expected);
        assert_eq!(bridged(input).await, expected);
    });
}

/// The same through a bridge, to a client that reads it to its end.
async fn bridged(input: &[u8]) -> Vec<u8> {
    let (ours, theirs) = duplex(1 << 20);
    let (mut process, far) = duplex(1 << 20);
    let (mut from_client, mut to_client) = split(theirs);
    let opened = open(&mut to_client, ours).await;
    let _ = process.write_all(input).await;
    drop(process);
    let Some(wire) = opened else { return Vec::new() };
    let (sender, mut clients) = mpsc::channel(1);
    drop(sender);
    let policy = Policy { rest: Some(std::time::Duration::ZERO), ends_with_client: true };
    let run = bridge::run(Stream::Stdout, far, Some(wire), &mut clients, policy);
    let said = async {
        let mut frames = Vec::new();
        let mut head = [0; HEADER];
        while from_client.read_exact(&mut head).await.is_ok() {
            let [a, b, c, d, _, _, _, _, _, flags] = head;
            let mut message = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
            if from_client.read_exact(&mut message).await.is_err() || flags & 1 != 0 {
                break;
            }
            frames.extend(data(&message));
        }
        // The end is answered, as containerd does.
        let end = Frame { stream: 1, kind: DATA, flags: 5, message: Vec::new() };
        let _ = to_client.write_all(&end.encode()).await;
        frames
    };
    tokio::join!(run, said).1
}

async fn open(to: &mut (impl tokio::io::AsyncWrite + Unpin), ours: tokio::io::DuplexStream) -> Option<Wire> {
    let request = b"\x0a\x2acontainerd.services.streaming.v1.Streaming\x12\x06Stream";
    let first = Frame { stream: 1, kind: REQUEST, flags: 2, message: request.to_vec() };
    let init = b"\x0a\x2bcontainerd.services.streaming.v1.StreamInit\x12\x03\x0a\x01c";
    // More than any input, so that nothing waits for a window.
    let window = b"\x0a\x26containerd.types.transfer.WindowUpdate\x12\x04\x08\x80\x80\x04";
    for message in [&init[..], window] {
        let frame = Frame { stream: 1, kind: DATA, flags: 0, message: message.to_vec() };
        to.write_all(&frame.encode()).await.ok()?;
    }
    let (reader, writer) = split(ours);
    Some(Wire::open(Box::new(reader), Box::new(writer), &first, |_| Ok(())).await.ok()?.0)
}

/// Bytes of a `containerd.types.transfer.Data` in an `Any`; none of any other.
fn data(any: &[u8]) -> Vec<u8> {
    use kuasar_common::streaming::wire::{Said, understand};
    let frame = Frame { stream: 1, kind: DATA, flags: 0, message: any.to_vec() };
    match understand(&frame, 1) {
        Some([Some(Said::Data(bytes)), _]) => bytes,
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_come_out() {
        run_async(async {
            for (seed, expected) in seeds().iter().zip([&b"hellox"[..], &[b'x'; 100], b"", b"\0\0\0\x01\x03\0"]) {
                assert_eq!(plain(seed), expected);
                assert_eq!(bridged(seed).await, expected);
            }
        });
    }
}
