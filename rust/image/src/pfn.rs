//! The PFN superblock: 4096 bytes at offset 4096 of a pmem namespace, little endian.
//!
//! With it, Linux (`drivers/nvdimm/pfn_devs.c`, `nd_pfn_validate`) turns the namespace into a block device
//! with DAX whose first byte is the namespace's byte `dataoff`. Offsets of the fields are those of the
//! kernel's `struct nd_pfn_sb`.

/// Offset of the superblock in the file, bytes.
pub const OFFSET: u64 = 4096;
/// Size of the superblock, bytes.
pub const SIZE: usize = 4096;
/// First bytes of the superblock.
pub const SIGNATURE: &[u8; 16] = b"NVDIMM_PFN_INFO\0";
/// The mode that keeps the kernel's page descriptors in guest RAM, so that the file itself is never written.
pub const MODE_RAM: u32 = 1;

const CHECKSUM_AT: usize = SIZE - 8;

/// The fields of the superblock that are not padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// [`SIGNATURE`] in a valid one.
    pub signature: [u8; 16],
    /// UUID of this instance; zero here, since a virtio-pmem namespace has none.
    pub uuid: [u8; 16],
    /// UUID of the namespace; the kernel compares it, and that of virtio-pmem is zero.
    pub parent_uuid: [u8; 16],
    /// Reserved by the kernel.
    pub flags: u32,
    /// Major version.
    pub version_major: u16,
    /// Minor version; `align` counts from 2 on, `start_pad` and `end_trunc` from 1 on.
    pub version_minor: u16,
    /// Offset of the data, bytes from the namespace's start.
    pub dataoff: u64,
    /// Number of page frames described, 0 in mode RAM.
    pub npfns: u64,
    /// 0 none, 1 RAM, 2 pmem: where the page descriptors live.
    pub mode: u32,
    /// Bytes left out at the start.
    pub start_pad: u32,
    /// Bytes left out at the end.
    pub end_trunc: u32,
    /// Alignment of the mapping, bytes.
    pub align: u32,
    /// Fletcher-64 over the block with this field zero.
    pub checksum: u64,
}

impl Superblock {
    /// The superblock this project writes, checksum included.
    #[must_use]
    pub fn new(dataoff: u64, align: u32) -> Self {
        let mut sb = Self {
            signature: *SIGNATURE,
            uuid: [0; 16],
            parent_uuid: [0; 16],
            flags: 0,
            version_major: 0,
            version_minor: 2,
            dataoff,
            npfns: 0,
            mode: MODE_RAM,
            start_pad: 0,
            end_trunc: 0,
            align,
            checksum: 0,
        };
        sb.checksum = checksum(&sb.encode());
        sb
    }

    /// The block as it is stored. The checksum field is written as it is, not computed.
    #[must_use]
    pub fn encode(&self) -> [u8; SIZE] {
        let mut block = [0; SIZE];
        let fields: [(usize, &[u8]); 13] = [
            (0, &self.signature),
            (16, &self.uuid),
            (32, &self.parent_uuid),
            (48, &self.flags.to_le_bytes()),
            (52, &self.version_major.to_le_bytes()),
            (54, &self.version_minor.to_le_bytes()),
            (56, &self.dataoff.to_le_bytes()),
            (64, &self.npfns.to_le_bytes()),
            (72, &self.mode.to_le_bytes()),
            (76, &self.start_pad.to_le_bytes()),
            (80, &self.end_trunc.to_le_bytes()),
            (84, &self.align.to_le_bytes()),
            (CHECKSUM_AT, &self.checksum.to_le_bytes()),
        ];
        for (at, bytes) in fields {
            if let Some(place) = block.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        }
        block
    }

    /// Takes a block apart. Any 4096 bytes have a meaning; whether it is a good one is [`crate::report`]'s
    /// business.
    #[must_use]
    pub fn decode(block: &[u8; SIZE]) -> Self {
        Self {
            signature: field(block, 0),
            uuid: field(block, 16),
            parent_uuid: field(block, 32),
            flags: u32::from_le_bytes(field(block, 48)),
            version_major: u16::from_le_bytes(field(block, 52)),
            version_minor: u16::from_le_bytes(field(block, 54)),
            dataoff: u64::from_le_bytes(field(block, 56)),
            npfns: u64::from_le_bytes(field(block, 64)),
            mode: u32::from_le_bytes(field(block, 72)),
            start_pad: u32::from_le_bytes(field(block, 76)),
            end_trunc: u32::from_le_bytes(field(block, 80)),
            align: u32::from_le_bytes(field(block, 84)),
            checksum: u64::from_le_bytes(field(block, CHECKSUM_AT)),
        }
    }
}

/// The kernel's `nd_fletcher64` over the block's 32 bit little-endian words, its checksum field taken as
/// zero.
#[must_use]
pub fn checksum(block: &[u8; SIZE]) -> u64 {
    let (mut low, mut high) = (0_u32, 0_u64);
    let (body, _) = block.split_at(CHECKSUM_AT);
    // The two words of the checksum itself are zero: they add nothing to `low`, but `high` still sums `low`
    // twice.
    for word in body.as_chunks::<4>().0.iter().chain(&[[0; 4]; 2]) {
        low = low.wrapping_add(u32::from_le_bytes(*word));
        high = high.wrapping_add(u64::from(low));
    }
    // The kernel shifts in 64 bits: what `high` has above 32 bits is lost there too.
    (high << 32) | u64::from(low)
}

/// `N` bytes at `at`, zeros where the block is too short (it never is, for the constants used here).
pub(crate) fn field<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    block.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_the_one_of_the_test_vector() {
        // Made by the tool of Kuasar, `nsdax IMAGE 2097152 2097152`.
        assert_eq!(Superblock::new(2 << 20, 2 << 20).checksum, 0x685b_032b_e394_3830);
    }

    #[test]
    fn block_holds_every_field_at_the_kernel_s_offset() {
        let block = Superblock::new(2 << 20, 2 << 20).encode();
        assert_eq!(&block[..16], b"NVDIMM_PFN_INFO\0");
        assert_eq!(block[54], 2, "minor version");
        assert_eq!(block[56..64], (2_u64 << 20).to_le_bytes(), "dataoff");
        assert_eq!(block[72..76], 1_u32.to_le_bytes(), "mode");
        assert_eq!(block[84..88], (2_u32 << 20).to_le_bytes(), "align");
        assert_eq!(block[4088..], 0x685b_032b_e394_3830_u64.to_le_bytes(), "checksum");
        assert!(block[88..4088].iter().all(|b| *b == 0), "padding");
    }

    #[test]
    fn decode_is_the_inverse_of_encode() {
        let mut sb = Superblock::new(4 << 20, 4096);
        sb.uuid = [7; 16];
        sb.parent_uuid = [9; 16];
        (sb.flags, sb.version_major, sb.npfns, sb.start_pad, sb.end_trunc) = (1, 2, 3, 4, 5);
        assert_eq!(Superblock::decode(&sb.encode()), sb);
    }

    #[test]
    fn checksum_sees_every_word_and_ignores_its_own_field() {
        let good = Superblock::new(2 << 20, 2 << 20).encode();
        for at in (0..SIZE).step_by(4) {
            let mut bad = good;
            bad[at] ^= 1;
            assert_eq!(checksum(&bad) == checksum(&good), at >= CHECKSUM_AT, "word at {at}");
        }
    }
}
