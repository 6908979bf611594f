//! Root file systems in layers that are image files, as containerd 2.2 and later hands them to a runtime that
//! mounts them itself (the relay says that ours does, in its answer to `-info`): all mounts but the last are
//! images, and the last says in templates (`{{ mount 0 }}`, `{{ overlay 1 4 }}`) where which of them goes. An
//! overlay, mostly.
//!
//! The guest mounts such a root itself when all of it is in images. One that writes to a folder of the host,
//! as containerd's erofs snapshotter has it unless its `default_size` is set, is mounted on the host and
//! shared.

use std::{path::Path, process::Command};

use kuasar_common::storage::{MOUNT_POINTS, Storage, driver};

use super::{
    disks::Wanted,
    mount::{self, MountError, RootfsMount, failed},
    storage::ROOTFS,
    tree::{Dir, Mount},
};

/// Option that containerd has its mount manager check. No runtime but runc has to.
const VERITY: &str = "X-containerd.dmverity=";
/// A folder to be made before the mount: `<path>[:<mode>[:<uid>:<gid>]]`.
const MKDIR: &str = "X-containerd.mkdir.path=";

/// A root file system made of images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layers {
    /// In the order that templates count them in.
    images: Vec<RootfsMount>,
    /// The mount that is made of them; its type has no transformations before it any more.
    top: RootfsMount,
}

/// The guest's way to make it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InGuest {
    pub(super) disks: Vec<(Wanted, Storage)>,
    /// Mounted after the disks.
    pub(super) overlay: Option<Storage>,
    pub(super) root: String,
}

impl Layers {
    /// Reads mounts that refer to one another; `None` for others.
    ///
    /// # Errors
    /// When they ask for something that cannot be done.
    pub(super) fn of(mounts: &[RootfsMount]) -> Result<Option<Self>, MountError> {
        let Some((last, before)) = mounts.split_last() else { return Ok(None) };
        let layers = if last.kind == "erofs" && before.is_empty() {
            // A single layer, and nothing to write to.
            let options = vec!["rbind".to_owned(), "ro".to_owned()];
            let source = "{{ mount 0 }}".to_owned();
            let top = RootfsMount { kind: "bind".into(), source, target: String::new(), options };
            Self { images: mounts.to_vec(), top }
        } else if let Some((transforms, kind)) = last.kind.rsplit_once('/') {
            if let Some(unknown) = transforms.split('/').find(|word| !["format", "mkdir"].contains(word)) {
                return Err(MountError::Refused(format!(
                    "the root file system is a mount of type {:?}, and {unknown} is not known; use the overlayfs snapshotter",
                    last.kind
                )));
            }
            Self { images: before.to_vec(), top: RootfsMount { kind: kind.to_owned(), ..last.clone() } }
        } else {
            return Ok(None);
        };
        layers.images.iter().try_for_each(check)?;
        Ok(Some(layers))
    }

    /// Plans its mounts in the guest, or says why it is better mounted on the host.
    pub(super) fn in_guest(&self, container: &str) -> Result<InGuest, String> {
        let base = format!("{MOUNT_POINTS}/{container}");
        let points: Vec<String> = (0..self.images.len()).map(|n| format!("{base}/layers/{n}")).collect();
        let disks = self.images.iter().zip(&points).map(|(image, point)| disk(image, point));
        let disks: Vec<_> = disks.collect::<Result<_, _>>()?;
        let (top, folders) = self.filled(&points).map_err(|error| error.to_string())?;
        let inside = |path: &str| path.starts_with(&format!("{base}/layers/"));
        if top.kind == "bind" {
            let read_only = disks.iter().all(|(disk, _)| disk.read_only);
            if !read_only || !folders.is_empty() || !inside(&top.source) {
                return Err("it is a folder in an image".to_owned());
            }
            return Ok(InGuest { disks, overlay: None, root: top.source });
        }
        if top.kind != "overlay" {
            return Err(format!("it is a mount of type {}", top.kind));
        }
        for option in &top.options {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let paths = ["lowerdir", "upperdir", "workdir"].contains(&name);
            if let Some(outside) = value.split(':').find(|path| paths && !inside(path)) {
                return Err(format!("its {name} is {outside} on the host"));
            }
        }
        // The agent makes the folders that an overlay writes to.
        let root = format!("{base}/rootfs");
        let overlay = Storage {
            driver: driver::OVERLAY.into(),
            options: top.options,
            mount_point: root.clone(),
            ..Storage::default()
        };
        Ok(InGuest { disks, overlay: Some(overlay), root })
    }

    /// Mounts it as a container's root, with its images below `images`.
    ///
    /// # Errors
    /// When something cannot be mounted. What is mounted by then stays, for the caller to take away.
    pub(super) fn on_host(&self, container: &Dir, stage: &Dir, images: &Dir) -> Result<(), MountError> {
        let mut points = Vec::with_capacity(self.images.len());
        for (number, image) in self.images.iter().enumerate() {
            let name = number.to_string();
            images.make_point(&name, true)?;
            images.attach(&name, &mount_image(image, stage)?)?;
            points.push(images.path(&name).display().to_string());
        }
        let (top, folders) = self.filled(&points)?;
        for folder in folders {
            make(&folder, images)?;
        }
        mount::rootfs(&[top], container, ROOTFS, stage)
    }

    /// The last mount without templates, and the folders that it wants made.
    fn filled(&self, points: &[String]) -> Result<(RootfsMount, Vec<String>), MountError> {
        let (mut options, mut folders) = (Vec::new(), Vec::new());
        for option in &self.top.options {
            let option = fill(option, points)?;
            match option.strip_prefix(MKDIR) {
                Some(folder) => folders.push(folder.to_owned()),
                None => options.push(option),
            }
        }
        let source = fill(&self.top.source, points)?;
        Ok((RootfsMount { source, options, ..self.top.clone() }, folders))
    }
}

/// Refuses what must not be left out unseen.
fn check(image: &RootfsMount) -> Result<(), MountError> {
    if image.options.iter().any(|option| option.starts_with(VERITY)) {
        return Err(MountError::Refused(format!(
            "the root file system's layer {} is to be checked by dm-verity, which is not done for layers; set dmverity_mode = \
             \"off\" for containerd's erofs snapshotter, or use the overlayfs snapshotter",
            image.source
        )));
    }
    if image.kind.contains('/') || !image.target.is_empty() {
        return Err(MountError::Refused(format!(
            "the root file system's layer {} is a mount of type {:?} at {:?}, which is not known; use the overlayfs snapshotter",
            image.source, image.kind, image.target
        )));
    }
    Ok(())
}

/// An image as a disk of the guest.
fn disk(image: &RootfsMount, point: &str) -> Result<(Wanted, Storage), String> {
    if !["erofs", "ext4", "xfs"].contains(&image.kind.as_str()) {
        return Err(format!("{} is a mount of type {}", image.source, image.kind));
    }
    if let Some(option) = image.options.iter().find(|option| option.starts_with("device=")) {
        return Err(format!("{} has its data elsewhere ({option})", image.source));
    }
    let read_only = image.kind == "erofs" || image.options.iter().any(|option| option == "ro");
    let options = image.options.iter().filter(|option| *option != "loop").cloned().collect();
    let storage = Storage {
        driver: driver::BLOCK.into(),
        fstype: image.kind.clone(),
        options,
        mount_point: point.to_owned(),
        ..Storage::default()
    };
    Ok((Wanted::file(&image.source, read_only), storage))
}

/// Puts mount points in the place of templates.
fn fill(text: &str, points: &[String]) -> Result<String, MountError> {
    let refuse =
        || MountError::Refused(format!("the root file system's mount has {text:?}, which is not known"));
    let (mut rest, mut filled) = (text, String::new());
    while let Some((before, template)) = rest.split_once("{{") {
        let (template, after) = template.split_once("}}").ok_or_else(refuse)?;
        let words: Vec<&str> = template.split_whitespace().collect();
        let number = |word: &str| word.parse::<usize>().ok().filter(|number| *number < points.len());
        let numbers: Option<Vec<usize>> = match *words.as_slice() {
            ["mount", one] => number(one).map(|one| vec![one]),
            ["overlay", from, to] => number(from).zip(number(to)).map(|(from, to)| {
                if from <= to { (from..=to).collect() } else { (to..=from).rev().collect() }
            }),
            _ => None,
        };
        let chosen = numbers.ok_or_else(refuse)?.into_iter();
        let chosen: Vec<&str> = chosen.filter_map(|number| points.get(number)).map(String::as_str).collect();
        filled = filled + before + &chosen.join(":");
        rest = after;
    }
    Ok(filled + rest)
}

/// Mounts an image. The kernel takes EROFS files as they are from 6.12 on; other images need a loop device,
/// which mount(8) has.
fn mount_image(image: &RootfsMount, stage: &Dir) -> Result<Mount, MountError> {
    let options = image.options.iter().filter(|option| *option != "loop").cloned().collect();
    let bare = RootfsMount { target: String::new(), options, ..image.clone() };
    let loops = bare.options.len() != image.options.len();
    if image.kind == "erofs" || !loops {
        match mount::file_system(&bare, stage) {
            Err(MountError::Io { source, .. })
                if loops && source.raw_os_error() == Some(nix::libc::ENOTBLK) => {}
            other => return other,
        }
    }
    Mount::by(stage, |point| {
        let doing = || format!("mounting {} {} at", image.kind, image.source);
        let mut command = Command::new("mount");
        command.args(["-t", &image.kind, "-o", &image.options.join(","), "--", &image.source]).arg(point);
        let output = command.output().map_err(failed(format!("{} with mount(8)", doing()), point))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(failed(doing(), point)(std::io::Error::other(said)))
    })
}

/// Makes a folder of the kind that a mount asked for. Only in the images, whatever it is called, and whatever
/// they lead to.
fn make(folder: &str, images: &Dir) -> Result<(), MountError> {
    let mut words = folder.split(':');
    let path = Path::new(words.next().unwrap_or_default());
    let refuse = || {
        MountError::Refused(format!(
            "the root file system wants a folder {folder:?}, which is not one of its own"
        ))
    };
    let below = path.strip_prefix(images.path("")).map_err(|_| refuse())?;
    let names: Option<Vec<&str>> =
        below.iter().map(|name| name.to_str().filter(|name| *name != "..")).collect();
    let mode = words.next().map_or(Ok(0o700), |mode| u32::from_str_radix(mode, 8)).map_err(|_| refuse())?;
    let ids: Vec<u32> = words.map(str::parse).collect::<Result<_, _>>().map_err(|_| refuse())?;
    let (image, names) = names.as_deref().and_then(<[&str]>::split_first).ok_or_else(refuse)?;
    let mut at = images.at(image)?;
    let mut made = false;
    for name in names {
        made = at.find(name)?.is_none();
        at = at.make_with(name, mode)?;
    }
    match *ids.as_slice() {
        [uid, gid] if made => at.give_to(uid, gid),
        [] | [_, _] => Ok(()),
        _ => Err(refuse()),
    }
}

#[cfg(test)]
#[path = "layers_tests.rs"]
pub(super) mod tests;
