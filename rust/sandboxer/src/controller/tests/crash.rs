//! The daemon killed at each step of its work, and each step failing: what becomes of the pod, and of what is
//! the user's.
//!
//! Every row is a daemon in a process of its own (this test's program once more), because what fails is the
//! process's. After a kill another daemon takes over; after a failure the same one is asked again. What came
//! of it is docs/crash-matrix.md.

use std::{
    collections::BTreeMap,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Output},
};

use nix::mount::{MsFlags, mount};
use tokio::task::JoinSet;

use super::*;
use crate::{container::mount::unmount_below, crash::armed};

/// The folder of the lab, for the program's second self.
const LAB: &str = "KUASAR_TEST_LAB";
/// The task of the second self.
const TASK: &str = "KUASAR_TEST_TASK";
/// Choice of the rows that are tried: `all`, or any other text, which chooses some. The commit, unless it is
/// set.
const ROWS: &str = "KUASAR_CRASH_ROWS";
/// One of so many rows is tried where not all are.
const SAMPLE: u64 = 5;
/// Rows at the same time.
const AT_ONCE: usize = 3;
const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/crash-matrix.md");

/// Steps, in their order. A record is replaced at each of these times.
const STEPS: &[&str] = &[
    "create: marker",
    "create: folder",
    "create: recorded",
    "start: recorded",
    "start: cgroup",
    "start: files",
    "start: ready to boot",
    "start: VM",
    "start: VM recorded",
    "start: guest called",
    "start: relay",
    "start: relay recorded",
    "start: guest set up",
    "start: running",
    "prepare: planned",
    "prepare: pinned",
    "prepare: attached",
    "prepare: mounted",
    "release: detached",
    "release: unmounted",
    "stop: guest",
    "stop: VM",
    "stop: network",
    "stop: unmounted",
    "remove: relay",
    "remove: cgroup",
    "remove: emptied",
    "remove: unproved",
    "record: written#1",
    "record: written#2",
    "record: written#4",
    "record: written#6",
    "record: replaced#1",
    "record: replaced#3",
    "record: replaced#5",
];

/// Steps of a daemon that finds a pod: what the daemon before was doing when it was killed, `run` if it had a
/// pod that runs.
const RECOVERY: &[(&str, &str)] = &[
    ("recover: listed", "run"),
    ("recover: host", "run"),
    ("recover: found", "run"),
    ("recover: listed", "start: VM"),
    ("recover: ended", "start: VM"),
    ("recover: ended", "start: relay"),
    ("remove: emptied", "start: VM"),
    ("recover: listed", "stop: VM"),
    ("recover: host", "stop: VM"),
];

/// No space left, too many open files, no memory.
const ERRORS: [(i32, &str); 3] = [(28, "ENOSPC"), (24, "EMFILE"), (12, "ENOMEM")];

/// A row of the table.
#[derive(Clone, Debug)]
enum Row {
    Kill(&'static str),
    Recovery(&'static str, &'static str),
    Failure(&'static str, i32, &'static str),
}

impl Row {
    fn all() -> Vec<Self> {
        let kills = STEPS.iter().map(|step| Self::Kill(step));
        let recoveries = RECOVERY.iter().map(|(step, before)| Self::Recovery(step, before));
        let failures = STEPS
            .iter()
            .flat_map(|step| ERRORS.iter().map(|(errno, name)| Self::Failure(step, *errno, name)));
        kills.chain(recoveries).chain(failures).collect()
    }

    fn name(&self) -> String {
        match self {
            Self::Kill(step) => format!("{step} | kill"),
            Self::Recovery(step, before) => format!("{step}, after a kill at {before} | kill"),
            Self::Failure(step, _, name) => format!("{step} | {name}"),
        }
    }

    /// Tries it; returns what became of the pod.
    async fn run(&self) -> String {
        let lab = Lab::new(Fault::None);
        let user = User::new(&lab);
        let outcome = match self {
            Self::Kill(step) => {
                killed(&again(&lab, "life", Some(&format!("{step}=kill"))), step);
                taken_over(&lab, &user).await
            }
            Self::Recovery(step, before) => {
                match *before {
                    "run" => killed(&again(&lab, "run", None), before),
                    before => killed(&again(&lab, "life", Some(&format!("{before}=kill"))), before),
                }
                killed(&again(&lab, "serve", Some(&format!("{step}=kill"))), step);
                taken_over(&lab, &user).await
            }
            Self::Failure(step, errno, _) => {
                let output = again(&lab, "life", Some(&format!("{step}={errno}")));
                assert!(output.status.success(), "{step}: {}", text(&output));
                let said = String::from_utf8_lossy(&output.stdout);
                let mut said =
                    said.lines().filter_map(|line| line.split_once("outcome: ")).map(|(_, said)| said);
                said.next_back().expect("it says what happened").to_owned()
            }
        };
        user.check("at the end");
        assert_eq!(children(&lab), Vec::<String>::new(), "{self:?}: processes are left");
        lab.assert_clean();
        outcome
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn killed(output: &Output, step: &str) {
    assert_eq!(output.status.signal(), Some(9), "{step} was never reached: {}", text(output));
}

/// Runs this program once more, for a task in a lab.
fn again(lab: &Lab, task: &str, point: Option<&str>) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "controller::tests::crash::a_daemon_of_its_own",
        "--nocapture",
        "--include-ignored",
    ]);
    command.env(LAB, lab.dir.path()).env(TASK, task).env_remove(armed::VARIABLE);
    if let Some(point) = point {
        command.env(armed::VARIABLE, point);
    }
    command.output().unwrap()
}

/// Processes that the daemons of a lab's rows have started, by what they are called with.
fn children(lab: &Lab) -> Vec<String> {
    let wanted = format!("{LAB}={}\0", lab.dir.path().display());
    let of = |entry: fs::DirEntry| {
        let environment = fs::read(entry.path().join("environ")).ok()?;
        let ours = environment.windows(wanted.len()).any(|part| part == wanted.as_bytes());
        let command = fs::read(entry.path().join("cmdline")).ok()?;
        (ours && !command.is_empty()).then(|| String::from_utf8_lossy(&command).replace('\0', " "))
    };
    fs::read_dir("/proc").unwrap().flatten().filter_map(of).collect()
}

/// The user's property: a volume with a mount in it, and mounts of it beside.
struct User {
    places: [PathBuf; 2],
    before: BTreeMap<String, String>,
}

impl User {
    fn new(lab: &Lab) -> Self {
        let none = None::<&str>;
        let places = [lab.path("volume"), lab.path("around")];
        for folder in ["volume/sub", "around", "bundle", "image"] {
            fs::create_dir_all(lab.path(folder)).unwrap();
        }
        mount(Some("tmpfs"), &lab.path("volume/sub"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::write(lab.path("volume/file"), "precious").unwrap();
        fs::write(lab.path("volume/sub/inner"), "precious, too").unwrap();
        fs::write(lab.path("image/file"), "").unwrap();
        mount(Some(&lab.path("volume")), &lab.path("around"), none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .unwrap();
        let spec = serde_json::json!({"ociVersion": "1.1.0", "hostname": "x", "mounts": [
            {"destination": "/data", "type": "bind", "source": lab.path("volume"), "options": ["rbind", "rw"]},
        ]});
        fs::write(lab.path("bundle/config.json"), spec.to_string()).unwrap();
        let before = places.iter().flat_map(|place| seen(place)).collect();
        Self { places, before }
    }

    fn check(&self, when: &str) {
        let now: BTreeMap<_, _> = self.places.iter().flat_map(|place| seen(place)).collect();
        assert_eq!(now, self.before, "{when}");
    }
}

impl Drop for User {
    fn drop(&mut self) {
        for place in &self.places {
            let _ = unmount_below(place);
        }
    }
}

/// Everything in a folder: files with what is in them, and mounts.
fn seen(folder: &Path) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    let mut left = vec![folder.to_owned()];
    while let Some(path) = left.pop() {
        let found = fs::symlink_metadata(&path).unwrap();
        if found.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            seen.insert(path.display().to_string(), "a folder".to_owned());
        } else {
            seen.insert(path.display().to_string(), fs::read_to_string(&path).unwrap());
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        if Path::new(fields[4]).starts_with(folder) {
            seen.insert(format!("mount {} {}", fields[0], fields[4]), fields[3].to_owned());
        }
    }
    seen
}

/// Does with a pod what containerd and the relay do, each thing once more where it fails.
async fn life(lab: &Lab, client: &mut Client) -> String {
    let mut failed = Vec::new();
    let mut started = false;
    for _ in 0..2 {
        if let Err(error) = client.create(create(lab, &pod_config())).await {
            failed.push(format!("create: {}", error.message()));
            client.create(create(lab, &pod_config())).await.expect("Create, again");
        }
        match start(client).await {
            Ok(_) => {
                started = true;
                break;
            }
            Err(error) => failed.push(format!("start: {}", error.message())),
        }
    }
    assert!(started, "Start failed twice: {failed:?}");
    let socket = lab.pod("p1").join(pod_files::HOST_SOCKET);
    let host = ttrpc::asynchronous::Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
    let host = HostClient::new(host);
    let prepare = |id: &str| hang::prepare(lab, id, &lab.path("image"));
    for id in ["c1", "c2"] {
        if let Err(error) = host.prepare(hang::context(), &prepare(id)).await {
            failed.push(format!("prepare: {error}"));
            host.prepare(hang::context(), &prepare(id)).await.expect("Prepare, again");
        }
    }
    let mut release = ReleaseRequest::new();
    release.container_id = "c1".into();
    if let Err(error) = host.release(hang::context(), &release).await {
        failed.push(format!("release: {error}"));
        host.release(hang::context(), &release).await.expect("Release, again");
    }
    assert!(!lab.pod("p1").join("shared/c1").exists(), "what is released is gone");
    if let Err(error) = stop(client).await {
        failed.push(format!("stop: {}", error.message()));
        stop(client).await.expect("Stop, again");
    }
    if let Err(error) = shutdown(client).await {
        failed.push(format!("shutdown: {}", error.message()));
        shutdown(client).await.expect("Shutdown, again");
    }
    let calls: Vec<&str> = failed.iter().filter_map(|text| text.split(':').next()).collect();
    let known = |text: &String| text.contains("os error") || text.contains("was there");
    assert!(failed.iter().all(known), "it is not said why: {failed:?}");
    if calls.is_empty() {
        "no call fails".into()
    } else {
        format!("{} fails, and works again", calls.join(", "))
    }
}

/// After the kill: another daemon takes over, what is left is removed, and the same can be done again.
async fn taken_over(lab: &Lab, user: &User) -> String {
    user.check("after the kill");
    let (mut client, _pods) = serve(lab).await;
    user.check("after the next daemon's start");
    let outcome = match status(&mut client).await {
        Err(error) => {
            assert_eq!(error.code(), Code::NotFound);
            "no pod".to_owned()
        }
        Ok(status) if status.state == "SANDBOX_READY" => "the pod runs on".to_owned(),
        Ok(status) if status.exited_at.is_none() => "the pod is created".to_owned(),
        Ok(status) => {
            let ours: serde_json::Value = serde_json::from_str(&status.info["kuasar"]).unwrap();
            match ours["reason"].as_str() {
                Some(reason) => {
                    let reason = reason.split(';').next().unwrap_or_default();
                    format!("the pod has ended: {reason}")
                }
                None => "the pod has been stopped".to_owned(),
            }
        }
    };
    // As containerd does with whatever it knows.
    if outcome != "no pod" {
        stop(&mut client).await.expect("Stop");
        user.check("after Stop");
    }
    shutdown(&mut client).await.expect("Shutdown");
    assert!(!lab.pod("p1").exists(), "its folder is gone");
    assert_eq!(life(lab, &mut client).await, "no call fails", "the second try");
    outcome
}

#[test]
#[ignore = "a part of others: the daemon that they kill"]
fn a_daemon_of_its_own() {
    let (Some(dir), Ok(task)) = (std::env::var_os(LAB), std::env::var(TASK)) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let lab = std::mem::ManuallyDrop::new(Lab::attach(Path::new(&dir)));
    runtime.block_on(async {
        let (mut client, _pods) = serve(&lab).await;
        match task.as_str() {
            "life" => {
                let outcome = life(&lab, &mut client).await;
                assert!(armed::was_reached(), "the step was never reached");
                println!("outcome: {outcome}");
            }
            "run" => {
                client.create(create(&lab, &pod_config())).await.unwrap();
                start(&mut client).await.unwrap();
                let socket = lab.pod("p1").join(pod_files::HOST_SOCKET);
                let address = format!("unix://{}", socket.display());
                let host = HostClient::new(ttrpc::asynchronous::Client::connect(&address).await.unwrap());
                host.prepare(hang::context(), &hang::prepare(&lab, "c1", &lab.path("image"))).await.unwrap();
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                    .unwrap();
            }
            _ => {}
        }
    });
}

/// A number for a text, the same everywhere (FNV-1a).
fn hash(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Chooses the rows that are tried, and says whether that is all of them.
fn chosen() -> (Vec<Row>, bool) {
    let commit = || {
        let asked =
            Command::new("git").args(["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "HEAD"]).output();
        asked.map_or_else(
            |_| String::new(),
            |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )
    };
    let by = std::env::var(ROWS).unwrap_or_else(|_| commit());
    if by == "all" {
        return (Row::all(), true);
    }
    let mine = |row: &Row| hash(&format!("{by} {}", row.name())).is_multiple_of(SAMPLE);
    (Row::all().into_iter().filter(mine).collect(), false)
}

fn table(outcomes: &BTreeMap<String, String>) -> String {
    let mut text = String::from(
        "# What a crash leaves\n\n\
         The daemon killed at each step of its work, and each step failing, with a double in the VM's place. Made by\n\
         `tests/lab/check crashes`, with `KUASAR_BLESS=1`, and compared with what happens by the same; a sample is in `make check`.\n\n\
         After a kill another daemon takes over. In every row: nothing of the user's has changed, neither files nor mounts, in a volume\n\
         or around it; once containerd has said that the pod is to go, no process, mount or folder of it is left; and the same pod\n\
         can be made, used and removed again.\n\n\
         | step | what happens | then |\n|---|---|---|\n",
    );
    for row in Row::all() {
        if let Some(outcome) = outcomes.get(&row.name()) {
            text += &format!("| {} | {outcome} |\n", row.name());
        }
    }
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_or_failing_at_every_step_leaves_nothing_and_harms_nobody() {
    let (rows, all) = chosen();
    let mut outcomes = BTreeMap::new();
    let mut running = JoinSet::new();
    let mut rows = rows.into_iter();
    loop {
        while running.len() < AT_ONCE
            && let Some(row) = rows.next()
        {
            running.spawn(async move { (row.name(), row.run().await) });
        }
        let Some(done) = running.join_next().await else { break };
        let (name, outcome) = done.unwrap();
        eprintln!("{name}: {outcome}");
        outcomes.insert(name, outcome);
    }
    if all && std::env::var_os("KUASAR_BLESS").is_some() {
        fs::write(TABLE, table(&outcomes)).unwrap();
    }
    let documented = fs::read_to_string(TABLE).unwrap();
    for (name, outcome) in &outcomes {
        let line = format!("| {name} | {outcome} |");
        assert!(documented.lines().any(|there| there == line), "{line} is not in docs/crash-matrix.md");
    }
    assert!(!all || documented == table(&outcomes), "docs/crash-matrix.md is of other steps");
}
