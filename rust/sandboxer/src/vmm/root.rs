//! The guest's root on the kernel's command line: which device, which file system, and the root hash that
//! vouches for it.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use serde::Deserialize;

use super::{Root, VmConfig};

/// Offset of the file system in an image, in bytes: see `kuasar-image`.
const FS_OFFSET: u64 = 3 << 20;
const BLOCK: u64 = 4096;

/// A root that dm-verity checks block by block, as `kuasar-image build --verity` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verity {
    /// SHA-256 of the hash tree's root, 64 hexadecimal digits.
    pub root_hash: String,
    /// Blocks of 4096 bytes that the tree covers.
    pub data_blocks: u64,
}

impl Verity {
    /// Its fault, as the end of a sentence that begins with the name of the key.
    pub(crate) fn problem(&self) -> Option<(&'static str, String)> {
        let digits = self.root_hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !digits || self.root_hash.len() != 64 {
            let why = format!("is {:?}, a SHA-256 has 64 hexadecimal digits", self.root_hash);
            return Some(("hypervisor.verity.root_hash", why));
        }
        (self.data_blocks == 0)
            .then(|| ("hypervisor.verity.data_blocks", "is 0, a root has at least one block".into()))
    }

    /// Returns true if the superblock of a hash tree lies where this says it does.
    pub(super) fn is_in(&self, image: &Path) -> std::io::Result<bool> {
        let at = self.data_blocks.saturating_mul(BLOCK).saturating_add(FS_OFFSET);
        let mut magic = [0; 8];
        match File::open(image)?.read_exact_at(&mut magic, at) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(false),
            read => read.map(|()| magic == *b"verity\0\0"),
        }
    }

    /// The device that the kernel itself makes before it mounts its root. A block that differs is a panic: a
    /// guest that went on without it would do something else than it was made for.
    fn device(&self, disk: &str) -> String {
        let Self { root_hash, data_blocks } = self;
        let (sectors, tree) = (data_blocks.saturating_mul(8), data_blocks.saturating_add(1));
        format!(
            "dm-mod.create=\"root,,,ro,0 {sectors} verity 1 {disk} {disk} 4096 4096 {data_blocks} {tree} sha256 \
             {root_hash} - 1 panic_on_corruption\""
        )
    }
}

/// The words that name the root, whichever hypervisor brings it.
#[must_use]
pub fn words(config: &VmConfig) -> String {
    let (disk, dax) = match config.root {
        Root::Pmem => ("/dev/pmem0p1", " rootflags=dax"),
        Root::Blk => ("/dev/vda1", ""),
        Root::Initrd => return String::new(),
    };
    let fs = config.image.as_deref().map_or("ext4", file_system);
    match &config.verity {
        // dm-verity reads what it checks: such a root has no DAX.
        Some(verity) => format!("{} root=/dev/dm-0 ro rootfstype={fs}", verity.device(disk)),
        None => format!("root={disk}{dax} ro rootfstype={fs}"),
    }
}

/// Name of an image's file system; ext4 if it is not known. A guest says itself what it cannot mount.
fn file_system(image: &Path) -> &'static str {
    crate::file_system::of(image, FS_OFFSET).ok().flatten().unwrap_or("ext4")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(at: u64, magic: &[u8]) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4 << 20).unwrap();
        image.as_file().write_all_at(magic, at).unwrap();
        image
    }

    #[test]
    fn the_file_system_is_what_the_image_says() {
        for (at, magic, expected) in [
            (1024, &[0xe2, 0xe1, 0xf5, 0xe0][..], "erofs"),
            (0, b"XFSB", "xfs"),
            (1024 + 56, &[0x53, 0xef], "ext4"),
            (0, b"", "ext4"),
        ] {
            assert_eq!(file_system(image(FS_OFFSET + at, magic).path()), expected);
        }
        assert_eq!(file_system(Path::new("/nonexistent")), "ext4");
    }

    #[test]
    fn the_kernel_is_told_of_data_and_tree() {
        let verity = Verity { root_hash: "ab".repeat(32), data_blocks: 100 };
        assert_eq!(
            verity.device("/dev/vda1"),
            format!(
                "dm-mod.create=\"root,,,ro,0 800 verity 1 /dev/vda1 /dev/vda1 4096 4096 100 101 sha256 {} - 1 \
                 panic_on_corruption\"",
                "ab".repeat(32)
            )
        );
        assert_eq!(verity.problem(), None);
    }

    #[test]
    fn a_tree_is_looked_for_where_the_data_end() {
        let image = image(FS_OFFSET + 100 * BLOCK, b"verity\0\0");
        let found =
            |data_blocks| Verity { root_hash: String::new(), data_blocks }.is_in(image.path()).unwrap();
        assert_eq!([100, 99, 1 << 20, u64::MAX].map(found), [true, false, false, false]);
    }
}
