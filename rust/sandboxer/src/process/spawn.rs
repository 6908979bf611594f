//! Starting a process: everything it gets is decided before it executes.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd, RawFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::{
    pipe::{PipeFlags, pipe_with},
    thread::{LinkNameSpaceType, UnshareFlags, unshare_unsafe},
};

use super::{
    Process, ProcessError, Rights,
    rights::{Prepared, Step},
};

/// First descriptor that a child inherits beside its standard streams.
const FIRST_FD: RawFd = 3;
/// The variable of a child's environment that names the pod's folder, by which it is found when no record
/// knows it.
pub const POD_VARIABLE: &str = "KUASAR_POD_FOLDER";

/// A process to be started.
#[derive(Debug)]
pub struct Spawn {
    path: PathBuf,
    args: Vec<std::ffi::OsString>,
    program: String,
    fds: Vec<FdMapping>,
    netns: Option<PathBuf>,
    cgroup_procs: Vec<PathBuf>,
    log: Option<PathBuf>,
    pod: Option<PathBuf>,
    rights: Rights,
}

impl Spawn {
    /// A program by path, or by name in `PATH`.
    #[must_use]
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            path: program.as_ref().into(),
            args: Vec::new(),
            program: program.as_ref().to_string_lossy().into_owned(),
            fds: Vec::new(),
            netns: None,
            cgroup_procs: Vec::new(),
            log: None,
            pod: None,
            rights: Rights::default(),
        }
    }

    /// Appends arguments.
    pub fn args<S: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = S>) -> &mut Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Lets the child inherit a descriptor; returns its number there.
    pub fn fd(&mut self, fd: OwnedFd) -> RawFd {
        let child_fd = RawFd::try_from(self.fds.len()).map_or(RawFd::MAX, |n| n.saturating_add(FIRST_FD));
        self.fds.push(FdMapping { parent_fd: fd, child_fd });
        child_fd
    }

    /// Runs it in a network namespace.
    pub fn netns(&mut self, path: Option<&Path>) -> &mut Self {
        self.netns = path.map(Path::to_owned);
        self
    }

    /// Has the child write itself to these `cgroup.procs` files before it executes.
    pub fn cgroup_procs(&mut self, files: &[PathBuf]) -> &mut Self {
        files.clone_into(&mut self.cgroup_procs);
        self
    }

    /// Appends its standard output and error to a file; without this they are discarded.
    pub fn log(&mut self, path: impl Into<PathBuf>) -> &mut Self {
        self.log = Some(path.into());
        self
    }

    /// Names the folder of the pod that it is started for, in its environment.
    pub fn pod(&mut self, folder: impl Into<PathBuf>) -> &mut Self {
        self.pod = Some(folder.into());
        self
    }

    /// Takes from it whatever these rights do not name.
    pub fn rights(&mut self, rights: Rights) -> &mut Self {
        self.rights = rights;
        self
    }

    /// Starts it. Blocks until the program executes, a few milliseconds.
    ///
    /// # Errors
    /// When the program, the namespace, a cgroup or the log cannot be opened, it cannot be confined, or not
    /// executed.
    pub fn spawn(mut self) -> Result<Process, ProcessError> {
        let program = std::mem::take(&mut self.program);
        let fail = |doing| {
            let program = program.clone();
            move |source| ProcessError { doing, program, source }
        };
        let (stdout, stderr) = self.output().map_err(fail("opening the log of"))?;
        let netns = self.netns.as_deref().map(File::open).transpose();
        let netns = netns.map_err(fail("opening the network namespace of"))?;
        let cgroups: Result<Vec<File>, _> =
            self.cgroup_procs.iter().map(|path| OpenOptions::new().write(true).open(path)).collect();
        let cgroups = cgroups.map_err(fail("opening the cgroup of"))?;
        let own_pids = self.rights.namespaces.pid;
        let (prepared, file) =
            std::mem::take(&mut self.rights).prepare(&self.path).map_err(fail("confining"))?;
        let (told, teller) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|error| fail("confining")(error.into()))?;
        let mut command = Command::new(&file);
        command.arg0(&self.path).args(&self.args).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        if let Some(folder) = &self.pod {
            command.env(POD_VARIABLE, folder);
        }
        let child = Child { netns, cgroups, prepared, teller };
        // SAFETY: the closure runs between fork and exec and makes system calls only; it owns what it
        // touches.
        unsafe {
            command.pre_exec(move || child.become_confined());
        }
        command
            .fd_mappings(self.fds)
            .map_err(|e| fail("passing descriptors to")(io::Error::other(e.to_string())))?;
        let started = if own_pids { start_with_own_pids(command) } else { start(&mut command) };
        // Dropping a `Child` neither ends nor reaps it, and until it is reaped its pid is nobody else's.
        let pid = started.map_err(|error| fail(Step::last(&told).doing())(error))?;
        Process::open(pid).map_err(fail("holding"))
    }

    fn output(&self) -> io::Result<(Stdio, Stdio)> {
        let Some(path) = &self.log else { return Ok((Stdio::null(), Stdio::null())) };
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        Ok((file.try_clone()?.into(), file.into()))
    }
}

fn start(command: &mut Command) -> io::Result<u32> {
    command.spawn().map(|child| child.id())
}

/// Starts the command as the first process of a PID namespace: the first one that the thread forks after
/// this `unshare(2)`. The call affects only this thread, which then ends.
fn start_with_own_pids(mut command: Command) -> io::Result<u32> {
    let thread = std::thread::Builder::new().name("spawn".into()).spawn(move || {
        // SAFETY: the thread makes no other one, and shares nothing that this separates.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
        start(&mut command)
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that starts it failed")))
}

/// The child between fork and exec.
struct Child {
    netns: Option<File>,
    cgroups: Vec<File>,
    prepared: Prepared,
    teller: OwnedFd,
}

impl Child {
    fn become_confined(&self) -> io::Result<()> {
        self.prepared.at(&self.teller, Step::Session)?;
        rustix::process::setsid()?;
        self.prepared.at(&self.teller, Step::Cgroup)?;
        for cgroup in &self.cgroups {
            rustix::io::write(cgroup, b"0")?;
        }
        self.prepared.at(&self.teller, Step::Network)?;
        if let Some(netns) = &self.netns {
            let network = Some(LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(netns.as_fd(), network)?;
        }
        self.prepared.apply(&self.teller)
    }
}
