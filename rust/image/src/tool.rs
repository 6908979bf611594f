//! Programs that this crate runs, with nothing of the builder's environment but PATH.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::{Error, Result};

/// A program and the package that brings it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
}

impl Tool {
    pub(crate) const fn new(name: &'static str, package: &'static str) -> Self {
        Self { name, package }
    }

    /// The command, to be run in `folder`: so the names it gets have no character that it reads as an option.
    pub(crate) fn command(self, folder: &Path, epoch: u32) -> Result<Command> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path).map(|dir| dir.join(self.name)).find(|file| file.is_file());
        let program = program.ok_or(Error::ToolMissing { tool: self.name, package: self.package })?;
        let mut command = Command::new(program);
        command.env_clear().env("PATH", path).env("LC_ALL", "C").env("TZ", "UTC");
        command.env("SOURCE_DATE_EPOCH", epoch.to_string());
        if !folder.as_os_str().is_empty() {
            command.current_dir(folder);
        }
        command.stdin(Stdio::null());
        Ok(command)
    }

    /// Runs it; gives its output, whatever its exit code.
    pub(crate) fn output(self, command: &mut Command) -> Result<Output> {
        command.output().map_err(|e| self.failed_with(format!("it did not start: {e}")))
    }

    /// Runs it; anything but success is an error.
    pub(crate) fn run(self, command: &mut Command) -> Result<Output> {
        let output = self.output(command)?;
        if output.status.success() { Ok(output) } else { Err(self.failed(&output)) }
    }

    /// The error that quotes what it said.
    pub(crate) fn failed(self, output: &Output) -> Error {
        self.failed_with(format!("{}: {}", output.status, self.said(output)))
    }

    /// Output of the tool without its banner.
    pub(crate) fn said(self, output: &Output) -> String {
        let text = [output.stderr.as_slice(), output.stdout.as_slice()].concat();
        let text = String::from_utf8_lossy(&text);
        let banner = format!("{} ", self.name);
        let lines: Vec<_> = text.lines().filter(|l| !l.starts_with(&banner)).take(10).collect();
        lines.join("; ")
    }

    pub(crate) fn failed_with(self, detail: String) -> Error {
        Error::Tool { tool: self.name, detail }
    }

    /// Pipes what `write` writes through the program into `output`.
    pub(crate) fn filter(
        self,
        mut command: Command,
        output: &std::fs::File,
        path: &Path,
        write: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let out = output.try_clone().map_err(Error::io("write", path))?;
        command.stdin(Stdio::piped()).stdout(out).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| self.failed_with(format!("it did not start: {e}")))?;
        let written = match child.stdin.take() {
            Some(mut stdin) => write(&mut stdin),
            None => Ok(()),
        };
        let mut said = Vec::new();
        if let Some(mut stderr) = child.stderr.take() {
            stderr.read_to_end(&mut said).map_err(Error::io("read from", path))?;
        }
        let status = child.wait().map_err(Error::io("wait for", path))?;
        if !status.success() {
            return Err(self.failed(&Output { status, stdout: Vec::new(), stderr: said }));
        }
        written
    }
}
