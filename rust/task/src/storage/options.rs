//! The words of a storage's options, sorted: what the kernel keeps for a mount, how it propagates, what the
//! file system knows.

use rustix::mount::{MountAttrFlags, MountPropagationFlags};

/// The options of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Attributes that the mount gets (`MOUNT_ATTR_*` of `linux/mount.h`).
    pub attributes: MountAttrFlags,
    /// Attributes that the mount must not have.
    pub cleared: MountAttrFlags,
    /// `rro` and the like: mounts below get the attributes, too.
    pub recursive: bool,
    /// Mounts below the source come along.
    pub recursive_bind: bool,
    /// Propagation of mounts below it; None leaves the kernel's choice.
    pub propagation: Option<MountPropagationFlags>,
    /// Options that only the file system knows, in the order given: name, and value if there is one.
    pub data: Vec<(String, Option<String>)>,
}

/// Words for an attribute: the one that sets it, the one that clears it.
const ATTRIBUTES: [(&str, &str, MountAttrFlags); 6] = [
    ("ro", "rw", MountAttrFlags::MOUNT_ATTR_RDONLY),
    ("nosuid", "suid", MountAttrFlags::MOUNT_ATTR_NOSUID),
    ("nodev", "dev", MountAttrFlags::MOUNT_ATTR_NODEV),
    ("noexec", "exec", MountAttrFlags::MOUNT_ATTR_NOEXEC),
    ("nodiratime", "diratime", MountAttrFlags::MOUNT_ATTR_NODIRATIME),
    ("nosymfollow", "symfollow", MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
];
/// When reading changes a file's time of access: one of these.
const ACCESS_TIMES: [(&str, MountAttrFlags); 3] = [
    ("relatime", MountAttrFlags::MOUNT_ATTR_RELATIME),
    ("noatime", MountAttrFlags::MOUNT_ATTR_NOATIME),
    ("strictatime", MountAttrFlags::MOUNT_ATTR_STRICTATIME),
];
const PROPAGATION: [(&str, MountPropagationFlags); 4] = [
    ("private", MountPropagationFlags::PRIVATE),
    ("shared", MountPropagationFlags::SHARED),
    ("slave", MountPropagationFlags::DOWNSTREAM),
    ("unbindable", MountPropagationFlags::UNBINDABLE),
];

impl Options {
    /// Sorts words; a later one wins over an earlier one that says the opposite.
    #[must_use]
    pub fn parse(words: &[String]) -> Self {
        let mut options = Self {
            attributes: MountAttrFlags::empty(),
            cleared: MountAttrFlags::empty(),
            recursive: false,
            recursive_bind: false,
            propagation: None,
            data: Vec::new(),
        };
        words.iter().flat_map(|words| words.split(',')).for_each(|word| options.take(word));
        options
    }

    fn take(&mut self, word: &str) {
        match word {
            "" | "defaults" | "bind" => {}
            "rbind" => self.recursive_bind = true,
            "rro" => {
                self.take("ro");
                (self.recursive, self.recursive_bind) = (true, true);
            }
            word if self.attribute(word) || self.access_time(word) || self.propagates(word) => {}
            word => {
                let (name, value) = match word.split_once('=') {
                    Some((name, value)) => (name, Some(value.to_owned())),
                    None => (word, None),
                };
                self.data.push((name.to_owned(), value));
            }
        }
    }

    fn attribute(&mut self, word: &str) -> bool {
        let Some((set, _, flag)) = ATTRIBUTES.iter().find(|(set, clear, _)| [*set, *clear].contains(&word))
        else {
            return false;
        };
        self.attributes.set(*flag, *set == word);
        self.cleared.set(*flag, *set != word);
        true
    }

    fn access_time(&mut self, word: &str) -> bool {
        let Some((_, flag)) = ACCESS_TIMES.iter().find(|(name, _)| *name == word) else { return false };
        // One field of several bits: the kernel wants all of them cleared when one is set.
        self.cleared |= MountAttrFlags::MOUNT_ATTR__ATIME;
        self.attributes = self.attributes.difference(MountAttrFlags::MOUNT_ATTR__ATIME) | *flag;
        true
    }

    fn propagates(&mut self, word: &str) -> bool {
        let find = |word: &str| PROPAGATION.iter().find(|(name, _)| *name == word).map(|(_, flag)| *flag);
        let recursive = || find(word.strip_prefix('r')?).map(|flag| flag | MountPropagationFlags::REC);
        let found = find(word).or_else(recursive);
        self.propagation = found.or(self.propagation);
        found.is_some()
    }

    /// Nothing is to be written through the mount.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    /// Takes an option of the file system's out, by name.
    pub fn take_data(&mut self, name: &str) -> Option<String> {
        let at = self.data.iter().position(|(other, _)| other == name)?;
        self.data.remove(at).1
    }
}

/// Bytes of a size as options have it: a number, and K, M or G for powers of 1024 (`Ki`, `Mi`, `Gi` are the
/// same).
#[must_use]
pub fn size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    let shift = match unit {
        "" => 0,
        "k" | "K" | "Ki" => 10,
        "m" | "M" | "Mi" => 20,
        "g" | "G" | "Gi" => 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &str) -> Options {
        Options::parse(&words.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn words_are_sorted() {
        let sorted = options("ro nosuid,noexec relatime rslave size=64m huge=always dax defaults");
        let wanted = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        assert_eq!(sorted.attributes, wanted);
        assert_eq!(sorted.cleared, MountAttrFlags::MOUNT_ATTR__ATIME);
        assert_eq!(sorted.propagation, Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC));
        let data = [("size", Some("64m")), ("huge", Some("always")), ("dax", None)];
        assert_eq!(sorted.data, data.map(|(name, value)| (name.to_owned(), value.map(str::to_owned))));
        assert!(!sorted.recursive);
    }

    #[test]
    fn the_last_word_wins() {
        assert!(!options("ro rw").read_only());
        assert!(options("rw ro").read_only());
        let both = options("noatime strictatime private rshared");
        assert_eq!(both.attributes, MountAttrFlags::MOUNT_ATTR_STRICTATIME);
        assert_eq!(both.propagation, Some(MountPropagationFlags::SHARED | MountPropagationFlags::REC));
        // What begins with an r is not always recursive.
        assert_eq!(
            options("rprivate").propagation.unwrap().bits() & MountPropagationFlags::PRIVATE.bits(),
            1 << 18
        );
        assert_eq!(options("rsize=1").data.len(), 1);
    }

    #[test]
    fn read_only_goes_down_when_asked() {
        let all = options("rro");
        assert!(all.read_only() && all.recursive && all.recursive_bind);
        let one = options("rbind ro");
        assert!(one.read_only() && !one.recursive && one.recursive_bind);
    }

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("2Mi", 2 << 20), ("2M", 2 << 20), ("1G", 1 << 30), ("3k", 3072)]
        {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
        for bad in ["", "M", "1.5G", "10%", "-1", "99999999999999999999", "99999999999999G"] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }
}
