//! Sees the kernel kill for want of memory: one inotify watch on each container's `memory.events`; with
//! cgroup v1, which has no such file, an eventfd of each container's.

use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep,
};

use crate::{cgroup::Cgroup, container::Container, events::Events};

/// Bytes of events read at a time; one of ours has 16.
const BUFFER: usize = 1024;
/// When to look for what cgroup v1 has announced.
const LEGACY_WAITS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(20), Duration::from_millis(500)];

/// Watches containers' memory; nothing until there is one.
#[derive(Default)]
pub struct OomWatch {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    inotify: Option<Arc<AsyncFd<OwnedFd>>>,
    watches: HashMap<i32, Weak<Container>>,
}

impl OomWatch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a container until [`Self::forget`].
    pub fn watch(self: &Arc<Self>, container: &Arc<Container>, events: &Arc<Events>) {
        let Some(cgroup) = container.cgroup.get() else { return };
        if let Err(error) = self.try_watch(container, cgroup, events) {
            // Without the memory controller, for instance. What happened is looked up once more at the exit.
            log::info!("watching the memory of container {}: {error}", container.id);
        }
    }

    fn try_watch(
        self: &Arc<Self>,
        container: &Arc<Container>,
        cgroup: &Cgroup,
        events: &Arc<Events>,
    ) -> io::Result<()> {
        let cgroup = match cgroup {
            Cgroup::Unified(path) => path,
            Cgroup::Legacy(cgroup) => {
                tokio::spawn(run_legacy(cgroup.oom_event()?, Arc::downgrade(container), Arc::clone(events)));
                return Ok(());
            }
        };
        let mut state = self.state();
        let inotify = match &state.inotify {
            Some(inotify) => Arc::clone(inotify),
            None => {
                let inotify = Arc::new(open()?);
                tokio::spawn(run(Arc::clone(self), Arc::clone(&inotify), Arc::clone(events)));
                Arc::clone(state.inotify.insert(inotify))
            }
        };
        let watch = inotify::add_watch(inotify.get_ref(), cgroup.join("memory.events"), WatchFlags::MODIFY)?;
        state.watches.insert(watch, Arc::downgrade(container));
        Ok(())
    }

    /// Ends a container's watch.
    pub fn forget(&self, container: &Container) {
        let State { inotify, watches } = &mut *self.state();
        let Some(inotify) = inotify else { return };
        watches.retain(|watch, watched| {
            let keep = watched.upgrade().is_some_and(|watched| watched.id != container.id);
            if !keep {
                // The kernel may have ended it itself.
                let _ = inotify::remove_watch(inotify.get_ref(), *watch);
            }
            keep
        });
    }

    /// The containers that these watches are for; all if it is not known for which.
    fn changed(&self, watch: Option<i32>) -> Vec<Arc<Container>> {
        let state = self.state();
        match watch {
            Some(watch) => state.watches.get(&watch).and_then(Weak::upgrade).into_iter().collect(),
            None => state.watches.values().filter_map(Weak::upgrade).collect(),
        }
    }
}

fn open() -> io::Result<AsyncFd<OwnedFd>> {
    let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    // SAFETY: the descriptor is owned, and closed with the registration and not before.
    Ok(unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) }?)
}

async fn run(oom: Arc<OomWatch>, inotify: Arc<AsyncFd<OwnedFd>>, events: Arc<Events>) {
    loop {
        let Ok(mut ready) = inotify.readable().await else { return };
        for watch in read(inotify.get_ref().as_fd()) {
            for container in oom.changed(watch) {
                container.check_memory(&events);
            }
        }
        ready.clear_ready();
    }
}

/// Follows one container's eventfd, which the kernel also makes readable when the cgroup is removed.
async fn run_legacy(event: AsyncFd<OwnedFd>, container: Weak<Container>, events: Arc<Events>) {
    loop {
        let Ok(mut ready) = event.readable().await else { return };
        let mut count = [0; 8];
        let _ = rustix::io::read(event.get_ref(), &mut count);
        ready.clear_ready();
        drop(ready);
        // The kernel tells before it kills.
        for wait in LEGACY_WAITS {
            sleep(wait).await;
            let Some(container) = container.upgrade().filter(|container| container.has_memory()) else {
                return;
            };
            container.check_memory(&events);
        }
    }
}

/// All that is to be read now: numbers of watches, `None` for "some were lost".
fn read(inotify: impl AsFd) -> Vec<Option<i32>> {
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    let mut changed = Vec::new();
    loop {
        match reader.next() {
            Ok(event) => {
                let lost = event.events().contains(ReadFlags::QUEUE_OVERFLOW);
                let watch = (!lost).then_some(event.wd());
                if !changed.contains(&watch) {
                    changed.push(watch);
                }
            }
            Err(Errno::INTR) => {}
            // Nothing more, or nothing that could be repaired.
            Err(_) => return changed,
        }
    }
}
