use std::{os::fd::BorrowedFd, sync::Mutex, time::Duration};

use async_trait::async_trait;
use kuasar_common::address::GuestAddress;

use super::*;
use crate::vmm::{DeviceAddress, ReadyGuest, VmError, VmExit, VmRecord};

/// Notes what comes and goes, and refuses what it is told to.
#[derive(Debug, Default)]
struct Bus {
    said: Mutex<Vec<String>>,
    stuck: Mutex<Option<String>>,
}

impl Bus {
    fn said(&self) -> Vec<String> {
        std::mem::take(&mut self.said.lock().unwrap())
    }

    fn note(&self, what: String) -> Result<(), VmError> {
        let stuck = self.stuck.lock().unwrap().clone();
        if stuck.is_some_and(|word| what.contains(&word)) {
            return Err(VmError::Unsupported(format!("no {what}")));
        }
        self.said.lock().unwrap().push(what);
        Ok(())
    }
}

#[async_trait]
impl Vm for Bus {
    async fn hot_attach(&self, device: DeviceInfo) -> Result<DeviceAddress, VmError> {
        let DeviceInfo::Block { id, read_only, .. } = device else { panic!("a disk is plugged in") };
        self.note(format!("+{id}{}", if read_only { " ro" } else { "" }))?;
        Ok(DeviceAddress::Serial(id))
    }

    async fn hot_detach(&self, id: &str) -> Result<(), VmError> {
        self.note(format!("-{id}"))
    }

    fn can_hot_attach(&self) -> bool {
        true
    }

    fn free_slots(&self) -> usize {
        2
    }

    fn pid(&self) -> u32 {
        unreachable!()
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        unreachable!()
    }

    fn address(&self) -> GuestAddress {
        unreachable!()
    }

    fn record(&self) -> VmRecord {
        unreachable!()
    }

    async fn ready(&self, _: Duration) -> Result<ReadyGuest, VmError> {
        unreachable!()
    }

    async fn ping(&self) -> Result<(), VmError> {
        unreachable!()
    }

    async fn stop(&self, _: bool, _: Duration) -> Result<(), VmError> {
        unreachable!()
    }

    async fn wait(&self) -> VmExit {
        unreachable!()
    }
}

struct Pod {
    dir: tempfile::TempDir,
    bus: Arc<Bus>,
    disks: Disks,
}

impl Pod {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let bus = Arc::new(Bus::default());
        let mut disks = Disks::new(dir.path());
        disks.set_vm(bus.clone());
        Self { dir, bus, disks }
    }

    fn want(&self, name: &str, read_only: bool) -> Wanted {
        Wanted::file(self.dir.path().join(name), read_only)
    }

    /// As a restarted daemon does.
    fn forget(&mut self) {
        self.disks = Disks::new(self.dir.path());
        self.disks.set_vm(self.bus.clone());
    }
}

#[tokio::test]
async fn a_disk_is_plugged_in_once_and_leaves_with_the_last_that_uses_it() {
    let mut pod = Pod::new();
    let (a, b) = (pod.want("a", false), pod.want("b", true));
    assert_eq!(
        pod.disks.attach("c1", &[a.clone(), b.clone()]).await.unwrap(),
        ["serial:disk-1", "serial:disk-2"]
    );
    pod.forget();
    // Reading is less than what it is there for already.
    let reads = Wanted { read_only: true, ..a.clone() };
    assert_eq!(pod.disks.attach("c2", &[reads]).await.unwrap(), ["serial:disk-1"]);
    assert_eq!(pod.bus.said(), ["+disk-1", "+disk-2 ro"]);
    pod.disks.release("c1").await.unwrap();
    pod.disks.release("c1").await.unwrap();
    assert_eq!(pod.bus.said(), ["-disk-2"]);
    pod.forget();
    pod.disks.release("c2").await.unwrap();
    assert_eq!(pod.bus.said(), ["-disk-1"]);
    assert_eq!(pod.disks.attach("c3", &[a]).await.unwrap(), ["serial:disk-1"], "its number is free again");
}

#[tokio::test]
async fn a_disk_that_is_there_for_reading_is_not_written_to() {
    let mut pod = Pod::new();
    pod.disks.attach("c1", &[pod.want("a", true)]).await.unwrap();
    let wanted = pod.want("a", false);
    let error = pod.disks.attach("c2", &[wanted]).await.unwrap_err();
    assert!(error.is_refusal(), "{error}");
    assert!(error.to_string().contains("is plugged into the VM read-only for another container"), "{error}");
}

#[tokio::test]
async fn a_container_that_reads_a_disk_and_writes_to_it_gets_it_once_for_both() {
    let mut pod = Pod::new();
    let link = pod.dir.path().join("link");
    std::os::unix::fs::symlink(pod.dir.path().join("a"), &link).unwrap();
    let wanted = [Wanted::file(link, true), pod.want("b", true), pod.want("a", false)];
    let addresses = pod.disks.attach("c1", &wanted).await.unwrap();
    assert_eq!(addresses, ["serial:disk-1", "serial:disk-2", "serial:disk-1"]);
    assert_eq!(pod.bus.said(), ["+disk-1", "+disk-2 ro"]);
}

#[tokio::test]
async fn what_does_not_come_or_go_is_known_and_tried_again() {
    let mut pod = Pod::new();
    *pod.bus.stuck.lock().unwrap() = Some("+disk-2".into());
    let wanted = [pod.want("a", false), pod.want("b", false)];
    let error = pod.disks.attach("c1", &wanted).await.unwrap_err().to_string();
    assert_eq!(error, "no +disk-2");
    // Its VMM may have done it all the same, before it failed to say so.
    pod.forget();
    pod.disks.release("c1").await.unwrap();
    assert_eq!(pod.bus.said(), ["+disk-1", "-disk-1", "-disk-2"]);
    *pod.bus.stuck.lock().unwrap() = Some("-disk-1".into());
    pod.disks.attach("c1", &wanted).await.unwrap();
    assert_eq!(pod.disks.release("c1").await.unwrap_err().to_string(), "no -disk-1");
    assert_eq!(pod.bus.said(), ["+disk-1", "+disk-2", "-disk-2"]);
    *pod.bus.stuck.lock().unwrap() = None;
    pod.forget();
    // While it is on its way out, the same file is not taken for plugged in.
    pod.disks.release("c9").await.unwrap();
    assert_eq!(pod.bus.said(), ["-disk-1"]);
    let gone = pod.want("nowhere", false);
    let error = pod.disks.attach("c2", &[gone]).await.unwrap_err().to_string();
    assert!(
        error.starts_with("finding ") && error.ends_with("No such file or directory (os error 2)"),
        "{error}"
    );
    fs::write(pod.dir.path().join(FILE), "{").unwrap();
    pod.forget();
    let error = pod.disks.release("c2").await.unwrap_err().to_string();
    assert!(error.contains("disks.json: EOF"), "{error}");
}

#[tokio::test]
async fn room_is_what_is_free_and_what_is_there_takes_none() {
    let mut pod = Pod::new();
    let (a, b, gone) = (pod.want("a", false), pod.want("b", true), pod.want("gone", true));
    pod.disks.attach("c1", std::slice::from_ref(&a)).await.unwrap();
    let room = pod.disks.room().unwrap();
    assert!(room.any() && room.fits([&a, &b, &b].into_iter(), 1));
    assert!(!room.fits([&a, &b].into_iter(), 2));
    // It is named when it is plugged in.
    assert!(room.fits([&gone].into_iter(), 2));
    let none = Disks::new(pod.dir.path()).room().unwrap();
    assert!(!none.any() && !none.fits([&b].into_iter(), 0));
}
