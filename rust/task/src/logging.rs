//! Log lines into the kernel's log, from where they reach the console, or to standard error outside a VM.

use std::{
    fs::{File, OpenOptions},
    io::Write,
};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Longest line that is written, in bytes: the kernel refuses longer records.
const MAX_LINE: usize = 900;

struct KernelLog {
    kmsg: Option<File>,
}

/// Sends all log lines from here on to `/dev/kmsg`, or to standard error where that does not exist. Later
/// calls only change the level.
pub fn init(level: LevelFilter) {
    let kmsg = OpenOptions::new().write(true).open("/dev/kmsg").ok();
    // The only error is that a logger is set already, which is what is wanted then.
    let _ = log::set_boxed_logger(Box::new(KernelLog { kmsg }));
    log::set_max_level(level);
    std::panic::set_hook(Box::new(|panic| log::error!("a defect of the agent: {panic}")));
}

impl Log for KernelLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = render(record.level(), &record.args().to_string());
        let written = self.kmsg.as_ref().is_some_and(|mut kmsg| kmsg.write_all(line.as_bytes()).is_ok());
        if !written {
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// One record for `/dev/kmsg`: syslog priority of the kernel facility's daemon, name, message without line
/// breaks.
fn render(level: Level, message: &str) -> String {
    let priority = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    let message: String =
        message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_LINE / 4).collect();
    format!("<{priority}>vmm-task: {message}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_bounded_line() {
        assert_eq!(render(Level::Warn, "a\nb\x1b[0m"), "<4>vmm-task: a b [0m\n");
        assert!(render(Level::Error, &"ä".repeat(10_000)).len() < MAX_LINE);
    }
}
