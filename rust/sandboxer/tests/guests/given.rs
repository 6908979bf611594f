//! Hypervisors that the daemon has no driver for: their command lines, and the call of their guests. They
//! want KVM.

use std::{
    ffi::OsString,
    fs,
    path::Path,
    process::Stdio,
    sync::{Mutex, PoisonError},
};

use tokio::{
    process::{Child, Command},
    time::timeout,
};
use vmm_sandboxer::vmm::{ReadyGuest, ReadyListener, Root, VmConfig, VsockHub, root_words};

use crate::{common, lab::DEADLINE, vmm::Vmm};

/// Context id of the one guest that there is at a time.
const CID: u32 = 1000;

/// A hypervisor's process.
pub(crate) struct Process {
    child: tokio::sync::Mutex<Child>,
    pid: u32,
    listener: Mutex<Option<ReadyListener>>,
}

/// Starts the program `config.path` in a pod's folder.
pub(crate) fn start(vmm: Vmm, config: &VmConfig, dir: &Path, hub: Option<&VsockHub>) -> Process {
    let listener = match hub {
        Some(hub) => ReadyListener::vhost(hub, CID),
        None => ReadyListener::hybrid(&dir.join("vsock"), None).unwrap(),
    };
    let arguments = match vmm {
        Vmm::CloudHypervisor => cloud_hypervisor(config, dir),
        Vmm::StratoVirt => stratovirt(config, dir),
        Vmm::Qemu(_) => unreachable!("the daemon's own"),
    };
    let log = fs::File::create(dir.join("log/vmm.log")).unwrap();
    let child = Command::new(&config.path)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("starting {}: {error}", config.path.display()));
    let pid = child.id().unwrap();
    Process { child: child.into(), pid, listener: Some(listener).into() }
}

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// The agent's call, or why there is none, with what console and program said.
    pub(crate) async fn ready(&self, dir: &Path) -> Result<ReadyGuest, String> {
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap();
        let mut child = self.child.lock().await;
        let why = tokio::select! {
            called = timeout(DEADLINE, listener.accept()) => match called {
                Ok(Ok(guest)) => return Ok(guest),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the guest did not call".into(),
            },
            ended = child.wait() => format!("the hypervisor ended: {}", ended.unwrap()),
        };
        Err(with_logs(&why, dir))
    }

    /// Why it has ended, if it has.
    pub(crate) async fn ended(&self, dir: &Path) -> Option<String> {
        let ended = self.child.lock().await.try_wait().unwrap()?;
        Some(with_logs(&format!("the hypervisor ended: {ended}"), dir))
    }

    pub(crate) async fn stop(self) {
        self.child.into_inner().kill().await.unwrap();
    }
}

/// With what console and program said.
fn with_logs(why: &str, dir: &Path) -> String {
    let log = |name: &str| fs::read(dir.join("log").join(name)).unwrap_or_default();
    let said = |name| String::from_utf8_lossy(&log(name)).into_owned();
    format!("{why}\n{}\n{}", said("vmm.log"), said("console.log"))
}

/// The kernel's command line, as the daemon writes it for a guest under KVM; nothing is shared.
fn append(config: &VmConfig) -> String {
    let words =
        "console=hvc0 reboot=t panic=-1 noreplace-smp quiet task.sharefs_type=none task.log_level=warn";
    format!("{} {words}", root_words(config)).trim().to_owned()
}

/// Memory is a file in both, so that what a guest has of it can be told from the rest.
fn cloud_hypervisor(config: &VmConfig, dir: &Path) -> Vec<OsString> {
    let spec = common::spec(dir);
    let image = config.image.as_deref().unwrap().display();
    let mut line = Line::default();
    line.word("--kernel", &config.kernel);
    line.word("--cmdline", append(config));
    line.word("--cpus", format!("boot={}", spec.vcpus));
    line.word("--memory", format!("size={}M,shared=on", spec.memory_mib));
    line.word("--serial", "off");
    line.word("--console", format!("file={}", dir.join("log/console.log").display()));
    line.word("--vsock", format!("cid={CID},socket={}", dir.join("vsock").display()));
    match config.root {
        Root::Pmem => line.word("--pmem", format!("file={image},discard_writes=on")),
        Root::Blk => line.word("--disk", format!("path={image},readonly=on,image_type=raw")),
        Root::Initrd => line.word("--initramfs", config.initrd.as_deref().unwrap()),
    }
    line.0
}

fn stratovirt(config: &VmConfig, dir: &Path) -> Vec<OsString> {
    let spec = common::spec(dir);
    let image = config.image.as_deref().unwrap();
    let mut line = Line::default();
    line.word("-machine", "microvm,mem-share=on");
    // It does not start without.
    line.word("-qmp", format!("unix:{},server,nowait", dir.join("qmp").display()));
    line.word("-smp", spec.vcpus.to_string());
    line.word("-m", spec.memory_mib.to_string());
    line.word("-kernel", &config.kernel);
    line.word("-append", append(config));
    line.word("-chardev", format!("file,id=console,path={}", dir.join("log/console.log").display()));
    line.word("-device", "virtio-serial-device,id=serial");
    line.word("-device", "virtconsole,id=hvc0,chardev=console,nr=0");
    line.word("-device", format!("vhost-vsock-device,id=vsock,guest-cid={CID}"));
    match config.root {
        Root::Pmem => {
            let size = fs::metadata(image).unwrap().len() >> 20;
            let file = format!("memory-backend-file,id=image,size={size}M,mem-path={}", image.display());
            line.word("-object", file);
            line.word("-device", "virtio-pmem-device,id=root,memdev=image");
            // Its filter does not know the call that maps this device's memory, once the guest has found it.
            line.0.push("-disable-seccomp".into());
        }
        Root::Blk => {
            line.word("-drive", format!("id=image,file={},readonly=on,direct=off", image.display()));
            line.word("-device", "virtio-blk-device,id=root,drive=image");
        }
        Root::Initrd => line.word("-initrd", config.initrd.as_deref().unwrap()),
    }
    line.0
}

#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn word(&mut self, option: &str, value: impl Into<OsString>) {
        self.0.extend([option.into(), value.into()]);
    }
}
