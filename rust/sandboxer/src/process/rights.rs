//! A process's rights: what is not named here is taken from it between fork and exec.

use std::{
    ffi::{CString, OsString},
    io,
    os::fd::OwnedFd,
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags},
    process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit},
    thread::{CapabilitySet, CapabilitySets, UnshareFlags},
};
use seccompiler::BpfProgram;

use super::{
    jail::{Jail, Mounts},
    landlock::Ruleset,
};

/// The rights of a process once it executes.
#[derive(Debug, Default)]
pub struct Rights {
    /// User and group id, without any other group. `None`: those of the daemon.
    pub id: Option<u32>,
    /// Capabilities that it, and whatever it executes, may have. `None`: those of the daemon. One with an id
    /// that is not root's has none at its start, whatever this says.
    pub capabilities: Option<CapabilitySet>,
    /// Nothing that it executes gives it more than it has.
    pub no_new_privileges: bool,
    /// Namespaces of its own.
    pub namespaces: Namespaces,
    /// All that it sees of the file system, in a mount namespace of its own.
    pub jail: Option<Jail>,
    /// Resource limits, soft and hard; more than the daemon's own are those of the daemon.
    pub limits: Vec<(Resource, u64)>,
    /// Its score for the kernel's choice of whom to end when memory runs out. `None`: the daemon's.
    pub oom_score_adj: Option<i32>,
    /// A seccomp filter.
    pub filter: Option<BpfProgram>,
}

/// Namespaces that a process has for itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Namespaces {
    /// It is the first process of its PID namespace, and sees no other.
    pub pid: bool,
    /// System V and POSIX IPC.
    pub ipc: bool,
    /// Host and domain name.
    pub uts: bool,
}

/// A step between fork and exec, for the error message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Step {
    Session,
    Cgroup,
    Network,
    Oom,
    Limits,
    Namespaces,
    Jail,
    Capabilities,
    User,
    Privileges,
    Landlock,
    Filter,
    Execute,
}

impl Step {
    const ALL: [Self; 13] = [
        Self::Session,
        Self::Cgroup,
        Self::Network,
        Self::Oom,
        Self::Limits,
        Self::Namespaces,
        Self::Jail,
        Self::Capabilities,
        Self::User,
        Self::Privileges,
        Self::Landlock,
        Self::Filter,
        Self::Execute,
    ];

    /// The last step that a child told before it ended.
    pub(super) fn last(told: &OwnedFd) -> Self {
        let mut steps = [0; Self::ALL.len()];
        let length = rustix::io::read(told, &mut steps).unwrap_or(0);
        let last = length.checked_sub(1).and_then(|last| steps.get(last).copied());
        last.and_then(|step| Self::ALL.get(usize::from(step)).copied()).unwrap_or(Self::Execute)
    }

    /// As the beginning of an error message that goes on with the program's name.
    pub(super) const fn doing(self) -> &'static str {
        match self {
            Self::Session => "beginning a session for",
            Self::Cgroup => "putting into its cgroup",
            Self::Network => "putting into its network namespace",
            Self::Oom => "setting the OOM score of",
            Self::Limits => "limiting the resources of",
            Self::Namespaces => "making namespaces for",
            Self::Jail => "making the file system of",
            Self::Capabilities => "taking the capabilities from",
            Self::User => "setting the user of",
            Self::Privileges => "forbidding new privileges to",
            Self::Landlock => "confining with Landlock",
            Self::Filter => "filtering the system calls of",
            Self::Execute => "starting",
        }
    }
}

/// [`Rights`] with all that memory is needed for done.
pub(super) struct Prepared {
    id: Option<u32>,
    keep: Option<CapabilitySet>,
    no_new_privileges: bool,
    unshare: UnshareFlags,
    mounts: Option<(Mounts, Option<Ruleset>)>,
    limits: Vec<(Resource, Rlimit)>,
    oom_score_adj: Option<CString>,
    filter: Option<BpfProgram>,
}

impl Rights {
    /// Makes ready what needs memory. Returns also which file is to be executed.
    pub(super) fn prepare(self, program: &Path) -> io::Result<(Prepared, OsString)> {
        let mut unshare = UnshareFlags::empty();
        unshare.set(UnshareFlags::NEWIPC, self.namespaces.ipc);
        unshare.set(UnshareFlags::NEWUTS, self.namespaces.uts);
        unshare.set(UnshareFlags::NEWNS, self.jail.is_some());
        let mut file = program.as_os_str().to_owned();
        let mounts = match self.jail {
            Some(jail) => {
                let found = super::jail::find(program)?;
                let made = jail.prepare(&found)?;
                file = found.into_os_string();
                Some(made)
            }
            None => None,
        };
        let limit = |(resource, most): (Resource, u64)| {
            let most = getrlimit(resource).maximum.map_or(most, |own| own.min(most));
            (resource, Rlimit { current: Some(most), maximum: Some(most) })
        };
        let score = |score: i32| CString::new(score.to_string()).unwrap_or_default();
        let prepared = Prepared {
            id: self.id,
            keep: self.capabilities,
            no_new_privileges: self.no_new_privileges,
            unshare,
            mounts,
            limits: self.limits.into_iter().map(limit).collect(),
            oom_score_adj: self.oom_score_adj.map(score),
            filter: self.filter,
        };
        Ok((prepared, file))
    }
}

impl Prepared {
    /// Tells the parent how far the child is.
    #[expect(clippy::unused_self, reason = "whoever has prepared rights tells")]
    pub(super) fn at(&self, teller: &OwnedFd, step: Step) -> io::Result<()> {
        rustix::io::write(teller, &[step as u8])?;
        Ok(())
    }

    /// Takes all that is not given, in an order in which each step still may do what it does. System calls
    /// only.
    pub(super) fn apply(&self, teller: &OwnedFd) -> io::Result<()> {
        self.at(teller, Step::Oom)?;
        self.set_oom_score()?;
        self.at(teller, Step::Limits)?;
        for (resource, limit) in &self.limits {
            setrlimit(*resource, *limit)?;
        }
        self.at(teller, Step::Namespaces)?;
        if !self.unshare.is_empty() {
            // SAFETY: the process has one thread, and none of these flags concerns its memory or descriptors.
            unsafe { rustix::thread::unshare_unsafe(self.unshare) }?;
        }
        self.at(teller, Step::Jail)?;
        if let Some((mounts, _)) = &self.mounts {
            mounts.enter()?;
        }
        if self.id.is_some() {
            rustix::process::umask(Mode::from_raw_mode(0o077));
        }
        self.at(teller, Step::Capabilities)?;
        if let Some(keep) = self.keep {
            drop_capabilities(keep)?;
        }
        self.at(teller, Step::User)?;
        if let Some(id) = self.id {
            become_user(id)?;
        }
        self.at(teller, Step::Privileges)?;
        if self.no_new_privileges {
            rustix::thread::set_no_new_privs(true)?;
        }
        self.at(teller, Step::Landlock)?;
        if let Some((_, Some(ruleset))) = &self.mounts {
            ruleset.enter()?;
        }
        self.at(teller, Step::Filter)?;
        // Told before the filter, which need not allow it.
        self.at(teller, Step::Execute)?;
        match &self.filter {
            Some(filter) => {
                seccompiler::apply_filter(filter).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
            }
            None => Ok(()),
        }
    }

    fn set_oom_score(&self) -> io::Result<()> {
        let Some(score) = &self.oom_score_adj else { return Ok(()) };
        let file =
            rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        match rustix::io::write(&file, score.to_bytes()) {
            // Less than the daemon's own takes CAP_SYS_RESOURCE, which not every root has.
            Err(rustix::io::Errno::ACCESS) => Ok(()),
            done => Ok(done.map(drop)?),
        }
    }
}

/// Takes all capabilities but these, from every set.
fn drop_capabilities(keep: CapabilitySet) -> io::Result<()> {
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        if keep.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            Ok(()) => {}
            // Beyond the last that the kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let own = rustix::thread::capabilities(None)?;
    // What is needed to become another user goes with that.
    let most = keep | CapabilitySet::SETUID | CapabilitySet::SETGID;
    let sets = CapabilitySets {
        effective: own.effective & most,
        permitted: own.permitted & most,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets)?;
    Ok(())
}

/// Becomes another user without any group but its own; the capabilities go with root.
fn become_user(id: u32) -> io::Result<()> {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    Ok(())
}

#[cfg(test)]
#[path = "rights_tests.rs"]
mod tests;
