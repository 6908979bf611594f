//! Bad input to the daemon and the relay: each refusal comes early, loses nothing, and is one that a person
//! can act on. (What CRI can be given wrongly is in `pods/life.rs`.)

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use kuasar_e2e::{
    cases,
    lab::{self, daemon_config},
    machine::Machine,
    paths::Paths,
    suite::{self, Shared, patient},
};
use tokio::{
    process::{Child, Command},
    time::timeout,
};

fn main() -> ExitCode {
    suite::without_lab(
        cases![
            a_missing_configuration,
            an_unknown_key,
            an_unknown_value,
            a_missing_kernel,
            an_unreadable_kernel,
            a_kernel_that_is_none,
            a_missing_image,
            an_image_that_is_none,
            a_missing_initrd,
            an_absent_qemu,
            a_qemu_that_is_none,
            an_absent_virtiofsd,
            kvm_without_kvm,
            a_second_daemon,
            a_daemon_that_ends_leaves_no_socket,
            a_containerd_that_is_too_old,
            an_unknown_option,
        ],
        |machine| Ok(Desk { paths: Paths::find()?, machine }),
    )
}

/// State that the cases share: the programs' paths, and a folder.
struct Desk {
    paths: Paths,
    machine: Machine,
}

impl Shared for Desk {
    async fn end(self) -> Vec<String> {
        Vec::new()
    }
}

/// Longest time until a refusal.
const SOON: Duration = Duration::from_secs(20);

impl Desk {
    /// A folder of its own for a case.
    fn folder(&self, case: &str) -> Result<PathBuf> {
        let folder = self.machine.root.join(case);
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// A configuration file with other keys in `[hypervisor]`.
    fn config(&self, folder: &Path, keys: &[(&str, &str)]) -> Result<PathBuf> {
        let file = folder.join("config.toml");
        fs::write(&file, toml::to_string(&daemon_config(&self.paths, keys)?)?)?;
        Ok(file)
    }

    fn daemon(&self, folder: &Path, config: &Path) -> Command {
        let mut command = Command::new(&self.paths.sandboxer);
        command.arg("--config").arg(config);
        command.arg("--listen").arg(folder.join("s")).arg("--dir").arg(folder.join("d"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Starts a daemon with these keys and returns what it says when it refuses.
    async fn refusal(&self, case: &str, keys: &[(&str, &str)]) -> Result<String> {
        let folder = self.folder(case)?;
        let config = self.config(&folder, keys)?;
        refused(&mut self.daemon(&folder, &config), &folder).await
    }
}

/// Returns a refusing program's words on standard error; it must end, and must not listen.
async fn refused(command: &mut Command, folder: &Path) -> Result<String> {
    let ran = timeout(patient(SOON), command.output()).await;
    let output = ran.ok().context("it did not refuse, it is running")??;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(!output.status.success(), "it ended as if all were well: {said}");
    ensure!(output.status.code() != Some(101) && !said.contains("panicked"), "it panicked: {said}");
    ensure!(!folder.join("s").exists(), "it left its socket: {said}");
    ensure!(said.lines().count() <= 12, "that is no sentence: {said}");
    Ok(said)
}

fn says(said: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(said.to_lowercase().contains(&word.to_lowercase()), "{word:?} is missing in: {said}");
    }
    Ok(())
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

async fn a_missing_configuration(desk: Arc<Desk>) -> Result<()> {
    let folder = desk.folder("no-config")?;
    let config = folder.join("nothing.toml");
    let said = refused(&mut desk.daemon(&folder, &config), &folder).await?;
    says(&said, &["configuration", &text(&config), "no such file"])
}

async fn an_unknown_key(desk: Arc<Desk>) -> Result<()> {
    let said = desk.refusal("key", &[("kernel_pth", "/x")]).await?;
    says(&said, &["kernel_pth", "did you mean `kernel_path`", "config.toml"])
}

async fn an_unknown_value(desk: Arc<Desk>) -> Result<()> {
    let said = desk.refusal("value", &[("share_fs", "virtio-fs")]).await?;
    says(&said, &["virtio-fs", "did you mean `virtiofs`"])
}

async fn a_missing_kernel(desk: Arc<Desk>) -> Result<()> {
    let said = desk.refusal("no-kernel", &[("kernel_path", "/nothing/vmlinux")]).await?;
    says(&said, &["kernel", "/nothing/vmlinux", "no such file", "hypervisor.kernel_path"])
}

async fn an_unreadable_kernel(desk: Arc<Desk>) -> Result<()> {
    // To root, a folder is what cannot be read.
    let folder = text(&desk.folder("a-folder")?);
    let said = desk.refusal("folder-kernel", &[("kernel_path", &folder)]).await?;
    says(&said, &["kernel", &folder, "hypervisor.kernel_path"])
}

async fn a_kernel_that_is_none(desk: Arc<Desk>) -> Result<()> {
    let file = desk.folder("text")?.join("vmlinux");
    fs::write(&file, "this is not a kernel")?;
    let said = desk.refusal("text-kernel", &[("kernel_path", &text(&file))]).await?;
    says(&said, &["kernel", &text(&file)])
}

async fn a_missing_image(desk: Arc<Desk>) -> Result<()> {
    let said = desk.refusal("no-image", &[("image_path", "/nothing/kuasar.img")]).await?;
    says(&said, &["image", "/nothing/kuasar.img", "no such file", "hypervisor.image_path"])
}

async fn an_image_that_is_none(desk: Arc<Desk>) -> Result<()> {
    let file = desk.folder("zeros")?.join("kuasar.img");
    fs::write(&file, vec![0; 3 << 20])?;
    let said = desk.refusal("zero-image", &[("image_path", &text(&file))]).await?;
    says(&said, &["image", &text(&file)])
}

async fn a_missing_initrd(desk: Arc<Desk>) -> Result<()> {
    let said =
        desk.refusal("no-initrd", &[("root", "initrd"), ("initrd_path", "/nothing/kuasar.initrd")]).await?;
    says(&said, &["initrd", "/nothing/kuasar.initrd", "no such file", "hypervisor.initrd_path"])
}

async fn an_absent_qemu(desk: Arc<Desk>) -> Result<()> {
    let said = desk.refusal("no-qemu", &[("path", "/nothing/qemu-system-x86_64")]).await?;
    says(&said, &["/nothing/qemu-system-x86_64", "hypervisor.path"])?;
    // A bare name is looked for in PATH.
    let said = desk.refusal("no-qemu-name", &[("path", "qemu-of-nobody")]).await?;
    says(&said, &["qemu-of-nobody", "PATH", "hypervisor.path"])
}

async fn a_qemu_that_is_none(desk: Arc<Desk>) -> Result<()> {
    let file = desk.folder("fake")?.join("qemu");
    fs::write(&file, "#!/bin/sh\necho 'QEMU emulator version 2.5.0'\n")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    let said = desk.refusal("old-qemu", &[("path", &text(&file))]).await?;
    says(&said, &["2.5.0", "or later", "hypervisor.path"])
}

async fn an_absent_virtiofsd(desk: Arc<Desk>) -> Result<()> {
    let folder = desk.folder("no-virtiofsd")?;
    let mut config = daemon_config(&desk.paths, &[])?;
    let hypervisor = lab::table(&mut config, "hypervisor")?;
    lab::table(hypervisor, "virtiofsd")?.insert("path".into(), "/nothing/virtiofsd".into());
    let file = folder.join("config.toml");
    fs::write(&file, toml::to_string(&config)?)?;
    let said = refused(&mut desk.daemon(&folder, &file), &folder).await?;
    says(&said, &["/nothing/virtiofsd", "hypervisor.virtiofsd.path"])
}

async fn kvm_without_kvm(desk: Arc<Desk>) -> Result<()> {
    let folder = desk.folder("kvm")?;
    let config = desk.config(&folder, &[("accel", "kvm")])?;
    // A machine with KVM becomes one without: for this daemon, the device is the null device.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--", "/bin/sh", "-c"]);
    command
        .arg("if [ -e /dev/kvm ]; then mount --bind /dev/null /dev/kvm || exit 9; fi; exec \"$@\"")
        .arg("sh");
    let daemon = desk.daemon(&folder, &config);
    command.arg(daemon.as_std().get_program()).args(daemon.as_std().get_args());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let said = refused(&mut command, &folder).await?;
    says(&said, &["/dev/kvm", "accel", "tcg"])
}

async fn listening(desk: &Desk, folder: &Path) -> Result<Child> {
    let config = desk.config(folder, &[])?;
    let log = folder.join("log");
    let file = fs::File::create(&log)?;
    let mut child = desk.daemon(folder, &config).stdout(file.try_clone()?).stderr(file).spawn()?;
    lab::listening(&mut child, &folder.join("s"), &log).await?;
    Ok(child)
}

async fn a_second_daemon(desk: Arc<Desk>) -> Result<()> {
    let folder = desk.folder("two")?;
    let mut first = listening(&desk, &folder).await?;
    let second = timeout(patient(SOON), desk.daemon(&folder, &folder.join("config.toml")).output()).await;
    let second = second.ok().context("the second daemon is running")??;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    ensure!(!second.status.success(), "the second daemon ended as if all were well: {said}");
    says(&said, &["another", &text(&folder.join("s"))])?;
    // The first one does not notice.
    if let Some(status) = first.try_wait()? {
        bail!("the first daemon ended with {status}");
    }
    tokio::net::UnixStream::connect(folder.join("s")).await.context("the first daemon's socket is gone")?;
    lab::end("the first daemon", &mut first).await
}

async fn a_daemon_that_ends_leaves_no_socket(desk: Arc<Desk>) -> Result<()> {
    let folder = desk.folder("ends")?;
    let mut daemon = listening(&desk, &folder).await?;
    lab::end("the daemon", &mut daemon).await?;
    ensure!(!folder.join("s").exists(), "its socket is still there");
    // And one that was killed is in nobody's way.
    let mut daemon = listening(&desk, &folder).await?;
    daemon.kill().await?;
    let mut daemon = listening(&desk, &folder).await.context("after a daemon was killed")?;
    lab::end("the daemon", &mut daemon).await
}

/// containerd before 2.1 knows no sandbox plugins for CRI and starts the shim instead, as it does with any
/// runtime.
async fn a_containerd_that_is_too_old(desk: Arc<Desk>) -> Result<()> {
    let folder = desk.folder("old")?;
    let mut relay = Command::new(desk.paths.relay());
    relay.args(["-namespace", "k8s.io", "-address", "/run/containerd/containerd.sock"]);
    relay.args(["-publish-binary", "/bin/true", "-id", "some-container", "start"]).current_dir(&folder);
    relay.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let said = refused(&mut relay, &folder).await?;
    says(&said, &["containerd", "2.1", "sandboxer"])
}

async fn an_unknown_option(desk: Arc<Desk>) -> Result<()> {
    let folder = desk.folder("option")?;
    let mut command = Command::new(&desk.paths.sandboxer);
    command
        .arg("--lisen")
        .arg(folder.join("s"))
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let said = refused(&mut command, &folder).await?;
    says(&said, &["--lisen", "--listen"])
}
