//! The file system that a shared file or folder of the host lies on, so far as the file server does not carry
//! it over: the flags of its mount bind the server's process and not the guest, and files that do not say how
//! long they are read as empty.

use std::path::Path;

use nix::sys::{
    statfs::{FsType, statfs},
    statvfs::FsFlags,
};
use serde_json::{Value, json};

use super::spec::{Bind, Object, SpecError, refused};

/// File systems whose files have a length of 0 whatever is in them (`linux/magic.h`). A guest asks no more
/// bytes of a file than its length. sysfs is none of them: its files say that they are a page long.
const WITHOUT_LENGTHS: [(u32, &str); 11] = [
    (0x9fa0, "procfs"),
    (0x0027_e0eb, "cgroupfs"),
    (0x6367_7270, "cgroup2fs"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xcafe_4a11, "the BPF file system"),
    (0xf97c_ff8c, "selinuxfs"),
    (0x4341_5d53, "smackfs"),
    (0x4249_4e4d, "binfmt_misc"),
    (0x0765_5821, "resctrl"),
];

/// Flags of a mount that confine its users: as statvfs(3) tells them, the option, and the option that lifts
/// it.
const CONFINING: [(FsFlags, &str, &str); 3] = [
    (FsFlags::ST_NOEXEC, "noexec", "exec"),
    (FsFlags::ST_NOSUID, "nosuid", "suid"),
    (FsFlags::ST_NODEV, "nodev", "dev"),
];

/// The file system at a path, as far as it is known.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostMount {
    kind: FsType,
    flags: FsFlags,
}

impl HostMount {
    /// The one of a path.
    ///
    /// # Errors
    /// When the path cannot be reached, or its file system does not answer.
    pub(super) fn of(path: &Path) -> std::io::Result<Self> {
        let found = statfs(path)?;
        Ok(Self { kind: found.filesystem_type(), flags: found.flags() })
    }

    /// Refuses what a container would read as empty, without a word.
    pub(super) fn check(&self, bind: &Bind) -> Result<(), SpecError> {
        // The field's type differs between the C libraries; no magic number has more than 32 bits.
        let magic = u32::try_from(self.kind.0).ok();
        let known = WITHOUT_LENGTHS.iter().find(|known| Some(known.0) == magic);
        let Some((_, name)) = known else { return Ok(()) };
        Err(refused(
            "mounts",
            format!(
                "{} is {} of the host, which is on {name}: its files do not say how long they are, and the VM's file server would \
                 have them read as empty; remove the mount, or run what needs it without a VM (another runtime class)",
                bind.destination,
                bind.source.display()
            ),
        ))
    }

    /// Has the guest confine the users of a mount as the host would, unless the spec itself lifts it, as runc
    /// does.
    pub(super) fn confine(&self, mount: &mut Object) {
        let options = mount.entry("options").or_insert_with(|| json!([]));
        let Some(options) = options.as_array_mut() else { return };
        for (flag, option, lifted) in CONFINING {
            let has = |name: &str| options.iter().any(|given| given.as_str() == Some(name));
            if self.flags.contains(flag) && !has(option) && !has(lifted) {
                options.push(Value::from(option));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::{
        mount::{MsFlags, mount, umount},
        sched::{CloneFlags, unshare},
    };

    use super::*;

    fn bind(source: &str) -> Bind {
        Bind {
            name: "0".into(),
            source: source.into(),
            destination: "/host/x".into(),
            read_only: true,
            recursive: true,
            disk: None,
        }
    }

    #[test]
    fn files_without_a_length_are_refused_by_name_and_others_pass() {
        for (path, name) in [("/proc", "procfs"), ("/proc/meminfo", "procfs"), ("/proc/sys/kernel", "procfs")]
        {
            let error = HostMount::of(Path::new(path)).unwrap().check(&bind(path)).unwrap_err().to_string();
            let expected = format!(
                "mounts of the container's spec: /host/x is {path} of the host, which is on {name}: "
            );
            assert!(error.starts_with(&expected) && error.contains("read as empty"), "{error}");
        }
        for path in ["/sys", "/sys/kernel", "/dev/shm", "/", "/tmp"] {
            if let Ok(found) = HostMount::of(Path::new(path)) {
                found.check(&bind(path)).unwrap();
            }
        }
        for (magic, name) in WITHOUT_LENGTHS {
            let found = HostMount { kind: FsType(magic.into()), flags: FsFlags::empty() };
            let error = found.check(&bind("/x")).unwrap_err().to_string();
            assert!(error.contains(&format!("which is on {name}: ")), "{error}");
        }
    }

    #[test]
    fn what_confines_on_the_host_confines_in_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        // A mount namespace that ends with its thread.
        let read = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let all = [MsFlags::empty(), MsFlags::MS_NOEXEC, MsFlags::MS_NOSUID, MsFlags::MS_NODEV];
            all.into_iter()
                .chain([MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_RDONLY])
                .map(|flags| {
                    mount(Some("t"), &path, Some("tmpfs"), flags, none).unwrap();
                    let found = HostMount::of(&path).unwrap();
                    umount(&path).unwrap();
                    found
                })
                .collect::<Vec<_>>()
        });
        let read = read.join().unwrap();
        let options = |found: &HostMount, given: Value| {
            let mut spec = json!({"destination": "/v"});
            if !given.is_null() {
                spec["options"] = given;
            }
            found.confine(spec.as_object_mut().unwrap());
            spec["options"].clone()
        };
        for (found, expected) in read.iter().zip([
            json!(["rbind"]),
            json!(["rbind", "noexec"]),
            json!(["rbind", "nosuid"]),
            json!(["rbind", "nodev"]),
            json!(["rbind", "noexec", "nosuid"]),
        ]) {
            assert_eq!(options(found, json!(["rbind"])), expected);
        }
        let both = &read[4];
        assert_eq!(options(both, Value::Null), json!(["noexec", "nosuid"]));
        assert_eq!(options(both, json!(["nosuid", "ro"])), json!(["nosuid", "ro", "noexec"]), "said once");
        assert_eq!(
            options(both, json!(["rw", "exec"])),
            json!(["rw", "exec", "nosuid"]),
            "lifted by the spec"
        );
        assert_eq!(options(both, json!(["rw", "suid", "exec"])), json!(["rw", "suid", "exec"]));
    }
}
