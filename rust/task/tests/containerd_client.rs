//! containerd's own streaming client against the agent's server: a Go program of containerd's packages, built
//! here if Go is there and its modules can be had.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use kuasar_common::{
    stdio::{Stream, header, payload_len},
    streaming::frame,
};
use protobuf::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    process::{Child, Command},
    time::timeout,
};
use ttrpc::{Request, proto::KeyValue};
use vmm_task::{
    auth::Token,
    stdio::registry::{Connection, Key, Registry},
    streaming::Streaming,
};

const TOKEN: &str = "5a5a";
const SOON: Duration = Duration::from_secs(60);
const MANY: usize = 3_000_000;

/// The program, or why there is none.
async fn client(dir: &Path) -> Result<PathBuf, String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/streaming-client");
    let go = |args: &[&str]| {
        let mut command = Command::new("go");
        command.current_dir(&source).env("GOFLAGS", "-mod=readonly").args(args);
        async move { command.output().await }
    };
    let fetched = go(&["mod", "download"]).await.map_err(|error| format!("running go: {error}"))?;
    if !fetched.status.success() {
        return Err(format!("go mod download: {}", String::from_utf8_lossy(&fetched.stderr).trim()));
    }
    let program = dir.join("streaming-client");
    let built = go(&["build", "-o", program.to_str().unwrap(), "."]).await.unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    Ok(program)
}

/// Serves a socket as a program that passes containerd's streams on does: it adds the token, which
/// containerd does not have.
fn serve(listener: UnixListener, streaming: Arc<Streaming>) {
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let streaming = Arc::clone(&streaming);
            tokio::spawn(async move {
                let mut first = frame::read(&mut connection).await.unwrap().unwrap();
                let mut request = Request::parse_from_bytes(&first.message).unwrap();
                let mut pair = KeyValue::new();
                (pair.key, pair.value) = ("kuasar-token".into(), TOKEN.into());
                request.metadata.push(pair);
                first.message = request.write_to_bytes().unwrap();
                streaming.serve(Box::new(connection), &first).await;
            });
        }
    });
}

fn run(program: &Path, socket: &Path, id: &str, direction: &str) -> Child {
    let mut command = Command::new(program);
    command.arg(socket).args([id, direction]).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

async fn process(registry: &Arc<Registry>, id: &str, stream: Stream) -> Connection {
    let key = Key { container: "c1".into(), exec: String::new(), stream };
    let mut slot = registry.claim(key.clone());
    registry.names.set(id, key);
    timeout(SOON, slot.next()).await.expect("no stream came").unwrap()
}

fn pattern() -> Vec<u8> {
    (0..MANY).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect()
}

#[tokio::test]
async fn containerds_client_gets_and_gives_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let program = match client(dir.path()).await {
        Ok(program) => program,
        Err(why) => return println!("skipped: containerd's streaming client: {why}"),
    };
    let registry = Arc::new(Registry::default());
    let token = Token::new();
    token.set(TOKEN.into());
    let streaming = Streaming::new(Arc::clone(&registry), token);
    let socket = dir.path().join("s");
    serve(UnixListener::bind(&socket).unwrap(), streaming);

    // Out: the client is there before the process.
    let mut reader = run(&program, &socket, "c1-stdout", "out");
    let mut stdout = process(&registry, "c1-stdout", Stream::Stdout).await;
    let writing = tokio::spawn(async move {
        for part in pattern().chunks(10_000) {
            stdout.write_all(&header(part.len())).await.unwrap();
            stdout.write_all(part).await.unwrap();
        }
        stdout.write_all(&header(0)).await.unwrap();
        stdout.flush().await.unwrap();
        stdout
    });
    let mut all = Vec::new();
    let mut output = reader.stdout.take().unwrap();
    timeout(SOON, output.read_to_end(&mut all)).await.expect("the client does not see the end").unwrap();
    assert!(all == pattern(), "{} of {MANY} bytes came, or others", all.len());
    assert!(timeout(SOON, reader.wait()).await.unwrap().unwrap().success());
    writing.await.unwrap();

    // In.
    let mut writer = run(&program, &socket, "c1-stdin", "in");
    let mut stdin = process(&registry, "c1-stdin", Stream::Stdin).await;
    let mut input = writer.stdin.take().unwrap();
    tokio::spawn(async move { input.write_all(&pattern()).await.unwrap() });
    let mut all = Vec::new();
    loop {
        let mut head = [0; 4];
        timeout(SOON, stdin.read_exact(&mut head)).await.expect("input stops").unwrap();
        let mut part = vec![0; payload_len(head).unwrap()];
        stdin.read_exact(&mut part).await.unwrap();
        if part.is_empty() {
            break;
        }
        all.extend(part);
    }
    assert!(all == pattern(), "{} of {MANY} bytes came, or others", all.len());
    assert!(timeout(SOON, writer.wait()).await.unwrap().unwrap().success());
}
