//! A master boot record with one partition.
//!
//! A real MBR and no GPT: a GPT's entry array fills bytes 1024 to 17407, and the PFN superblock has to be at
//! 4096.

use crate::pfn::field;

/// Size of a sector, bytes.
pub const SECTOR: u64 = 512;
/// Type of a partition with a Linux file system.
pub const TYPE_LINUX: u8 = 0x83;

const ENTRIES_AT: usize = 446;
const ENTRY_SIZE: usize = 16;
const DISK_ID_AT: usize = 440;
/// Fixed, so that `PARTUUID` is the same in every build: "KUAS" read as little endian.
const DISK_ID: u32 = u32::from_le_bytes(*b"KUAS");

/// One partition, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Partition {
    /// Type byte; 0 for an entry that is not used.
    pub kind: u8,
    /// First sector.
    pub start: u32,
    /// Number of sectors.
    pub sectors: u32,
}

impl Partition {
    /// Returns true if the entry is in use.
    #[must_use]
    pub fn is_used(&self) -> bool {
        *self != Self::default()
    }
}

/// A partition table as read from a sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// True if the sector ends in 55 AA.
    pub signature: bool,
    /// Disk identifier, the first half of `PARTUUID`.
    pub disk_id: u32,
    /// The four entries.
    pub partitions: [Partition; 4],
}

/// The sector of a table whose partition 1 is the one given.
#[must_use]
pub fn encode(partition: Partition) -> [u8; SECTOR as usize] {
    let mut sector = [0; SECTOR as usize];
    // "Beyond cylinder 1023": tells every reader to use the sector numbers.
    const CHS: [u8; 3] = [0xfe, 0xff, 0xff];
    let fields: [(usize, &[u8]); 7] = [
        (DISK_ID_AT, &DISK_ID.to_le_bytes()),
        (ENTRIES_AT + 1, &CHS),
        (ENTRIES_AT + 4, &[partition.kind]),
        (ENTRIES_AT + 5, &CHS),
        (ENTRIES_AT + 8, &partition.start.to_le_bytes()),
        (ENTRIES_AT + 12, &partition.sectors.to_le_bytes()),
        (510, &[0x55, 0xaa]),
    ];
    for (at, bytes) in fields {
        if let Some(place) = sector.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    sector
}

/// Takes a sector apart.
#[must_use]
pub fn decode(sector: &[u8; SECTOR as usize]) -> Table {
    let entry = |index: usize| {
        let at = ENTRIES_AT + index * ENTRY_SIZE;
        let [kind] = field(sector, at + 4);
        Partition {
            kind,
            start: u32::from_le_bytes(field(sector, at + 8)),
            sectors: u32::from_le_bytes(field(sector, at + 12)),
        }
    };
    Table {
        signature: field(sector, 510) == [0x55, 0xaa],
        disk_id: u32::from_le_bytes(field(sector, DISK_ID_AT)),
        partitions: [entry(0), entry(1), entry(2), entry(3)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_reads_back() {
        let partition = Partition { kind: TYPE_LINUX, start: 6144, sectors: 59392 };
        let table = decode(&encode(partition));
        assert!(table.signature);
        assert_eq!(table.partitions[0], partition);
        assert!(table.partitions[1..].iter().all(|p| !p.is_used()));
    }

    #[test]
    fn bytes_are_those_of_the_standard() {
        let sector = encode(Partition { kind: TYPE_LINUX, start: 6144, sectors: 0x0102_0304 });
        assert_eq!(sector[446], 0, "not marked bootable");
        assert_eq!(sector[450], 0x83);
        assert_eq!(sector[454..458], [0, 0x18, 0, 0]);
        assert_eq!(sector[458..462], [4, 3, 2, 1]);
        assert_eq!(sector[510..], [0x55, 0xaa]);
    }
}
