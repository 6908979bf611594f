//! Unmaking: Delete, and giving back what the daemon prepared.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{
    api::{DeleteRequest, DeleteResponse},
    protobuf::MessageField,
};
use tokio::time::sleep;
use ttrpc::{
    Code,
    proto::{Request, Status},
};

use crate::{
    answer::{Answer, decode, encode, guest_error, not_found},
    guest::{Call, CallError},
    host::HostError,
    life::Exit,
    log::log,
    registry::{Container, Process, lock},
    task::{EXIT_KILLED, Relay, WORK_LIMIT, at_least, work},
};

/// Number of times that the daemon may fail to release before the relay leaves the release to it.
const REFUSALS: u32 = 5;
/// Pause between attempts to tell the daemon of a release: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

impl Relay {
    pub(crate) async fn delete(self: Arc<Self>, request: Request) -> Answer {
        let delete: DeleteRequest = decode(&request.payload)?;
        let missing = || not_found(&format!("container {}", delete.id));
        let container = self.containers.get(&delete.id).ok_or_else(missing)?;
        if !delete.exec_id.is_empty() {
            return self.delete_exec(&container, &delete.exec_id, request).await;
        }
        // Waits for a Create or another Delete that containerd did not wait for.
        let _gate = container.gate.lock().await;
        if !self.containers.holds(&container) {
            return Err(missing());
        }
        let answered = self.delete_in_guest(&format!("deleting container {}", container.id), request).await?;
        let response = deleted(&container.init, answered);
        drop(std::mem::take(&mut *lock(&container.sockets)));
        self.release(&container.id).await;
        self.containers.remember(&container, "", &container.init);
        self.containers.remove(&container);
        for process in container.processes() {
            process.deleted(EXIT_KILLED);
        }
        log!("container {} is deleted, exit status {}", container.id, response.exit_status);
        encode(&response)
    }

    async fn delete_exec(&self, container: &Arc<Container>, exec_id: &str, request: Request) -> Answer {
        let what = format!("exec {exec_id} of container {}", container.id);
        let process = container.process(exec_id).ok_or_else(|| not_found(&what))?;
        let answered = self.delete_in_guest(&format!("deleting {what}"), request).await?;
        let response = deleted(&process, answered);
        self.containers.remember(container, exec_id, &process);
        container.remove_exec(exec_id);
        process.deleted(EXIT_KILLED);
        encode(&response)
    }

    /// Deletes in the guest; nothing if the guest has it no more.
    async fn delete_in_guest(&self, doing: &str, request: Request) -> Result<Option<DeleteResponse>, Status> {
        let limit = Some(at_least(WORK_LIMIT, &request));
        let call = Call { limit, repeatable: true, ..work("Delete", request) };
        match self.guest.call(call).await {
            // Nonsense is an answer as well: a container must not stay for want of a better one.
            Ok(payload) => Ok(decode(&payload).ok()),
            Err(CallError::Dead) => Ok(None),
            Err(CallError::Status(status)) if status.code() == Code::NOT_FOUND => Ok(None),
            Err(e) => {
                let status = guest_error(doing, e);
                log!("{doing} in the guest: {}", status.message());
                Err(status)
            }
        }
    }

    /// Has the daemon undo what it prepared. If it cannot now, it is told later.
    pub(crate) async fn release(self: &Arc<Self>, id: &str) {
        let _one = self.releasing.lock().await;
        if let Err(e) = self.host.release(id).await {
            log!("{e}; trying again later");
            self.owe_release(id);
        }
    }

    /// Tells the daemon of a container's end as soon as it can be told.
    pub(crate) fn owe_release(self: &Arc<Self>, id: &str) {
        if !lock(&self.unreleased).insert(id.to_owned()) {
            return;
        }
        let (relay, id) = (Arc::clone(self), id.to_owned());
        tokio::spawn(async move {
            let (mut pause, mut refusals) = (RETRY.0, 0);
            // Then the daemon knows of it at least, and has its own recovery.
            while refusals < REFUSALS {
                sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
                match relay.pay_release(&id).await {
                    Ok(()) => return,
                    Err(HostError::Absent { .. }) => {}
                    Err(HostError::Refused(status)) => {
                        refusals += 1;
                        log!("releasing container {id}: {}", status.message());
                    }
                }
            }
            lock(&relay.unreleased).remove(&id);
        });
    }

    /// Releases an id if that is still owed.
    pub(crate) async fn pay_release(&self, id: &str) -> Result<(), HostError> {
        if !lock(&self.unreleased).contains(id) {
            return Ok(());
        }
        let _one = self.releasing.lock().await;
        if lock(&self.unreleased).contains(id) {
            self.host.release(id).await?;
            lock(&self.unreleased).remove(id);
        }
        Ok(())
    }
}

/// The answer to Delete: what the relay knows of the exit comes first, then what the guest said.
fn deleted(process: &Process, answered: Option<DeleteResponse>) -> DeleteResponse {
    let status = answered.map_or(EXIT_KILLED, |response| response.exit_status);
    process.life.end(status);
    let Exit { status, .. } =
        process.life.exit().unwrap_or(Exit { status, at: std::time::SystemTime::now() });
    let exited_at =
        process.life.exit().map_or_else(MessageField::none, |exit| MessageField::some(exit.timestamp()));
    DeleteResponse { pid: process.pid(), exit_status: status, exited_at, ..Default::default() }
}
