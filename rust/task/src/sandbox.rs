//! Turns a VM into a certain pod: names, sysctls, `/dev/shm`.

use std::{
    ffi::CString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::{
    mount::{MountFlags, mount_bind, mount_remount},
    system::sethostname,
};

use crate::error::TaskError;

/// File that gets the pod's resolver configuration.
const RESOLV_CONF: &str = "/run/kuasar/resolv.conf";
/// Path at which programs of the guest look for it.
const ETC_RESOLV_CONF: &str = "/etc/resolv.conf";

/// Sets the VM's host name. Empty leaves it.
///
/// # Errors
/// The kernel's, for instance when it is longer than 64 bytes.
pub fn set_hostname(name: &str) -> Result<(), TaskError> {
    if name.is_empty() {
        return Ok(());
    }
    sethostname(name.as_bytes()).map_err(TaskError::io(format!("setting the host name to {name:?}")))
}

/// Puts the pod's resolver configuration where programs look. The root file system may be read-only: the file
/// is on a tmpfs, and bound over the one in the image.
///
/// # Errors
/// When it cannot be written. An image without the file is no error: nothing in it resolves names then.
pub fn set_resolv_conf(text: &str) -> Result<(), TaskError> {
    let doing = || format!("writing {RESOLV_CONF}");
    fs::write(RESOLV_CONF, text).map_err(TaskError::io(doing()))?;
    let etc = Path::new(ETC_RESOLV_CONF);
    if is_same(etc, Path::new(RESOLV_CONF)) {
        // The image points it to ours, or it was bound before.
        return Ok(());
    }
    let bound = if etc.exists() { mount_bind(RESOLV_CONF, etc) } else { Err(rustix::io::Errno::NOENT) };
    if let Err(error) = bound {
        let linked = std::os::unix::fs::symlink(RESOLV_CONF, etc);
        linked.unwrap_or_else(|_| log::info!("binding {RESOLV_CONF} over {ETC_RESOLV_CONF}: {error}"));
    }
    Ok(())
}

fn is_same(one: &Path, other: &Path) -> bool {
    let (Ok(one), Ok(other)) = (fs::metadata(one), fs::metadata(other)) else { return false };
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Sets sysctls: those that set others with them come first.
///
/// # Errors
/// At the first that cannot be set.
pub fn set_sysctls<'a>(sysctls: impl IntoIterator<Item = (&'a String, &'a String)>) -> Result<(), TaskError> {
    let mut sysctls: Vec<_> = sysctls.into_iter().collect();
    sysctls.sort_by_key(|(name, value)| (turn(name), *name, *value));
    for (name, value) in sysctls {
        let path = sysctl_path(name)?;
        fs::write(&path, value).map_err(TaskError::io(format!("setting sysctl {name} to {value:?}")))?;
    }
    Ok(())
}

/// Forwarding sets others back to what suits it, and what is set for all links is set for each.
fn turn(name: &str) -> (bool, usize) {
    let parts: Vec<&str> = name.split(['.', '/']).collect();
    let forwards = matches!(parts.last(), Some(&("ip_forward" | "forwarding")));
    let scope = match parts.as_slice() {
        ["net", _, "conf" | "neigh", "all", ..] => 0,
        ["net", _, "conf" | "neigh", "default", ..] => 1,
        ["net", _, "conf" | "neigh", ..] => 2,
        _ => 0,
    };
    (!forwards, scope)
}

/// The file of a sysctl, named with dots or with slashes; the first of either in a name says which separates.
/// The other one then stands for the separator in a link's name, as in `net/ipv4/conf/eth0.1/rp_filter`.
fn sysctl_path(name: &str) -> Result<PathBuf, TaskError> {
    let separator = name.find(['.', '/']).and_then(|at| name.as_bytes().get(at)).copied();
    let relative = if separator == Some(b'.') {
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect()
    } else {
        name.to_owned()
    };
    let fine = !relative.is_empty()
        && relative.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !relative.contains(char::is_whitespace);
    if !fine {
        return Err(TaskError::InvalidArgument(format!("{name:?} is not the name of a sysctl")));
    }
    Ok(Path::new("/proc/sys").join(relative))
}

/// Sets the size of `/dev/shm` in bytes; 0 leaves it at 64 MiB.
///
/// # Errors
/// The kernel's.
pub fn set_shm_size(bytes: u64) -> Result<(), TaskError> {
    if bytes == 0 {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let data = CString::new(format!("mode=1777,size={bytes}")).unwrap_or_default();
    mount_remount("/dev/shm", flags, data.as_c_str())
        .map_err(TaskError::io(format!("setting the size of /dev/shm to {bytes} bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_that_set_others_come_first() {
        let mut names = [
            "net.ipv4.conf.all.rp_filter",
            "net.ipv4.conf.a0.rp_filter",
            "net/ipv4/conf/eth0.1/forwarding",
            "net.ipv4.ip_forward",
            "net.ipv4.conf.default.rp_filter",
            "net.core.somaxconn",
        ];
        names.sort_by_key(|name| (turn(name), *name));
        assert_eq!(
            names,
            [
                "net.ipv4.ip_forward",
                "net/ipv4/conf/eth0.1/forwarding",
                "net.core.somaxconn",
                "net.ipv4.conf.all.rp_filter",
                "net.ipv4.conf.default.rp_filter",
                "net.ipv4.conf.a0.rp_filter",
            ]
        );
    }

    #[test]
    fn sysctl_names_become_paths() {
        for (name, path) in [
            ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            ("net/ipv4/conf/eth0.1/rp_filter", "/proc/sys/net/ipv4/conf/eth0.1/rp_filter"),
            ("net.ipv4.conf.eth0/1.rp_filter", "/proc/sys/net/ipv4/conf/eth0.1/rp_filter"),
        ] {
            assert_eq!(sysctl_path(name).unwrap(), Path::new(path));
        }
        for bad in ["", "..", "net/../../etc/passwd", "/etc/passwd", "net..ipv4", "a b"] {
            let error = sysctl_path(bad).unwrap_err().to_string();
            assert!(error.ends_with("is not the name of a sysctl"), "{error}");
        }
    }
}
