//! Names, ports and paths on which host and guest agree.

/// vsock port in the guest of the agent's ttrpc services.
pub const PORT_TTRPC: u32 = 1024;
/// vsock port in the guest of the debug console.
pub const PORT_DEBUG: u32 = 1025;
/// vsock port in the guest of the stdio streams (see [`crate::stdio`]).
pub const PORT_STDIO: u32 = 1026;
/// vsock port in the guest of port-forward (see [`crate::forward`]).
pub const PORT_FORWARD: u32 = 1027;
/// vsock port of the host that the agent calls when it is ready (see [`crate::handshake`]). The last there
/// is: that connection stays, and `vhost-device-vsock` 0.3.0, which counts the ports of the host's own
/// connections up from 0, makes no more of them once it comes to one that is taken.
pub const PORT_READY: u32 = u32::MAX - 1;
/// The host's vsock address, as in `linux/vm_sockets.h` (`VMADDR_CID_HOST`).
pub const CID_HOST: u32 = 2;

/// virtiofs tag and 9p mount tag of the pod's shared folder.
pub const SHARE_TAG: &str = "kuasar";
/// Folder at which the guest mounts the shared folder.
pub const GUEST_STATE_DIR: &str = "/run/kuasar/state";
/// Sources of bind mounts that the agent puts a disk's node in the place of: this, a slash, and the host's
/// number of the disk.
pub const GUEST_BLOCK_NODES: &str = "/dev/block";
/// Name of the OCI runtime in the guest's image.
pub const GUEST_RUNC: &str = "/bin/runc";

/// ttrpc metadata key that carries the pod's token on every call from the host to the guest.
pub const TOKEN_METADATA: &str = "kuasar-token";

/// Value of `stdin`, `stdout` and `stderr` in a Task request to the guest for a stream that is wanted.
pub const STDIO_WANTED: &str = "vsock";

/// Offset that the relay adds to the guest's process ids for containerd. The sum is no process of the host's,
/// whose ids end at [`GUEST_PID_LIMIT`]: `cAdvisor`, or a person with `nsenter`, who looks it up there finds
/// none instead of somebody else's.
pub const GUEST_PID_BASE: u32 = 1 << 30;
/// One more than any process id of Linux (`PID_MAX_LIMIT`).
pub const GUEST_PID_LIMIT: u32 = 1 << 22;

/// Runtime type in containerd's configuration.
pub const RUNTIME_TYPE: &str = "io.containerd.kuasar-vmm.v1";

/// Files of a pod's folder on the host.
pub mod pod_files {
    /// The pod's record.
    pub const RECORD: &str = "pod.json";
    /// 64 hex digits, readable by the owner only.
    pub const TOKEN: &str = "token";
    /// containerd's Task endpoint, served by the relay.
    pub const TASK_SOCKET: &str = "task.sock";
    /// The daemon's endpoint for the relay.
    pub const HOST_SOCKET: &str = "host.sock";
    /// The hybrid vsock's socket; guest-initiated connections go to this name with `_<port>` appended. Short,
    /// as that may have ten digits.
    pub const VSOCK_SOCKET: &str = "vsock";
    /// The folder in which the daemon makes what containers need. No guest sees it.
    pub const WORK: &str = "work";
    /// The view of it that the guest sees: what is not a mount of its own is read-only.
    pub const SHARED: &str = "shared";
    /// In both: the files that all containers of the pod have.
    pub const FILES: &str = "files";
    /// In both: the files and folders of the host that containers of the pod have as volumes.
    pub const VOLUMES: &str = "volumes";
    /// The pod's logs.
    pub const LOG: &str = "log";
}
