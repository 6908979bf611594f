//! containerd's side of a stream.

use std::{path::Path, time::Duration};

use kuasar_common::{
    api::{
        streaming::StreamInit,
        transfer::{Data, WindowUpdate},
    },
    streaming::frame::{DATA, Frame, REQUEST, read},
};
use protobuf::{Message, well_known_types::any::Any};
use tokio::{io::AsyncWriteExt, net::UnixStream, time::sleep};
use ttrpc::Request;

use super::soon;

/// Bytes that a reader grants its peer at a time.
pub const WINDOW: usize = 64 * 1024;

/// A stream's client, which acts as containerd's CRI plugin does.
pub struct Client(UnixStream);

#[derive(Debug, PartialEq)]
pub enum Heard {
    Data(Vec<u8>),
    Window(i32),
    End,
    Gone,
}

impl Client {
    pub async fn open(dir: &Path, id: &str) -> Self {
        let connection = UnixStream::connect(dir.join("task.sock")).await.unwrap();
        let mut client = Self(connection);
        let mut request = Request::new();
        request.service = "containerd.services.streaming.v1.Streaming".into();
        request.method = "Stream".into();
        let first = Frame { stream: 1, kind: REQUEST, flags: 2, message: request.write_to_bytes().unwrap() };
        client.0.write_all(&first.encode()).await.unwrap();
        let init = StreamInit { id: id.into(), ..Default::default() };
        client.say("containerd.services.streaming.v1.StreamInit", &init).await;
        let ack = soon("the acknowledgement", read(&mut client.0)).await.unwrap().unwrap();
        assert_eq!((ack.kind, ack.flags), (DATA, 0));
        client
    }

    /// A reader, which lets itself be sent a window at once.
    pub async fn reader(dir: &Path, id: &str) -> Self {
        let mut client = Self::open(dir, id).await;
        client.grant(WINDOW).await;
        client
    }

    async fn frame(&mut self, flags: u8, message: Vec<u8>) {
        let frame = Frame { stream: 1, kind: DATA, flags, message };
        self.0.write_all(&frame.encode()).await.unwrap();
    }

    async fn say(&mut self, kind: &str, message: &impl Message) {
        let value = message.write_to_bytes().unwrap();
        let any = Any { type_url: kind.into(), value, ..Default::default() };
        self.frame(0, any.write_to_bytes().unwrap()).await;
    }

    pub async fn grant(&mut self, bytes: usize) {
        let update = i32::try_from(bytes).unwrap();
        let update = WindowUpdate { update, ..Default::default() };
        self.say("containerd.types.transfer.WindowUpdate", &update).await;
    }

    pub async fn data(&mut self, bytes: &[u8]) {
        let data = Data { data: bytes.to_vec(), ..Default::default() };
        self.say("containerd.types.transfer.Data", &data).await;
    }

    pub async fn close_send(&mut self) {
        self.frame(5, Vec::new()).await;
    }

    pub async fn hear(&mut self) -> Heard {
        let frame = soon("something on a stream", read(&mut self.0)).await;
        let Ok(Some(frame)) = frame else { return Heard::Gone };
        assert_eq!((frame.kind, frame.stream), (DATA, 1), "a response would be read as an error");
        if frame.flags == 5 {
            return Heard::End;
        }
        let any = Any::parse_from_bytes(&frame.message).unwrap();
        match any.type_url.as_str() {
            "containerd.types.transfer.Data" => {
                let data = Data::parse_from_bytes(&any.value).unwrap().data;
                assert!(data.len() <= 32 * 1024, "containerd counts no more of a message: {}", data.len());
                Heard::Data(data)
            }
            "containerd.types.transfer.WindowUpdate" => {
                Heard::Window(WindowUpdate::parse_from_bytes(&any.value).unwrap().update)
            }
            other => panic!("{other}"),
        }
    }

    /// Reads to the end as containerd does, letting itself be sent another window whenever less than one is
    /// left.
    pub async fn read_to_end(&mut self, mut window: usize, pause: Duration) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match self.hear().await {
                Heard::Data(bytes) => {
                    assert!(bytes.len() <= window, "{} bytes into a window of {window}", bytes.len());
                    window -= bytes.len();
                    all.extend(bytes);
                }
                Heard::End => return all,
                other => panic!("{other:?} after {} bytes", all.len()),
            }
            if window < WINDOW {
                self.grant(WINDOW).await;
                window += WINDOW;
            }
            sleep(pause).await;
        }
    }
}
