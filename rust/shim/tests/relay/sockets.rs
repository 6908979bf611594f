//! Sockets of the host that containers have mounted.

use std::{
    fs,
    io::IoSliceMut,
    mem::MaybeUninit,
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::PathBuf,
    time::Duration,
};

use kuasar_common::api::host::HostSocket;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, UCred, recvmsg, sockopt::set_socket_passcred,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::sleep,
};
use ttrpc::{Code, context};

use crate::{
    fake::{TOKEN, soon},
    pod::{CID, Pod, code},
};

const ROOT: &[u8] = b"OK {\"uid\":0,\"gid\":0}\n";
/// As many as may be open at the same time.
const MOST: usize = 128;

fn mounted(pod: &Pod) -> PathBuf {
    let path = pod.dir.path().join("service");
    let host = path.to_str().unwrap().to_owned();
    let socket = HostSocket { host, guest: "/run/kuasar/storage/c1/sockets/0".into(), ..Default::default() };
    *pod.daemon.sockets.lock().unwrap() = vec![socket];
    path
}

async fn next(pod: &Pod) -> UnixStream {
    let (hello, conn) = pod.guest.waiting().await;
    assert_eq!((hello.token.as_str(), hello.port), (TOKEN, 0));
    assert_eq!(hello.socket, "/run/kuasar/storage/c1/sockets/0");
    conn
}

async fn at_its_end(conn: &mut UnixStream) {
    assert_eq!(soon("the end of a connection", conn.read(&mut [0])).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_carried_one_waits_and_all_end_with_the_container() {
    let pod = Pod::new().await;
    let listener = UnixListener::bind(mounted(&pod)).unwrap();
    let before = pod.open_fds();
    pod.run("").await;
    let mut guest = next(&pod).await;
    sleep(Duration::from_millis(100)).await;
    assert!(pod.guest.waiting.lock().unwrap().is_empty(), "one waits, not more");
    guest.write_all(ROOT).await.unwrap();
    let (mut service, _) = soon("a connection", listener.accept()).await.unwrap();
    let mut waits = next(&pod).await;
    // A question, the end of it, and an answer after that.
    guest.write_all(b"\0\0\0\x03who\0\0\0\0").await.unwrap();
    let mut question = Vec::new();
    soon("the question", service.read_to_end(&mut question)).await.unwrap();
    assert_eq!(question, b"who");
    service.write_all(b"me").await.unwrap();
    drop(service);
    let mut answer = [0; 10];
    soon("the answer", guest.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"\0\0\0\x02me\0\0\0\0");
    guest.write_all(b"\0\0\0\0").await.unwrap();
    at_its_end(&mut guest).await;
    pod.delete(CID, "").await.unwrap();
    at_its_end(&mut waits).await;
    pod.fds_settle_at(before).await;
}

/// Reads the next bytes, and the writer that `SO_PASSCRED` names for them.
fn writer_of(socket: &impl AsFd) -> rustix::io::Result<(Vec<u8>, Option<UCred>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; 64];
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::DONTWAIT)?.bytes;
    bytes.truncate(got);
    let credentials = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmCredentials(credentials) => Some(credentials),
        _ => None,
    });
    Ok((bytes, credentials))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_asks_who_wrote_sees_the_user_and_not_root() {
    let pod = Pod::new().await;
    let path = mounted(&pod);
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    pod.run("").await;
    for (uid, gid) in [(1000, 1000), (0, 0), (0, 7), (65534, 4242)] {
        let mut guest = next(&pod).await;
        guest.write_all(format!("OK {{\"uid\":{uid},\"gid\":{gid}}}\n").as_bytes()).await.unwrap();
        let (service, _) = soon("a connection", listener.accept()).await.unwrap();
        set_socket_passcred(&service, true).unwrap();
        guest.write_all(b"\0\0\0\x03who").await.unwrap();
        let asked = async {
            loop {
                service.readable().await.unwrap();
                match service.try_io(tokio::io::Interest::READABLE, || Ok(writer_of(&service)?)) {
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                    asked => return asked.unwrap(),
                }
            }
        };
        let (bytes, credentials) = soon("the bytes", asked).await;
        let credentials = credentials.unwrap();
        assert_eq!(bytes, b"who");
        assert_eq!((credentials.uid.as_raw(), credentials.gid.as_raw()), (uid, gid));
        assert_eq!(credentials.pid.as_raw_nonzero().get(), pod.relay.id().cast_signed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_are_open_than_is_good_for_the_relay() {
    let pod = Pod::new().await;
    let listener = UnixListener::bind(mounted(&pod)).unwrap();
    pod.run("").await;
    let mut open = Vec::new();
    for _ in 0..MOST {
        let mut guest = next(&pod).await;
        guest.write_all(ROOT).await.unwrap();
        open.push((guest, soon("a connection", listener.accept()).await.unwrap().0));
    }
    sleep(Duration::from_millis(200)).await;
    assert!(pod.guest.waiting.lock().unwrap().is_empty(), "{} are open and one more waits", open.len());
    open.pop();
    let mut guest = next(&pod).await;
    guest.write_all(ROOT).await.unwrap();
    soon("a connection", listener.accept()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_host_refuses_is_closed_and_said_once() {
    let pod = Pod::new().await;
    let path = mounted(&pod);
    drop(UnixListener::bind(&path).unwrap());
    pod.run("").await;
    for _ in 0..3 {
        let mut guest = next(&pod).await;
        guest.write_all(ROOT).await.unwrap();
        at_its_end(&mut guest).await;
    }
    let said = format!(
        "a connection to the mounted socket {}: connecting to it as user 0, group 0: Connection refused",
        path.display()
    );
    assert_eq!(pod.log().matches(&said).count(), 1, "{}", pod.log());
    // What a hostile guest says ends nothing.
    for lie in [&b"OK {\"uid\":-1}\n"[..], b"OK {\"uid\":4294967295,\"gid\":0}\n", b"\n", b"ERR no\n"] {
        let mut guest = next(&pod).await;
        guest.write_all(lie).await.unwrap();
        at_its_end(&mut guest).await;
    }
    // And when the container is gone, there is nothing more to wait for.
    next(&pod).await.write_all(b"ERR gone\n").await.unwrap();
    sleep(Duration::from_millis(300)).await;
    assert!(pod.guest.waiting.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_socket_any_more_fails_the_creation() {
    let pod = Pod::new().await;
    let path = mounted(&pod);
    for (make, why) in [(false, "No such file or directory"), (true, "it is a socket no more")] {
        if make {
            fs::write(&path, "").unwrap();
        }
        let request = pod.create_request(CID, "");
        let (code, text) = code(pod.task.create(context::Context::default(), &request).await);
        assert_eq!(code, Code::FAILED_PRECONDITION);
        let begin = format!("creating container c1: mounting the socket {}: ", path.display());
        assert!(text.starts_with(&begin) && text.contains(why), "{text}");
    }
    assert_eq!(*pod.daemon.released.lock().unwrap(), [CID, CID]);
}
