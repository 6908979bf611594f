//! The end of a cgroup, with the kernel's own. Needs root and a cgroup v2 hierarchy, wherever it is mounted.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Child, Command},
};

use vmm_task::cgroup;

/// Makes a new cgroup below the test's own.
fn hierarchy() -> Result<PathBuf, String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let of_v2 = |line: &&str| line.contains(" - cgroup2 ");
    let mount = mounts.lines().find(of_v2).ok_or("no cgroup v2 hierarchy is mounted")?;
    let root = PathBuf::from(mount.split(' ').nth(4).unwrap());
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let test = root.join(own).join(format!("kuasar-test-{}", std::process::id()));
    fs::create_dir(&test).map_err(|error| format!("{}: {error}", test.display()))?;
    Ok(test)
}

fn sleep_in(cgroup: &std::path::Path) -> Child {
    let child = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).unwrap();
    child
}

#[tokio::test]
async fn what_is_in_a_removed_cgroup_is_killed_first() {
    let top = match hierarchy() {
        Ok(top) => top,
        Err(missing) => return println!("skipped: {missing}"),
    };
    let below = top.join("a/b");
    fs::create_dir_all(&below).unwrap();
    let mut children = [sleep_in(&top), sleep_in(&below)];
    let mut pids = children.each_ref().map(|child| i32::try_from(child.id()).unwrap());
    let mut found: [i32; 2] = cgroup::processes(&top).try_into().unwrap();
    pids.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, pids);
    cgroup::remove(&top).await.unwrap();
    assert!(!top.exists());
    for child in &mut children {
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
    // It is gone already, which is as good.
    cgroup::remove(&top).await.unwrap();
}
