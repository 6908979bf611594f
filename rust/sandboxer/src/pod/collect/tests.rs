use std::sync::Mutex;

use nix::mount::{MntFlags, umount2};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use super::*;
use crate::{
    containerd::SandboxList,
    pod::{Caller, PodSpec},
    protos::{
        controller::{StoreListRequest, StoreListResponse, store_server},
        types::Sandbox,
    },
    testing::{Fault, Lab, eventually},
};

const GRACE: Duration = Duration::from_millis(400);
const NEVER: Duration = Duration::from_secs(3600);

/// containerd's list, on a real socket.
#[derive(Clone, Default)]
struct FakeStore(Arc<Mutex<Vec<(String, String)>>>);

#[tonic::async_trait]
impl store_server::Store for FakeStore {
    async fn list(&self, request: Request<StoreListRequest>) -> Result<Response<StoreListResponse>, Status> {
        let namespace = request.metadata().get("containerd-namespace").unwrap().to_str().unwrap().to_owned();
        let all = self.0.lock().unwrap().clone();
        if all.iter().any(|(_, id)| id == "broken") {
            return Err(Status::unavailable("the database is locked"));
        }
        let theirs = all.into_iter().filter(|(of, _)| *of == namespace);
        let list = theirs.map(|(_, sandbox_id)| Sandbox { sandbox_id, ..Sandbox::default() }).collect();
        Ok(Response::new(StoreListResponse { list }))
    }
}

impl FakeStore {
    fn set(&self, pods: &[(&str, &str)]) {
        let pods = pods.iter().map(|(namespace, id)| ((*namespace).to_owned(), (*id).to_owned()));
        *self.0.lock().unwrap() = pods.collect();
    }

    fn serve(&self, lab: &Lab) -> SandboxList {
        let socket = lab.path("containerd.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = Server::builder().add_service(store_server::StoreServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        SandboxList::new(socket)
    }
}

/// A lab with the running pods `a` (of the CRI) and `b` (of somebody else).
async fn two_pods(lab: &Lab) -> Arc<Pods> {
    let pods = Arc::new(Pods::new(lab.environment()));
    for (id, namespace) in [("a", "k8s.io"), ("b", "other")] {
        let spec = PodSpec { netns: lab.netns(), namespace: namespace.into(), ..PodSpec::default() };
        pods.create(id, spec).await.unwrap();
        let (_guard, caller) = Caller::new();
        pods.get(id).unwrap().start(caller).await.unwrap();
        // One network namespace does for both: its link's redirections are the first one's.
    }
    pods
}

fn collect(pods: &Arc<Pods>, list: SandboxList, interval: Duration) -> tokio::task::JoinHandle<()> {
    tokio::spawn(Collector::new(pods.clone(), Arc::new(list), interval, GRACE).run())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_containerd_forgot_is_removed_after_the_grace_and_nothing_else() {
    let (lab, store) = (Lab::new(Fault::None), FakeStore::default());
    let pods = two_pods(&lab).await;
    // An id in another namespace is another pod.
    store.set(&[("k8s.io", "a"), ("k8s.io", "b"), ("other", "b")]);
    let collecting = collect(&pods, store.serve(&lab), NEVER);
    tokio::time::sleep(GRACE * 3).await;
    assert_eq!(pods.len(), 2);
    store.set(&[("k8s.io", "b"), ("other", "b")]);
    let forgotten = Instant::now();
    pods.suspect();
    eventually("the forgotten pod goes", || pods.get("a").is_err()).await;
    assert!(forgotten.elapsed() >= GRACE, "without the grace");
    assert!(!lab.path("pods/a").exists());
    assert_eq!((pods.len(), lab.relays().len()), (1, 1));
    collecting.abort();
    pods.remove("b").await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_in_the_list_again_stays() {
    let (lab, store) = (Lab::new(Fault::None), FakeStore::default());
    let pods = two_pods(&lab).await;
    store.set(&[("other", "b")]);
    let mut collector = Collector::new(pods.clone(), Arc::new(store.serve(&lab)), NEVER, GRACE);
    assert_eq!(collector.look().await, GRACE);
    tokio::time::sleep(GRACE).await;
    store.set(&[("k8s.io", "a"), ("other", "b")]);
    assert_eq!(collector.look().await, NEVER);
    store.set(&[("other", "b")]);
    collector.look().await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(pods.len(), 2, "its grace began anew");
    for id in ["a", "b"] {
        pods.remove(id).await.unwrap();
    }
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_whose_records_cannot_be_read_are_removed_when_containerd_forgot_them() {
    let (lab, store) = (Lab::new(Fault::None), FakeStore::default());
    let later = r#"{"version": 99, "spec": {"namespace": "other", "what": "nobody knows"}}"#;
    for (id, record) in [
        ("forgotten", later),
        ("known", later),
        ("torn", later.split_at(40).0),
        ("nameless", r#"{"version": 99}"#),
    ] {
        std::fs::create_dir(lab.path("pods").join(id)).unwrap();
        std::fs::write(lab.path("pods").join(id).join("pod.json"), record).unwrap();
    }
    let pods = Arc::new(Pods::new(lab.environment()));
    assert_eq!(pods.recover().await.unwrap(), 0);
    // Of that id in the namespace of another one, containerd says nothing.
    store.set(&[("other", "known"), ("k8s.io", "forgotten")]);
    let begun = Instant::now();
    let collecting = collect(&pods, store.serve(&lab), NEVER);
    let is_there = |id: &str| lab.path("pods").join(id).exists();
    eventually("the forgotten one goes", || !is_there("forgotten")).await;
    assert!(begun.elapsed() >= GRACE, "without the grace");
    tokio::time::sleep(GRACE * 3).await;
    assert!(["known", "torn", "nameless"].map(is_there).iter().all(|there| *there));
    collecting.abort();
    for id in ["known", "torn", "nameless"] {
        pods.remove(id).await.unwrap();
    }
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_removed_while_containerd_does_not_answer() {
    let (lab, store) = (Lab::new(Fault::None), FakeStore::default());
    let pods = two_pods(&lab).await;
    let absent = SandboxList::new(lab.path("nobody.sock"));
    let error = absent.known("k8s.io").await.unwrap_err().to_string();
    assert!(error.starts_with("connecting to containerd at ") && error.contains("nobody.sock"), "{error}");
    store.set(&[("k8s.io", "broken")]);
    let broken = store.serve(&lab);
    let error = broken.known("k8s.io").await.unwrap_err().to_string();
    assert!(error.contains("the database is locked"), "{error}");
    for list in [absent, broken] {
        let collecting = collect(&pods, list, GRACE);
        tokio::time::sleep(GRACE * 4).await;
        collecting.abort();
        assert_eq!(pods.len(), 2);
    }
    for id in ["a", "b"] {
        pods.remove(id).await.unwrap();
    }
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_network_is_gone_is_stopped_with_that_reason() {
    let (lab, store) = (Lab::new(Fault::None), FakeStore::default());
    let pods = two_pods(&lab).await;
    store.set(&[("k8s.io", "a"), ("other", "b")]);
    let collecting = collect(&pods, store.serve(&lab), NEVER);
    tokio::time::sleep(GRACE * 2).await;
    // As CNI does it at a pod's end: nobody is told but by the file that goes.
    umount2(&lab.netns(), MntFlags::MNT_DETACH).unwrap();
    std::fs::remove_file(lab.netns()).unwrap();
    let stopped = |id: &str| pods.get(id).unwrap().view().phase == Phase::Stopped;
    eventually("both pods are stopped", || stopped("a") && stopped("b")).await;
    let exit = pods.get("a").unwrap().wait().await;
    let reason = format!("its network namespace {} is gone", lab.netns().display());
    assert_eq!(exit.reason, Some(reason));
    collecting.abort();
    for id in ["a", "b"] {
        pods.remove(id).await.unwrap();
    }
    lab.assert_clean();
}
