//! Refuses root file systems that cannot boot, before time is spent on an image that dies in the guest.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use object::elf::{EM_AARCH64, EM_X86_64, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};

use crate::{Error, Result, systemd};

/// Links followed before a chain counts as a loop, as in the kernel.
const MAX_LINKS: usize = 40;
/// A script whose interpreter is a script whose ...: the kernel stops at 5.
const MAX_INTERPRETERS: usize = 5;

/// The machine a guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// 64 bit x86.
    X86_64,
    /// 64 bit Arm.
    Aarch64,
}

impl Arch {
    /// The architecture this program was built for, if guests can run on it.
    #[must_use]
    pub fn native() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::X86_64),
            "aarch64" => Some(Self::Aarch64),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    fn machine(self) -> u16 {
        match self {
            Self::X86_64 => EM_X86_64,
            Self::Aarch64 => EM_AARCH64,
        }
    }
}

/// Checks that the kernel of a guest could start `init` (absolute, as seen in the guest) as process 1, and that the agent will
/// run: as process 1, or as a service of systemd.
///
/// # Errors
/// [`Error::Root`] with the reason: missing, a folder, not executable, no program, for another machine, its loader or
/// interpreter missing; a systemd that does not start the agent.
pub fn init(root: &Path, init: &Path, arch: Arch) -> Result<()> {
    program(root, init, arch, 0)
        .and_then(|()| process_1(root, init, arch))
        .map_err(|reason| Error::Root { root: root.to_owned(), reason })
}

fn process_1(root: &Path, init: &Path, arch: Arch) -> Result<(), String> {
    let (real, shown) = (resolve(root, init)?, init.display());
    let data = fs::read(&real).map_err(|e| format!("{shown} cannot be read: {e}"))?;
    // Its program is called so; a copy under another name still loads its library.
    let library = b"libsystemd-core";
    let systemd = real.file_name().is_some_and(|name| name == "systemd")
        || data.windows(library.len()).any(|w| w == library);
    if systemd {
        systemd::starts_agent(root, arch).map_err(|reason| format!("{shown} {reason}"))?;
    }
    Ok(())
}

pub(crate) fn program(root: &Path, path: &Path, arch: Arch, depth: usize) -> Result<(), String> {
    let shown = path.display();
    if depth > MAX_INTERPRETERS {
        return Err(format!("{shown}: interpreters call each other more than {MAX_INTERPRETERS} deep"));
    }
    let real = resolve(root, path)?;
    let meta = fs::metadata(&real).map_err(|e| format!("{shown} cannot be read: {e}"))?;
    if !meta.is_file() {
        return Err(format!("{shown} is not a regular file"));
    }
    let mode = meta.permissions().mode() & 0o7777;
    if mode & 0o111 == 0 {
        return Err(format!("{shown} is not executable (mode {mode:04o})"));
    }
    let data = fs::read(&real).map_err(|e| format!("{shown} cannot be read: {e}"))?;
    let Some(needed) = needed_program(&data, arch).map_err(|reason| format!("{shown} {reason}"))? else {
        return Ok(());
    };
    program(root, &needed, arch, depth + 1)
        .map_err(|reason| format!("{shown} needs {}, but {reason}", needed.display()))
}

/// The loader or interpreter that has to be there for `data` to run; none for a static program.
fn needed_program(data: &[u8], arch: Arch) -> Result<Option<PathBuf>, String> {
    if let Some(rest) = data.strip_prefix(b"#!") {
        let line = rest.split(|b| *b == b'\n').next().unwrap_or_default();
        let name = line.split(u8::is_ascii_whitespace).find(|word| !word.is_empty());
        return name.map(to_path).map(Some).ok_or_else(|| "is a script that names no interpreter".into());
    }
    if !data.starts_with(b"\x7fELF") {
        return Err("is neither an ELF program nor a script with an interpreter".into());
    }
    elf_loader(data, arch)
}

fn elf_loader(data: &[u8], arch: Arch) -> Result<Option<PathBuf>, String> {
    let damaged = |e: object::read::Error| format!("is a damaged ELF file: {e}");
    let Ok(header) = FileHeader64::<object::Endianness>::parse(data) else {
        return Err(format!("is not a 64 bit ELF program, which {} needs", arch.name()));
    };
    let endian = header.endian().map_err(damaged)?;
    let machine = header.e_machine(endian);
    if machine != arch.machine() {
        let other = match machine {
            EM_X86_64 => "x86_64".to_owned(),
            EM_AARCH64 => "aarch64".to_owned(),
            number => format!("ELF machine {number}"),
        };
        return Err(format!("is built for {other}, the image is for {}", arch.name()));
    }
    for segment in header.program_headers(endian, data).map_err(damaged)? {
        if let Some(name) = segment.interpreter(endian, data).map_err(damaged)? {
            return Ok(Some(to_path(name)));
        }
    }
    Ok(None)
}

fn to_path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

/// Follows `path` inside `root` as the guest would: absolute links start at `root`, nothing leads out of it.
pub(crate) fn resolve(root: &Path, path: &Path) -> Result<PathBuf, String> {
    let mut real = PathBuf::from(root);
    let mut depth = 0_usize;
    let mut links = 0;
    let mut todo: VecDeque<OsString> = components(path);
    while let Some(name) = todo.pop_front() {
        if name == ".." {
            if depth > 0 {
                real.pop();
                depth -= 1;
            }
            continue;
        }
        let next = real.join(&name);
        let meta = fs::symlink_metadata(&next).map_err(|e| match (e.kind(), links) {
            (std::io::ErrorKind::NotFound, 0) => format!("{} is missing", path.display()),
            (std::io::ErrorKind::NotFound, _) => {
                let inside = next.strip_prefix(root).unwrap_or(&next);
                format!("{} is a link to /{}, which is missing", path.display(), inside.display())
            }
            _ => format!("{} cannot be read: {e}", path.display()),
        })?;
        if !meta.is_symlink() {
            real = next;
            depth += 1;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(format!("{} is a loop of links", path.display()));
        }
        let target = fs::read_link(&next).map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
        if target.is_absolute() {
            real = PathBuf::from(root);
            depth = 0;
        }
        for part in components(&target).into_iter().rev() {
            todo.push_front(part);
        }
    }
    Ok(real)
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A root with the given `/sbin/init`, executable.
    fn root(content: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sbin")).unwrap();
        put(dir.path(), "sbin/init", content);
        dir
    }

    fn put(root: &Path, path: &str, content: &[u8]) {
        fs::write(root.join(path), content).unwrap();
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The smallest ELF header the parser takes, with an optional loader.
    fn elf(machine: u16, loader: Option<&str>) -> Vec<u8> {
        let mut data = vec![0_u8; 64];
        data[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        data[16..18].copy_from_slice(&2_u16.to_le_bytes());
        data[18..20].copy_from_slice(&machine.to_le_bytes());
        data[20] = 1;
        data[52..54].copy_from_slice(&64_u16.to_le_bytes());
        data[54..56].copy_from_slice(&56_u16.to_le_bytes());
        if let Some(loader) = loader {
            data[32] = 64;
            data[56] = 1;
            let mut segment = [0_u8; 56];
            segment[0] = 3;
            segment[8] = 120;
            segment[32] = u8::try_from(loader.len() + 1).unwrap();
            data.extend_from_slice(&segment);
            data.extend_from_slice(loader.as_bytes());
            data.push(0);
        }
        data
    }

    fn verdict(root: &Path) -> String {
        match init(root, Path::new("/sbin/init"), Arch::X86_64) {
            Ok(()) => "good".into(),
            Err(error) => error.to_string().split_once(": ").unwrap().1.to_owned(),
        }
    }

    #[test]
    fn a_static_program_is_good() {
        assert_eq!(verdict(root(&elf(EM_X86_64, None)).path()), "good");
    }

    #[test]
    fn a_missing_init_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(verdict(dir.path()), "/sbin/init is missing");
    }

    #[test]
    fn an_init_without_execute_permission_is_refused() {
        let dir = root(&elf(EM_X86_64, None));
        fs::set_permissions(dir.path().join("sbin/init"), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(verdict(dir.path()), "/sbin/init is not executable (mode 0644)");
    }

    #[test]
    fn an_init_that_is_a_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("sbin/init")).unwrap();
        assert_eq!(verdict(dir.path()), "/sbin/init is not a regular file");
    }

    #[test]
    fn another_architecture_is_refused() {
        let dir = root(&elf(EM_AARCH64, None));
        assert_eq!(verdict(dir.path()), "/sbin/init is built for aarch64, the image is for x86_64");
        assert!(init(dir.path(), Path::new("/sbin/init"), Arch::Aarch64).is_ok());
    }

    #[test]
    fn a_dynamic_program_needs_its_loader() {
        let dir = root(&elf(EM_X86_64, Some("/lib64/ld.so")));
        assert_eq!(verdict(dir.path()), "/sbin/init needs /lib64/ld.so, but /lib64/ld.so is missing");
        fs::create_dir(dir.path().join("lib64")).unwrap();
        put(dir.path(), "lib64/ld.so", &elf(EM_X86_64, None));
        assert_eq!(verdict(dir.path()), "good");
    }

    #[test]
    fn systemd_is_refused_unless_it_starts_the_agent() {
        let dir = root(b"");
        fs::remove_file(dir.path().join("sbin/init")).unwrap();
        fs::create_dir_all(dir.path().join("lib/systemd/system/multi-user.target.wants")).unwrap();
        put(dir.path(), "lib/systemd/systemd", &elf(EM_X86_64, None));
        symlink("../lib/systemd/systemd", dir.path().join("sbin/init")).unwrap();
        let said = "/sbin/init is systemd, which starts no agent: the agent must be process 1, or its vmm-task.service be enabled, as by a link in etc/systemd/system/multi-user.target.wants";
        assert_eq!(verdict(dir.path()), said);
        let copy = root(&[elf(EM_X86_64, None), b"\0libsystemd-core-257.so\0".to_vec()].concat());
        assert_eq!(verdict(copy.path()), said);
        put(dir.path(), "lib/systemd/system/vmm-task.service", b"[Service]\nExecStart=/sbin/agent\n");
        assert_eq!(verdict(dir.path()), said);
        let wants = "lib/systemd/system/multi-user.target.wants/vmm-task.service";
        symlink("../vmm-task.service", dir.path().join(wants)).unwrap();
        let missing = verdict(dir.path());
        assert!(
            missing.ends_with("vmm-task.service cannot start /sbin/agent: /sbin/agent is missing"),
            "{missing}"
        );
        put(dir.path(), "sbin/agent", &elf(EM_X86_64, None));
        assert_eq!(verdict(dir.path()), "good");
    }

    #[test]
    fn a_script_needs_its_interpreter() {
        let dir = root(b"#! /bin/sh -e\n");
        assert_eq!(verdict(dir.path()), "/sbin/init needs /bin/sh, but /bin/sh is missing");
        assert_eq!(verdict(root(b"#!\n").path()), "/sbin/init is a script that names no interpreter");
        let endless = verdict(root(b"#!/sbin/init\n").path());
        assert!(endless.ends_with("interpreters call each other more than 5 deep"), "{endless}");
    }

    #[test]
    fn what_is_no_program_is_refused() {
        let reason = "/sbin/init is neither an ELF program nor a script with an interpreter";
        assert_eq!(verdict(root(b"hello").path()), reason);
        assert_eq!(verdict(root(b"").path()), reason);
        let short = verdict(root(b"\x7fELF").path());
        assert_eq!(short, "/sbin/init is not a 64 bit ELF program, which x86_64 needs");
    }

    #[test]
    fn links_stay_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("sbin")).unwrap();
        symlink("/../../bin/agent", dir.path().join("sbin/init")).unwrap();
        assert_eq!(verdict(dir.path()), "/sbin/init is a link to /bin, which is missing");
        fs::create_dir(dir.path().join("bin")).unwrap();
        assert_eq!(verdict(dir.path()), "/sbin/init is a link to /bin/agent, which is missing");
        put(dir.path(), "bin/agent", &elf(EM_X86_64, None));
        assert_eq!(verdict(dir.path()), "good");
    }

    #[test]
    fn a_loop_of_links_ends() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("sbin")).unwrap();
        symlink("init", dir.path().join("sbin/init")).unwrap();
        assert_eq!(verdict(dir.path()), "/sbin/init is a loop of links");
    }
}
