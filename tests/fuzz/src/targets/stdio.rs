//! A connection to the agent's stdio port: its first line, and the frames behind it.

use std::sync::Arc;

use kuasar_common::stdio::{Stream, header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    sync::watch,
};
use vmm_task::{
    auth::Token,
    stdio::{
        listener::StdioListener,
        registry::{Key, Registry},
        stdin::Input,
    },
};

use super::run_async;

fn secret() -> String {
    "5a".repeat(32)
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let hello = |stream: &str| {
        format!("{{\"token\":\"{}\",\"container\":\"c\",\"exec\":\"\",\"stream\":\"{stream}\"}}\n", secret())
    };
    let frames = [&header(5)[..], b"hello", &header(1), b"x", &header(0)].concat();
    let two = [hello("stdin").as_bytes(), &frames].concat();
    vec![two, hello("stdout").into_bytes(), hello("stdin").replace("5a5a", "5b5b").into_bytes()]
}

pub(crate) fn run(input: &[u8]) {
    run_async(async {
        let (registry, token) = (Arc::new(Registry::default()), Token::new());
        token.set(secret());
        let key = Key { container: "c".to_owned(), exec: String::new(), stream: Stream::Stdin };
        let (_close, closed) = watch::channel(false);
        let process = tokio::spawn(Input::new(None, registry.claim(key.clone()), closed).run());
        let (ours, mut theirs) = duplex(64 * 1024);
        StdioListener::new(Arc::clone(&registry), token).accept(Box::new(ours));
        let _ = theirs.write_all(input).await;
        let _ = theirs.shutdown().await;
        let mut answer = [0; 3];
        let answered = theirs.read_exact(&mut answer).await.is_ok();
        drop(theirs);
        let names_it = input.windows(64).any(|window| window == secret().as_bytes());
        assert!(!answered || answer != *b"OK\n" || names_it, "taken in without the token");
        registry.release(&key);
        assert!(process.await.is_ok());
    });
}
