//! One process of a container: its first one, or one that was added by Exec.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicI32, Ordering},
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;

use crate::{
    error::TaskError,
    reaper::{Exit, ExitSender},
    stdio::process_io::{ProcessIo, StdioSpec},
};

/// Phase of a process. Its end is known from its exit alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waits for Start.
    Created,
    /// Start is being done.
    Starting,
    /// Was started.
    Running,
    /// Is being frozen.
    Pausing,
    /// Is frozen.
    Paused,
    /// Has ended.
    Stopped,
}

/// One process.
pub struct Process {
    /// Its streams as the request had them.
    pub stdio: StdioSpec,
    /// Its streams.
    pub io: ProcessIo,
    exit: ExitSender,
    pid: AtomicI32,
    phase: Mutex<Phase>,
    announced: AtomicBool,
}

impl Process {
    /// A process that does not exist yet.
    #[must_use]
    pub fn new(stdio: StdioSpec, io: ProcessIo) -> Self {
        Self {
            stdio,
            io,
            exit: Arc::new(watch::Sender::new(None)),
            pid: AtomicI32::new(0),
            phase: Mutex::new(Phase::Created),
            announced: AtomicBool::new(false),
        }
    }

    /// Its pid in the VM; 0 until it exists.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// The same, as protocols want it.
    #[must_use]
    pub fn pid_u32(&self) -> u32 {
        u32::try_from(self.pid()).unwrap_or(0)
    }

    /// Notes the pid.
    pub fn set_pid(&self, pid: i32) {
        self.pid.store(pid, Ordering::Relaxed);
    }

    /// Channel that announces its exit.
    #[must_use]
    pub fn exit_sender(&self) -> ExitSender {
        Arc::clone(&self.exit)
    }

    /// Sees its exit, and whether it is forgotten without one: then the channel closes.
    #[must_use]
    pub fn exited(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// Its exit, if it has ended.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Its phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        if self.exit().is_some() {
            return Phase::Stopped;
        }
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true if its start is under way, or was when it ended.
    #[must_use]
    pub fn is_starting(&self) -> bool {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) == Phase::Starting
    }

    /// Returns true for the first caller, which announces the exit.
    #[must_use]
    pub fn announce(&self) -> bool {
        !self.announced.swap(true, Ordering::Relaxed)
    }

    /// Moves on from `from` to `to`; false if it is elsewhere.
    #[must_use]
    pub fn advance(&self, from: Phase, to: Phase) -> bool {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = *phase == from && self.exit().is_none();
        if fits {
            *phase = to;
        }
        fits
    }

    /// Sends a signal by number, real-time signals included.
    ///
    /// # Errors
    /// When it has ended, does not exist yet, or the number is no signal's.
    pub fn kill(&self, signal: u32) -> Result<(), TaskError> {
        if self.exit().is_some() {
            return Err(TaskError::NotFound("process (it has ended already)".to_owned()));
        }
        // Its pid cannot belong to another: it stays taken until the reaper collects the exit, which it has
        // not.
        match Pid::from_raw(self.pid()) {
            Some(pid) => signal_pid(pid, signal),
            None => Err(TaskError::FailedPrecondition("the process was not started yet".to_owned())),
        }
    }
}

/// Sends a signal to a process; that it is gone is no error.
///
/// # Errors
/// When the number is no signal's.
pub fn signal_pid(pid: Pid, signal: u32) -> Result<(), TaskError> {
    let number = i32::try_from(signal).ok().filter(|number| (1..=64).contains(number));
    let Some(number) = number else {
        return Err(TaskError::InvalidArgument(format!("{signal} is not the number of a signal")));
    };
    // SAFETY: the signal is only sent, never used for a handler in this process, which is what the C library
    // reserves some of the numbers for; the kernel checks the range, and so did we.
    let signal = unsafe { Signal::from_raw_unchecked(number) };
    match kill_process(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(TaskError::io(format!("sending signal {number} to process {pid:?}"))(error)),
    }
}
