//! containerd's Streaming service, byte by byte: what a client sends, and what it must get.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{sync::Arc, time::Duration};

use kuasar_common::{
    api::{
        streaming::StreamInit,
        transfer::{Data, WindowUpdate},
    },
    stdio::{Stream, header, payload_len},
    streaming::{
        bridge::WINDOW,
        frame::{DATA, Frame, REQUEST, RESPONSE, read},
    },
};
use protobuf::{Message, well_known_types::any::Any};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    time::timeout,
};
use ttrpc::{Code, Request, Response, proto::KeyValue};
use vmm_task::{
    auth::Token,
    stdio::registry::{Connection, Key, Registry, Slot},
    streaming::Streaming,
};

const TOKEN: &str = "5a5a";
const SOON: Duration = Duration::from_secs(20);

struct Lab {
    registry: Arc<Registry>,
    streaming: Arc<Streaming>,
}

fn lab() -> Lab {
    let registry = Arc::new(Registry::default());
    let token = Token::new();
    token.set(TOKEN.into());
    let streaming = Streaming::new(Arc::clone(&registry), token);
    Lab { registry, streaming }
}

impl Lab {
    /// The agent's side of a process's stream, as a Create request with this id makes it.
    fn process(&self, id: &str, stream: Stream) -> Slot {
        let key = Key { container: "c1".into(), exec: String::new(), stream };
        let slot = self.registry.claim(key.clone());
        self.registry.names.set(id, key);
        slot
    }

    fn dial(&self, token: &str) -> Client {
        let (ours, theirs) = duplex(1 << 20);
        let mut request = Request::new();
        request.service = "containerd.services.streaming.v1.Streaming".into();
        request.method = "Stream".into();
        let mut pair = KeyValue::new();
        (pair.key, pair.value) = ("kuasar-token".into(), token.into());
        request.metadata.push(pair);
        let first = Frame { stream: 1, kind: REQUEST, flags: 2, message: request.write_to_bytes().unwrap() };
        let streaming = Arc::clone(&self.streaming);
        tokio::spawn(async move { streaming.serve(Box::new(theirs), &first).await });
        Client(ours)
    }

    async fn open(&self, id: &str) -> Client {
        let mut client = self.dial(TOKEN);
        client
            .say(
                "containerd.services.streaming.v1.StreamInit",
                &StreamInit { id: id.into(), ..Default::default() },
            )
            .await;
        // The acknowledgement, to the byte: a Data frame of stream 1 with an Any of google.protobuf.Empty.
        let mut ack = vec![0; 10 + 23];
        timeout(SOON, client.0.read_exact(&mut ack)).await.unwrap().unwrap();
        assert_eq!(ack, [&[0, 0, 0, 23, 0, 0, 0, 1, 3, 0, 10, 21][..], b"google.protobuf.Empty"].concat());
        client
    }
}

struct Client(DuplexStream);

#[derive(Debug, PartialEq)]
enum Heard {
    Data(Vec<u8>),
    Window(i32),
    End,
    Gone,
}

impl Client {
    async fn frame(&mut self, flags: u8, message: Vec<u8>) {
        let frame = Frame { stream: 1, kind: DATA, flags, message };
        self.0.write_all(&frame.encode()).await.unwrap();
    }

    async fn say(&mut self, kind: &str, message: &impl Message) {
        let value = message.write_to_bytes().unwrap();
        let any = Any { type_url: kind.into(), value, ..Default::default() };
        self.frame(0, any.write_to_bytes().unwrap()).await;
    }

    async fn grant(&mut self, bytes: usize) {
        let update = i32::try_from(bytes).unwrap();
        self.say("containerd.types.transfer.WindowUpdate", &WindowUpdate { update, ..Default::default() })
            .await;
    }

    async fn data(&mut self, bytes: &[u8]) {
        self.say("containerd.types.transfer.Data", &Data { data: bytes.to_vec(), ..Default::default() })
            .await;
    }

    async fn close_send(&mut self) {
        self.frame(5, Vec::new()).await;
    }

    async fn hear(&mut self) -> Heard {
        let Some(frame) = timeout(SOON, read(&mut self.0)).await.expect("nothing came").unwrap() else {
            return Heard::Gone;
        };
        assert_eq!((frame.kind, frame.stream), (DATA, 1));
        if frame.flags == 5 {
            assert!(frame.message.is_empty());
            return Heard::End;
        }
        assert_eq!(frame.flags, 0);
        let any = Any::parse_from_bytes(&frame.message).unwrap();
        match any.type_url.as_str() {
            "containerd.types.transfer.Data" => Heard::Data(Data::parse_from_bytes(&any.value).unwrap().data),
            "containerd.types.transfer.WindowUpdate" => {
                Heard::Window(WindowUpdate::parse_from_bytes(&any.value).unwrap().update)
            }
            other => panic!("{other}"),
        }
    }

    /// Data up to so many bytes.
    async fn hear_bytes(&mut self, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            let Heard::Data(bytes) = self.hear().await else { panic!("{} of {count} bytes came", all.len()) };
            assert!(bytes.len() <= 32 * 1024, "containerd counts no more of a message: {}", bytes.len());
            all.extend(bytes);
        }
        assert_eq!(all.len(), count);
        all
    }

    async fn silent(&mut self) {
        let heard = timeout(Duration::from_millis(300), read(&mut self.0)).await;
        assert!(heard.is_err(), "{heard:?}");
    }
}

async fn joined(slot: &mut Slot) -> Connection {
    timeout(SOON, slot.next()).await.expect("no stream came").unwrap()
}

/// Writes what the process would, in frames of the stdio port, with the end of it.
fn write(mut process: Connection, bytes: Vec<u8>) -> tokio::task::JoinHandle<Connection> {
    tokio::spawn(async move {
        for part in bytes.chunks(5000) {
            process.write_all(&header(part.len())).await.unwrap();
            process.write_all(part).await.unwrap();
        }
        process.write_all(&header(0)).await.unwrap();
        process.flush().await.unwrap();
        process
    })
}

/// Reads the process's input, up to its end.
async fn input_of(process: &mut Connection) -> Vec<u8> {
    let mut input = Vec::new();
    loop {
        let mut head = [0; 4];
        timeout(SOON, process.read_exact(&mut head)).await.expect("input stops").unwrap();
        let mut part = vec![0; payload_len(head).unwrap()];
        process.read_exact(&mut part).await.unwrap();
        if part.is_empty() {
            return input;
        }
        input.extend(part);
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect()
}

#[tokio::test]
async fn output_flows_as_far_as_the_client_lets_it() {
    let lab = lab();
    // Opened first, as CRI does it; acknowledged although nobody knows it yet.
    let mut client = lab.open("c1-stdout").await;
    let mut slot = lab.process("c1-stdout", Stream::Stdout);
    let bytes = pattern(150_000);
    let writer = write(joined(&mut slot).await, bytes.clone());
    client.silent().await;
    client.grant(WINDOW).await;
    let mut all = client.hear_bytes(WINDOW).await;
    client.silent().await;
    client.grant(1).await;
    all.extend(client.hear_bytes(1).await);
    client.grant(2 * WINDOW).await;
    all.extend(client.hear_bytes(150_000 - WINDOW - 1).await);
    assert_eq!(all, bytes);
    assert_eq!(client.hear().await, Heard::End);
    client.silent().await;
    client.close_send().await;
    assert_eq!(client.hear().await, Heard::Gone, "the server closes: containerd up to 2.2 does not");
    let mut process = writer.await.unwrap();
    assert_eq!(process.read(&mut [0]).await.unwrap(), 0, "whoever wrote it knows that it was taken");
}

#[tokio::test]
async fn a_client_that_takes_over_misses_nothing() {
    let lab = lab();
    let mut slot = lab.process("c1-stdout", Stream::Stdout);
    let mut first = lab.open("c1-stdout").await;
    let bytes = pattern(400_000);
    let writer = write(joined(&mut slot).await, bytes.clone());
    // It grants as it reads, as containerd's does: five grants say that 3 * WINDOW were read, whatever became
    // of the rest.
    for n in 0..5 {
        first.grant(WINDOW).await;
        assert_eq!(first.hear_bytes(WINDOW).await, bytes[n * WINDOW..(n + 1) * WINDOW]);
    }
    drop(first);
    let mut second = lab.open("c1-stdout").await;
    for n in 3..7 {
        second.grant(WINDOW).await;
        let part = &bytes[n * WINDOW..bytes.len().min((n + 1) * WINDOW)];
        assert_eq!(second.hear_bytes(part.len()).await, part);
    }
    assert_eq!(second.hear().await, Heard::End);
    // Gone before it said that it has it all: the next one gets the rest again, and the end.
    drop(second);
    let mut third = lab.open("c1-stdout").await;
    third.grant(4 * WINDOW).await;
    let again = third.hear_bytes(400_000 - 5 * WINDOW).await;
    assert_eq!(again, bytes[5 * WINDOW..]);
    assert_eq!(third.hear().await, Heard::End);
    third.close_send().await;
    writer.await.unwrap();
}

#[tokio::test]
async fn a_newer_client_displaces_one_that_hangs() {
    let lab = lab();
    let mut slot = lab.process("c1-stderr", Stream::Stderr);
    let mut hung = lab.open("c1-stderr").await;
    let _writer = write(joined(&mut slot).await, pattern(10));
    let mut newer = lab.open("c1-stderr").await;
    assert_eq!(hung.hear().await, Heard::Gone);
    newer.grant(WINDOW).await;
    assert_eq!(newer.hear_bytes(10).await, pattern(10));
}

#[tokio::test]
async fn input_is_granted_taken_and_ended() {
    let lab = lab();
    let mut client = lab.open("e1-stdin").await;
    let mut slot = lab.process("e1-stdin", Stream::Stdin);
    let mut process = joined(&mut slot).await;
    assert_eq!(client.hear().await, Heard::Window(65536), "before anything is sent");
    client.data(b"hello ").await;
    assert_eq!(client.hear().await, Heard::Window(6));
    // A new client goes on where the last one broke off, which was no end.
    drop(client);
    let mut client = lab.open("e1-stdin").await;
    assert_eq!(client.hear().await, Heard::Window(65536));
    client.data(b"world").await;
    client.close_send().await;
    assert_eq!(input_of(&mut process).await, b"hello world");
    assert_eq!(client.hear().await, Heard::Window(5));
    assert_eq!(client.hear().await, Heard::End);
    assert_eq!(client.hear().await, Heard::Gone);
}

#[tokio::test]
async fn input_of_a_client_that_sends_it_and_leaves_is_whole() {
    let lab = lab();
    let mut slot = lab.process("e1-stdin", Stream::Stdin);
    let mut client = lab.open("e1-stdin").await;
    let mut process = joined(&mut slot).await;
    assert_eq!(client.hear().await, Heard::Window(65536));
    // As containerd's does from 2.3 on: what its window allows, the end, and away, whatever it is sent
    // meanwhile.
    let bytes = pattern(WINDOW);
    for part in bytes.chunks(10_000) {
        client.data(part).await;
    }
    client.close_send().await;
    drop(client);
    assert!(input_of(&mut process).await == bytes, "others came");
}

#[tokio::test]
async fn input_of_a_client_is_whole_when_another_takes_its_place() {
    let lab = lab();
    let mut slot = lab.process("c1-stdin", Stream::Stdin);
    let mut first = lab.open("c1-stdin").await;
    let mut process = joined(&mut slot).await;
    let bytes = pattern(WINDOW);
    for part in bytes.chunks(700) {
        first.data(part).await;
    }
    // It does not even leave; the process has taken nothing yet.
    let mut second = lab.open("c1-stdin").await;
    let reading = tokio::spawn(async move { input_of(&mut process).await });
    assert_eq!(second.hear().await, Heard::Window(65536));
    second.data(b"and more").await;
    second.close_send().await;
    assert!(timeout(SOON, reading).await.unwrap().unwrap() == [&bytes, &b"and more"[..]].concat());
}

#[tokio::test]
async fn who_does_not_know_the_token_is_refused_by_status() {
    let lab = lab();
    let mut client = lab.dial("wrong");
    let frame = timeout(SOON, read(&mut client.0)).await.unwrap().unwrap().unwrap();
    assert_eq!(frame.kind, RESPONSE);
    let status = Response::parse_from_bytes(&frame.message).unwrap().status.unwrap();
    assert_eq!(status.code(), Code::PERMISSION_DENIED);
    assert_eq!(status.message, "the call does not carry the pod's token as kuasar-token");
    assert_eq!(client.hear().await, Heard::Gone);
}

#[tokio::test]
async fn nonsense_ends_the_connection_and_keeps_the_stream() {
    let lab = lab();
    let mut slot = lab.process("c1-stdout", Stream::Stdout);
    for (flags, message) in [(0, b"\xff\xff\xff".to_vec()), (0, Any::new().write_to_bytes().unwrap())] {
        let mut client = lab.open("c1-stdout").await;
        client.frame(flags, message).await;
        assert_eq!(client.hear().await, Heard::Gone);
    }
    let _writer = write(joined(&mut slot).await, pattern(3));
    let mut client = lab.open("c1-stdout").await;
    client.grant(WINDOW).await;
    assert_eq!(client.hear_bytes(3).await, pattern(3));
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_process_never_comes_is_given_up() {
    let lab = lab();
    let mut client = lab.open("c9-stdout").await;
    tokio::time::advance(Duration::from_secs(3601)).await;
    let gone = read(&mut client.0).await.unwrap();
    assert_eq!(gone, None);
}
