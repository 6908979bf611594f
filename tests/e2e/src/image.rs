//! OCI images from files: what a registry would give, made here, equal at every run.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::Write,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::paths::Paths;

/// Image A: busybox in several layers.
pub const BUSYBOX: &str = "kuasar.test/busybox:1";
/// Image B: bash and nothing else; it has no busybox.
pub const BASH: &str = "kuasar.test/bash:1";
/// Says it is for this architecture, but its program is not.
pub const ALIEN: &str = "kuasar.test/alien:1";
/// Holds a pod's namespaces for the runtime that is not ours.
pub const PAUSE: &str = "kuasar.test/pause:1";

const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// One image: what it is called, for which architecture it says it is, its layers from the bottom up.
#[derive(Debug)]
pub struct Image {
    name: String,
    architecture: &'static str,
    command: Vec<String>,
    layers: Vec<Vec<u8>>,
}

impl Image {
    /// An image without layers for this machine's architecture.
    #[must_use]
    pub fn new(name: &str, command: &[&str]) -> Self {
        let command = command.iter().map(|&word| word.to_owned()).collect();
        Self { name: name.to_owned(), architecture: native(), command, layers: Vec::new() }
    }

    /// Adds a layer.
    ///
    /// # Errors
    /// When the layer is not well formed.
    pub fn layer(mut self, layer: Layer) -> Result<Self> {
        self.layers.push(layer.0.into_inner().context("ending a layer")?);
        Ok(self)
    }

    /// Writes the image as an OCI layout in a tar file, which `ctr images import` takes.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut archive = Archive(Layer::new());
        let mut layers = Vec::new();
        for layer in &self.layers {
            layers.push(archive.blob(OCI_LAYER, layer)?);
        }
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer["digest"].clone()).collect();
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {"Cmd": self.command, "Env": ["PATH=/bin:/sbin:/usr/bin"], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = archive.blob(OCI_CONFIG, &serde_json::to_vec(&config)?)?;
        let manifest =
            json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers});
        let mut manifest = archive.blob(OCI_MANIFEST, &serde_json::to_vec(&manifest)?)?;
        if let Some(descriptor) = manifest.as_object_mut() {
            let platform = json!({"architecture": self.architecture, "os": "linux"});
            descriptor.insert("platform".into(), platform);
            descriptor.insert("annotations".into(), json!({"io.containerd.image.name": self.name}));
        }
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [manifest]});
        let archive = archive.0.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?.file(
            "index.json",
            0o644,
            &serde_json::to_vec(&index)?,
        )?;
        let bytes = archive.0.into_inner().context("ending the archive")?;
        let mut file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
        file.write_all(&bytes).with_context(|| format!("writing {}", path.display()))
    }
}

/// OCI's name of the architecture this runs on.
fn native() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    }
}

fn foreign() -> &'static str {
    match native() {
        "arm64" => "amd64",
        _ => "arm64",
    }
}

struct Archive(Layer);

impl Archive {
    fn blob(&mut self, media_type: &str, data: &[u8]) -> Result<Value> {
        let mut digest = String::new();
        for byte in Sha256::digest(data) {
            let _ = write!(digest, "{byte:02x}");
        }
        self.0.entry(&format!("blobs/sha256/{digest}"), EntryType::Regular, 0o644, data, None)?;
        Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": data.len()}))
    }
}

/// A layer: a tar archive without clock, names of users, or anything else of this machine.
pub struct Layer(Builder<Vec<u8>>);

impl Default for Layer {
    fn default() -> Self {
        Self::new()
    }
}

impl Layer {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// Adds a folder.
    ///
    /// # Errors
    /// When the path cannot be stored.
    pub fn dir(mut self, path: &str, mode: u32) -> Result<Self> {
        self.entry(path, EntryType::Directory, mode, &[], None)?;
        Ok(self)
    }

    /// Adds a file.
    ///
    /// # Errors
    /// When the path cannot be stored.
    pub fn file(mut self, path: &str, mode: u32, data: &[u8]) -> Result<Self> {
        self.entry(path, EntryType::Regular, mode, data, None)?;
        Ok(self)
    }

    /// Adds a file that has an extended attribute, as tar's PAX headers tell it.
    ///
    /// # Errors
    /// When the path cannot be stored.
    pub fn file_with(mut self, path: &str, mode: u32, data: &[u8], attribute: (&str, &[u8])) -> Result<Self> {
        let rest = [b" SCHILY.xattr.", attribute.0.as_bytes(), b"=", attribute.1, b"\n"].concat();
        // The length that a record begins with counts its own digits.
        let digits = (1..).find(|digits| (rest.len() + digits).to_string().len() == *digits).unwrap_or(1);
        let record = [(rest.len() + digits).to_string().as_bytes(), &rest].concat();
        self.entry("attributes", EntryType::XHeader, 0o644, &record, None)?;
        self.file(path, mode, data)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// When the path or target cannot be stored.
    pub fn link(mut self, path: &str, target: &str) -> Result<Self> {
        self.entry(path, EntryType::Symlink, 0o777, &[], Some(target))?;
        Ok(self)
    }

    fn entry(
        &mut self,
        path: &str,
        kind: EntryType,
        mode: u32,
        data: &[u8],
        target: Option<&str>,
    ) -> Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(u64::try_from(data.len())?);
        match target {
            Some(target) => self.0.append_link(&mut header, path, target),
            None => self.0.append_data(&mut header, path, data),
        }
        .with_context(|| format!("storing {path}"))
    }
}

fn base() -> Result<Layer> {
    let mut layer = Layer::new();
    for (path, mode) in [("bin", 0o755), ("dev", 0o755), ("etc", 0o755), ("proc", 0o755), ("root", 0o700)] {
        layer = layer.dir(path, mode)?;
    }
    let passwd = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
    layer.dir("sys", 0o755)?.dir("tmp", 0o1777)?.dir("var", 0o755)?.file("etc/passwd", 0o644, passwd)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}: run tests/lab/setup", path.display()))
}

/// Three layers, so that a container's overlay has several lower folders; the top one replaces a file of the
/// bottom one.
fn busybox(paths: &Paths, name: &str, command: &[&str]) -> Result<Image> {
    let program = paths.tool("busybox");
    let list = Command::new(&program).arg("--list").output().context("asking busybox for its applets")?;
    let list = String::from_utf8(list.stdout).context("reading busybox' applets")?;
    let mut applets: Vec<_> = list.lines().filter(|applet| *applet != "busybox").collect();
    applets.sort_unstable();
    let mut links = Layer::new();
    for applet in applets {
        links = links.link(&format!("bin/{applet}"), "busybox")?;
    }
    let release = b"ID=lab-busybox\nPRETTY_NAME=\"Lab image A: busybox\"\n";
    Image::new(name, command)
        .layer(base()?.file("bin/busybox", 0o755, &read(&program)?)?.file(
            "etc/os-release",
            0o644,
            b"ID=hidden\n",
        )?)?
        .layer(links)?
        .layer(Layer::new().file("etc/os-release", 0o644, release)?)
}

fn bash(paths: &Paths) -> Result<Image> {
    let release = b"ID=lab-bash\nPRETTY_NAME=\"Lab image B: bash\"\n";
    let layer = base()?.file("bin/bash", 0o755, &read(&paths.tool("bash-static"))?)?;
    Image::new(BASH, &["/bin/bash"]).layer(layer.file("etc/os-release", 0o644, release)?)
}

/// The first 64 bytes of a program for the machine that this one is not: as far as the kernel reads before it
/// says no.
fn alien_program() -> Vec<u8> {
    let machine: u16 = if foreign() == "arm64" { 183 } else { 62 };
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend(2u16.to_le_bytes()); // an executable
    elf.extend(machine.to_le_bytes());
    elf.extend(1u32.to_le_bytes());
    elf.extend([0; 24]); // entry, program headers, section headers
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 0, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf
}

fn alien(name: &str) -> Result<Image> {
    Image::new(name, &["/bin/alien"]).layer(base()?.file("bin/alien", 0o755, &alien_program())?)
}

/// All images of the tests.
///
/// # Errors
/// When a program that goes into one is missing.
pub fn all(paths: &Paths) -> Result<Vec<Image>> {
    Ok(vec![
        busybox(paths, BUSYBOX, &["/bin/sh"])?,
        bash(paths)?,
        alien(ALIEN)?,
        // Not a sleep: the CRI validation suite looks for one that must be gone, also among the pod's
        // processes.
        busybox(paths, PAUSE, &["/bin/tail", "-f", "/dev/null"])?,
    ])
}

impl Image {
    /// The image's full name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_image_is_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = folder.path().join(name);
            alien("x.test/y:1").unwrap().write(&path).unwrap();
            fs::read(path).unwrap()
        };
        assert_eq!(write("a"), write("b"));
    }

    #[test]
    fn an_alien_program_is_a_whole_elf_header() {
        let elf = alien_program();
        assert_eq!(elf.len(), 64);
        assert_eq!(elf[..4], *b"\x7fELF");
    }
}
