//! The daemon's configuration, and what pods' annotations ask for.

use std::path::Path;

use vmm_sandboxer::{config::Config, fuzz};

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![
        b"[sandbox]\nlog_level = \"info\"\nstart_timeout_s = 60\n[hypervisor]\nvcpus = 1\nmemory_in_mb = 512\nallowed_annotations = \
          [\"io.kuasar.vm.vcpus\"]\nroot = \"pmem\"\n[hypervisor.virtiofsd]\npath = \"virtiofsd\"\n"
            .to_vec(),
        b"[hypervisor]\nkernle_path = \"x\"\n".to_vec(),
        b"io.kuasar.vm.vcpus\n2".to_vec(),
        b"io.kuasar.vm.memory_mib\n4294967296".to_vec(),
        b"io.kuasar.vm.kernel_params\nquiet a=b".to_vec(),
        b"io.kuasar.vm.colour\nred".to_vec(),
    ]
}

pub(crate) fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    drop(Config::from_text(&text, Path::new("/etc/kuasar/qemu.toml")));
    let (name, value) = text.split_once('\n').unwrap_or((&text, ""));
    if let Some(parameters) = fuzz::annotation(name, value) {
        // They become a part of the guest's command line, and nothing else of the VMM's.
        assert!(parameters.len() <= 1024 && !parameters.contains(char::is_control), "{parameters:?}");
    }
}
