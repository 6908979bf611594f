//! The device monitor with uevents that the test sends and a sysfs that it makes, and once with the real
//! kernel's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::{fs::symlink, net::UnixDatagram},
    },
    path::Path,
    process::Command,
    sync::Arc,
    time::Duration,
};

use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, bind, netlink, sendto, socket_with,
    sockopt::set_socket_recv_buffer_size,
};
use tempfile::TempDir;
use vmm_task::devices::{Device, Devices, Matcher, let_go};

const LONG: Duration = Duration::from_secs(20);

/// A guest's devices, as far as the monitor sees them.
struct Guest {
    dir: TempDir,
    kernel: UnixDatagram,
    devices: Arc<Devices>,
}

impl Guest {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        for folder in ["sys/class/block", "sys/class/scsi_host", "sys/devices", "dev"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        let (kernel, ours) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (sys, dev) = (dir.path().join("sys"), dir.path().join("dev"));
        let devices = Devices::listen(OwnedFd::from(ours), &sys, &dev).unwrap();
        Self { dir, kernel, devices }
    }

    fn put(&self, path: &str, content: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// A disk in sysfs and `/dev`, of which nobody is told. `path` is below `/sys/devices`.
    fn add(&self, path: &str, number: &str) {
        let name = Path::new(path).file_name().unwrap().to_str().unwrap();
        self.put(&format!("sys/devices/{path}/dev"), &format!("{number}\n"));
        self.put(&format!("sys/devices/{path}/ro"), "0\n");
        self.put(&format!("dev/{name}"), "");
        symlink(format!("../../devices/{path}"), self.dir.path().join("sys/class/block").join(name)).unwrap();
    }

    fn remove(&self, path: &str) {
        let name = Path::new(path).file_name().unwrap();
        fs::remove_file(self.dir.path().join("sys/class/block").join(name)).unwrap();
        fs::remove_file(self.dir.path().join("dev").join(name)).unwrap();
        fs::remove_dir_all(self.dir.path().join("sys/devices").join(path)).unwrap();
    }

    fn tell(&self, action: &str, path: &str) {
        let event = format!("{action}@/devices/{path}\0ACTION={action}\0SUBSYSTEM=block\0");
        self.kernel.send(event.as_bytes()).unwrap();
    }

    async fn find(&self, wanted: &str) -> Result<Device, String> {
        let wanted: Matcher = wanted.parse().unwrap();
        self.devices.wait(&wanted, Duration::ZERO).await.map_err(|error| error.to_string())
    }

    fn waits(&self, wanted: &str) -> tokio::task::JoinHandle<Device> {
        let (devices, wanted) = (Arc::clone(&self.devices), wanted.parse().unwrap());
        tokio::spawn(async move { devices.wait(&wanted, LONG).await.unwrap() })
    }
}

const BLK: &str = "pci0000:00/0000:00:05.0/virtio3/block/vdb";
const BEHIND_A_PORT: &str = "pci0000:00/0000:00:02.0/0000:01:00.0/virtio4/block/vdc";
const SCSI: &str = "pci0000:00/0000:00:06.0/virtio5/host0/target0:0:1/0:0:1:2/block/sda";
const PMEM: &str = "pci0000:00/0000:00:07.0/virtio6/ndbus0/region0/namespace0.0/block/pmem0";

#[tokio::test]
async fn what_is_there_is_found_by_each_of_its_names() {
    let guest = Guest::new();
    for (path, number) in [(BLK, "254:16"), (BEHIND_A_PORT, "254:32"), (SCSI, "8:0"), (PMEM, "259:0")] {
        guest.add(path, number);
    }
    guest.put(&format!("sys/devices/{BLK}/serial"), "data\n");
    guest.put(&format!("sys/devices/{SCSI}/ro"), "1\n");
    guest.add(&format!("{PMEM}/pmem0p1"), "259:1");
    guest.put(&format!("sys/devices/{PMEM}/pmem0p1/partition"), "1\n");
    for (wanted, name) in [
        ("pci:0000:00:05.0", "vdb"),
        ("serial:data", "vdb"),
        ("pci:0000:01:00.0", "vdc"),
        ("pci:0000:00:02.0", "vdc"),
        ("scsi:0:0:1:2", "sda"),
        ("scsi:*:0:1:2", "sda"),
        ("pmem:0000:00:07.0", "pmem0"),
        ("name:pmem0p1", "pmem0p1"),
    ] {
        let found = guest.find(wanted).await.unwrap();
        assert_eq!(found.name, name, "{wanted}");
        assert_eq!(found.node, guest.dir.path().join("dev").join(name));
        assert_eq!(found.read_only, name == "sda");
    }
    let found = guest.find("serial:data").await.unwrap();
    assert_eq!((found.major, found.minor), (254, 16));
    // A controller's address is not that of its disks, and memory is no disk.
    for wanted in ["pci:0000:00:06.0", "pci:0000:00:07.0", "pmem:0000:00:05.0", "scsi:1:0:1:2", "serial:dat"]
    {
        let missing = guest.find(wanted).await.unwrap_err();
        assert_eq!(
            missing,
            format!(
                "no device {wanted} came within 0 s; there are: pmem0 (pmem:0000:00:07.0), sda (scsi:0:0:1:2), \
                 vdb (serial:data) (pci:0000:00:05.0), vdc (pci:0000:01:00.0)"
            )
        );
    }
}

#[tokio::test]
async fn what_comes_wakes_all_who_wait_for_it_and_nobody_else() {
    let guest = Guest::new();
    let (one, two) = (guest.waits("pci:0000:00:05.0"), guest.waits("name:vdb"));
    let other = guest.waits("serial:other");
    tokio::task::yield_now().await;
    assert_eq!(guest.devices.waiting(), 3);
    // Its node may come a moment after it, and then another event.
    guest.add(BLK, "254:16");
    fs::remove_file(guest.dir.path().join("dev/vdb")).unwrap();
    guest.tell("add", BLK);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!one.is_finished());
    guest.put("dev/vdb", "");
    guest.tell("change", BLK);
    assert_eq!(one.await.unwrap(), two.await.unwrap());
    assert!(!other.is_finished());
    assert_eq!(guest.devices.waiting(), 1);
}

#[tokio::test]
async fn who_gives_up_is_forgotten_and_takes_nothing_away() {
    let guest = Guest::new();
    let missing = guest.find("name:vdb").await.unwrap_err();
    assert_eq!(missing, "no device name:vdb came within 0 s; there are: none");
    let cancelled = guest.waits("name:vdb");
    tokio::task::yield_now().await;
    cancelled.abort();
    assert!(cancelled.await.unwrap_err().is_cancelled());
    assert_eq!(guest.devices.waiting(), 0);
    let next = guest.waits("name:vdb");
    tokio::task::yield_now().await;
    guest.add(BLK, "254:16");
    guest.tell("add", BLK);
    assert_eq!(next.await.unwrap().name, "vdb");
}

#[tokio::test]
async fn a_slot_that_is_used_again_has_what_is_in_it_now() {
    let guest = Guest::new();
    guest.add(BLK, "254:16");
    assert_eq!(guest.find("pci:0000:00:05.0").await.unwrap().name, "vdb");
    guest.remove(BLK);
    guest.tell("remove", BLK);
    assert!(guest.find("pci:0000:00:05.0").await.is_err(), "what has gone is not there");
    let next = "pci0000:00/0000:00:05.0/virtio3/block/vdd";
    let waiting = guest.waits("pci:0000:00:05.0");
    tokio::task::yield_now().await;
    guest.add(next, "254:48");
    guest.tell("add", next);
    let found = waiting.await.unwrap();
    assert_eq!((found.name.as_str(), found.minor), ("vdd", 48));
}

#[tokio::test]
async fn nonsense_is_ignored_and_what_comes_after_it_is_not() {
    let guest = Guest::new();
    let waiting = guest.waits("name:vdb");
    tokio::task::yield_now().await;
    for nonsense in [&b""[..], b"\0\0", b"add@", b"libudev\0\xfe\xed\xca\xfe\0", &[0xff; 9000]] {
        guest.kernel.send(nonsense).unwrap();
    }
    guest.add(BLK, "254:16");
    guest.tell("add", BLK);
    assert_eq!(waiting.await.unwrap().name, "vdb");
}

#[tokio::test]
async fn scsi_hosts_are_told_to_look() {
    let guest = Guest::new();
    for host in ["host0", "host1"] {
        guest.put(&format!("sys/class/scsi_host/{host}/scan"), "");
    }
    let scans = || {
        ["host0", "host1"].map(|host| {
            fs::read_to_string(guest.dir.path().join("sys/class/scsi_host").join(host).join("scan")).unwrap()
        })
    };
    assert!(guest.find("scsi:1:0:3:4").await.is_err());
    while scans()[1].is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(scans(), ["", "0 3 4"]);
    let waiting = guest.waits("scsi:*:0:1:2");
    while scans()[0].is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    guest.add(SCSI, "8:0");
    guest.tell("add", SCSI);
    assert_eq!(waiting.await.unwrap().name, "sda");
}

#[tokio::test]
async fn the_kernel_looks_behind_bridges_and_lets_go_of_what_is_there() {
    let guest = Guest::new();
    fs::create_dir_all(guest.dir.path().join("sys/class/pci_bus")).unwrap();
    let buses = ["pci0000:00/pci_bus/0000:00", "pci0000:00/0000:00:02.0/pci_bus/0000:01"];
    for bus in buses {
        guest.put(&format!("sys/devices/{bus}/rescan"), "");
        let name = Path::new(bus).file_name().unwrap();
        let link = guest.dir.path().join("sys/class/pci_bus").join(name);
        symlink(Path::new("../../devices").join(bus), link).unwrap();
    }
    let read = |path: &str| fs::read_to_string(guest.dir.path().join("sys/devices").join(path)).unwrap();
    guest.find("scsi:0:0:1:2").await.unwrap_err();
    assert_eq!(read(&format!("{}/rescan", buses[1])), "", "SCSI has another way");
    let waiting = guest.waits("serial:disk-1");
    while read(&format!("{}/rescan", buses[1])).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(read(&format!("{}/rescan", buses[0])), "", "nothing is plugged in at the root");
    guest.add(BEHIND_A_PORT, "254:32");
    guest.put(&format!("sys/devices/{BEHIND_A_PORT}/serial"), "disk-1\n");
    guest.tell("add", BEHIND_A_PORT);
    let found = waiting.await.unwrap();
    let remove = "pci0000:00/0000:00:02.0/0000:01:00.0/remove";
    guest.put(&format!("sys/devices/{remove}"), "");
    let_go(&found.sys).unwrap();
    assert_eq!(read(remove), "1");
    // What is at the root, or has others beside it, stays.
    let at = |path: &str| guest.dir.path().join("sys/devices").join(path);
    let_go(&at(BLK)).unwrap();
    let_go(&at(&SCSI.replace("0000:00:06.0", "0000:00:02.0/0000:01:00.0"))).unwrap();
    assert!(!at("pci0000:00/0000:00:05.0/remove").exists());
}

/// Says what the kernel would say, as root of the guest's containers may.
fn pretend() -> bool {
    let flags = SocketFlags::CLOEXEC;
    let socket =
        socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(netlink::KOBJECT_UEVENT)).unwrap();
    let message = b"add@/devices/vdb\0ACTION=add\0SUBSYSTEM=block\0";
    sendto(&socket, message, SendFlags::empty(), &netlink::SocketAddrNetlink::new(0, 1)).is_ok()
}

/// Real uevents: a loop device is made. Needs root.
#[tokio::test]
async fn the_kernel_is_heard() {
    let dir = TempDir::new().unwrap();
    for folder in ["class/block", "devices"] {
        fs::create_dir_all(dir.path().join(folder)).unwrap();
    }
    let Ok(devices) = Devices::start(dir.path(), dir.path()) else {
        eprintln!("skipped: no uevents here");
        return;
    };
    let losetup = |args: &[&str]| Command::new("/sbin/losetup").args(args).output();
    let waiting = {
        let devices = Arc::clone(&devices);
        tokio::spawn(async move { devices.wait(&"name:vdb".parse().unwrap(), LONG).await.unwrap() })
    };
    tokio::task::yield_now().await;
    // It comes to the made-up sysfs without a word, so that only an event of the real kernel's can make it be
    // seen.
    let disk = dir.path().join("devices/vdb");
    fs::create_dir_all(&disk).unwrap();
    fs::write(disk.join("dev"), "254:16\n").unwrap();
    fs::write(dir.path().join("vdb"), "").unwrap();
    symlink("../../devices/vdb", dir.path().join("class/block/vdb")).unwrap();
    let file = tempfile::NamedTempFile::new_in("/tmp").unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let made = losetup(&["--find", "--show", file.path().to_str().unwrap()]);
    let Some(made) = made.ok().filter(|made| made.status.success()) else {
        eprintln!("skipped: making a loop device needs root");
        return;
    };
    let node = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let found = waiting.await;
    let _ = losetup(&["-d", &node]);
    assert_eq!(found.unwrap().name, "vdb");
}

/// A socket that is too small for what is sent has lost something, which is a reason to look again. Needs
/// root.
#[tokio::test]
async fn lost_events_are_made_up_for() {
    let guest = Guest::new();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = Some(netlink::KOBJECT_UEVENT);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol).unwrap();
    if bind(&socket, &netlink::SocketAddrNetlink::new(0, 1)).is_err() {
        eprintln!("skipped: no uevents here");
        return;
    }
    set_socket_recv_buffer_size(&socket, 1).unwrap();
    let (sys, dev) = (guest.dir.path().join("sys"), guest.dir.path().join("dev"));
    let devices = Devices::listen(socket, &sys, &dev).unwrap();
    let waiting = {
        let devices = Arc::clone(&devices);
        tokio::spawn(async move { devices.wait(&"name:vdb".parse().unwrap(), LONG).await.unwrap() })
    };
    tokio::task::yield_now().await;
    guest.add(BLK, "254:16");
    if !pretend() {
        eprintln!("skipped: filling a uevent socket needs root");
        return;
    }
    // None of these is the kernel's, so none is believed.
    for _ in 0..1000 {
        pretend();
    }
    assert_eq!(waiting.await.unwrap().name, "vdb");
}
