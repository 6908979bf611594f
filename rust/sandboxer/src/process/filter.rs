//! The system calls of `vhost-device-vsock`. It has no filter of its own, and sees whatever a guest sends.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// System calls, from `execve(2)` on, that a program needs to carry bytes between unix sockets and a guest's
/// memory. A shell script around such a program makes processes as well, before it executes the program.
#[rustfmt::skip]
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_accept, libc::SYS_accept4, libc::SYS_bind, libc::SYS_brk, libc::SYS_clock_getres,
    libc::SYS_clock_gettime, libc::SYS_clock_nanosleep, libc::SYS_close, libc::SYS_close_range, libc::SYS_connect,
    libc::SYS_dup, libc::SYS_dup3, libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait,
    libc::SYS_eventfd2, libc::SYS_execve, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_faccessat,
    libc::SYS_faccessat2, libc::SYS_fcntl, libc::SYS_fstat, libc::SYS_futex, libc::SYS_getcwd,
    libc::SYS_getdents64, libc::SYS_getegid, libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getpeername,
    libc::SYS_getpgid, libc::SYS_getpid, libc::SYS_getppid, libc::SYS_getrandom, libc::SYS_getsockname,
    libc::SYS_getsockopt, libc::SYS_gettid, libc::SYS_gettimeofday, libc::SYS_getuid, libc::SYS_listen,
    libc::SYS_lseek, libc::SYS_madvise, libc::SYS_membarrier, libc::SYS_mmap, libc::SYS_mprotect,
    libc::SYS_mremap, libc::SYS_munmap, libc::SYS_nanosleep, libc::SYS_newfstatat, libc::SYS_openat,
    libc::SYS_pipe2, libc::SYS_ppoll, libc::SYS_pread64, libc::SYS_prlimit64, libc::SYS_pwrite64,
    libc::SYS_read, libc::SYS_readlinkat, libc::SYS_readv, libc::SYS_recvfrom, libc::SYS_recvmsg,
    libc::SYS_restart_syscall, libc::SYS_rseq, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn, libc::SYS_rt_sigsuspend, libc::SYS_sched_getaffinity, libc::SYS_sched_yield,
    libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_set_robust_list, libc::SYS_set_tid_address,
    libc::SYS_setsockopt, libc::SYS_shutdown, libc::SYS_sigaltstack, libc::SYS_statx, libc::SYS_sysinfo,
    libc::SYS_tgkill, libc::SYS_umask, libc::SYS_uname, libc::SYS_unlinkat, libc::SYS_wait4, libc::SYS_write,
    libc::SYS_writev,
];

/// The older names that x86 has beside those.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALLOWED_TOO: &[libc::c_long] = &[
    libc::SYS_access, libc::SYS_arch_prctl, libc::SYS_dup2, libc::SYS_epoll_wait, libc::SYS_getpgrp,
    libc::SYS_getrlimit, libc::SYS_lstat, libc::SYS_open, libc::SYS_pipe, libc::SYS_poll, libc::SYS_readlink,
    libc::SYS_rmdir, libc::SYS_stat, libc::SYS_time, libc::SYS_unlink, libc::SYS_vfork,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_TOO: &[libc::c_long] = &[];

/// Flags of `clone(2)` that make namespaces.
const NAMESPACES: u64 = 0x7e02_0000 | 0x80;
/// `TCGETS2` of `asm-generic/ioctls.h`, for `struct termios2` of 44 bytes.
const TCGETS2: u64 = 0x802c_542a;
/// `PR_SET_VMA` of `linux/prctl.h`: memory gets a name.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// The filter for `vhost-device-vsock`. A call that is not allowed is one that the kernel does not have, and
/// the library in the program falls back to an older one, or the program reports it.
///
/// # Errors
/// When the crate has no such filter for the host's architecture.
pub fn vsock_device() -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().chain(ALLOWED_TOO).map(|number| (*number, Vec::new())).collect();
    let equal = |argument, value: u64| {
        SeccompRule::new(vec![SeccompCondition::new(argument, Len::Dword, Op::Eq, value)?])
    };
    let any = |argument, values: &[u64]| {
        values.iter().map(|value| equal(argument, *value)).collect::<Result<Vec<_>, BackendError>>()
    };
    let unix = u64::try_from(libc::AF_UNIX).unwrap_or_default();
    let number = |value: libc::c_int| u64::try_from(value).unwrap_or_default();
    rules.insert(libc::SYS_socket, any(0, &[unix])?);
    rules.insert(libc::SYS_socketpair, any(0, &[unix])?);
    // clone3(2) has its flags in memory, where no filter sees them; the library does without.
    let no_namespace = SeccompCondition::new(0, Len::Qword, Op::MaskedEq(NAMESPACES), 0)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![no_namespace])?]);
    let requests =
        [libc::FIONBIO, libc::FIOCLEX, libc::FIONCLEX, libc::TCGETS, libc::TIOCGWINSZ, libc::FIONREAD];
    rules.insert(libc::SYS_ioctl, any(1, &requests)?);
    rules.entry(libc::SYS_ioctl).or_default().push(equal(1, TCGETS2)?);
    let names = [number(libc::PR_SET_NAME), number(libc::PR_GET_NAME), PR_SET_VMA];
    rules.insert(libc::SYS_prctl, any(0, &names)?);
    let refused = SeccompAction::Errno(u32::try_from(libc::ENOSYS).unwrap_or_default());
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()
}
