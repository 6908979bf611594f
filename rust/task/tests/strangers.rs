//! Cost of a stranger, who may open a vsock to the agent and does not know the pod's token: little, for a
//! short time, and never the turn of a caller that knows the token.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{sync::Arc, time::Duration};

use kuasar_common::{
    constants::TOKEN_METADATA,
    stdio::{Hello, Stream},
    streaming::{
        frame::{Frame, HEADER, MAX_FIRST, REQUEST, RESPONSE, read},
        route::Rewound,
    },
};
use protobuf::Message;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex},
    net::TcpListener,
    sync::mpsc,
    time::{Instant, timeout},
};
use ttrpc::{Code, Request, Response, proto::KeyValue};
use vmm_task::{
    auth::Token,
    calls::Calls,
    forward::Forwards,
    stdio::{listener::StdioListener, registry::Registry},
    strangers::{DEADLINE, MAX},
    streaming::Streaming,
};

const TOKEN: &str = "5a5a";
/// Much less than strangers have.
const SOON: Duration = Duration::from_secs(5);
/// More than any port takes in at once.
const CROWD: usize = 1200;

fn token() -> Arc<Token> {
    let token = Token::new();
    token.set(TOKEN.into());
    token
}

fn calls() -> (Calls<DuplexStream>, mpsc::Receiver<Rewound<DuplexStream>>) {
    let (sender, receiver) = mpsc::channel(16);
    let streaming = Streaming::new(Arc::new(Registry::default()), token());
    (Calls::new(token(), sender, streaming), receiver)
}

fn call(token: &str, payload: usize) -> Vec<u8> {
    let pair = KeyValue { key: TOKEN_METADATA.into(), value: token.into(), ..Default::default() };
    let request = Request {
        service: "grpc.SandboxService".into(),
        method: "Check".into(),
        payload: vec![7; payload],
        metadata: vec![pair],
        ..Default::default()
    };
    Frame { stream: 1, kind: REQUEST, flags: 0, message: request.write_to_bytes().unwrap() }.encode()
}

/// A connection's end of ours, once the agent has the other.
fn open(accept: impl FnOnce(DuplexStream)) -> DuplexStream {
    let (theirs, ours) = duplex(2 * MAX_FIRST);
    accept(theirs);
    ours
}

async fn is_closed(connection: &mut DuplexStream) -> bool {
    matches!(timeout(SOON, connection.read(&mut [0; 64])).await, Ok(Ok(0)))
}

#[tokio::test]
async fn a_crowd_at_the_calls_keeps_nobody_out_and_has_no_more_than_its_places() {
    let (calls, mut server) = calls();
    let mut crowd = Vec::new();
    for _ in 0..CROWD {
        let mut stranger = open(|theirs| calls.accept(theirs));
        // Begins with what would be a call.
        let announced = u32::try_from(MAX_FIRST).unwrap().to_be_bytes();
        stranger.write_all(&[&announced[..], &[0, 0, 0, 1, REQUEST, 0], &[0; 1000]].concat()).await.unwrap();
        crowd.push(stranger);
    }
    let mut known = open(|theirs| calls.accept(theirs));
    known.write_all(&call(TOKEN, 0)).await.unwrap();
    let mut served = timeout(SOON, server.recv()).await.expect("it waits for the crowd").unwrap();
    let mut first = vec![0; call(TOKEN, 0).len()];
    served.read_exact(&mut first).await.unwrap();
    assert_eq!(first, call(TOKEN, 0), "the server does not see the call as it was sent");
    // All but the youngest are gone, the one that knew the token having taken the place of one.
    let (gone, there) = crowd.split_at_mut(CROWD - (MAX - 1));
    for stranger in gone {
        assert!(is_closed(stranger).await, "an old one is still there");
    }
    for stranger in there {
        assert!(timeout(Duration::from_millis(1), stranger.read_u8()).await.is_err(), "a young one is gone");
    }
}

#[tokio::test]
async fn a_first_call_is_short_and_has_the_token() {
    let (calls, mut server) = calls();
    let mut longest = open(|theirs| calls.accept(theirs));
    let overhead = call(TOKEN, MAX_FIRST / 2).len() - HEADER - MAX_FIRST / 2;
    longest.write_all(&call(TOKEN, MAX_FIRST - overhead)).await.unwrap();
    timeout(SOON, server.recv()).await.unwrap().unwrap();
    // One byte more than that is not read, whatever it knows.
    let mut longer = open(|theirs| calls.accept(theirs));
    longer.write_all(&call(TOKEN, MAX_FIRST - overhead + 1)).await.unwrap();
    assert!(is_closed(&mut longer).await);
    for wrong in ["", "5a5b", "5a5a5a"] {
        let mut stranger = open(|theirs| calls.accept(theirs));
        stranger.write_all(&call(wrong, 0)).await.unwrap();
        let answer = timeout(SOON, read(&mut stranger)).await.unwrap().unwrap().unwrap();
        assert_eq!((answer.stream, answer.kind), (1, RESPONSE));
        let status = Response::parse_from_bytes(&answer.message).unwrap().status.unwrap();
        assert_eq!(status.code, Code::PERMISSION_DENIED.into());
        assert_eq!(status.message, "the call does not carry the pod's token as kuasar-token");
        assert!(is_closed(&mut stranger).await, "it may go on");
    }
    assert!(server.try_recv().is_err(), "the server got one of those");
}

#[tokio::test(start_paused = true)]
async fn who_does_not_show_the_token_has_ten_seconds() {
    let (calls, _server) = calls();
    let stdio = StdioListener::new(Arc::default(), token());
    let forwards = Forwards::new(token(), Arc::default());
    for mut stranger in [
        open(|theirs| calls.accept(theirs)),
        open(|theirs| stdio.accept(Box::new(theirs))),
        open(|theirs| forwards.accept(Box::new(theirs))),
    ] {
        let began = Instant::now();
        // A byte now and then is no excuse.
        while began.elapsed() < DEADLINE - Duration::from_secs(1) {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if stranger.write_all(b"\0").await.is_err() {
                break;
            }
        }
        let ended = timeout(Duration::from_secs(2), stranger.read_u8()).await;
        assert!(ended.is_ok_and(|read| read.is_err()), "it is still there after {:?}", began.elapsed());
    }
}

#[tokio::test]
async fn a_crowd_at_the_streams_keeps_nobody_out() {
    let stdio = StdioListener::new(Arc::default(), token());
    let _crowd: Vec<_> = (0..CROWD).map(|_| open(|theirs| stdio.accept(Box::new(theirs)))).collect();
    let hello =
        Hello { token: TOKEN.into(), container: "c".into(), exec: String::new(), stream: Stream::Stdout };
    let known = open(|theirs| stdio.accept(Box::new(theirs)));
    assert_eq!(answer(known, &serde_json::to_string(&hello).unwrap()).await, "OK\n");
}

#[tokio::test]
async fn a_crowd_at_the_ports_keeps_nobody_out() {
    let server = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let forwards = Forwards::new(token(), Arc::default());
    let _crowd: Vec<_> = (0..CROWD).map(|_| open(|theirs| forwards.accept(Box::new(theirs)))).collect();
    let known = open(|theirs| forwards.accept(Box::new(theirs)));
    let hello = format!("{{\"token\":\"{TOKEN}\",\"port\":{}}}", server.local_addr().unwrap().port());
    assert_eq!(answer(known, &hello).await, "OK\n");
}

async fn answer(connection: DuplexStream, hello: &str) -> String {
    let mut connection = BufReader::new(connection);
    connection.write_all(format!("{hello}\n").as_bytes()).await.unwrap();
    let mut line = String::new();
    timeout(SOON, connection.read_line(&mut line)).await.expect("it waits for the crowd").unwrap();
    line
}
