//! Huge pages for hugetlbfs storages: taken from the VM's memory when the storage comes, given back when it
//! goes.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use super::options::{self, Options};
use crate::error::TaskError;

/// The kernel's pools of huge pages.
pub(super) const POOLS: &str = "/sys/kernel/mm/hugepages";
/// The size of a page if the options do not say: the one that x86-64 and aarch64 (with 4 KiB pages) have.
const DEFAULT_PAGE: u64 = 2 << 20;
/// Reading and writing a pool's size are two steps.
static POOL: Mutex<()> = Mutex::new(());

/// Pages that were taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reserved {
    pool: PathBuf,
    pages: u64,
}

/// Takes as many pages as the options' `size` needs.
///
/// # Errors
/// When the options do not say how much, or the VM does not have it; nothing was taken then.
pub(super) fn reserve(pools: &Path, options: &Options) -> Result<Reserved, TaskError> {
    let find = |name: &str| {
        let option = options.data.iter().find(|(option, _)| option == name)?;
        Some(option.1.as_deref().unwrap_or_default())
    };
    let read = |name: &str, default: Option<u64>| match find(name) {
        Some(text) => options::size(text).filter(|size| *size > 0).ok_or_else(|| {
            TaskError::InvalidArgument(format!("hugetlbfs: {name}={text} is no size in bytes"))
        }),
        None => default.ok_or_else(|| {
            TaskError::InvalidArgument(format!("hugetlbfs: the options do not say {name}=<bytes>"))
        }),
    };
    let (page, size) = (read("pagesize", Some(DEFAULT_PAGE))?, read("size", None)?);
    let pool = pools.join(format!("hugepages-{}kB", page / 1024)).join("nr_hugepages");
    if !pool.exists() {
        return Err(TaskError::InvalidArgument(format!(
            "hugetlbfs: the guest has no huge pages of {page} bytes; it has {}",
            sizes(pools)
        )));
    }
    let pages = size.div_ceil(page);
    let before = change(&pool, |now| now.saturating_add(pages))?;
    let after = pages_of(&pool)?;
    if after < before.saturating_add(pages) {
        change(&pool, |_| before)?;
        return Err(TaskError::FailedPrecondition(format!(
            "hugetlbfs: the VM has memory for {} of {pages} huge pages of {page} bytes: give the pod more memory",
            after.saturating_sub(before)
        )));
    }
    Ok(Reserved { pool, pages })
}

impl Reserved {
    /// Gives the pages back.
    pub(super) fn release(&self) -> Result<(), TaskError> {
        change(&self.pool, |now| now.saturating_sub(self.pages)).map(|_| ())
    }
}

/// Sets a pool's size; returns what it was.
fn change(pool: &Path, to: impl FnOnce(u64) -> u64) -> Result<u64, TaskError> {
    let _one_at_a_time = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let before = pages_of(pool)?;
    let wanted = to(before);
    fs::write(pool, wanted.to_string())
        .map_err(TaskError::io(format!("writing {wanted} to {}", pool.display())))?;
    Ok(before)
}

fn pages_of(pool: &Path) -> Result<u64, TaskError> {
    let text = fs::read_to_string(pool).map_err(TaskError::io(format!("reading {}", pool.display())))?;
    text.trim().parse().map_err(|_| TaskError::Internal(format!("{} says {text:?}", pool.display())))
}

fn sizes(pools: &Path) -> String {
    let entries = fs::read_dir(pools).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut sizes: Vec<String> =
        names.filter_map(|name| name.strip_prefix("hugepages-").map(str::to_owned)).collect();
    sizes.sort();
    if sizes.is_empty() { "none".to_owned() } else { sizes.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &str) -> Options {
        Options::parse(&[words.to_owned()])
    }

    #[test]
    fn pages_are_taken_and_given_back() {
        let pools = tempfile::tempdir().unwrap();
        let pool = pools.path().join("hugepages-2048kB");
        fs::create_dir(&pool).unwrap();
        fs::write(pool.join("nr_hugepages"), "3\n").unwrap();
        let reserved = reserve(pools.path(), &options("size=5M,pagesize=2Mi")).unwrap();
        assert_eq!(reserved.pages, 3, "rounded up");
        assert_eq!(fs::read_to_string(pool.join("nr_hugepages")).unwrap(), "6");
        reserved.release().unwrap();
        assert_eq!(fs::read_to_string(pool.join("nr_hugepages")).unwrap(), "3");

        for (words, why) in [
            ("pagesize=2M", "hugetlbfs: the options do not say size=<bytes>"),
            ("size=lots", "hugetlbfs: size=lots is no size in bytes"),
            ("size=0", "hugetlbfs: size=0 is no size in bytes"),
            (
                "size=1G,pagesize=1G",
                "hugetlbfs: the guest has no huge pages of 1073741824 bytes; it has 2048kB",
            ),
        ] {
            assert_eq!(reserve(pools.path(), &options(words)).unwrap_err().to_string(), why);
        }
    }
}
