//! Roots whose process 1 is systemd: one that starts the agent is as good as one whose process 1 is the
//! agent.

use std::fs;
use std::path::{Path, PathBuf};

use crate::elf::{Arch, program, resolve};

/// The agent's unit.
const UNIT: &str = "vmm-task.service";
/// Folders that systemd searches for units and for what is enabled, in its order.
const FOLDERS: [&str; 4] = [
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];
/// Characters that may precede the program of an `ExecStart=`.
const PREFIXES: [char; 6] = ['@', '-', ':', '+', '!', '|'];

/// Checks that the systemd of a root will start the agent.
pub(crate) fn starts_agent(root: &Path, arch: Arch) -> Result<(), String> {
    let folders: Vec<PathBuf> =
        FOLDERS.iter().filter_map(|path| resolve(root, Path::new(path)).ok()).collect();
    if !folders.iter().any(|folder| is_enabled(folder)) {
        return Err(format!(
            "is systemd, which starts no agent: the agent must be process 1, or its {UNIT} be enabled, as by a link in \
             etc/systemd/system/multi-user.target.wants"
        ));
    }
    let unit = FOLDERS.iter().find_map(|path| resolve(root, &Path::new(path).join(UNIT)).ok());
    let text = unit.and_then(|unit| fs::read_to_string(unit).ok()).unwrap_or_default();
    let started = text.lines().find_map(|line| line.trim().strip_prefix("ExecStart=")).unwrap_or_default();
    match started.trim_start_matches(PREFIXES).split_whitespace().next() {
        Some(agent) => program(root, Path::new(agent), arch, 0)
            .map_err(|reason| format!("is systemd, whose {UNIT} cannot start {agent}: {reason}")),
        None => Err(format!("is systemd, and {UNIT} is enabled, but no unit of this name says ExecStart=")),
    }
}

/// Returns true if something in a folder of units wants the agent's unit.
fn is_enabled(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let wants = |path: &Path| path.extension().is_some_and(|kind| kind == "wants" || kind == "requires");
    entries
        .map(|entry| entry.path())
        .filter(|path| wants(path))
        .any(|path| path.join(UNIT).symlink_metadata().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn put(root: &Path, path: &str, text: &str, mode: u32) {
        let file = root.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn the_agents_unit_must_be_enabled_and_its_program_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let verdict = || starts_agent(root, Arch::X86_64).err().unwrap_or_else(|| "good".into());
        let unit = "[Service]\nType=exec\n ExecStart=-/usr/bin/vmm-task\n";
        put(root, "usr/lib/systemd/system/vmm-task.service", unit, 0o644);
        assert!(verdict().starts_with("is systemd, which starts no agent: the agent must be process 1, "));
        let wants = root.join("etc/systemd/system/multi-user.target.wants");
        fs::create_dir_all(&wants).unwrap();
        // As `systemctl --root=DIR enable` makes it: a link of the guest.
        symlink("/usr/lib/systemd/system/vmm-task.service", wants.join(UNIT)).unwrap();
        assert_eq!(
            verdict(),
            "is systemd, whose vmm-task.service cannot start /usr/bin/vmm-task: /usr/bin/vmm-task is missing"
        );
        put(root, "bin/sh", "#!/bin/sh", 0o755);
        put(root, "usr/bin/vmm-task", "not executable", 0o644);
        assert!(verdict().ends_with("/usr/bin/vmm-task is not executable (mode 0644)"));
        put(root, "usr/bin/vmm-task", "\x7fELF", 0o755);
        assert!(verdict().ends_with("/usr/bin/vmm-task is not a 64 bit ELF program, which x86_64 needs"));
        // Masked.
        symlink("/dev/null", root.join("etc/systemd/system").join(UNIT)).unwrap();
        put(root, "dev/null", "", 0o644);
        assert!(verdict().ends_with("but no unit of this name says ExecStart="));
    }
}
