//! Refuses root file systems that cannot boot, before time is spent on an image that dies in the guest.

use std::fs;
use std::path::Path;

use crate::elf::{Arch, program, resolve};
use crate::{Error, Result, systemd};

/// Checks that the kernel of a guest could start `init` (absolute, as seen in the guest) as process 1, and
/// that the agent will run: as process 1, or as a service of systemd.
///
/// # Errors
/// [`Error::Root`] with the reason: missing, a folder, not executable, no program, for another machine, its
/// loader or interpreter missing; a systemd that does not start the agent.
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use object::elf::{EM_AARCH64, EM_X86_64};

    use super::*;

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
