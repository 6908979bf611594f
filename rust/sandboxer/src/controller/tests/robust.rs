//! Callers that go away, and daemons that come back.

use std::{sync::Arc, time::Instant};

use super::*;
use crate::{pod::Caller, process::Spawn};

/// Starts, and hangs up when `when` is over.
async fn start_and_hang_up(client: &Client, when: impl Future<Output = ()>) {
    let mut other = client.clone();
    let starting = tokio::spawn(async move { start(&mut other).await });
    when.await;
    starting.abort();
    let _ = starting.await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_in_a_step_that_hangs_leaves_nothing() {
    for fault in [Fault::SlowVmm, Fault::Silent, Fault::HangsSetup] {
        let lab = Lab::new(fault);
        let (mut client, pods) = serve(&lab).await;
        client.create(create(&lab, &pod_config())).await.unwrap();
        let reached = async {
            match fault {
                Fault::SlowVmm => lab.hypervisor.slow.notified().await,
                Fault::Silent => eventually("the VMM starts", || !lab.survivors().is_empty()).await,
                _ => {
                    eventually("the guest is set up", || !lab.hypervisor.setups.lock().unwrap().is_empty())
                        .await;
                }
            }
        };
        start_and_hang_up(&client, reached).await;
        eventually("the pod goes", || pods.is_empty()).await;
        lab.assert_clean();
    }
}

/// A daemon dies while it makes a pod's network: the next one knows all that it left.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_is_recorded_before_it_is_made() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    // Beside the network the token is written, into what takes it when somebody reads.
    let token = lab.path("pods/p1/token");
    nix::unistd::mkfifo(&token, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut other = client.clone();
    let starting = tokio::spawn(async move { start(&mut other).await });
    let recorded = || {
        let text = fs::read(lab.path("pods/p1/pod.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()
    };
    // The runtime's own clock may stand still with the thread that writes the token.
    let began = Instant::now();
    while recorded()["phase"] != "starting" {
        assert!(began.elapsed() < Duration::from_secs(10), "the start is not recorded");
        std::thread::sleep(Duration::from_millis(5));
    }
    let netns = lab.netns();
    assert_eq!(recorded()["network"]["netns"], *netns.to_str().unwrap());
    assert!(!starting.is_finished());
    let text = fs::read(&token).unwrap();
    fs::remove_file(&token).unwrap();
    fs::write(&token, text).unwrap();
    starting.await.unwrap().unwrap();
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

/// At every millisecond of a start, so that every step is hit; a start that was faster than its caller is a
/// running pod.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_at_any_time_leaves_nothing_or_a_pod() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    let mut running = 0;
    for millis in (0..120).step_by(4) {
        client.create(create(&lab, &pod_config())).await.unwrap();
        start_and_hang_up(&client, tokio::time::sleep(Duration::from_millis(millis))).await;
        let settled =
            || pods.get("p1").map_or(true, |pod| pod.view().phase == Phase::Running || pod.view().pid == 0);
        eventually("the start is over", settled).await;
        // Whoever had not been heard at all has only created a pod.
        if let Ok(pod) = pods.get("p1") {
            if pod.view().phase == Phase::Running {
                running += 1;
            }
            shutdown(&mut client).await.unwrap();
        }
        eventually("the pod goes", || pods.is_empty()).await;
        assert!(!lab.path("pods/p1").exists());
        eventually("its processes go", || lab.survivors().is_empty()).await;
    }
    assert!(running < 30, "the caller never went away in time");
    lab.assert_clean();
}

#[tokio::test]
async fn a_guest_that_calls_late_has_the_time_to_be_set_up() {
    let lab = Lab::new(Fault::ComesLate);
    let (mut client, _pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn create_stop_and_shutdown_finish_without_their_caller() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    for call in ["create", "stop", "shutdown"] {
        let (mut other, request) = (client.clone(), create(&lab, &pod_config()));
        if call != "create" {
            client.create(request.clone()).await.unwrap();
            start(&mut client).await.unwrap();
        }
        let calling = tokio::spawn(async move {
            match call {
                "create" => drop(other.create(request).await),
                "stop" => drop(stop(&mut other).await),
                _ => drop(shutdown(&mut other).await),
            }
        });
        tokio::time::sleep(Duration::from_millis(5)).await;
        calling.abort();
        let _ = calling.await;
        // Again, as kubelet does: whatever the first did, the second finds it done or does it.
        if call == "create" {
            client.create(create(&lab, &pod_config())).await.unwrap();
        }
        if call == "stop" {
            stop(&mut client).await.unwrap();
            assert_eq!(status(&mut client).await.unwrap().state, "SANDBOX_NOTREADY");
        }
        shutdown(&mut client).await.unwrap();
        assert!(pods.is_empty());
        lab.assert_clean();
    }
}

/// The daemon dies after each of the steps that are written down; what it knew then is all that the next one
/// has.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_dies_with_the_daemon_is_cleared_away() {
    for fault in [Fault::SlowVmm, Fault::Silent, Fault::HangsSetup] {
        let lab = Lab::new(fault);
        let (mut client, pods) = serve(&lab).await;
        client.create(create(&lab, &pod_config())).await.unwrap();
        // Not through the client: nobody may cancel it in an orderly way.
        let (guard, caller) = Caller::new();
        let pod = pods.get("p1").unwrap();
        let starting = tokio::spawn(async move { pod.start(caller).await });
        match fault {
            Fault::SlowVmm => lab.hypervisor.slow.notified().await,
            Fault::Silent => {
                eventually("the VM starts", || !lab.survivors().is_empty()).await;
                assert!(lab.relays().is_empty(), "nobody calls a guest that has not called");
            }
            _ => {
                eventually("the guest is set up", || !lab.hypervisor.setups.lock().unwrap().is_empty()).await
            }
        }
        starting.abort();
        let _ = starting.await;
        std::mem::forget(guard);
        pods.leave();
        drop((client, pods));
        let (mut client, pods) = serve(&lab).await;
        assert!(pods.is_empty());
        assert_eq!(status(&mut client).await.unwrap_err().code(), Code::NotFound);
        lab.assert_clean();
    }
}

/// One pod that runs, and whose VMM does not answer the next daemon.
async fn with_a_vmm_that_does_not_answer(lab: &Lab) -> (Client, Arc<Pods>, Instant) {
    let (mut client, pods) = serve(lab).await;
    client.create(create(lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    pods.leave();
    drop((client, pods));
    fs::write(lab.path("pods/p1/hang"), "").unwrap();
    let began = Instant::now();
    let (client, pods) = serve(lab).await;
    (client, pods, began)
}

fn silent(status: &ControllerStatusResponse) -> bool {
    status.info["kuasar"].contains("its VMM has not answered yet since the daemon was restarted")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_vmm_answers_late_was_ready_all_the_time() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods, began) = with_a_vmm_that_does_not_answer(&lab).await;
    assert!(began.elapsed() >= lab.environment().recover_timeout, "nobody waited for it");
    let waiting = tokio::spawn(wait(client.clone()));
    let unknown = status(&mut client).await.unwrap();
    assert_eq!((unknown.state.as_str(), unknown.pid), ("SANDBOX_READY", lab.vmm().pid()));
    assert!(silent(&unknown), "{unknown:?}");
    fs::remove_file(lab.path("pods/p1/hang")).unwrap();
    let pod = pods.get("p1").unwrap();
    eventually("it is found", || pod.silence().is_none()).await;
    assert_eq!(status(&mut client).await.unwrap().state, "SANDBOX_READY");
    // And watched as any other.
    assert!(!waiting.is_finished());
    lab.vmm().signal(rustix::process::Signal::KILL).unwrap();
    timeout(Duration::from_secs(5), waiting).await.expect("Wait ends").unwrap().unwrap();
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_vmm_does_not_answer_can_be_stopped_and_removed() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods, _) = with_a_vmm_that_does_not_answer(&lab).await;
    assert!(lab.survivors().contains(&lab.vmm().pid()), "nobody has ended it so far");
    stop(&mut client).await.unwrap();
    assert!(!lab.survivors().contains(&lab.vmm().pid()));
    let stopped = status(&mut client).await.unwrap();
    assert_eq!(stopped.state, "SANDBOX_NOTREADY");
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_vmm_or_relay_is_noticed_before_it_has_answered() {
    for whose in ["VM", "relay"] {
        let lab = Lab::new(Fault::None);
        let (mut client, _pods, _) = with_a_vmm_that_does_not_answer(&lab).await;
        let waiting = tokio::spawn(wait(client.clone()));
        let pid = if whose == "VM" { lab.vmm().pid() } else { lab.relays()[0] };
        crate::process::Process::open(pid).unwrap().signal(rustix::process::Signal::KILL).unwrap();
        timeout(Duration::from_secs(5), waiting).await.expect("Wait ends").unwrap().unwrap();
        let ended = status(&mut client).await.unwrap();
        assert_eq!(ended.state, "SANDBOX_NOTREADY");
        let reason = format!("its {whose} ended while no daemon watched");
        assert!(ended.info["kuasar"].contains(&reason), "{ended:?}");
        shutdown(&mut client).await.unwrap();
        lab.assert_clean();
    }
}

/// Process ids of before a restart of the host are those of other processes now.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_host_is_told_from_one_of_the_daemon() {
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    pods.leave();
    drop((client, pods));
    let path = lab.path("pods/p1/pod.json");
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(record["boot"], boot.trim());
    record["boot"] = "11111111-2222-3333-4444-555555555555".into();
    fs::write(&path, record.to_string()).unwrap();

    let relays = lab.relays();
    let (mut client, _pods) = serve(&lab).await;
    let ended = status(&mut client).await.unwrap();
    assert_eq!((ended.state.as_str(), ended.pid), ("SANDBOX_NOTREADY", 0));
    assert!(ended.info["kuasar"].contains("its VM ended with the host, which was restarted"), "{ended:?}");
    shutdown(&mut client).await.unwrap();
    // What has their ids is not ours.
    assert_eq!(lab.survivors(), [lab.vmm().pid()]);
    lab.vmm().end(Duration::ZERO).await.unwrap();
    for relay in relays {
        crate::process::Process::open(relay).unwrap().end(Duration::ZERO).await.unwrap();
    }
    lab.assert_clean();
}

/// A user who gives the daemon a folder one level too high loses nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_pods_folder_is_left_alone_by_recovery_creation_and_removal() {
    let lab = Lab::new(Fault::None);
    let precious = lab.path("pods/precious");
    fs::create_dir(&precious).unwrap();
    let none = None::<&str>;
    nix::mount::mount(Some("tmpfs"), &precious, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
    fs::write(precious.join("data"), "x").unwrap();
    let unfinished = lab.path("pods").join("a".repeat(64));
    fs::create_dir(&unfinished).unwrap();
    let (mut client, pods) = serve(&lab).await;
    assert!(precious.join("data").exists() && pods.is_empty());
    assert!(!unfinished.exists(), "nothing is lost with an empty folder of a sandbox's name");
    let mut request = create(&lab, &pod_config());
    request.sandbox_id = "precious".into();
    let error = client.create(request).await.unwrap_err();
    assert!(error.message().contains("precious is there already and no sandbox's"), "{error:?}");
    let request = ControllerShutdownRequest { sandbox_id: "precious".into(), ..Default::default() };
    client.shutdown(request).await.unwrap();
    assert_eq!(fs::read_to_string(precious.join("data")).unwrap(), "x");
    crate::container::mount::unmount_below(&precious).unwrap();
    fs::remove_dir(&precious).unwrap();
    lab.assert_clean();
}

/// Records of one running pod, multiplied: 490 that live, and of the broken ones each kind.
#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_pods_are_recovered_and_ten_broken_ones_delay_none() {
    crate::daemon::raise_open_files();
    let lab = Lab::new(Fault::None);
    let (mut client, pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    pods.leave();
    drop((client, pods));
    let record = fs::read_to_string(lab.path("pods/p1/pod.json")).unwrap();
    let mut gone = Spawn::new("true").spawn().unwrap().record();
    gone.start_time += 1;
    let vmm = serde_json::from_str::<serde_json::Value>(&record).unwrap()["vm"]["vmm"].clone();
    for number in 2..=500 {
        let id = format!("p{number}");
        let dir = lab.path("pods").join(&id);
        fs::create_dir_all(dir.join("log")).unwrap();
        let mut record: serde_json::Value = serde_json::from_str(&record).unwrap();
        record["id"] = id.clone().into();
        record["vm"]["dir"] = dir.to_str().unwrap().into();
        match number {
            // Three torn, three that hang, three whose VM is dead, one of another age.
            2..=4 => {}
            5..=7 => fs::write(dir.join("hang"), "").unwrap(),
            8..=10 => record["vm"]["vmm"] = serde_json::to_value(gone).unwrap(),
            11 => record["version"] = 99.into(),
            _ => assert_eq!(record["vm"]["vmm"], vmm),
        }
        let mut text = record.to_string();
        if number <= 4 {
            text.truncate(text.len() / 2);
        }
        fs::write(dir.join("pod.json"), text).unwrap();
    }
    let began = Instant::now();
    let pods = Arc::new(Pods::new(lab.environment()));
    let recovering = {
        let pods = pods.clone();
        tokio::spawn(async move { pods.recover().await })
    };
    let ready = || {
        (1..=500)
            .filter(|number| {
                pods.get(&format!("p{number}")).is_ok_and(|pod| pod.view().phase == Phase::Running)
            })
            .count()
    };
    eventually("493 pods are there", || ready() == 493).await;
    // The hanging ones are waited for three seconds, and ready as they were; the others were found without
    // them.
    assert!(!recovering.is_finished(), "the hanging ones were not waited for");
    eprintln!("493 pods ready after {:?}", began.elapsed());
    assert_eq!(recovering.await.unwrap().unwrap(), 496);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(ready(), 493);
    let silent = |number| pods.get(&format!("p{number}")).unwrap().silence().is_some();
    eventually("it is told that they do not answer", || (5..=7).all(silent)).await;
    assert!(!silent(12) && !silent(500));
    let exit = pods.get("p8").unwrap().view().exit.unwrap();
    let reason = "its VM ended while no daemon watched";
    assert!(exit.reason.as_deref().is_some_and(|told| told.starts_with(reason)), "{exit:?}");
    for number in [2, 11] {
        assert!(pods.get(&format!("p{number}")).is_err());
        assert!(lab.path(&format!("pods/p{number}/pod.json.unreadable")).exists());
    }
    pods.leave();
}
