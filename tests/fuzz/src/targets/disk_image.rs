//! A disk image of another builder, or of nobody: partition tables of both kinds, the PFN superblock, the
//! superblocks of file systems and dm-verity, and the walk through folders for the largest files.

use kuasar_image::{examine, mbr, pfn, source::Pieces};

/// Pieces of an image that is looked at: where each lies, and how many bytes of an input it gets. Few, so
/// that most changes meet a byte that has a meaning.
const PIECES: [(u64, usize); 8] = [
    (0, 1280),
    (pfn::OFFSET, 128),
    (2 << 20, 1152),
    (3 << 20, 256),
    ((3 << 20) + 1024, 256),
    ((3 << 20) + 4096, 512),
    ((3 << 20) + 8192, 256),
    ((3 << 20) + 12288, 256),
];
const SIZE: u64 = 4 << 20;

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = image.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Offset of a piece in an input.
fn start(piece: usize) -> usize {
    PIECES.iter().take(piece).map(|(_, length)| length).sum()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut ours = vec![0; start(PIECES.len())];
    put(&mut ours, 0, &mbr::encode(kuasar_image::layout::partition(SIZE, 0)));
    let superblock = pfn::Superblock::new(2 << 20, 2 << 20).encode();
    put(&mut ours, start(1), superblock.get(..128).unwrap_or_default());
    put(&mut ours, start(2), &mbr::encode(kuasar_image::layout::partition(SIZE, 2 << 20)));
    let (mut gpt, mut ext4, mut erofs, mut xfs) = (ours.clone(), ours.clone(), ours.clone(), ours);

    put(&mut gpt, 450, &[0xee]);
    put(&mut gpt, 512, b"EFI PART\0\0\x01\0\x5c\0\0\0");
    put(&mut gpt, 512 + 72, &[2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 128, 0, 0, 0]);
    put(&mut gpt, 1024, &[7; 48]);

    // 32 inodes of 128 bytes in block 1, where the root has one extent: block 2.
    let sb = start(4);
    put(&mut ext4, sb, &[32, 0, 0, 0, 255]);
    put(&mut ext4, sb + 24, &[2]);
    put(&mut ext4, sb + 40, &[32]);
    put(&mut ext4, sb + 56, &[0x53, 0xef, 1]);
    put(&mut ext4, start(5) + 8, &[1]);
    put(&mut ext4, start(5) + 128, &[0xed, 0x41]);
    let extent = [0x0a, 0xf3, 1, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2];
    put(&mut ext4, start(5) + 128 + 40, &extent);
    put(&mut ext4, start(6), b"\x03\0\0\0\x0c\0\x03\x01one\0\x02\0\0\0\xf4\x0f\x03\x02two\0");

    put(&mut erofs, sb, &[0xe2, 0xe1, 0xf5, 0xe0, 0, 0, 0, 0, 1, 0, 0, 0, 12, 0, 36]);
    put(&mut erofs, sb + 36, &[3]);
    put(&mut erofs, sb + 128, &[1, 0, 0, 0, 0xed, 0x41, 0, 0, 30, 0, 0, 0, 0, 0, 0, 0, 1]);
    put(&mut erofs, start(5), b"\x24\0\0\0\0\0\0\0\x18\0\x02\0\x26\0\0\0\0\0\0\0\x1b\0\x01\0onetwo");
    put(&mut erofs, start(7), b"verity\0\0\x01\0\0\0\x01");

    // 16 blocks in one group; the root is the first inode of block 1.
    put(&mut xfs, start(3), b"XFSB\0\0\x10\0\0\0\0\0\0\0\0\x10");
    put(&mut xfs, start(3) + 56, &[0, 0, 0, 0, 0, 0, 0, 8]);
    put(&mut xfs, start(3) + 84, &[0, 0, 0, 16]);
    put(&mut xfs, start(3) + 100, &[0xb4, 0xb5, 0x10, 0, 2, 0]);
    put(&mut xfs, start(3) + 120, &[12, 12, 9, 3, 4]);
    put(&mut xfs, start(3) + 216, &[0, 0, 0, 1]);
    let inode = start(5);
    put(&mut xfs, inode, b"IN\x41\xed\x03\x01");
    let mut tree = xfs.clone();
    put(&mut xfs, inode + 176, b"\x02\0\0\0\0\x08\x03\0\x60one\x01\0\0\0\x09\x03\0\x70two\x02\0\0\0\x0a");
    // A tree of extents: its node is block 3, whose one extent is block 2.
    put(&mut tree, inode + 5, &[3]);
    put(&mut tree, inode + 176, &[0, 1, 0, 1]);
    put(&mut tree, inode + 180 + 160, &[0, 0, 0, 0, 0, 0, 0, 3]);
    put(&mut tree, start(7), b"BMA3\0\0\0\x01");
    put(&mut tree, start(7) + 72 + 13, &[0x40, 0, 1]);
    put(&mut tree, start(6), b"XDD3");
    put(&mut tree, start(6) + 64, b"\0\0\0\0\0\0\0\x09\x03one\x01\0\0\x40\0\0\0\0\0\0\0\x08\x03two\x02\0\0\x50");
    vec![gpt, ext4, erofs, xfs, tree]
}

pub(crate) fn run(input: &[u8]) {
    let mut rest = input;
    let pieces = PIECES.map(|(at, length)| {
        let (piece, others) = rest.split_at_checked(length).unwrap_or((rest, &[]));
        rest = others;
        (at, piece)
    });
    let Ok(report) = examine::disk_image(&Pieces { size: SIZE, pieces: pieces.to_vec() }) else { return };
    let text = report.to_string();
    assert!(text.is_ascii() && !text.contains('\x1b'), "bytes of the image reach the terminal: {text}");
}
