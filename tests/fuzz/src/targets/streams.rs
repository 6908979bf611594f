//! containerd's streams at the agent, and the debug console's frames: whatever a connection brings after its
//! first line.

use kuasar_common::{
    console::FromHost,
    streaming::{
        frame::{DATA, Frame, HEADER, NO_DATA, REMOTE_CLOSED, REQUEST, read},
        id_of,
        wire::{Said, asks_for_a_stream, understand},
    },
};

use super::run_async;

/// Any of a `containerd.types.transfer.Data` with three bytes, and of a `WindowUpdate` of 65536.
const DATA_ANY: &[u8] = b"\x0a\x1econtainerd.types.transfer.Data\x12\x05\x0a\x03abc";
const WINDOW_ANY: &[u8] = b"\x0a\x26containerd.types.transfer.WindowUpdate\x12\x04\x08\x80\x80\x04";

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let frame = |kind, flags, message: &[u8]| Frame { stream: 1, kind, flags, message: message.to_vec() }.encode();
    let request = b"\x0a\x2acontainerd.services.streaming.v1.Streaming\x12\x06Stream";
    vec![
        [frame(REQUEST, 2, request), frame(DATA, 0, DATA_ANY), frame(DATA, REMOTE_CLOSED | NO_DATA, b"")].concat(),
        [frame(DATA, 0, WINDOW_ANY), frame(DATA, REMOTE_CLOSED, DATA_ANY)].concat(),
        b"ttrpc+hvsock:///run/vsock.sock:1024?streaming_id=c1-stdout".to_vec(),
        vec![1, 0, 50, 0, 132],
    ]
}

pub(crate) fn run(input: &[u8]) {
    run_async(async {
        let mut from = input;
        while let Ok(Some(frame)) = read(&mut from).await {
            assert_eq!(frame.encode().len(), HEADER + frame.message.len());
            let _ = asks_for_a_stream(&frame);
            for said in understand(&frame, frame.stream).into_iter().flatten().flatten() {
                if let Said::Data(bytes) = said {
                    assert!(bytes.len() <= frame.message.len());
                }
            }
        }
    });
    if let Ok(url) = str::from_utf8(input) {
        assert!(id_of(url).is_none_or(|id| !id.is_empty()));
    }
    if let Some(FromHost::Input(typed)) = FromHost::parse(input) {
        assert!(typed.len() < input.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_understood() {
        for (any, said) in [(DATA_ANY, Said::Data(b"abc".to_vec())), (WINDOW_ANY, Said::Window(65536))] {
            let frame = Frame { stream: 1, kind: DATA, flags: REMOTE_CLOSED, message: any.to_vec() };
            assert_eq!(understand(&frame, 1), Some([Some(said), Some(Said::Closed)]));
        }
        run_async(async {
            let seeds = seeds();
            let first = read(&mut seeds.first().unwrap().as_slice()).await.unwrap().unwrap();
            assert!(asks_for_a_stream(&first));
        });
    }
}
