//! Whole command lines.

use kuasar_common::param::ToCmdLineParams;

use super::*;

fn config() -> VmConfig {
    VmConfig {
        path: "qemu-system-x86_64".into(),
        accel: Accel::Tcg,
        machine: Machine::Q35,
        cpu: None,
        kernel: "/k/vmlinux".into(),
        image: None,
        initrd: Some("/k/kuasar.initrd".into()),
        root: Root::Initrd,
        verity: None,
        kernel_params: String::new(),
        share_fs: ShareFs::NineP,
        virtiofsd: "virtiofsd".into(),
        file_server: crate::vmm::FileServer::default(),
        vsock: crate::vmm::VsockKind::Vhost,
        vhost_device_vsock: "vhost-device-vsock".into(),
        free_page_reporting: true,
        task_log_level: "info".into(),
        debug: false,
    }
}

fn files(image: Option<RawFd>, initrd: Option<RawFd>, kvm: Option<RawFd>) -> Files {
    Files { kernel: 20, initrd, image, kvm }
}

fn without_companions(files: Files) -> Inherited {
    let vsock = VsockFd::Vhost { fd: 5, cid: 77 };
    Inherited { qmp: 3, events: 9, console: 4, virtiofs: None, vsock, files }
}

fn spec() -> VmSpec {
    VmSpec {
        pod: "p1".into(),
        dir: "/run/p1".into(),
        netns: None,
        cgroup_procs: Vec::new(),
        vcpus: 2,
        memory_mib: 256,
        devices: Vec::new(),
        kernel_params: String::new(),
        user: None,
        oom_score_adj: 0,
    }
}

fn argv(config: &VmConfig, spec: &VmSpec, inherited: &Inherited, extras: &[Extra]) -> (String, Bus) {
    let (line, buses) = CommandLine::new(config, spec, inherited, extras).unwrap();
    (line.to_cmdline_params("-").join(" "), buses.into_iter().next().unwrap())
}

#[test]
fn pmem_virtiofs_vhost_user_and_a_card() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("kuasar,1.img");
    std::fs::File::create(&image).unwrap().set_len(6 << 20).unwrap();
    let config = VmConfig {
        image: Some(image.clone()),
        root: Root::Pmem,
        share_fs: ShareFs::Virtiofs,
        kernel_params: " loglevel=1 ".into(),
        ..config()
    };
    let spec = VmSpec { kernel_params: "task.x=1".into(), ..spec() };
    let vsock = VsockFd::VhostUser { fd: 6 };
    let files = files(Some(21), None, None);
    let inherited = Inherited { qmp: 3, events: 9, console: 4, virtiofs: Some(5), vsock, files };
    let extras = [Extra::Nic {
        id: "net2".into(),
        mac: "02:00:00:00:00:05".into(),
        fds: vec![7, 8],
        vhost: vec![10, 11],
    }];
    let (argv, bus) = argv(&config, &spec, &inherited, &extras);
    assert_eq!(
        argv,
        "-name guest=sandbox-p1,debug-threads=on -no-user-config -nodefaults -no-reboot -display none \
             -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
             -machine q35,memory-backend=ram,acpi=off,hpet=off,usb=off,graphics=off,vmport=off,sata=off,\
             smbus=off,i8042=off -accel tcg -global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off -cpu max -smp cpus=2,sockets=2,cores=1,threads=1 \
             -m 256M,slots=1,maxmem=1280M -kernel /proc/self/fd/20 \
             -append root=/dev/pmem0p1 rootflags=dax ro rootfstype=ext4 console=hvc0 reboot=t panic=-1 noreplace-smp \
             no_timer_check tsc=reliable init_on_alloc=1 quiet task.sharefs_type=virtiofs task.log_level=info loglevel=1 task.x=1 \
             -object memory-backend-memfd,id=ram,size=256M,share=on \
             -object memory-backend-file,id=image,mem-path=/proc/self/fd/21,size=6291456,share=on,readonly=on \
             -chardev socket,id=qmp,fd=3,server=on,wait=off -chardev socket,id=events,fd=9,server=on,wait=off -chardev socket,id=vsock,fd=6 \
             -chardev socket,id=share,fd=5 -chardev socket,id=console,fd=4,server=on,wait=off \
             -mon chardev=qmp,mode=control -mon chardev=events,mode=control \
             -netdev tap,id=net2,fds=7:8,vhost=on,vhostfds=10:11 \
             -device virtio-pmem-pci,id=root,bus=pcie.0,addr=0x1,memdev=image \
             -device vhost-user-vsock-pci,id=vsock,bus=pcie.0,addr=0x2,chardev=vsock \
             -device vhost-user-fs-pci,id=share-device,bus=pcie.0,addr=0x3,chardev=share,tag=kuasar \
             -device virtio-serial-pci,id=serial,bus=pcie.0,addr=0x4 -device virtconsole,id=hvc0,chardev=console \
             -device virtio-rng-pci,id=rng,bus=pcie.0,addr=0x5 \
             -device virtio-net-pci,id=net2-device,bus=pcie.0,addr=0x6,netdev=net2,mac=02:00:00:00:00:05,mq=on,\
             vectors=6,romfile= -device virtio-balloon-pci,id=balloon,bus=pcie.0,addr=0x7,free-page-reporting=on \
             -device pci-bridge,id=plug,bus=pcie.0,addr=0x8,chassis_nr=1,shpc=on"
    );
    assert_eq!(bus.used.get(&6).map(String::as_str), Some("net2-device"));
}

#[test]
fn initrd_9p_and_the_kernels_vsock() {
    let config = VmConfig { accel: Accel::Kvm, debug: true, ..config() };
    let inherited = without_companions(files(None, Some(21), Some(22)));
    let (argv, _) = argv(&config, &VmSpec { vcpus: 1, ..spec() }, &inherited, &[]);
    assert_eq!(
        argv,
        "-name guest=sandbox-p1,debug-threads=on -no-user-config -nodefaults -no-reboot -display none \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -add-fd fd=22,set=1,opaque=kvm \
         -machine q35,memory-backend=ram,acpi=off,hpet=off,usb=off,graphics=off,vmport=off,sata=off,\
         smbus=off,i8042=off -accel kvm,device=/dev/fdset/1 -global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off -cpu host -smp cpus=1,sockets=1,cores=1,threads=1 -m 256M -kernel /proc/self/fd/20 \
         -initrd /proc/self/fd/21 -append console=hvc0 reboot=t panic=-1 noreplace-smp task.sharefs_type=9p task.log_level=info \
         task.debug -object memory-backend-memfd,id=ram,size=256M,share=on \
         -chardev socket,id=qmp,fd=3,server=on,wait=off -chardev socket,id=events,fd=9,server=on,wait=off -chardev socket,id=console,fd=4,server=on,wait=off \
         -mon chardev=qmp,mode=control -mon chardev=events,mode=control -fsdev local,id=share,path=/run/p1/shared,security_model=none,multidevs=remap \
         -device vhost-vsock-pci,id=vsock,bus=pcie.0,addr=0x1,guest-cid=77,vhostfd=5 \
         -device virtio-9p-pci,id=share-device,bus=pcie.0,addr=0x2,fsdev=share,mount_tag=kuasar \
         -device virtio-serial-pci,id=serial,bus=pcie.0,addr=0x3 -device virtconsole,id=hvc0,chardev=console \
         -device virtio-rng-pci,id=rng,bus=pcie.0,addr=0x4 \
         -device virtio-balloon-pci,id=balloon,bus=pcie.0,addr=0x5,free-page-reporting=on \
         -device pci-bridge,id=plug,bus=pcie.0,addr=0x6,chassis_nr=1,shpc=on"
    );
}

#[test]
fn other_machines_and_a_disk() {
    let config = |machine| VmConfig {
        machine,
        image: Some("/k/kuasar.img".into()),
        root: Root::Blk,
        cpu: Some("Haswell".into()),
        ..config()
    };
    let inherited = without_companions(files(Some(21), None, None));
    let extras = [
        Extra::Disk { id: "d0".into(), fd: 30, device: true, read_only: false },
        Extra::Nic { id: "net2".into(), mac: "02:00:00:00:00:05".into(), fds: vec![6], vhost: vec![] },
    ];
    let (pc, _) = argv(&config(Machine::Pc), &spec(), &inherited, &extras);
    for part in [
        "-machine pc,memory-backend=ram,acpi=off",
        "-cpu Haswell ",
        "-append root=/dev/vda1 ro rootfstype=ext4 console=hvc0",
        "-add-fd fd=21,set=1,opaque=root -add-fd fd=30,set=2,opaque=d0 -machine",
        "-blockdev driver=raw,node-name=boot-root,read-only=on,file.driver=file,file.filename=/dev/fdset/1",
        "-blockdev driver=raw,node-name=boot-d0,read-only=off,file.driver=host_device,file.filename=/dev/fdset/2",
        "-device virtio-blk-pci,id=root-device,bus=pci.0,addr=0x2,drive=boot-root",
        "-device virtio-blk-pci,id=d0-device,bus=pci.0,addr=0x7,drive=boot-d0",
        "-netdev tap,id=net2,fds=6",
        "-global PIIX4_PM.acpi-pci-hotplug-with-bridge-support=off ",
        "-device virtio-balloon-pci,id=balloon,bus=pci.0,addr=0x9,free-page-reporting=on",
        "-device pci-bridge,id=plug,bus=pci.0,addr=0xa,chassis_nr=1,shpc=on",
        "-device virtio-net-pci,id=net2-device,bus=pci.0,addr=0x8,netdev=net2,mac=02:00:00:00:00:05,romfile=",
    ] {
        assert!(pc.contains(part), "{part} in {pc}");
    }
    let (microvm, _) = argv(&config(Machine::Microvm), &spec(), &inherited, &extras);
    assert!(microvm.contains("-machine microvm,memory-backend=ram,"), "{microvm}");
    assert!(microvm.contains("-device virtio-blk-device,id=root-device,drive=boot-root"), "{microvm}");
    assert!(!microvm.contains("pci") && !microvm.contains("romfile"), "{microvm}");
    assert!(microvm.contains("-device virtio-balloon-device,id=balloon,free-page-reporting=on"), "{microvm}");
    let without = VmConfig { free_page_reporting: false, ..config(Machine::Microvm) };
    assert!(!argv(&without, &spec(), &inherited, &extras).0.contains("balloon"));
}

#[test]
fn the_machine_of_aarch64() {
    let config = VmConfig {
        machine: Machine::Virt,
        kernel: "/k/Image".into(),
        image: Some("/k/kuasar.img".into()),
        root: Root::Blk,
        ..config()
    };
    let inherited = without_companions(files(Some(21), None, None));
    let (virt, bus) = argv(&config, &spec(), &inherited, &[]);
    for part in [
        "-machine virt,memory-backend=ram,acpi=off,gic-version=max -accel tcg -cpu max -smp cpus=2",
        "-append root=/dev/vda1 ro rootfstype=ext4 console=hvc0 reboot=t panic=-1 \
         initcall_blacklist=jent_mod_init quiet task.sharefs_type=9p",
        "-device virtio-blk-pci,id=root-device,bus=pcie.0,addr=0x1,drive=boot-root",
        "-device virtio-balloon-pci,id=balloon,bus=pcie.0,addr=0x6,free-page-reporting=on",
        "-device pci-bridge,id=plug,bus=pcie.0,addr=0x7,chassis_nr=1,shpc=on",
    ] {
        assert!(virt.contains(part), "{part} in {virt}");
    }
    assert!(!virt.contains("-global"), "{virt}");
    assert_eq!(bus.slots, 31);
}

#[test]
fn a_full_bus_is_an_error() {
    let inherited = without_companions(files(None, Some(21), None));
    let disk = |n: i32| Extra::Disk { id: format!("d{n}"), fd: 30, device: true, read_only: false };
    let disks: Vec<_> = (0..27).map(disk).collect();
    let error = CommandLine::new(&config(), &spec(), &inherited, &disks).unwrap_err().to_string();
    assert_eq!(error, "plugging d26-device in: all 30 slots of the bus pcie.0 are taken");
}

#[test]
fn a_root_that_is_checked_is_a_device_of_the_kernel_s_own() {
    let verity = Some(crate::vmm::Verity { root_hash: "5a".repeat(32), data_blocks: 3 });
    let line = append(&VmConfig { root: Root::Pmem, verity, ..config() }, &spec());
    assert!(line.starts_with(
        "dm-mod.create=\"root,,,ro,0 24 verity 1 /dev/pmem0p1 /dev/pmem0p1 4096 4096 3 4 sha256 5a5a"
    ));
    assert!(line.contains(" - 1 panic_on_corruption\" root=/dev/dm-0 ro rootfstype=ext4 console="), "{line}");
    assert!(!line.contains("dax"), "{line}");
}
