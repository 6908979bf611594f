//! As much of `bpf(2)` as port-forward needs: one map, one program, one link, and the instructions to write
//! it with.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::libc;

// Of `linux/bpf.h`.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_PSEUDO_MAP_FD: u8 = 1;
/// Helper that finds a map's value.
pub(super) const MAP_LOOKUP: i32 = 1;
/// Helper that gives a reference to a socket back.
pub(super) const SK_RELEASE: i32 = 86;
/// Helper that chooses the socket.
pub(super) const SK_ASSIGN: i32 = 124;
/// Result of a program that does not object.
pub(super) const SK_PASS: i32 = 1;

/// Offsets in `struct bpf_sk_lookup`.
pub(super) mod context {
    pub(crate) const FAMILY: i16 = 8;
    pub(crate) const PROTOCOL: i16 = 12;
    pub(crate) const LOCAL_IP4: i16 = 40;
    pub(crate) const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];
}

/// The machine's registers that are used.
#[derive(Clone, Copy, Debug)]
pub(super) enum Register {
    R0 = 0,
    R1 = 1,
    R2 = 2,
    R3 = 3,
    R6 = 6,
    R7 = 7,
    R10 = 10,
}

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    fn new(code: u8, to: Register, from: u8, offset: i16, immediate: i32) -> Self {
        // Two fields of four bits, whose order is the machine's byte order.
        let to = to as u8;
        let registers = if cfg!(target_endian = "little") { to | from << 4 } else { to << 4 | from };
        Self { code, registers, offset, immediate }
    }

    /// `to = *(u32 *)(from + offset)`
    pub(super) fn load(to: Register, from: Register, offset: i16) -> Self {
        Self::new(0x61, to, from as u8, offset, 0)
    }

    /// `*(u32 *)(to + offset) = value`
    pub(super) fn store(to: Register, offset: i16, value: i32) -> Self {
        Self::new(0x62, to, 0, offset, value)
    }

    /// `to = from`
    pub(super) fn copy(to: Register, from: Register) -> Self {
        Self::new(0xbf, to, from as u8, 0, 0)
    }

    /// `to = value`
    pub(super) fn set(to: Register, value: i32) -> Self {
        Self::new(0xb7, to, 0, 0, value)
    }

    /// `to += value`
    pub(super) fn add(to: Register, value: i32) -> Self {
        Self::new(0x07, to, 0, 0, value)
    }

    /// `to |= from`
    pub(super) fn or(to: Register, from: Register) -> Self {
        Self::new(0x4f, to, from as u8, 0, 0)
    }

    /// `to >>= bits`
    pub(super) fn shift_right(to: Register, bits: i32) -> Self {
        Self::new(0x77, to, 0, 0, bits)
    }

    /// `to = htobe32(to)`
    pub(super) fn big_endian(to: Register) -> Self {
        Self::new(0xdc, to, 0, 0, 32)
    }

    /// Skips `skipped` instructions.
    pub(super) fn jump(skipped: i16) -> Self {
        Self::new(0x05, Register::R0, 0, skipped, 0)
    }

    /// Skips them when a register has this value.
    pub(super) fn jump_if(register: Register, value: i32, skipped: i16) -> Self {
        Self::new(0x15, register, 0, skipped, value)
    }

    /// Skips them when a register has another value.
    pub(super) fn jump_unless(register: Register, value: i32, skipped: i16) -> Self {
        Self::new(0x55, register, 0, skipped, value)
    }

    /// Calls one of the kernel's helpers.
    pub(super) fn call(helper: i32) -> Self {
        Self::new(0x85, Register::R0, 0, 0, helper)
    }

    /// Returns R0.
    pub(super) fn exit() -> Self {
        Self::new(0x95, Register::R0, 0, 0, 0)
    }

    /// `to = map`; takes the room of two.
    pub(super) fn map(to: Register, map: RawFd) -> [Self; 2] {
        [Self::new(0x18, to, BPF_PSEUDO_MAP_FD, 0, map), Self::new(0, Register::R0, 0, 0, 0)]
    }
}

/// A map with one socket in it.
pub(super) fn socket_map(socket: &OwnedFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    #[repr(C)]
    struct Update {
        map: u32,
        unused: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let create = Create { map_type: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 1 };
    // SAFETY: `Create` has no padding, and no pointers in it.
    let map = unsafe { descriptor(BPF_MAP_CREATE, &create) }?;
    let (key, value) = (0_u32, u64::from(number(socket.as_raw_fd())));
    let update = Update {
        map: number(map.as_raw_fd()),
        unused: 0,
        key: address(&raw const key),
        value: address(&raw const value),
        flags: 0,
    };
    // SAFETY: `Update` has no padding, and what it points at has the sizes that the map was created with and
    // is alive.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &update) }?;
    Ok(map)
}

/// Loads a program for socket lookup.
pub(super) fn load_socket_lookup(program: &[Instruction]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u32; 4],
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }
    let license = c"Apache-2.0";
    let load = Load {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: address(program.as_ptr()),
        license: address(license.as_ptr()),
        log: [0; 4],
        kernel_version: 0,
        flags: 0,
        name: *b"kuasar_forward\0\0",
        interface: 0,
        attach_type: BPF_SK_LOOKUP,
    };
    // SAFETY: `Load` has no padding; the instructions, of that number, and the license, which ends in 0, are
    // alive.
    unsafe { descriptor(BPF_PROG_LOAD, &load) }
}

/// Attaches it to a network namespace, for as long as the returned descriptor is open.
pub(super) fn attach_socket_lookup(program: &OwnedFd, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attach {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let attach = Attach {
        program: number(program.as_raw_fd()),
        target: number(netns.as_raw_fd()),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: `Attach` has no padding, and no pointers in it.
    unsafe { descriptor(BPF_LINK_CREATE, &attach) }
}

/// # Safety
/// As [`bpf`], and the command returns a new descriptor, which the kernel sets to close on exec.
unsafe fn descriptor<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller promises.
    let fd = unsafe { bpf(command, attributes) }?;
    // SAFETY: it is new, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `attributes` must be the first fields of the command's part of `union bpf_attr`, without padding, and
/// addresses in it must be what the command expects there.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the kernel reads `size` bytes of `attributes`, takes what is missing for zeroes, and follows
    // addresses as the caller promises.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    match RawFd::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A descriptor as the kernel's structures have it.
fn number(fd: RawFd) -> u32 {
    fd.cast_unsigned()
}

fn address<T>(pointer: *const T) -> u64 {
    u64::try_from(pointer.addr()).unwrap_or(0)
}
