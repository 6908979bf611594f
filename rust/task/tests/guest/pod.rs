//! Calls of one pod, as the relay makes them.

use std::time::Instant;

use containerd_shim_protos::{api, shim_async::TaskClient};
use kuasar_common::{constants::STDIO_WANTED, stdio::Stream};
use protobuf::{MessageField, well_known_types::any::Any};
use ttrpc::Code;

use crate::{
    given::Given,
    vm::{Vm, bundle, process},
};

/// One pod's worth of calls.
pub(crate) struct Pod {
    pub(crate) given: Given,
    pub(crate) vm: Vm,
    pub(crate) task: TaskClient,
}

pub(crate) fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

impl Pod {
    pub(crate) async fn create(
        &self,
        id: &str,
        args: &[&str],
        terminal: bool,
        stdin: bool,
    ) -> ttrpc::Result<u32> {
        let bundle = bundle(&self.given, &self.vm, id, args, terminal);
        self.create_from(id, bundle, terminal, stdin).await
    }

    pub(crate) async fn create_from(
        &self,
        id: &str,
        bundle: String,
        terminal: bool,
        stdin: bool,
    ) -> ttrpc::Result<u32> {
        let mark = |wanted: bool| if wanted { STDIO_WANTED.to_owned() } else { String::new() };
        let mut req = api::CreateTaskRequest::new();
        (req.id, req.bundle, req.terminal) = (id.to_owned(), bundle, terminal);
        (req.stdin, req.stdout, req.stderr) = (mark(stdin), mark(true), mark(!terminal));
        Ok(self.task.create(self.vm.context(), &req).await?.pid)
    }

    pub(crate) async fn start(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let req = api::StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        Ok(self.task.start(self.vm.context(), &req).await?.pid)
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let req = api::WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        Ok(self.task.wait(self.vm.context(), &req).await?.exit_status)
    }

    pub(crate) async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<api::DeleteResponse> {
        let req = api::DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.task.delete(self.vm.context(), &req).await
    }

    pub(crate) async fn state(&self, id: &str, exec: &str) -> ttrpc::Result<api::StateResponse> {
        let req = api::StateRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.task.state(self.vm.context(), &req).await
    }

    pub(crate) async fn kill(
        &self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> ttrpc::Result<api::Empty> {
        let req = api::KillRequest { id: id.into(), exec_id: exec.into(), signal, all, ..Default::default() };
        self.task.kill(self.vm.context(), &req).await
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec: &str,
        args: &[&str],
        tty: bool,
        stdin: bool,
    ) -> ttrpc::Result<api::Empty> {
        self.exec_process(id, exec, &process(args, tty), stdin).await
    }

    async fn exec_process(
        &self,
        id: &str,
        exec: &str,
        process: &serde_json::Value,
        stdin: bool,
    ) -> ttrpc::Result<api::Empty> {
        let tty = process["terminal"].as_bool().unwrap();
        let mark = |wanted: bool| if wanted { STDIO_WANTED.to_owned() } else { String::new() };
        let mut req = api::ExecProcessRequest::new();
        (req.id, req.exec_id, req.terminal) = (id.into(), exec.into(), tty);
        (req.stdin, req.stdout, req.stderr) = (mark(stdin), mark(true), mark(!tty));
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        req.spec = MessageField::some(spec);
        self.task.exec(self.vm.context(), &req).await
    }

    /// Runs a command in a container; its exit code and output.
    pub(crate) async fn run(&self, id: &str, exec: &str, args: &[&str]) -> (u32, String) {
        self.run_with(id, exec, args, &["CAP_KILL"]).await
    }

    /// The same with these capabilities.
    pub(crate) async fn run_with(
        &self,
        id: &str,
        exec: &str,
        args: &[&str],
        capabilities: &[&str],
    ) -> (u32, String) {
        let mut process = process(args, false);
        for set in ["bounding", "effective", "permitted"] {
            process["capabilities"][set] = capabilities.into();
        }
        self.exec_process(id, exec, &process, false).await.unwrap();
        let output = self.vm.output(id, exec, Stream::Stdout);
        self.start(id, exec).await.unwrap();
        let status = self.wait(id, exec).await.unwrap();
        let output = join(output).await;
        assert_eq!(self.delete(id, exec).await.unwrap().exit_status, status);
        (status, String::from_utf8(output).unwrap())
    }
}

pub(crate) async fn join(thread: std::thread::JoinHandle<Vec<u8>>) -> Vec<u8> {
    tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap()
}

pub(crate) fn step(name: &str, since: Instant) {
    println!("{name}: {:.2} s", since.elapsed().as_secs_f64());
}
