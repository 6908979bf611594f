//! The line with which a port of the guest answers the relay.

use kuasar_common::handshake::MAX_LINE;
use kuasar_relay::guest::read_line;

use super::run_async;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![b"OK 1073741824\n\0\0\0\x03abc".to_vec(), b"OK\n".to_vec(), b"ERR no such stream\n".to_vec(), vec![b'x'; 5000]]
}

pub(crate) fn run(input: &[u8]) {
    run_async(async {
        let mut from = input;
        match read_line(&mut from, MAX_LINE).await {
            // Neither a byte more nor a byte less than the line is taken.
            Ok(line) => {
                assert!(line.len() <= MAX_LINE && !line.contains(&b'\n'));
                assert_eq!(from.len() + line.len() + 1, input.len());
                assert!(input.starts_with(&line));
            }
            Err(_) => assert!(!input.contains(&b'\n') || input.iter().position(|b| *b == b'\n') > Some(MAX_LINE)),
        }
    });
}
