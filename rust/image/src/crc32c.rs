//! CRC-32C, which ext4, EROFS and XFS put into their superblocks.

const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Remainder of each byte after eight steps.
const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    let mut rest: &mut [u32] = &mut table;
    while let Some((entry, others)) = rest.split_first_mut() {
        let (mut crc, mut bit): (u32, u32) = (byte, 0);
        while bit < 8 {
            crc = (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
            bit += 1;
        }
        *entry = crc;
        byte += 1;
        rest = others;
    }
    table
}

/// The register after `data`, begun at `seed`, not inverted at the end (as in the kernel's `crc32c`).
pub(crate) fn update(seed: u32, data: &[u8]) -> u32 {
    data.iter().fold(seed, |crc, byte| {
        let [low, ..] = crc.to_le_bytes();
        (crc >> 8) ^ TABLE.get(usize::from(low ^ byte)).copied().unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn check_value_is_that_of_the_catalogue() {
        assert_eq!(!super::update(!0, b"123456789"), 0xe306_9283);
    }
}
