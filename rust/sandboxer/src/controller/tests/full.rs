//! A disk without room for records.

use super::*;
use crate::testing::SmallDisk;

/// A lab whose pods have a disk of their own.
struct Full {
    lab: Lab,
    disk: SmallDisk,
}

impl Full {
    fn new() -> Option<Self> {
        let disk = SmallDisk::new(4 << 20)?;
        let mut lab = Lab::new(Fault::None);
        let pods = disk.path().join("pods");
        fs::create_dir(&pods).unwrap();
        lab.pods = Some(pods);
        Some(Self { lab, disk })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_stopped_and_removed_without_room() {
    let Some(Full { lab, disk }) = Full::new() else { return };
    let (mut client, _pods) = serve(&lab).await;
    for stops in [true, false] {
        client.create(create(&lab, &pod_config())).await.unwrap();
        start(&mut client).await.unwrap();
        disk.fill();
        if stops {
            stop(&mut client).await.unwrap();
            assert_eq!(status(&mut client).await.unwrap().state, "SANDBOX_NOTREADY");
            // Its end is written all the same: room for that was kept.
            let record = fs::read_to_string(lab.pod("p1").join("pod.json")).unwrap();
            assert!(record.contains("\"stopped\""), "{record}");
        }
        shutdown(&mut client).await.unwrap();
        lab.assert_clean();
        disk.empty();
    }
}

/// Also where not even a spare can be written.
#[tokio::test(flavor = "multi_thread")]
async fn pods_are_stopped_and_removed_although_nothing_can_be_written() {
    let lab = Lab::new(Fault::None);
    let (mut client, _pods) = serve(&lab).await;
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    let spare = lab.pod("p1").join("pod.json.new");
    fs::remove_file(&spare).unwrap();
    fs::create_dir(&spare).unwrap();
    stop(&mut client).await.unwrap();
    assert!(fs::read_to_string(lab.pod("p1").join("pod.json")).unwrap().contains("\"running\""));
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_cannot_be_created_leaves_nothing_and_can_be_later() {
    let Some(Full { lab, disk }) = Full::new() else { return };
    let (mut client, pods) = serve(&lab).await;
    disk.fill();
    for _ in 0..3 {
        let error = client.create(create(&lab, &pod_config())).await.unwrap_err();
        assert!(error.message().contains("No space left on device"), "{error:?}");
        assert!(pods.is_empty());
        lab.assert_clean();
    }
    disk.empty();
    client.create(create(&lab, &pod_config())).await.unwrap();
    start(&mut client).await.unwrap();
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}

/// A container's end gives back what it had.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_released_without_room() {
    let Some(Full { lab, disk }) = Full::new() else { return };
    let (mut client, _pods, host) = hang::running(&lab).await;
    host.prepare(hang::context(), &hang::prepare(&lab, "c1", &lab.path("image"))).await.unwrap();
    disk.fill();
    let mut release = ReleaseRequest::new();
    release.container_id = "c1".into();
    host.release(hang::context(), &release).await.unwrap();
    assert!(!lab.pod("p1").join("shared/c1").exists());
    shutdown(&mut client).await.unwrap();
    lab.assert_clean();
}
