//! A `/run` without room: it is then that one wants pods to go.

use std::{
    fs::{self, File},
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kuasar_e2e::{image::BUSYBOX, lab::Lab, suite::handler};
use nix::mount::{MsFlags, mount};

use super::IDLE;

const RUN: &str = "/run";
const FILLER: &str = "/run/filler";

/// The machine's `/run` with no more room than it has used, and somebody who takes at once what becomes free.
struct Full {
    ends: Arc<AtomicBool>,
    filling: Option<std::thread::JoinHandle<()>>,
}

impl Full {
    fn new() -> Result<Self> {
        let found = nix::sys::statvfs::statvfs(RUN).context("asking how much /run holds")?;
        let used = (found.blocks() - found.blocks_free()) * found.fragment_size();
        resize(&format!("size={}", used + (1 << 20)))?;
        let ends = Arc::new(AtomicBool::new(false));
        let ended = ends.clone();
        let filling = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                fill();
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let full = Self { ends, filling: Some(filling) };
        for _ in 0..500 {
            if fs::write("/run/more", "x").is_err() {
                let _ = fs::remove_file("/run/more");
                return Ok(full);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        anyhow::bail!("/run does not become full")
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(filling) = self.filling.take() {
            let _ = filling.join();
        }
        let _ = fs::remove_file(FILLER);
        if let Err(error) = resize("size=50%") {
            eprintln!("{error:#}");
        }
    }
}

fn resize(options: &str) -> Result<()> {
    mount(None::<&str>, RUN, None::<&str>, MsFlags::MS_REMOUNT, Some(options)).context("resizing /run")
}

fn fill() {
    let Ok(mut filler) = File::options().append(true).create(true).open(FILLER) else { return };
    for chunk in [vec![b'x'; 64 << 10], vec![b'x'; 1 << 10], vec![b'x'; 1]] {
        while filler.write(&chunk).is_ok_and(|length| length > 0) {}
    }
}

/// No write of a record stands in the way of an end.
pub(crate) async fn pods_are_stopped_and_removed_while_run_is_full(lab: Arc<Lab>) -> Result<()> {
    let idle = lab.pod("idle", handler()).await?;
    idle.container("idle", BUSYBOX, IDLE).await?;
    let busy = lab.pod("busy", handler()).await?;
    busy.container("busy", BUSYBOX, IDLE).await?;
    {
        let _full = Full::new()?;
        lab.cri.stop_pod(&idle.id).await.context("stopping a pod while /run is full")?;
        let (status, _) = lab.cri.pod_status(&idle.id).await?;
        ensure!(status.state != 0, "the pod is still ready");
        lab.cri.remove_pod(&idle.id).await.context("removing a pod while /run is full")?;
        // As it is: running, with a container.
        lab.cri.remove_pod(&busy.id).await.context("removing a running pod while /run is full")?;
        let left = fs::read_dir("/run/kuasar").context("listing /run/kuasar")?.flatten();
        let left: Vec<_> = left
            .map(|entry| entry.path())
            .filter(|path| path.join(&idle.id).exists() || path.join(&busy.id).exists())
            .collect();
        ensure!(left.is_empty(), "folders are left in {left:?}");
    }
    // With room again, all is as before.
    let next = lab.pod("next", handler()).await?;
    next.container("next", BUSYBOX, IDLE).await?;
    next.remove().await
}
