//! Paths of the programs and artefacts under test. A missing one is an error that says what to run: a test
//! that cannot run has not passed.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// Programs and artefacts of one run.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Result of `nix build .#image-qemu`: kernel, image, initrd, `config.toml`.
    pub image: PathBuf,
    /// The daemon.
    pub sandboxer: PathBuf,
    /// The folder that holds the relay, for containerd's `PATH`.
    pub relay_dir: PathBuf,
    /// The folder of unpacked tools: containerd, ctr, QEMU, virtiofsd, vhost-device-vsock, busybox, `cni/`.
    pub tools: PathBuf,
}

/// The relay's file name, which containerd derives from the runtime's type.
pub const RELAY: &str = "containerd-shim-kuasar-vmm-v1";

impl Paths {
    /// From `KUASAR_IMAGE`, `KUASAR_SANDBOXER`, `KUASAR_RELAY` and `KUASAR_CACHE`; programs that are not
    /// named are taken from where `cargo build` puts them.
    ///
    /// # Errors
    /// When something is missing; the text says what to run.
    pub fn find() -> Result<Self> {
        let image = env::var_os("KUASAR_IMAGE").map(PathBuf::from).context(
            "KUASAR_IMAGE is not set: run `make e2e`, or set it to a result of `nix build .#image-qemu`",
        )?;
        let image = image
            .canonicalize()
            .with_context(|| format!("KUASAR_IMAGE={} is not there: run `make image`", image.display()))?;
        for part in ["config.toml", "vmlinux", "kuasar.img", "kuasar.initrd"] {
            if !image.join(part).is_file() {
                bail!("KUASAR_IMAGE={} has no {part}: run `make image`", image.display());
            }
        }
        let relay = program("KUASAR_RELAY", RELAY)?;
        let relay_dir = relay.parent().map(Path::to_owned).context("KUASAR_RELAY names no file")?;
        Ok(Self {
            image,
            sandboxer: program("KUASAR_SANDBOXER", "vmm-sandboxer")?,
            relay_dir,
            tools: tools()?,
        })
    }

    /// A tool of the lab.
    #[must_use]
    pub fn tool(&self, name: &str) -> PathBuf {
        self.tools.join(name)
    }

    /// The kubelet of `tests/kubelet`, which a suite of its own builds.
    #[must_use]
    pub fn kubelet(&self) -> PathBuf {
        self.tools.with_file_name("kubelet").join("kubelet")
    }

    /// The relay.
    #[must_use]
    pub fn relay(&self) -> PathBuf {
        self.relay_dir.join(RELAY)
    }
}

fn program(variable: &str, name: &str) -> Result<PathBuf> {
    let path = match env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => built_by_cargo(name)?,
    };
    path.canonicalize().with_context(|| {
        format!("{variable}: {} is not there: run `make e2e`, or build {name}", path.display())
    })
}

/// Test binaries live in `target/<profile>/deps`, programs one folder up.
fn built_by_cargo(name: &str) -> Result<PathBuf> {
    let here = env::current_exe().context("finding this program")?;
    let candidates = here.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    let first = here.with_file_name(name);
    Ok(candidates.filter(|path| path.is_file()).last().unwrap_or(first))
}

fn tools() -> Result<PathBuf> {
    let cache = env::var_os("KUASAR_CACHE").map(PathBuf::from).or_else(|| {
        let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let base = base.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
        base.map(|base| base.join("kuasar-nix"))
    });
    let tools = cache.context("neither KUASAR_CACHE nor HOME is set")?.join("tools/bin");
    for tool in
        ["containerd", "ctr", "runc", "busybox", "bash-static", "cni", "qemu-system-x86_64", "virtiofsd"]
    {
        if !tools.join(tool).exists() {
            bail!("{} is not there: run tests/lab/setup", tools.join(tool).display());
        }
    }
    Ok(tools)
}
