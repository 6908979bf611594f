//! A volume that several containers of a pod have is one thing: what one does there, the others see as
//! processes of one machine do. And a container that got hold of its guest gets no further.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use kuasar_e2e::{
    cri::{ContainerConfig, Mount},
    image::BUSYBOX,
    lab::{self, Lab, Pod, QEMU_9P, folder_of, run},
    suite::{handler, patient},
};
use tokio::{process::Command, time::timeout};

use super::{
    IDLE,
    common::{privileged_pod, sh},
};

/// A program that does what busybox cannot, or not everywhere.
async fn probe(lab: &Lab) -> Result<PathBuf> {
    let program = lab.machine.root.join("tmp/share_probe");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/share_probe.rs");
    if !program.exists() {
        let mut rustc = Command::new("rustc");
        rustc.args(["--edition", "2024", "-C", "target-feature=+crt-static", "-o"]);
        run(rustc.arg(&program).arg(source)).await.context("building the probe")?;
    }
    Ok(program)
}

fn mount(host: &Path, container: &str, readonly: bool) -> Mount {
    let host_path = host.to_string_lossy().into_owned();
    Mount { container_path: container.into(), host_path, readonly, ..Mount::default() }
}

async fn started(lab: &Lab, pod: &Pod<'_>, name: &str, mounts: &[Mount]) -> Result<String> {
    let mut mounts = mounts.to_vec();
    mounts.push(mount(&probe(lab).await?, "/probe", true));
    let id = pod.create(ContainerConfig { mounts, ..lab::container(name, BUSYBOX, IDLE) }).await?;
    lab.cri.start(&id).await.map_err(|e| anyhow!("starting {name}: {}", e.message()))?;
    Ok(id)
}

/// Does one thing after the other, in the container of each, and compares what the last said.
async fn steps(lab: &Lab, what: &str, steps: &[(&str, &str)], expected: &str) -> Result<()> {
    let mut said = String::new();
    for (id, script) in steps {
        let done = timeout(patient(Duration::from_secs(40)), sh(lab, id, script)).await;
        said = done.with_context(|| format!("{what}: {script}"))?.with_context(|| what.to_owned())?;
    }
    ensure!(said == expected, "{what}: {said:?} instead of {expected:?}");
    Ok(())
}

const UNTIL: &str = "for i in $(seq 300); do test -s /tmp/said && exit 0; sleep 0.1; done; exit 1";

/// `one` writes; both have the volume at `/v`.
async fn behaves_as_one(lab: &Lab, one: &str, two: &str, round: u32) -> Result<()> {
    let at = |text: &str| text.replace('#', &round.to_string());
    let background =
        |command: &str| at(&format!("rm -f /tmp/said; {{ {command}; }} >/tmp/said 2>&1 </dev/null &"));
    let wait = "for i in $(seq 100); do test -S /v/s# && exec /probe ask /v/s#; sleep 0.1; done; exit 1";
    let serve = background("/probe serve /v/s#");
    steps(lab, "a unix socket", &[(one, &serve), (two, &at(wait))], "0 hello").await?;
    let pipe = background("/probe pipe /v/p#; echo through > /v/p#");
    let read = at("for i in $(seq 100); do test -p /v/p# && exec cat /v/p#; sleep 0.1; done; exit 1");
    steps(lab, "a named pipe", &[(one, &pipe), (two, &read)], "0 through").await?;
    for kind in ["flock", "posix"] {
        let hold = background(&format!("/probe hold {kind} /v/{kind}#"));
        let again = at(&format!("/probe try {kind} /v/{kind}#"));
        let release = at(&format!(
            "killall probe; for i in $(seq 100); do /probe try {kind} /v/{kind}# | grep -q got && exit; \
             sleep 0.1; done"
        ));
        let held: [(&str, &str); 3] = [(one, &hold), (one, UNTIL), (one, &again)];
        steps(lab, &format!("{kind} in one container"), &held, "0 busy").await?;
        steps(lab, kind, &[(one, &release), (one, &again)], "0 got").await?;
    }
    let watch = background("/probe watch /v");
    let there = "for i in $(seq 300); do grep -q watching /tmp/said && exit 0; sleep 0.1; done; exit 1";
    let make = at("touch /v/made#");
    let seen =
        at("for i in $(seq 100); do grep made# /tmp/said && exit 0; sleep 0.1; done; cat /tmp/said; exit 1");
    let watched: [(&str, &str); 4] = [(two, &watch), (two, there), (one, &make), (two, &seen)];
    steps(lab, "inotify", &watched, &at("0 made#")).await?;
    // At once: nobody waits for what was known to be forgotten.
    let texts = [
        (
            "growing",
            "printf ab > /v/x#",
            "cat /v/x#",
            "printf 0123456789 > /v/x#",
            "cat /v/x#",
            "0 0123456789",
        ),
        ("appending", "echo a > /v/l#", "cat /v/l#", "echo b >> /v/l#", "cat /v/l#", "0 a\nb"),
        ("replacing", "echo a > /v/r#", "cat /v/r#", "echo b > /v/n# && mv /v/n# /v/r#", "cat /v/r#", "0 b"),
        (
            "changing a mode",
            "echo > /v/m#; chmod 600 /v/m#",
            "ls /v/m#",
            "chmod 755 /v/m#",
            "stat -c %a /v/m#",
            "0 755",
        ),
    ];
    for (what, first, look, then, again, expected) in texts {
        let all: Vec<String> = [first, look, then, again].map(at).into();
        let all: Vec<(&str, &str)> =
            [one, two, one, two].into_iter().zip(all.iter().map(String::as_str)).collect();
        steps(lab, what, &all, expected).await?;
    }
    Ok(())
}

/// Locks are two containers' to fight for.
async fn locks_keep_others_out(lab: &Lab, one: &str, two: &str) -> Result<()> {
    for kind in ["flock", "posix"] {
        let hold = format!("rm -f /tmp/said; /probe hold {kind} /v/both-{kind} >/tmp/said 2>&1 </dev/null &");
        let again = format!("/probe try {kind} /v/both-{kind}");
        let held: [(&str, &str); 3] = [(one, &hold), (one, UNTIL), (two, &again)];
        steps(lab, &format!("{kind} of another container"), &held, "0 busy").await?;
    }
    Ok(())
}

pub(crate) async fn containers_share_a_volume_as_one(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("sharing", handler()).await?;
    let volume = lab.machine.root.join("tmp/sharing");
    fs::create_dir_all(volume.join("sub"))?;
    let whole = |readonly| [mount(&volume, "/v", readonly)];
    let one = started(&lab, &pod, "one", &whole(false)).await?;
    let two = started(&lab, &pod, "two", &whole(false)).await?;
    behaves_as_one(&lab, &one, &two, 1).await?;
    behaves_as_one(&lab, &two, &one, 2).await?;
    locks_keep_others_out(&lab, &one, &two).await?;
    // A part of it, in another container.
    let part = started(&lab, &pod, "part", &[mount(&volume.join("sub"), "/s", false)]).await?;
    let written = [
        (one.as_str(), "echo abc > /v/sub/l"),
        (&part, "cat /s/l; echo defghijkl > /s/l"),
        (&one, "cat /v/sub/l"),
    ];
    steps(&lab, "a part of a volume", &written, "0 defghijkl").await?;
    pod.remove().await
}

/// The one that only reads comes first: what is read-only on the host must become writable without becoming
/// another.
pub(crate) async fn a_volume_is_read_only_until_somebody_writes(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("reads-first", handler()).await?;
    let volume = lab.machine.root.join("tmp/reads-first");
    fs::create_dir_all(&volume)?;
    fs::write(volume.join("f"), "old\n")?;
    let reads = started(&lab, &pod, "reads", &[mount(&volume, "/v", true)]).await?;
    steps(&lab, "reading", &[(&reads, "cat /v/f")], "0 old").await?;
    let exported = folder_of(handler()).join(&pod.id).join("shared/volumes/1/f");
    let denied = fs::OpenOptions::new().append(true).open(&exported).map(drop).map_err(|e| e.raw_os_error());
    ensure!(denied == Err(Some(30)), "the host lets a guest write to what no container may: {denied:?}");
    let writes = started(&lab, &pod, "writes", &[mount(&volume, "/v", false)]).await?;
    behaves_as_one(&lab, &writes, &reads, 1).await?;
    let out = sh(&lab, &reads, "echo x > /v/x").await?;
    ensure!(out.contains("Read-only file system"), "the one that only reads: {out:?}");
    pod.remove().await
}

/// What 9p carries: names and bytes at once. It has no sockets, locks and watches between containers
/// (docs/storage.md).
pub(crate) async fn containers_share_a_volume_by_9p(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod("sharing-9p", QEMU_9P).await?;
    let volume = lab.machine.root.join("tmp/sharing-9p");
    fs::create_dir_all(volume.join("sub"))?;
    let reads = started(&lab, &pod, "reads", &[mount(&volume, "/v", true)]).await?;
    let writes = started(&lab, &pod, "writes", &[mount(&volume, "/v", false)]).await?;
    for (what, first, then, expected) in [
        ("growing", "printf ab > /v/x", "cat /v/x", "0 ab"),
        ("growing", "printf 0123456789 > /v/x", "cat /v/x", "0 0123456789"),
        ("replacing", "echo b > /v/n && mv /v/n /v/x", "cat /v/x", "0 b"),
    ] {
        steps(&lab, what, &[(&writes, first), (&reads, then)], expected).await?;
    }
    let out = sh(&lab, &reads, "echo x > /v/y").await?;
    ensure!(out.contains("Read-only file system"), "the one that only reads: {out:?}");
    pod.remove().await
}

/// An ordinary privileged container is root of its guest: the kernel runs a program of its choice for a core
/// dump. There it has the shared folder, and changes what it can while another container is made.
pub(crate) async fn a_guest_cannot_lead_the_host_astray(lab: Arc<Lab>) -> Result<()> {
    let pod = privileged_pod(&lab, "hostile").await?;
    let (precious, volume) =
        (lab.machine.root.join("tmp/precious-file"), lab.machine.root.join("tmp/hostile"));
    fs::create_dir_all(&volume)?;
    fs::write(&precious, "precious\n")?;
    let mut config = ContainerConfig {
        mounts: vec![mount(&volume, "/v", false)],
        ..lab::container("hostile", BUSYBOX, IDLE)
    };
    config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let hostile = pod.create(config).await?;
    lab.cri.start(&hostile).await.map_err(|e| anyhow!("starting: {}", e.message()))?;
    // The guest has no shell, and a core pattern has 128 bytes at most.
    fs::copy(lab.paths.tool("busybox"), volume.join("busybox"))?;
    let script = format!(
        "cd /run/kuasar/state; for n in $(seq 2000); do for c in *; do \
         ln -s {0} $c/config.json; ln -s {0} $c/.config.json.new; ln -s {1} volumes/9; mv $c away; mkdir new; \
         echo x > $c/config.json; done; done > /run/kuasar/state/volumes/1/said 2>&1",
        precious.display(),
        precious.parent().unwrap_or(Path::new("/")).display(),
    );
    fs::write(volume.join("attack"), script)?;
    // In the background: who dumps core waits for the program that takes it.
    let begin = format!(
        "echo '|{0}/busybox sh {0}/attack' > /proc/sys/kernel/core_pattern && \
         ulimit -c unlimited; (sh -c 'kill -SEGV $$' >/dev/null 2>&1 </dev/null &); echo begun",
        "/run/kuasar/state/volumes/1"
    );
    let begun = sh(&lab, &hostile, &begin).await?;
    ensure!(begun.contains("begun"), "it could not begin: {begun:?}");
    for n in 0..4 {
        let id = started(&lab, &pod, &format!("victim-{n}"), &[mount(&volume, "/v", true)]).await?;
        lab.cri.stop(&id, 0).await?;
        lab.cri.remove(&id).await.map_err(|e| anyhow!("removing: {}", e.message()))?;
    }
    let said = fs::read_to_string(volume.join("said")).unwrap_or_default();
    ensure!(said.contains("Read-only file system"), "it did not really try: {:?}", said.get(..200));
    ensure!(fs::read_to_string(&precious)? == "precious\n", "a file of the host was changed");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let folder = folder_of(handler());
    let strangers = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let astray =
        strangers.filter(|point| point.starts_with("/") && point.ends_with("/precious-file")).count();
    ensure!(astray == 0, "something is mounted over the host's file; pods are at {}", folder.display());
    pod.remove().await
}
