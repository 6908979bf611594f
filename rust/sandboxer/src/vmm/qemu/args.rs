//! QEMU's command line.

mod params;

use std::os::fd::RawFd;

use kuasar_common::constants::SHARE_TAG;

pub(super) use self::params::CommandLine;
use self::params::{
    AccelType, AddFd, Blockdev, Chardev, Device, Fsdev, MachineType, Mon, Name, Netdev, Object, Sandbox, Smp,
};
use crate::vmm::{Accel, Bus, BusKind, Machine, Root, ShareFs, VmConfig, VmError, VmSpec, root};

/// Prefix of the names of block nodes that are there from the boot on. No later disk has such a name.
pub(super) const AT_BOOT: &str = "boot-";
/// Granularity of the address space that is set aside for persistent memory, in MiB.
const MAXMEM_ALIGN_MIB: u64 = 1024;

/// Descriptors that QEMU inherits, by their numbers there.
#[derive(Debug)]
pub(super) struct Inherited {
    /// Listening: QMP.
    pub(super) qmp: RawFd,
    /// Listening: QMP, for the daemon's connection that follows its events.
    pub(super) events: RawFd,
    /// Listening: the guest's console.
    pub(super) console: RawFd,
    /// Connected to virtiofsd; without it the folder is shared by 9p.
    pub(super) virtiofs: Option<RawFd>,
    /// The vsock.
    pub(super) vsock: VsockFd,
    /// Files of the configuration.
    pub(super) files: Files,
}

/// Files that all VMs of a daemon read, opened by the daemon: QEMU finds no file by its path.
#[derive(Debug)]
pub(super) struct Files {
    /// The guest's kernel.
    pub(super) kernel: RawFd,
    /// The initial RAM disk, if that is the root.
    pub(super) initrd: Option<RawFd>,
    /// The image, if that is the root.
    pub(super) image: Option<RawFd>,
    /// `/dev/kvm`, if that executes the guest's instructions.
    pub(super) kvm: Option<RawFd>,
}

/// The two kinds of vsock.
#[derive(Debug)]
pub(super) enum VsockFd {
    /// `/dev/vhost-vsock`, with the guest's context id set.
    Vhost { fd: RawFd, cid: u32 },
    /// Connected to `vhost-device-vsock`.
    VhostUser { fd: RawFd },
}

/// A device that a pod brings, with descriptors by their numbers in QEMU.
#[derive(Debug)]
pub(super) enum Extra {
    Nic { id: String, mac: String, fds: Vec<RawFd>, vhost: Vec<RawFd> },
    Disk { id: String, fd: RawFd, device: bool, read_only: bool },
}

impl CommandLine {
    /// Command line of a pod's VM, and its buses: one with all devices plugged in, and one for those that
    /// come later.
    ///
    /// # Errors
    /// When the bus has too few slots, or the image cannot be measured.
    pub(super) fn new(
        config: &VmConfig,
        spec: &VmSpec,
        inherited: &Inherited,
        extras: &[Extra],
    ) -> Result<(Self, Vec<Bus>), VmError> {
        let mut line = Self::machine(config, spec, inherited);
        let mut plug = Plug::new(config.machine);
        line.root(config, spec, &inherited.files, &mut plug)?;
        line.vsock(&inherited.vsock, &mut plug)?;
        line.share(spec, inherited.virtiofs, &mut plug)?;
        line.console(inherited.console, &mut plug)?;
        line.devices.push(plug.device("virtio-rng", "rng")?);
        for extra in extras {
            line.extra(extra, &mut plug)?;
        }
        line.balloon(config, &mut plug)?;
        let later = line.bridge(config.machine, &mut plug)?;
        Ok((line, std::iter::once(plug.bus).chain(later).collect()))
    }

    fn machine(config: &VmConfig, spec: &VmSpec, inherited: &Inherited) -> Self {
        let cpu = match config.accel {
            Accel::Kvm => "host",
            Accel::Tcg => "max",
        };
        let files = &inherited.files;
        let mut line = Self {
            name: Name { guest: format!("sandbox-{}", spec.pod), debug_threads: true },
            no_user_config: true,
            nodefaults: true,
            no_reboot: true,
            display: "none",
            sandbox: Sandbox {
                on: true,
                obsolete: "deny",
                elevateprivileges: "deny",
                spawn: "deny",
                resourcecontrol: "deny",
            },
            add_fds: Vec::new(),
            machine: machine_type(config),
            accel: AccelType { kind: "tcg", device: None },
            global: None,
            cpu: config.cpu.clone().unwrap_or_else(|| cpu.to_owned()),
            smp: Smp { cpus: spec.vcpus, sockets: spec.vcpus, cores: 1, threads: 1 },
            memory: format!("{}M", spec.memory_mib),
            kernel: reopened(files.kernel),
            initrd: files.initrd.map(reopened),
            append: append(config, spec),
            // Shared, because the user-space ends of virtiofs and vsock work in the guest's memory.
            objects: vec![Object {
                kind: "memory-backend-memfd",
                id: "ram",
                mem_path: None,
                size: format!("{}M", spec.memory_mib),
                share: true,
                readonly: None,
            }],
            chardevs: vec![listener("qmp", inherited.qmp), listener("events", inherited.events)],
            mons: ["qmp", "events"].map(|chardev| Mon { chardev, mode: "control" }).into(),
            blockdevs: Vec::new(),
            fsdev: None,
            netdevs: Vec::new(),
            devices: Vec::new(),
        };
        if let Some(kvm) = files.kvm {
            line.accel = AccelType { kind: "kvm", device: Some(line.lend(kvm, "kvm")) };
        }
        line
    }

    /// Gives a descriptor the name by which QEMU's own way of opening files finds it.
    fn lend(&mut self, fd: RawFd, opaque: &str) -> String {
        let set = self.add_fds.len().saturating_add(1);
        self.add_fds.push(AddFd { fd, set, opaque: opaque.to_owned() });
        format!("/dev/fdset/{set}")
    }

    fn root(
        &mut self,
        config: &VmConfig,
        spec: &VmSpec,
        files: &Files,
        plug: &mut Plug,
    ) -> Result<(), VmError> {
        let image = config.image.clone().unwrap_or_default();
        match (config.root, files.image) {
            (Root::Initrd, _) | (_, None) => {}
            (Root::Blk, Some(fd)) => self.disk("root", fd, false, true, plug)?,
            (Root::Pmem, Some(fd)) => {
                let size = std::fs::metadata(&image)
                    .map_err(VmError::io(format!("reading the size of the guest image {}", image.display())))?
                    .len();
                let reserved = size.div_ceil(1 << 20).next_multiple_of(MAXMEM_ALIGN_MIB);
                self.memory = format!(
                    "{}M,slots=1,maxmem={}M",
                    spec.memory_mib,
                    spec.memory_mib.saturating_add(reserved)
                );
                self.objects.push(Object {
                    kind: "memory-backend-file",
                    id: "image",
                    mem_path: Some(reopened(fd).into()),
                    size: size.to_string(),
                    share: true,
                    readonly: Some(true),
                });
                let device = plug.device("virtio-pmem", "root")?;
                self.devices.push(Device { memdev: Some("image"), ..device });
            }
        }
        Ok(())
    }

    fn vsock(&mut self, vsock: &VsockFd, plug: &mut Plug) -> Result<(), VmError> {
        let device = match *vsock {
            VsockFd::Vhost { fd, cid } => {
                let device = plug.device("vhost-vsock", "vsock")?;
                Device { guest_cid: Some(cid), vhostfd: Some(fd), ..device }
            }
            VsockFd::VhostUser { fd } => {
                self.chardevs.push(connected("vsock", fd));
                Device { chardev: Some("vsock"), ..plug.device("vhost-user-vsock", "vsock")? }
            }
        };
        self.devices.push(device);
        Ok(())
    }

    fn share(&mut self, spec: &VmSpec, virtiofs: Option<RawFd>, plug: &mut Plug) -> Result<(), VmError> {
        let device = if let Some(fd) = virtiofs {
            self.chardevs.push(connected("share", fd));
            Device {
                chardev: Some("share"),
                tag: Some(SHARE_TAG),
                ..plug.device("vhost-user-fs", "share-device")?
            }
        } else {
            self.fsdev = Some(Fsdev {
                driver: "local",
                id: "share",
                path: spec.dir.join(kuasar_common::constants::pod_files::SHARED),
                security_model: "none",
                multidevs: "remap",
            });
            Device {
                fsdev: Some("share"),
                mount_tag: Some(SHARE_TAG),
                ..plug.device("virtio-9p", "share-device")?
            }
        };
        self.devices.push(device);
        Ok(())
    }

    fn console(&mut self, fd: RawFd, plug: &mut Plug) -> Result<(), VmError> {
        self.chardevs.push(listener("console", fd));
        self.devices.push(plug.device("virtio-serial", "serial")?);
        self.devices.push(Device {
            driver: "virtconsole".into(),
            id: "hvc0".into(),
            chardev: Some("console"),
            ..Device::default()
        });
        Ok(())
    }

    /// Takes back what the guest does not use any more. It is never inflated.
    fn balloon(&mut self, config: &VmConfig, plug: &mut Plug) -> Result<(), VmError> {
        if config.free_page_reporting {
            let device = plug.device("virtio-balloon", "balloon")?;
            self.devices.push(Device { free_page_reporting: Some(true), ..device });
        }
        Ok(())
    }

    /// The bridge behind which disks come and go; see [`super::plug`].
    fn bridge(&mut self, machine: Machine, plug: &mut Plug) -> Result<Option<Bus>, VmError> {
        // Else the chipset leaves it to ACPI, of which there is none.
        self.global = match machine {
            Machine::Q35 => Some("ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"),
            Machine::Pc => Some("PIIX4_PM.acpi-pci-hotplug-with-bridge-support=off"),
            Machine::Microvm => return Ok(None),
            // Nothing but its device tree speaks of devices.
            Machine::Virt => None,
        };
        let bridge = plug.place("pci-bridge", super::plug::BUS)?;
        self.devices.push(Device { chassis_nr: Some(1), shpc: Some(true), ..bridge });
        Ok(Some(Bus::new(BusKind::Pci, super::plug::BUS, super::plug::SLOTS)))
    }

    fn extra(&mut self, extra: &Extra, plug: &mut Plug) -> Result<(), VmError> {
        match extra {
            Extra::Disk { id, fd, device, read_only } => self.disk(id, *fd, *device, *read_only, plug),
            Extra::Nic { id, mac, fds, vhost } => {
                let vhost = Some(vhost).filter(|vhost| !vhost.is_empty()).cloned();
                let on = vhost.as_ref().map(|_| true);
                let netdev =
                    Netdev { kind: "tap", id: id.clone(), fds: fds.clone(), vhost: on, vhostfds: vhost };
                self.netdevs.push(netdev);
                let many = fds.len() > 1;
                self.devices.push(Device {
                    netdev: Some(id.clone()),
                    mac: Some(mac.clone()),
                    mq: many.then_some(true),
                    // Two for each queue, one for the configuration, one for control.
                    vectors: many.then(|| fds.len().saturating_mul(2).saturating_add(2)),
                    romfile: Some("").filter(|_| plug.is_pci()),
                    ..plug.device("virtio-net", &format!("{id}-device"))?
                });
                Ok(())
            }
        }
    }

    fn disk(
        &mut self,
        id: &str,
        fd: RawFd,
        device: bool,
        read_only: bool,
        plug: &mut Plug,
    ) -> Result<(), VmError> {
        let node = format!("{AT_BOOT}{id}");
        let filename = self.lend(fd, id);
        let file_driver = super::plug::driver(device);
        let node_name = node.clone();
        self.blockdevs.push(Blockdev { driver: "raw", node_name, read_only, file_driver, filename });
        let device = plug.device("virtio-blk", &format!("{id}-device"))?;
        let serial = Some(id.to_owned());
        self.devices.push(Device { drive: Some(node), serial, ..device });
        Ok(())
    }
}

/// The path by which QEMU opens a descriptor's file once more, where it has no other way to be given one:
/// kernels, initial RAM disks and files in memory are opened by path only.
fn reopened(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

fn machine_type(config: &VmConfig) -> MachineType {
    let without = match config.machine {
        Machine::Q35 => "acpi=off,hpet=off,usb=off,graphics=off,vmport=off,sata=off,smbus=off,i8042=off",
        Machine::Pc => "acpi=off,hpet=off,usb=off,graphics=off,vmport=off,smbus=off,i8042=off",
        // Emulated CPUs have no kvmclock to calibrate by, so the timer stays.
        Machine::Microvm => "acpi=off,isa-serial=off,rtc=on,pit=on,pic=on",
        // The default is an interrupt controller of 2008, which not every host's KVM has.
        Machine::Virt => "acpi=off,gic-version=max",
    };
    MachineType { kind: config.machine.name(), memory_backend: "ram", without }
}

/// The kernel's command line. A guest that panics or reboots ends its VMM: there is nothing to boot into
/// again.
fn append(config: &VmConfig, spec: &VmSpec) -> String {
    let root = root::words(config);
    let share = match config.share_fs {
        ShareFs::Virtiofs => "task.sharefs_type=virtiofs",
        ShareFs::NineP => "task.sharefs_type=9p",
    };
    let level = format!("task.log_level={}", config.task_log_level);
    let (verbose, debug) = if config.debug { ("", "task.debug") } else { ("quiet", "") };
    let x86 = config.machine.architecture() == "x86_64";
    // noreplace-smp: else the kernel of a guest with one processor rewrites thousands of lock prefixes.
    // jent_mod_init: a test of a thousand rounds, more than half of what mini's boot takes, for a source of
    // random numbers that IPsec alone wants, and can do without. Mini for x86 has this word built in, which
    // on aarch64 the line here would replace.
    let kernel = if x86 { "noreplace-smp" } else { "initcall_blacklist=jent_mod_init" };
    let clock = match (config.accel, spec.vcpus) {
        _ if !x86 => "",
        (Accel::Kvm, _) => "",
        // An emulated clock is what it claims to be; finding that out takes the guest 40 ms. One processor
        // can do without the timer of its APIC, whose speed takes a quarter of a second to find out; several
        // need it for short sleeps.
        (Accel::Tcg, 1) => "no_timer_check tsc=reliable nolapic_timer",
        (Accel::Tcg, _) => "no_timer_check tsc=reliable",
    };
    // virtiofsd writes to the guest's memory behind QEMU's back, so emulation would go on executing its
    // translations of what a page held before it was used again. A page that the guest itself has cleared has
    // none.
    let clear = match (config.accel, config.share_fs) {
        (Accel::Tcg, ShareFs::Virtiofs) => "init_on_alloc=1",
        _ => "",
    };
    let words = [
        &root,
        "console=hvc0 reboot=t panic=-1",
        kernel,
        clock,
        clear,
        verbose,
        share,
        &level,
        debug,
        &config.kernel_params,
        &spec.kernel_params,
    ];
    words.map(str::trim).into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

const fn listener(id: &'static str, fd: RawFd) -> Chardev {
    Chardev { kind: "socket", id, fd, server: Some(true), wait: Some(false) }
}

const fn connected(id: &'static str, fd: RawFd) -> Chardev {
    Chardev { kind: "socket", id, fd, server: None, wait: None }
}

/// Plugs devices into a bus.
struct Plug {
    bus: Bus,
}

impl Plug {
    fn new(machine: Machine) -> Self {
        let bus = match machine {
            // Slot 0 is the host bridge, slot 31 the chipset's other half.
            Machine::Q35 => Bus::new(BusKind::Pci, "pcie.0", 30),
            Machine::Pc => {
                let mut bus = Bus::new(BusKind::Pci, "pci.0", 31);
                // The chipset's other half.
                bus.take("piix3");
                bus
            }
            // As many transports as the machine has.
            Machine::Microvm => Bus::new(BusKind::Mmio, "virtio-mmio", 24),
            // Slot 0 is the host bridge.
            Machine::Virt => Bus::new(BusKind::Pci, "pcie.0", 31),
        };
        Self { bus }
    }

    fn is_pci(&self) -> bool {
        self.bus.kind == BusKind::Pci
    }

    /// A virtio device in the next free slot.
    fn device(&mut self, driver: &str, id: &str) -> Result<Device, VmError> {
        let kind = if self.is_pci() { "pci" } else { "device" };
        self.place(&format!("{driver}-{kind}"), id)
    }

    /// A device in the next free slot.
    fn place(&mut self, driver: &str, id: &str) -> Result<Device, VmError> {
        let slot = self.bus.take(id).ok_or_else(|| {
            VmError::Unsupported(format!(
                "plugging {id} in: all {} slots of the bus {} are taken",
                self.bus.slots, self.bus.id
            ))
        })?;
        let mut device = Device { driver: driver.to_owned(), id: id.to_owned(), ..Device::default() };
        if self.is_pci() {
            device.bus = Some(self.bus.id.clone());
            device.addr = Some(format!("{slot:#x}"));
        }
        Ok(device)
    }
}

#[cfg(test)]
mod tests;
