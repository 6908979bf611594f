//! Sysctls that CNI plugins (`tuning` and others) have set in the pod's network namespace. A VM's packets do
//! not pass through that namespace's stack, so the guest gets the same settings.
//!
//! A plugin has set those sysctls that differ from a new namespace's: the kernel gives each namespace the
//! host's own defaults.

use std::{
    collections::BTreeMap,
    fs, io,
    path::Path,
    thread::{self, JoinHandle},
};

use nix::sched::{CloneFlags, unshare};

use super::{NetworkError, read::Link};

/// Sysctls of the thread's network namespace.
const ROOT: &str = "/proc/sys/net";
/// `ipv4/conf/eth0/arp_notify` is as deep as they go.
const MAX_DEPTH: usize = 4;
/// Longest value that is looked at; lists of ports may be longer, and nobody sets these.
const MAX_VALUE: usize = 4096;
/// Most settings of one pod.
const MAX_CHANGED: usize = 256;

/// Families of settings that every link has, between `ipv4` or `ipv6` and the link.
const OF_LINKS: [&str; 2] = ["conf", "neigh"];
/// Settings that links have in common, and the link that every namespace has.
const DEFAULT: &str = "default";
const COMMON: [&str; 3] = ["all", DEFAULT, "lo"];

/// Files that are no settings: each counts, is the link's or a secret, or is made by the kernel at its first
/// use.
const NO_SETTINGS: [&str; 5] =
    ["mtu", "stable_secret", "nf_conntrack_count", "tcp_fastopen_key", "mc_forwarding"];

type Settings = BTreeMap<String, String>;

/// Settings of the thread's network namespace that differ from those of a new one, by name, with dots.
pub(super) fn changed(links: &[Link]) -> Result<Settings, NetworkError> {
    if links.is_empty() {
        return Ok(Settings::new());
    }
    let names: Vec<&str> = links.iter().map(|link| link.interface.name.as_str()).collect();
    let doing = "reading the sysctls of a new network namespace";
    let new = fresh().map_err(NetworkError::io(doing))?;
    let here = settings(&names).map_err(NetworkError::io("reading the pod's sysctls"))?;
    let new = new.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
    let new = new.map_err(NetworkError::io(doing))?;
    let changed = differing(here, &new);
    if changed.len() > MAX_CHANGED {
        return Err(NetworkError::Unsupported(format!(
            "CNI plugins have set {} sysctls in the pod's network namespace, and a guest takes {MAX_CHANGED}; use plugins that \
             set fewer (plugin tuning)",
            changed.len()
        )));
    }
    Ok(changed.into_iter().map(|(path, value)| (dotted(&path), value)).collect())
}

/// Reads those of a namespace that nobody has touched, which ends at once, while the pod's are read.
fn fresh() -> io::Result<JoinHandle<io::Result<Settings>>> {
    let read = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        settings(&[])
    };
    thread::Builder::new().name("new netns".into()).spawn(read)
}

fn differing(here: Settings, new: &Settings) -> Settings {
    let is_new = |path: &str, value: &String| {
        // A link begins with what is default. A setting that a new namespace does not have came with the
        // link's own kind.
        new.get(path).or_else(|| new.get(&of_default(path)?)).is_none_or(|new| new == value)
    };
    here.into_iter().filter(|(path, value)| !is_new(path, value)).collect()
}

/// The default of a link's setting.
fn of_default(path: &str) -> Option<String> {
    match path.split('/').collect::<Vec<_>>().as_slice() {
        [family, kind, _, name] if OF_LINKS.contains(kind) => {
            Some(format!("{family}/{kind}/{DEFAULT}/{name}"))
        }
        _ => None,
    }
}

fn settings(links: &[&str]) -> io::Result<Settings> {
    let mut settings = Settings::new();
    for entry in fs::read_dir(ROOT)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), &entry.file_name().to_string_lossy(), links, &mut settings, 1)?;
        }
    }
    Ok(settings)
}

fn collect(
    folder: &Path,
    prefix: &str,
    links: &[&str],
    settings: &mut Settings,
    depth: usize,
) -> io::Result<()> {
    let per_link = OF_LINKS.iter().any(|kind| prefix.split('/').nth(1) == Some(*kind)) && depth == 2;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{prefix}/{name}");
        if entry.file_type()?.is_dir() {
            let wanted = !per_link || COMMON.contains(&name.as_str()) || links.contains(&name.as_str());
            if wanted && depth < MAX_DEPTH {
                collect(&entry.path(), &path, links, settings, depth + 1)?;
            }
        } else if !NO_SETTINGS.contains(&name.as_str())
            // Some can only be written, some have no value before they were.
            && let Ok(value) = fs::read_to_string(entry.path())
            && value.len() <= MAX_VALUE
        {
            settings.insert(path, value.trim_end().to_owned());
        }
    }
    Ok(())
}

/// `ipv4/conf/eth0.1/arp_notify` is `net.ipv4.conf.eth0/1.arp_notify`.
fn dotted(path: &str) -> String {
    let swapped = path.chars().map(|c| match c {
        '/' => '.',
        '.' => '/',
        c => c,
    });
    "net.".chars().chain(swapped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_what_differs_from_its_default() {
        let settings = |list: &[(&str, &str)]| -> Settings {
            list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let new = settings(&[("ipv4/conf/default/rp_filter", "0"), ("core/somaxconn", "4096")]);
        let here = settings(&[
            ("ipv4/conf/default/rp_filter", "0"),
            ("ipv4/conf/eth0/rp_filter", "2"),
            ("ipv4/conf/eth1/rp_filter", "0"),
            ("core/somaxconn", "500"),
            ("ipv4/new", "1"),
        ]);
        let changed = differing(here, &new);
        assert_eq!(changed, settings(&[("ipv4/conf/eth0/rp_filter", "2"), ("core/somaxconn", "500")]));
    }

    #[test]
    fn a_links_dot_is_a_slash_in_a_name_with_dots() {
        assert_eq!(dotted("ipv4/conf/eth0.1/rp_filter"), "net.ipv4.conf.eth0/1.rp_filter");
    }
}
