//! A guest that lies on purpose, one lie after the other: containerd and the pod's other calls must not
//! notice more than that an answer is missing.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{self, PidsResponse, ProcessInfo, StatsResponse},
    events::task::{TaskCreate, TaskExit, TaskOOM},
};
use kuasar_common::{
    api::sandbox,
    stdio::{Stream, header},
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::{io::AsyncWriteExt, time::sleep};
use ttrpc::{Code, asynchronous::Server, context, proto::Status};

use crate::{
    fake::{
        PID,
        events::{self, Events, event},
        figures,
        hostile::Lie,
        soon,
    },
    pod::{CID, Pod, code, reader},
};

/// containerd's own events of a pod with a running container and an exec.
async fn with_events() -> (Pod, Arc<Events>, Server) {
    let pod = Pod::running().await;
    pod.exec(&pod.exec_request("e1", "", "")).await.unwrap();
    let seen = Arc::new(Events::default());
    let containerd = seen.serve(&pod.dir.path().join("containerd.sock.ttrpc")).await;
    (pod, seen, containerd)
}

fn exit_of(container: &str, id: &str) -> TaskExit {
    TaskExit { container_id: container.into(), id: id.into(), pid: 1, exit_status: 9, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_about_others_go_no_further() {
    let (pod, seen, _containerd) = with_events().await;
    let long = TaskOOM { container_id: "x".repeat(70_000), ..Default::default() };
    let mut garbage = events::out_of_memory(CID);
    garbage.event.mut_or_insert_default().value = vec![0xff; 100];
    let mut without = events::out_of_memory(CID);
    without.event = MessageField::none();
    let image = event("/images/delete", &TaskOOM { container_id: CID.into(), ..Default::default() });
    for lie in [
        // containerd acts on the type, whatever the topic.
        event("/tasks/oom", &exit_of("of-another-pod", "of-another-pod")),
        event("/tasks/exit", &exit_of("of-another-pod", "of-another-pod")),
        event("/tasks/oom", &exit_of(CID, CID)),
        event("/tasks/exit", &exit_of(CID, "an-exec-of-another")),
        events::out_of_memory("of-another-pod"),
        events::out_of_memory(""),
        event("/tasks/oom", &long),
        garbage,
        without,
        image,
    ] {
        pod.guest.happens(lie);
    }
    // In a namespace that is none of containerd's, or somebody else's; at a time that cannot be; with pids of
    // the host's.
    let mut elsewhere = events::exited(CID, "e1");
    (elsewhere.namespace, elsewhere.timestamp_ns) = ("moby".into(), i64::MAX);
    pod.guest.happens(elsewhere);
    assert_eq!(seen.wait_for(1).await, ["k8s.io /tasks/exit"]);
    let exit: TaskExit = seen.last();
    assert_eq!((exit.container_id.as_str(), exit.id.as_str(), exit.pid), (CID, "e1", PID + 100));
    let year = seen.0.lock().unwrap()[0].timestamp.seconds / 31_556_952 + 1970;
    assert!((2020..2200).contains(&year), "{year}");
    let mut create =
        TaskCreate { container_id: CID.into(), bundle: "/etc".into(), pid: 1, ..Default::default() };
    create.rootfs = vec![Default::default(); 100];
    pod.guest.happens(event("/tasks/create", &create));
    seen.wait_for(2).await;
    let create: TaskCreate = seen.last();
    assert_eq!((create.bundle.as_str(), create.pid), ("/run/containerd/c1", PID + 100));
    assert!(create.rootfs.is_empty());
    assert!(
        pod.log().contains("events of the guest were not passed on, the last because it"),
        "{}",
        pod.log()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_once_is_told_once_and_a_flood_costs_only_its_own_kind() {
    let (pod, seen, _containerd) = with_events().await;
    let mut flood = vec![events::out_of_memory(CID); 300];
    flood.extend(vec![events::paused(CID); 300]);
    flood.extend(vec![events::out_of_memory("of-another-pod"); 300]);
    flood.extend(vec![events::created(CID); 50]);
    flood.push(events::exited(CID, "e1"));
    flood.push(events::exited(CID, CID));
    flood.push(events::exited(CID, CID));
    let begun = Instant::now();
    pod.guest.events.send_modify(|all| all.extend(flood));
    let mut topics = Vec::new();
    while topics.iter().filter(|topic| *topic == "k8s.io /tasks/exit").count() < 2 {
        sleep(Duration::from_millis(20)).await;
        assert!(begun.elapsed() < Duration::from_secs(30), "{topics:?}");
        topics = seen.topics();
    }
    sleep(Duration::from_millis(300)).await;
    let count = |topic: &str| seen.topics().iter().filter(|seen| seen.ends_with(topic)).count();
    assert_eq!((count("exit"), count("create")), (2, 1));
    let repeated = count("oom") + count("paused");
    assert!((16..60).contains(&repeated), "{repeated} of 600 went through");
    assert!(count("oom") > 0);
    // In between, the pod's calls are answered.
    assert_eq!(pod.pids(CID).await, [PID + 100, PID + 200]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbers_that_cannot_be_lose_no_event() {
    let (pod, seen, _containerd) = with_events().await;
    let numbered = |event: sandbox::Envelope, sequence| sandbox::Envelope { sequence, ..event };
    pod.guest.happens(numbered(events::created(CID), u64::MAX));
    pod.guest.happens(events::out_of_memory(CID));
    assert_eq!(seen.wait_for(2).await, ["k8s.io /tasks/create", "k8s.io /tasks/oom"]);
    // One that is over already is no news, however often it comes.
    pod.guest.happens(numbered(events::out_of_memory(CID), 1));
    sleep(Duration::from_millis(500)).await;
    assert_eq!(seen.topics().len(), 2);
    assert!(pod.log().contains("it answered with event 1 after 2"), "{}", pod.log());
}

/// containerd fails the figures of the whole node for one answer that it cannot decode.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn figures_are_figures_whatever_the_guest_says() {
    let pod = Pod::running().await;
    let good = figures().write_to_bytes().unwrap();
    let answer = |type_url: &str, value: Vec<u8>| {
        let any = Any { type_url: type_url.into(), value, ..Default::default() };
        StatsResponse { stats: MessageField::some(any), ..Default::default() }.write_to_bytes().unwrap()
    };
    let v2 = "io.containerd.cgroups.v2.Metrics";
    let lies = [
        answer(v2, b"nonsense".to_vec()),
        answer("containerd.events.TaskExit", good.clone()),
        answer(v2, vec![0; 100_000]),
        vec![0xff; 1000],
        Vec::new(),
    ];
    for expected in [Vec::new(), good.clone()] {
        for lie in &lies {
            pod.guest.lie("Stats", Lie::Payload(lie.clone()));
            let stats = pod.stats(CID).await.unwrap().stats;
            assert_eq!((stats.type_url.as_str(), &stats.value), (v2, &expected));
        }
        pod.guest.lies.lock().unwrap().clear();
        assert_eq!(pod.stats(CID).await.unwrap().stats.value, good);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_are_none_of_the_hosts() {
    let pod = Pod::running().await;
    let process = |pid| ProcessInfo { pid, ..Default::default() };
    let answer = |pids: &[u32]| {
        let processes = pids.iter().map(|pid| process(*pid)).collect();
        Lie::Payload(PidsResponse { processes, ..Default::default() }.write_to_bytes().unwrap())
    };
    for (lie, seen) in [
        (answer(&[1, 0, 1 << 22, u32::MAX, 77]), vec![PID + 1, PID + 77]),
        (answer(&[]), vec![PID + 100]),
        (Lie::Payload(vec![0xff; 50]), vec![PID + 100]),
        (Lie::Error(ttrpc::get_status(Code::NOT_FOUND, "no")), vec![PID + 100]),
    ] {
        pod.guest.lie("Pids", lie.clone());
        assert_eq!(pod.pids(CID).await, seen, "{lie:?}");
    }
    for pid in [0, 1 << 22, PID + 1, u32::MAX] {
        let created = api::CreateTaskResponse { pid, ..Default::default() }.write_to_bytes().unwrap();
        pod.guest.lie("Create", Lie::Payload(created));
        let request = pod.create_request("c2", "");
        let answer = soon("Create", pod.task.create(context::Context::default(), &request)).await;
        let text = "creating container c2: the guest named no process id";
        assert_eq!(code(answer), (Code::INTERNAL, text.into()), "{pid}");
    }
    pod.exec(&pod.exec_request("e1", "", "")).await.unwrap();
    pod.guest.lie("Start", Lie::Payload(vec![0xff; 9]));
    let text = "starting exec e1 of container c1: the guest named no process id";
    assert_eq!(code(pod.start(CID, "e1").await), (Code::INTERNAL, text.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_are_short_printable_and_of_known_codes() {
    let pod = Pod::running().await;
    let lie = |code: i32, message: &str| {
        let details = vec![ttrpc::proto::Any { value: vec![0; 1000], ..Default::default() }];
        let code = protobuf::EnumOrUnknown::from_i32(code);
        Lie::Error(Status { code, message: message.into(), details, ..Default::default() })
    };
    let long = "x".repeat(100_000);
    for (said, seen) in [
        (lie(5, "no such thing"), (Code::NOT_FOUND, "no such thing".to_owned())),
        (lie(3, "a\nb\x1b[31m\u{202e}c\u{200b}"), (Code::INVALID_ARGUMENT, "a b [31m c ".to_owned())),
        (lie(1, ""), (Code::UNKNOWN, String::new())),
        (lie(2, &long), (Code::UNKNOWN, format!("{}…", "x".repeat(512)))),
    ] {
        pod.guest.lie("Update", said);
        let request = api::UpdateTaskRequest { id: CID.into(), ..Default::default() };
        match pod.task.update(context::Context::default(), &request).await {
            Err(ttrpc::Error::RpcStatus(status)) => {
                assert_eq!((status.code(), status.message().to_owned()), seen);
                assert!(status.details.is_empty());
            }
            other => panic!("{other:?}"),
        }
    }
    // Of an answer that says nothing, nothing is passed on.
    pod.guest.lie("Update", Lie::Payload(b"\x0a\x04evil".to_vec()));
    let request = api::UpdateTaskRequest { id: CID.into(), ..Default::default() };
    let answer = pod.task.update(context::Context::default(), &request).await.unwrap();
    assert_eq!(answer, api::Empty::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_keeps_no_container() {
    let pod = Pod::running().await;
    pod.guest.exit(CID, "", 5);
    assert_eq!(pod.wait(CID, "").await.unwrap().exit_status, 5);
    pod.guest.lie("Delete", Lie::Payload(vec![0xff; 99]));
    let deleted = pod.delete(CID, "").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (5, PID + 100), "what the relay knows stays");
    assert_eq!(*pod.daemon.released.lock().unwrap(), [CID]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_answers_and_garbage_break_the_connection_and_nothing_else() {
    let pod = Pod::running().await;
    pod.guest.lie("Update", Lie::Payload(vec![0; 300_000]));
    let request = api::UpdateTaskRequest { id: CID.into(), ..Default::default() };
    let (_, text) = code(pod.task.update(context::Context::default(), &request).await);
    assert!(text.contains("an answer of 300") && text.contains("at most 262144 are taken"), "{text}");
    assert_eq!(pod.pids(CID).await, [PID + 100, PID + 200], "it is made anew");

    for garbage in [vec![0xff; 100], [0; 10].repeat(1000), b"\0\0\0\x04\0\0\0\x01\x02\0abcd".repeat(100)] {
        *pod.guest.garbage.lock().unwrap() = garbage;
        pod.guest.cut();
        sleep(Duration::from_millis(200)).await;
        pod.guest.listen(pod.dir.path()).await;
        sleep(Duration::from_millis(300)).await;
        pod.guest.garbage.lock().unwrap().clear();
        for _ in 0..500 {
            if pod.pids(CID).await.len() == 2 {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(pod.pids(CID).await, [PID + 100, PID + 200]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_guest_is_not_waited_for_in_passing() {
    let pod = Pod::running().await;
    for method in ["Stats", "Pids", "Check", "GetEvents"] {
        pod.guest.lie(method, Lie::Silence);
    }
    let begun = Instant::now();
    assert_eq!(pod.pids(CID).await, [PID + 100]);
    assert!(pod.stats(CID).await.unwrap().stats.value.is_empty());
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

/// One-byte frames on both outputs and events without end, and a reader that takes it all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_holds_no_call_up() {
    let (pod, _seen, _containerd) = with_events().await;
    let out = pod.fifo("out");
    let mut output = reader(&out);
    pod.create("c2", &out).await;
    pod.start("c2", "").await.unwrap();
    let mut conn = pod.guest.stream("c2", "", Stream::Stdout).await;
    let sink = tokio::spawn(async move { tokio::io::copy(&mut output, &mut tokio::io::sink()).await });
    let flood = tokio::spawn(async move {
        let frames = [&header(1)[..], b"x"].concat().repeat(10_000);
        while conn.write_all(&frames).await.is_ok() {}
    });
    pod.guest.events.send_modify(|all| all.extend(vec![events::out_of_memory(CID); 20_000]));
    sleep(Duration::from_millis(200)).await;
    let mut longest = Duration::ZERO;
    for n in 0..10 {
        let begun = Instant::now();
        pod.stats(CID).await.unwrap();
        let exec = format!("x{n}");
        pod.exec(&pod.exec_request(&exec, "", "")).await.unwrap();
        pod.start(CID, &exec).await.unwrap();
        longest = longest.max(begun.elapsed());
    }
    pod.kill("c2").await.unwrap();
    assert!(longest < Duration::from_secs(3), "{longest:?}");
    flood.abort();
    sink.abort();
}
