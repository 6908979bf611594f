//! How a process comes to life: streams, the OCI runtime, its pid, and who sees it end.

use std::{fs, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    cgroup,
    error::TaskError,
    process::Process,
    runc::{ChildStdio, RuncError},
    stdio::{
        console::ConsoleSocket,
        process_io::{Pipes, ProcessIo},
    },
    tasks::{Container, Context, Exec, write},
};

/// The parts of an OCI spec that concern the agent.
#[derive(Deserialize)]
struct Spec {
    process: Option<SpecProcess>,
}

#[derive(Deserialize)]
struct SpecProcess {
    #[serde(default)]
    terminal: bool,
}

/// What a process is launched with.
enum Streams {
    Pipes(Pipes),
    Terminal(ConsoleSocket),
}

/// Lets the runtime make a container.
pub(crate) async fn create(context: &Context, container: &Container) -> Result<(), TaskError> {
    let init = &container.init;
    let bundle = Path::new(&container.bundle);
    check_spec(bundle, init.stdio.terminal)?;
    let pid_file = context.work.join(format!("{}.pid", container.id));
    let (streams, child) = prepare(context, init)?;
    let console = console_path(&streams);
    let guard = context.reaper.spawning();
    let created = context.runc.create(&container.id, bundle, &pid_file, console, child).await;
    let pid = settle(created, &pid_file)?;
    init.set_pid(pid);
    if let Some(cgroup) = cgroup::of_process(&context.cgroups, pid) {
        let _ = container.cgroup.set(cgroup);
    }
    context.reaper.watch(pid, init.exit_sender());
    drop(guard);
    connect(init, streams).await
}

/// Lets the runtime run a process in a container.
pub(crate) async fn exec(
    context: &Context,
    container: &Container,
    exec_id: &str,
    exec: &Exec,
) -> Result<(), TaskError> {
    let process = &exec.process;
    let stem = format!("{}.{exec_id}", container.id);
    let (spec_file, pid_file) =
        (context.work.join(format!("{stem}.json")), context.work.join(format!("{stem}.pid")));
    write(&spec_file, &exec.spec)?;
    let (streams, child) = prepare(context, process)?;
    let console = console_path(&streams);
    let guard = context.reaper.spawning();
    let started = context.runc.exec(&container.id, &spec_file, &pid_file, console, child).await;
    let _ = fs::remove_file(&spec_file);
    let pid = settle(started, &pid_file)?;
    process.set_pid(pid);
    context.reaper.watch(pid, process.exit_sender());
    drop(guard);
    connect(process, streams).await
}

/// The JSON of an OCI process as the runtime gets it: without what only the host has, and with the terminal that the
/// request asks for.
pub(crate) fn process_spec(json: &[u8], terminal: bool) -> Result<Vec<u8>, TaskError> {
    let refuse = |why: String| TaskError::InvalidArgument(format!("the process to execute: {why}"));
    let mut spec: Value = serde_json::from_slice(json).map_err(|error| refuse(error.to_string()))?;
    let Some(fields) = spec.as_object_mut() else {
        return Err(refuse("it is not a JSON object".to_owned()));
    };
    if fields.get("args").and_then(Value::as_array).is_none_or(Vec::is_empty) {
        return Err(refuse("it has no args".to_owned()));
    }
    fields.remove("apparmorProfile");
    fields.remove("selinuxLabel");
    fields.insert("terminal".to_owned(), Value::Bool(terminal));
    serde_json::to_vec(&spec).map_err(|error| refuse(error.to_string()))
}

fn check_spec(bundle: &Path, terminal: bool) -> Result<(), TaskError> {
    let path = bundle.join("config.json");
    let doing = || format!("reading the container's spec {}", path.display());
    let text = fs::read(&path).map_err(TaskError::io(doing()))?;
    let spec: Spec = serde_json::from_slice(&text)
        .map_err(|error| TaskError::InvalidArgument(format!("{}: {error}", doing())))?;
    let wants = spec.process.is_some_and(|process| process.terminal);
    if wants != terminal {
        return Err(TaskError::InvalidArgument(format!(
            "{}: its process.terminal is {wants}, the request's terminal is {terminal}",
            doing()
        )));
    }
    Ok(())
}

fn prepare(context: &Context, process: &Process) -> Result<(Streams, ChildStdio), TaskError> {
    let doing = "making the standard streams of a process";
    if process.stdio.terminal {
        let console = ProcessIo::console(&context.work).map_err(TaskError::io(doing))?;
        return Ok((Streams::Terminal(console), ChildStdio::default()));
    }
    let (pipes, child) = process.io.pipes().map_err(TaskError::io(doing))?;
    Ok((Streams::Pipes(pipes), child))
}

fn console_path(streams: &Streams) -> Option<&Path> {
    match streams {
        Streams::Terminal(console) => Some(console.path()),
        Streams::Pipes(_) => None,
    }
}

/// The pid that the runtime wrote, once it has succeeded.
fn settle(done: Result<(), RuncError>, pid_file: &Path) -> Result<i32, TaskError> {
    let text = fs::read_to_string(pid_file);
    let _ = fs::remove_file(pid_file);
    done?;
    let text = text.map_err(TaskError::io(format!("reading {}", pid_file.display())))?;
    match text.trim().parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(TaskError::Internal(format!("the runtime wrote {text:?} as a pid"))),
    }
}

async fn connect(process: &Process, streams: Streams) -> Result<(), TaskError> {
    let exited = process.exited();
    match streams {
        Streams::Pipes(pipes) => process.io.start_pipes(pipes, &exited),
        Streams::Terminal(console) => match console.receive().await {
            Ok(master) => process.io.start_terminal(master, &exited),
            Err(error) => Err(error),
        },
    }
    .map_err(TaskError::io("connecting the standard streams of a process"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_labels_are_dropped_and_the_terminal_is_the_request_s() {
        let json =
            br#"{"args":["sh"],"apparmorProfile":"x","selinuxLabel":"y","terminal":true,"cwd":"/","new":{"a":1}}"#;
        let spec: Value = serde_json::from_slice(&process_spec(json, false).unwrap()).unwrap();
        assert_eq!(spec, serde_json::json!({"args":["sh"],"terminal":false,"cwd":"/","new":{"a":1}}));
    }

    #[test]
    fn what_is_no_process_is_refused() {
        for (bad, why) in [
            (&b"{"[..], "EOF while parsing"),
            (b"[]", "it is not a JSON object"),
            (b"{}", "it has no args"),
            (b"{\"args\":[]}", "it has no args"),
        ] {
            let error = process_spec(bad, false).unwrap_err().to_string();
            assert!(error.starts_with("the process to execute: ") && error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_missing_or_torn_spec_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = check_spec(dir.path(), false).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("No such file"), "{error}");
        fs::write(dir.path().join("config.json"), "{\"process\":").unwrap();
        assert!(matches!(check_spec(dir.path(), false), Err(TaskError::InvalidArgument(_))));
        fs::write(dir.path().join("config.json"), "{\"process\":{\"terminal\":true}}").unwrap();
        let error = check_spec(dir.path(), false).unwrap_err().to_string();
        assert!(error.contains("process.terminal is true"), "{error}");
        check_spec(dir.path(), true).unwrap();
    }
}
