//! Mounts that hang, as those of a server that is away do, and what has to go on all the same.

use std::{os::fd::AsRawFd, time::Instant};

use nix::mount::{MsFlags, mount};

use super::*;
use crate::container::mount::unmount_below;

/// A file system that answers nobody, until it is dropped: one of FUSE without a server.
struct Hanging {
    device: Option<fs::File>,
    path: PathBuf,
}

impl Hanging {
    fn new(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let device = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        mount(Some("hanging"), &path, Some("fuse"), MsFlags::empty(), Some(data.as_str())).unwrap();
        Self { device: Some(device), path }
    }

    /// Ends the file system: everybody who waits for it gets an error.
    fn end(&mut self) {
        self.device = None;
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.end();
        let _ = unmount_below(&self.path);
    }
}

fn bind(source: &std::path::Path) -> Vec<HostMount> {
    let options = vec!["rbind".into(), "ro".into()];
    vec![HostMount {
        type_: "bind".into(),
        source: source.to_str().unwrap().into(),
        options,
        ..HostMount::default()
    }]
}

pub(super) fn prepare(lab: &Lab, container: &str, source: &std::path::Path) -> PrepareRequest {
    let mut prepare = PrepareRequest::new();
    prepare.container_id = container.into();
    prepare.bundle = lab.path("bundle").to_str().unwrap().into();
    prepare.rootfs = bind(source);
    prepare
}

pub(super) async fn running(lab: &Lab) -> (Client, Arc<Pods>, HostClient) {
    let (mut client, pods) = serve(lab).await;
    client.create(create(lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    for name in ["bundle", "image"] {
        fs::create_dir(lab.path(name)).unwrap();
    }
    fs::write(lab.path("bundle/config.json"), r#"{"ociVersion":"1.1.0","hostname":"x"}"#).unwrap();
    let socket = lab.pod("p1").join(pod_files::HOST_SOCKET);
    let host = ttrpc::asynchronous::Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
    (client, pods, HostClient::new(host))
}

pub(super) fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(60))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_comes_after_its_pods_end_is_refused() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods, host) = running(&lab).await;
    stop(&mut client).await.unwrap();
    let error =
        host.prepare(context(), &prepare(&lab, "late", &lab.path("image"))).await.unwrap_err().to_string();
    assert!(
        error.contains("preparing the container late: its sandbox p1 has ended; create it in a new one"),
        "{error}"
    );
    assert!(!lab.path("pods/p1/shared/late").exists());
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_hangs_holds_up_neither_the_vms_end_nor_who_asks_for_it() {
    let lab = Lab::new(Fault::None);
    let mut hanging = Hanging::new(lab.path("hanging"));
    let (mut client, pods, host) = running(&lab).await;
    let first = {
        let (host, request) = (host.clone(), prepare(&lab, "c1", &lab.path("hanging")));
        tokio::spawn(async move { host.prepare(context(), &request).await })
    };
    let folder = lab.path("pods/p1/shared/c1");
    eventually("the mount is tried", || folder.exists()).await;
    // One more of this pod does not wait for ever either.
    let error =
        host.prepare(context(), &prepare(&lab, "c2", &lab.path("image"))).await.unwrap_err().to_string();
    assert!(error.contains("waited 1 s for mounting for the container c1, which has taken "), "{error}");
    for call in ["stop", "shutdown", "shutdown"] {
        let began = Instant::now();
        let ended = if call == "stop" { stop(&mut client).await } else { shutdown(&mut client).await };
        let error = ended.unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(5), "{call}: {:?}", began.elapsed());
        assert!(
            error.message().starts_with(
                "unmounting what containers used: the sandbox's mounts are in use: waited 1 s for \
                mounting for the container c1"
            ),
            "{call}: {error:?}"
        );
        assert_eq!(status(&mut client).await.unwrap().state, "SANDBOX_NOTREADY");
        assert!(!lab.survivors().contains(&lab.vmm().pid()), "the VM goes on");
    }
    assert_eq!(pods.len(), 1);
    hanging.end();
    first.await.unwrap().unwrap_err();
    shutdown(&mut client).await.unwrap();
    drop(hanging);
    lab.assert_clean();
}
