use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::from_text(text, Path::new("/etc/kuasar/qemu.toml"))
}

fn refusal(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn ids_for_pods_are_not_the_hosts() {
    let why = |value: &str| {
        let text = format!("[sandbox]\nuid_range = {value:?}");
        Config::from_text(&text, Path::new("/etc/kuasar/qemu.toml")).map(drop).map_err(|e| e.to_string())
    };
    for value in ["", "100000-165535"] {
        assert_eq!(why(value), Ok(()), "{value:?}");
    }
    let error = why("0-65535").unwrap_err();
    assert_eq!(
        error,
        "checking the configuration /etc/kuasar/qemu.toml: sandbox.uid_range begins with 0, and ids below 65536 are the host's \
         own users; begin with 65536 or more"
    );
    assert!(why("200000").unwrap_err().contains("sandbox.uid_range is \"200000\" and not FIRST-LAST"));
}

#[test]
fn an_empty_file_is_the_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config.hypervisor.vcpus, 1);
    assert_eq!(config.hypervisor.accel, Accel::Kvm);
    assert_eq!(config.sandbox.relay_path, Path::new("containerd-shim-kuasar-vmm-v1"));
}

#[test]
fn the_documented_file_is_understood() {
    let document = include_str!("../../../../docs/config.md");
    let text = document.split("```").find_map(|block| block.strip_prefix("toml\n")).unwrap();
    let documented = parse(text).unwrap();
    // The page shows every key with its default, so it must say what the code does.
    let mut default = Config::default();
    default.resolve(Path::new("/etc/kuasar"));
    let mut documented = format!("{documented:?}");
    if std::env::consts::ARCH != "x86_64" {
        documented = documented.replace("x86_64", std::env::consts::ARCH);
    }
    assert_eq!(documented, format!("{default:?}"));
}

#[test]
fn an_unknown_key_names_the_nearest() {
    let text = refusal("[hypervisor]\nmemory_in_mib = 512\n");
    assert!(text.starts_with("parsing the configuration /etc/kuasar/qemu.toml: "), "{text}");
    assert!(text.contains("unknown field `memory_in_mib`"), "{text}");
    assert!(text.ends_with("did you mean `memory_in_mb`?"), "{text}");
    assert!(text.contains("line 2"), "{text}");
}

#[test]
fn an_unknown_key_like_no_other_gets_the_list_only() {
    let text = refusal("[sandbox]\nzzzz = 1\n");
    assert!(text.contains("expected one of `hypervisor`"), "{text}");
    assert!(!text.contains("did you mean"), "{text}");
}

#[test]
fn an_unknown_value_names_the_nearest() {
    let text = refusal("[hypervisor]\nshare_fs = \"virtio-fs\"\n");
    assert!(text.ends_with("did you mean `virtiofs`?"), "{text}");
    assert_eq!(parse("[hypervisor]\nshare_fs = \"9p\"").unwrap().hypervisor.share_fs, ShareFs::NineP);
}

#[test]
fn values_that_cannot_work_are_refused_by_name() {
    for (text, part) in [
        ("[hypervisor]\nvcpus = 0", "hypervisor.vcpus is 0"),
        ("[hypervisor]\nmemory_in_mb = 16", "hypervisor.memory_in_mb is 16, a guest needs at least 48"),
        ("[hypervisor]\nmemory_in_mb = 59\nroot = \"initrd\"", "is 59, a guest needs at least 60"),
        ("[hypervisor]\nkernel_path = \"\"", "hypervisor.kernel_path is empty"),
        ("[hypervisor]\nroot = \"initrd\"\ninitrd_path = \"\"", "hypervisor.initrd_path is empty"),
        (
            "[hypervisor.verity]\nroot_hash = \"12g\"\ndata_blocks = 1",
            "hypervisor.verity.root_hash is \"12g\", a SHA-256 has 64 hexadecimal digits",
        ),
        (
            &format!("[hypervisor.verity]\nroot_hash = \"{}\"\ndata_blocks = 0", "0".repeat(64)),
            "hypervisor.verity.data_blocks is 0",
        ),
        (
            "[hypervisor]\nroot = \"initrd\"\nverity = { root_hash = \"\", data_blocks = 1 }",
            "hypervisor.verity is set and the root is the initrd, which no hash tree covers",
        ),
        ("[hypervisor.virtiofsd]\nthreads = 0", "hypervisor.virtiofsd.threads is 0, virtiofsd has 1 to 256"),
        (
            "[hypervisor.virtiofsd]\nsandbox = \"none\"",
            "unknown variant `none`, expected `namespace` or `chroot`",
        ),
        ("[sandbox]\nstart_timeout_s = 0", "sandbox.start_timeout_s is 0"),
        ("[sandbox]\ncollect_grace_s = 0", "sandbox.collect_grace_s is 0"),
        ("[sandbox]\ncollect_interval_s = 0", "sandbox.collect_interval_s is 0"),
        ("[hypervisor]\nallowed_annotations = [\"io.kuasar.vm.vcpu\"]", "did you mean `io.kuasar.vm.vcpus`?"),
    ] {
        let said = refusal(text);
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn relative_paths_are_beside_the_file_and_bare_programs_in_path() {
    let config =
        parse("[hypervisor]\nkernel_path = \"vmlinux\"\npath = \"qemu\"\nvirtiofsd.path = \"./fs\"").unwrap();
    assert_eq!(config.hypervisor.kernel_path, Path::new("/etc/kuasar/vmlinux"));
    assert_eq!(config.hypervisor.path, Path::new("qemu"));
    assert_eq!(config.hypervisor.virtiofsd.path, Path::new("/etc/kuasar/./fs"));
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(Path::new("/nonexistent/qemu.toml")).unwrap_err().to_string();
    assert_eq!(
        error,
        "reading the configuration /nonexistent/qemu.toml: No such file or directory (os error 2)"
    );
}
