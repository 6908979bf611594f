//! Programs of a root file system: whether one can run on the guest's machine, with its interpreter or
//! loader.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use object::elf::{EM_AARCH64, EM_X86_64, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};

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
