//! Launch of a process: its streams, the OCI runtime, its pid, and the watch for its end.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    cgroup::Cgroup,
    container::{Container, Exec},
    error::TaskError,
    guest_devices, hooks,
    process::Process,
    runc::{ChildStdio, RuncError},
    spec,
    stdio::{
        console::ConsoleSocket,
        process_io::{Pipes, ProcessIo},
    },
    storage::blocking,
    tasks::{Context, write},
};

/// Streams that a process is launched with.
enum Streams {
    Pipes(Pipes),
    Terminal(ConsoleSocket),
}

/// Lets the runtime make a container.
pub(crate) async fn create(context: &Context, container: &Arc<Container>) -> Result<(), TaskError> {
    let init = &container.init;
    let mut spec = read_spec(container).await?;
    spec::fit_cgroup(&mut spec, &context.cgroups)?;
    let devices = context.storages.attach(&container.id, Path::new(&container.bundle)).await?;
    spec::set_devices(&mut spec, &devices);
    enter_volumes(context, container, &spec).await?;
    container.set_shares_pids(context.pids.resolve(&mut spec, &context.runc)?);
    guest_devices::check(&spec, Path::new("/sys"))?;
    guest_devices::give(&mut spec, Path::new("/sys"));
    hooks::check(&spec, Path::new("/"))?;
    let _ = container.cgroup.set(cgroup_of(context, &spec));
    let bundle = write_bundle(context, container, &spec)?;
    let pid_file = context.work.join(format!("{}.pid", container.id));
    let (streams, child) = prepare(context, init)?;
    let console = console_path(&streams);
    let guard = context.reaper.spawning();
    let created = context.runc.create(&container.id, &bundle, &pid_file, console, child).await;
    let pid = settle(container, created, &pid_file)?;
    init.set_pid(pid);
    context.reaper.watch(pid, init.exit_sender());
    drop(guard);
    context.oom.watch(container, &context.events);
    connect(init, streams).await
}

/// Removes a container: what runs in it, what the runtime keeps of it, what the agent does. If the runtime
/// does not do its part, the agent does: a container that cannot be deleted would stay for ever.
pub(crate) async fn remove(context: &Context, container: &Container) -> Result<(), TaskError> {
    context.oom.forget(container);
    let cgroup = container.cgroup.get();
    // In a PID namespace that it shares, more of it may live than its own process.
    let _ = cgroup.is_some_and(Cgroup::kill);
    if let Err(error) = context.runc.delete(&container.id, true).await {
        log::warn!("container {}: {error}; removing it without", container.id);
        let _ = fs::remove_dir_all(context.runc.root.join(&container.id));
    }
    let gone = match cgroup {
        Some(cgroup) => cgroup.remove().await,
        None => Ok(()),
    };
    context.storages.release(&container.id).await;
    context.storages.shares.leave(&container.id);
    forget_bundle(context, container);
    gone.map_err(TaskError::io(format!("removing the cgroup of container {}", container.id)))
}

/// Removes the agent's own folder of a container.
fn forget_bundle(context: &Context, container: &Container) {
    let _ = fs::remove_dir_all(bundle_dir(context, container));
}

fn bundle_dir(context: &Context, container: &Container) -> PathBuf {
    context.work.join(format!("{}.bundle", container.id))
}

/// The OCI `LinuxResources` that a container was made with, null if there are none.
pub(crate) fn resources(context: &Context, container: &Container) -> Value {
    let spec = fs::read(bundle_dir(context, container).join("config.json")).ok();
    let mut spec = spec.and_then(|json| serde_json::from_slice::<Value>(&json).ok());
    let resources = spec.as_mut().and_then(|spec| spec.pointer_mut("/linux/resources"));
    resources.map(Value::take).unwrap_or_default()
}

fn cgroup_of(context: &Context, spec: &Value) -> Cgroup {
    let path = spec.pointer("/linux/cgroupsPath").and_then(Value::as_str).unwrap_or_default();
    context.cgroups.cgroup(path)
}

async fn read_spec(container: &Container) -> Result<Value, TaskError> {
    let bundle = Path::new(&container.bundle);
    let path = bundle.join("config.json");
    let doing = format!("reading the container's spec {}", path.display());
    // The share's server may be slow.
    let read = {
        let (doing, bundle) = (doing.clone(), bundle.to_owned());
        move || {
            look_anew(&bundle);
            fs::read(&path).map_err(TaskError::io(doing))
        }
    };
    let json = blocking(doing, read).await?;
    let terminal = container.init.stdio.terminal;
    spec::rewrite(&json, spec::Target { container: &container.id, bundle, terminal })
}

/// The share's server may be slow here, too.
async fn enter_volumes(context: &Context, container: &Container, spec: &Value) -> Result<(), TaskError> {
    let (shares, id, spec) = (Arc::clone(&context.storages.shares), container.id.clone(), spec.clone());
    let doing = format!("mounting the volumes of container {id}");
    let enter = move || {
        shares.enter_bound(&id, &spec);
        Ok(())
    };
    blocking(doing, enter).await
}

/// Has the kernel ask the share's server what is at a path. For a second it goes by what it knows, which may
/// be the folder of a container of the same id that is gone; a link that is not to be over anything is the
/// one question that it never answers by itself. Nothing is made: there are no links between file systems.
fn look_anew(path: &Path) {
    let _ = fs::hard_link("/proc/version", path);
}

/// The runtime gets a bundle of the agent's own: the host's stays as it is.
fn write_bundle(context: &Context, container: &Container, spec: &Value) -> Result<PathBuf, TaskError> {
    let dir = bundle_dir(context, container);
    fs::create_dir_all(&dir).map_err(TaskError::io(format!("making {}", dir.display())))?;
    write(&dir.join("config.json"), spec.to_string().as_bytes())?;
    Ok(dir)
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
    let pid = settle(container, started, &pid_file)?;
    process.set_pid(pid);
    context.reaper.watch(pid, process.exit_sender());
    drop(guard);
    connect(process, streams).await
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

/// The pid that the runtime wrote, once it has succeeded. If it was killed after it had written one, that
/// process is, too: nobody would know it.
fn settle(container: &Container, done: Result<(), RuncError>, pid_file: &Path) -> Result<i32, TaskError> {
    let text = fs::read_to_string(pid_file);
    let _ = fs::remove_file(pid_file);
    let pid = text.as_ref().ok().and_then(|text| text.trim().parse().ok()).filter(|pid| *pid > 0);
    if let Err(error) = done {
        if let Some(pid) = pid {
            container.kill_one(pid);
        }
        return Err(error.into());
    }
    let text = text.map_err(TaskError::io(format!("reading {}", pid_file.display())))?;
    pid.ok_or_else(|| TaskError::Internal(format!("the runtime wrote {text:?} as a pid")))
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
