//! Starting a VM: every process as soon as what it needs is there, none of them polled for.
//!
//! QEMU gets connections and listening sockets as descriptors, so it never waits for anybody: virtiofsd is
//! given a socket that listens already, and we listen for QMP and console on QEMU's behalf. Only
//! `vhost-device-vsock` insists on making its own socket; inotify tells when.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, PermissionsExt, chown, symlink},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use kuasar_common::{
    constants::pod_files::{LOG, SHARED, VSOCK_SOCKET},
    param::ToCmdLineParams,
};
use rustix::fs::FileType;
use tracing::Instrument;

use super::{
    CONSOLE_SOCKET, EVENTS_SOCKET, LOGS, QMP_SOCKET, Qemu, QemuVm,
    args::{CommandLine, Extra, Files, Inherited, VsockFd},
    events,
};
use crate::{
    process::{Process, Spawn},
    vmm::{
        Accel, DeviceInfo, FileServer, FileServerSandbox, InodeFileHandles, ReadyListener, Root, ShareFs,
        VmConfig, VmError, VmSpec, VsockKind, logs, rights,
        supervisor::Supervisor,
        vsock::{self, SocketWatch, VHOST_VSOCK},
    },
};

const VIRTIOFSD: &str = "virtiofsd";
const VSOCK_DEVICE: &str = "vhost-device-vsock";

/// Processes started so far; ended again when the start fails.
#[derive(Default)]
struct Started(BTreeMap<String, Process>);

impl Started {
    /// Keeps what was started, if it was.
    fn note(&mut self, name: &str, spawned: Result<Option<Process>, VmError>) -> Result<(), VmError> {
        self.0.extend(spawned?.map(|process| (name.to_owned(), process)));
        Ok(())
    }

    async fn end(self) {
        for process in self.0.values() {
            if let Err(error) = process.end(Duration::ZERO).await {
                tracing::error!(%error, "ending a process of a VM that did not start");
            }
        }
    }
}

pub(super) async fn start(qemu: &Qemu, spec: VmSpec) -> Result<QemuVm, VmError> {
    let mut started = Started::default();
    let dir = spec.dir.clone();
    match start_all(qemu, spec, &mut started).await {
        Ok(vm) => Ok(vm),
        Err(error) => {
            started.end().await;
            Err(explain(error, &dir))
        }
    }
}

/// Adds what the logs say to an error that has none of it yet.
fn explain(error: VmError, dir: &Path) -> VmError {
    match error {
        VmError::Start { step, why, .. } => {
            VmError::Start { step, why, log: logs::quote(&dir.join(LOG), &LOGS) }
        }
        error => error,
    }
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> VmError {
    move |error| VmError::Start { step, why: error.to_string(), log: String::new() }
}

#[tracing::instrument(name = "start QEMU and its companions", level = "trace", skip_all)]
async fn start_all(qemu: &Qemu, mut spec: VmSpec, started: &mut Started) -> Result<QemuVm, VmError> {
    let config = &qemu.config;
    let (watch, virtiofs) = start_companions(config, &spec, started).await?;
    let mut spawn = companion(&config.path, &spec, "vmm.log");
    let listen = |name| listener(&spec.dir.join(name)).map_err(failed("listening on behalf of QEMU"));
    let (qmp, console) = (spawn.fd(listen(QMP_SOCKET)?), spawn.fd(listen(CONSOLE_SOCKET)?));
    let events = spawn.fd(listen(EVENTS_SOCKET)?);
    let virtiofs = virtiofs.map(|fd| spawn.fd(fd));
    let (vsock, ready, cid) = match watch {
        Some(watch) => vsock_device(&spec, watch, started, &mut spawn).await?,
        None => kernel_vsock(qemu, &mut spec, &mut spawn).await?,
    };
    let extras: Result<Vec<Extra>, VmError> =
        spec.devices.drain(..).map(|device| extra(device, config.accel, &mut spawn)).collect();
    let extras = extras?;
    let files = files(config, &spec, &mut spawn)?;
    let inherited = Inherited { qmp, events, console, virtiofs, vsock, files };
    let (line, buses) = CommandLine::new(config, &spec, &inherited, &extras)?;
    spawn.args(line.to_cmdline_params("-"));
    let vmm = run(spawn).instrument(tracing::trace_span!("start QEMU")).await?;
    Ok(QemuVm {
        cid,
        bus: Mutex::new(buses),
        plugging: tokio::sync::Mutex::default(),
        supervisor: Supervisor::new(vmm, std::mem::take(&mut started.0)),
        listener: Mutex::new(Some(ready)),
        resumptions: events::resumptions(spec.dir.join(EVENTS_SOCKET)),
        dir: copy_console(spec.dir).await,
    })
}

/// QEMU or a companion: in the pod's network namespace and cgroups, with a log of its own.
fn companion(program: &Path, spec: &VmSpec, log: &str) -> Spawn {
    let mut spawn = Spawn::new(program);
    spawn.netns(spec.netns.as_deref()).cgroup_procs(&spec.cgroup_procs).pod(&spec.dir);
    spawn.log(spec.dir.join(LOG).join(log));
    spawn
}

/// Spawning blocks until the program executes.
async fn run(spawn: Spawn) -> Result<Process, VmError> {
    let spawned = tokio::task::spawn_blocking(move || spawn.spawn()).await;
    Ok(spawned.map_err(|e| failed("starting a process")(e.into()))??)
}

async fn wanted<T>(work: Option<impl Future<Output = Result<T, VmError>>>) -> Result<Option<T>, VmError> {
    match work {
        Some(work) => work.await.map(Some),
        None => Ok(None),
    }
}

/// Both companions start now, side by side, and find their way while QEMU is being prepared.
async fn start_companions(
    config: &VmConfig,
    spec: &VmSpec,
    started: &mut Started,
) -> Result<(Option<SocketWatch>, Option<OwnedFd>), VmError> {
    let (watch, vsock) = match config.vsock {
        VsockKind::VhostUser => Some(vsock_device_spawn(config, spec)?),
        VsockKind::Vhost => None,
    }
    .unzip();
    let (virtiofs, files) = match config.share_fs {
        ShareFs::Virtiofs => {
            let (virtiofs, mut spawn) = virtiofsd_spawn(config, spec)?;
            spawn.rights(rights::file_server(spec, config.file_server.device_nodes));
            Some((virtiofs, spawn))
        }
        ShareFs::NineP => None,
    }
    .unzip();
    let vsock = vsock.map(|spawn| run(spawn).instrument(tracing::trace_span!("start vhost-device-vsock")));
    let files = files.map(|spawn| run(spawn).instrument(tracing::trace_span!("start virtiofsd")));
    let (vsock, files) = tokio::join!(wanted(vsock), wanted(files));
    // The one that has started is to be ended when the other has not.
    let vsock = started.note(VSOCK_DEVICE, vsock);
    started.note(VIRTIOFSD, files)?;
    vsock?;
    Ok((watch, virtiofs))
}

fn virtiofsd_spawn(config: &VmConfig, spec: &VmSpec) -> Result<(OwnedFd, Spawn), VmError> {
    let step = "starting virtiofsd";
    let path = spec.dir.join("virtiofs.sock");
    let listening = listener(&path).map_err(failed(step))?;
    let connected = UnixStream::connect(&path).map_err(failed(step))?;
    // Both ends are held: nobody else is to connect.
    fs::remove_file(&path).map_err(failed(step))?;
    let mut spawn = companion(&config.virtiofsd, spec, "virtiofsd.log");
    let fd = spawn.fd(listening);
    let shared = spec.dir.join(SHARED);
    spawn.args([format!("--fd={fd}"), format!("--shared-dir={}", shared.display())]);
    spawn.args(file_server(&config.file_server));
    spawn.args([format!("--log-level={}", if config.debug { "info" } else { "error" })]);
    Ok((connected.into(), spawn))
}

/// virtiofsd's options, whatever it shares. Its limit of open files it raises itself, as far as it may.
fn file_server(how: &FileServer) -> Vec<String> {
    let handles = match how.inode_file_handles {
        InodeFileHandles::Prefer => "prefer",
        InodeFileHandles::Never => "never",
    };
    let sandbox = match how.sandbox {
        FileServerSandbox::Namespace => "namespace",
        FileServerSandbox::Chroot => "chroot",
    };
    let mut options = vec![
        // Its mounts are slaves of the host's: what is mounted in the folder later arrives there as well.
        format!("--sandbox={sandbox}"),
        "--cache=auto".into(),
        // A request that the host does not answer holds up a thread, and not the pod.
        format!("--thread-pool-size={}", how.threads),
        format!("--inode-file-handles={handles}"),
        "--xattr".into(),
        // Only where the guest's kernel can.
        "--posix-acl=auto".into(),
        // A user that may mount in the guest has trusted attributes of its own there, which are none on the
        // host: an overlay can have its upper folder in a volume.
        "--xattrmap=:map:trusted.:user.virtiofs.:".into(),
    ];
    if !how.announce_submounts {
        options.push("--no-announce-submounts".into());
    }
    if !how.device_nodes {
        // Pipes and sockets need no right, nor do the white-outs of an overlay.
        options.push("--modcaps=-mknod".into());
    }
    options
}

fn vsock_device_spawn(config: &VmConfig, spec: &VmSpec) -> Result<(SocketWatch, Spawn), VmError> {
    let folder = vsock_folder(spec).map_err(failed("making the folder of vhost-device-vsock"))?;
    let watch = SocketWatch::new(&folder).map_err(failed("starting vhost-device-vsock"))?;
    let mut spawn = companion(&config.vhost_device_vsock, spec, "vsock.log");
    spawn.rights(rights::vsock_device(spec, &folder)?);
    spawn.args([
        "--vm".into(),
        format!(
            "guest-cid={GUEST_CID},tx-buffer-size={TX_BUFFER},uds-path={},socket={}",
            folder.join(HYBRID_SOCKET).display(),
            folder.join(VHOST_USER_SOCKET).display()
        ),
    ]);
    Ok((watch, spawn))
}

/// Makes the folder in which `vhost-device-vsock` makes its sockets: it has no other, and the pod's own
/// folder has much that is not its business. Where others look for the vsock, a link leads there.
fn vsock_folder(spec: &VmSpec) -> io::Result<PathBuf> {
    let (folder, link) = (spec.dir.join(VSOCK_FOLDER), spec.dir.join(VSOCK_SOCKET));
    for stale in [folder.join(VHOST_USER_SOCKET), folder.join(HYBRID_SOCKET), link.clone()] {
        remove_stale(&stale)?;
    }
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if let Some(id) = spec.user {
        chown(&folder, Some(id), Some(id))?;
    }
    symlink(Path::new(VSOCK_FOLDER).join(HYBRID_SOCKET), link)?;
    Ok(folder)
}

/// Takes the folder away from `vhost-device-vsock` once its sockets are there. It goes on to reach what
/// others made in it for the guest's calls, and makes and replaces nothing any more: any client of a
/// socket there is root.
fn seal(folder: &Path, id: u32) -> io::Result<()> {
    chown(folder, Some(0), Some(id))?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o710))
}

/// The folder of `vhost-device-vsock` in the pod's, and its sockets. Short: a socket's path has 107 bytes.
const VSOCK_FOLDER: &str = "vs";
/// Socket on which it listens for callers of the guest; the guest's own calls go to this name with `_<port>`
/// appended.
const HYBRID_SOCKET: &str = "s";
/// Socket on which it listens for QEMU.
const VHOST_USER_SOCKET: &str = "vhost";
/// Bytes that a guest may send before it waits, and so the largest packet that it makes. Linux (6.12.95, for
/// one) puts packets of more than 32 KiB into several buffers, and `vhost-device-vsock` 0.3.0 drops those
/// without a word: the connection stands still for ever.
const TX_BUFFER: u32 = 16 << 10;
/// Behind a unix socket every guest may have the same.
const GUEST_CID: u32 = 3;

/// Waits for the end of a companion.
async fn ended(started: &Started, name: &str) -> Option<u32> {
    match started.0.get(name) {
        Some(process) => process.wait().await.ok().flatten(),
        None => std::future::pending().await,
    }
}

async fn vsock_device(
    spec: &VmSpec,
    watch: SocketWatch,
    started: &Started,
    spawn: &mut Spawn,
) -> Result<(VsockFd, ReadyListener, Option<u32>), VmError> {
    let step = "waiting for vhost-device-vsock to listen";
    let folder = spec.dir.join(VSOCK_FOLDER);
    let ready = ReadyListener::hybrid(&folder.join(HYBRID_SOCKET), spec.user);
    let ready = ready.map_err(failed("listening for the guest's agent"))?;
    let socket = folder.join(VHOST_USER_SOCKET);
    let connected = tokio::select! {
        connected = watch.connect(&socket) => connected.map_err(failed(step))?,
        status = ended(started, VSOCK_DEVICE) => {
            let why = format!("it ended with status {}", status.unwrap_or_default());
            return Err(VmError::Start { step, why, log: String::new() });
        }
    };
    if let Some(id) = spec.user {
        seal(&folder, id).map_err(failed("taking back the folder of vhost-device-vsock"))?;
    }
    Ok((VsockFd::VhostUser { fd: spawn.fd(connected.into()) }, ready, None))
}

async fn kernel_vsock(
    qemu: &Qemu,
    spec: &mut VmSpec,
    spawn: &mut Spawn,
) -> Result<(VsockFd, ReadyListener, Option<u32>), VmError> {
    let hub = qemu.hub().await.map_err(failed("listening for guests on the host's vsock port"))?;
    let (fd, cid) = vsock::open_vhost().map_err(VmError::io(format!("opening {VHOST_VSOCK}")))?;
    let ready = ReadyListener::vhost(hub, cid);
    spec.kernel_params = format!("{} {}", hub.parameter(), spec.kernel_params);
    Ok((VsockFd::Vhost { fd: spawn.fd(fd), cid }, ready, Some(cid)))
}

/// Opens what all VMs read, and gives QEMU the rights that it has with these.
fn files(config: &VmConfig, spec: &VmSpec, spawn: &mut Spawn) -> Result<Files, VmError> {
    let open = |path: &Path, write| {
        let file = OpenOptions::new().read(true).write(write).open(path);
        file.map(OwnedFd::from).map_err(VmError::io(format!("opening {}", path.display())))
    };
    let wanted = |root: bool, path: &Option<PathBuf>| path.clone().filter(|_| root);
    let initrd = wanted(config.root == Root::Initrd, &config.initrd);
    let image = wanted(config.root != Root::Initrd, &config.image);
    let kvm = (config.accel == Accel::Kvm).then(|| PathBuf::from("/dev/kvm"));
    let read = |path: &Path| {
        let file = open(path, false)?;
        match rustix::fs::fstat(&file) {
            Ok(there) if spec.user.is_some() && there.st_mode & 0o004 == 0 => {
                Err(VmError::Unsupported(format!(
                    "opening {}: the VMM runs as another user than root, and only root may read this file; let others read it \
                 (chmod o+r)",
                    path.display()
                )))
            }
            _ => Ok(file),
        }
    };
    let kernel = read(&config.kernel)?;
    let initrd = initrd.map(|path| read(&path)).transpose()?;
    let image = image.map(|path| read(&path)).transpose()?;
    let kvm = kvm.map(|path| open(&path, true)).transpose()?;
    let reopened: Vec<_> = [Some(&kernel), initrd.as_ref(), image.as_ref()].into_iter().flatten().collect();
    let reopened: Vec<_> = reopened.into_iter().map(AsFd::as_fd).collect();
    spawn.rights(rights::vmm(spec, config.share_fs, &reopened)?);
    Ok(Files {
        kernel: spawn.fd(kernel),
        initrd: initrd.map(|fd| spawn.fd(fd)),
        image: image.map(|fd| spawn.fd(fd)),
        kvm: kvm.map(|fd| spawn.fd(fd)),
    })
}

fn extra(device: DeviceInfo, accel: Accel, spawn: &mut Spawn) -> Result<Extra, VmError> {
    Ok(match device {
        DeviceInfo::Tap(nic) => Extra::Nic {
            id: nic.id,
            mac: nic.mac,
            fds: nic.queues.into_iter().map(|queue| spawn.fd(queue)).collect(),
            // The kernel's half of a card needs the kernel's half of the interrupts.
            vhost: match accel {
                Accel::Kvm => nic.vhost.into_iter().map(|vhost| spawn.fd(vhost)).collect(),
                Accel::Tcg => Vec::new(),
            },
        },
        DeviceInfo::Block { id, path, read_only, file } => {
            let there = rustix::fs::fstat(&file).map_err(io::Error::from);
            let there = there.map_err(VmError::io(format!("plugging in {}", path.display())))?;
            let device = FileType::from_raw_mode(there.st_mode) == FileType::BlockDevice;
            Extra::Disk { id, fd: spawn.fd(file), device, read_only }
        }
    })
}

/// A socket that listens before the process that serves it exists. What an earlier attempt left is replaced.
fn listener(path: &Path) -> io::Result<OwnedFd> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("binding {}: {e}", path.display()));
    remove_stale(path).map_err(named)?;
    Ok(UnixListener::bind(path).map_err(named)?.into())
}

fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Begins to copy the console to its log. QEMU need not have begun: the socket listens.
async fn copy_console(dir: PathBuf) -> PathBuf {
    match tokio::net::UnixStream::connect(dir.join(CONSOLE_SOCKET)).await {
        Ok(console) => drop(tokio::spawn(logs::copy_console(console, dir.join(LOG)))),
        Err(error) => tracing::warn!(dir = %dir.display(), %error, "connecting to a guest's console"),
    }
    dir
}
