//! Command line of the daemon.

use std::path::PathBuf;

use clap::Parser;

use crate::config;

/// containerd sandbox controller that runs every pod in a microVM.
#[derive(Clone, Debug, Parser)]
#[command(name = "vmm-sandboxer", disable_version_flag = true)]
pub struct Args {
    /// Configuration file (all keys: docs/config.md).
    #[arg(long, short, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    pub config: PathBuf,
    /// Folder of the pods' state; on a file system that a reboot empties.
    #[arg(long, short, value_name = "DIR", default_value = "/run/kuasar/qemu")]
    pub dir: PathBuf,
    /// Socket that containerd connects to.
    #[arg(long, short, value_name = "SOCK", default_value = "/run/kuasar/qemu.sock")]
    pub listen: PathBuf,
    /// error, warn, info, debug, trace, or directives as in RUST_LOG; wins over the file.
    #[arg(long, value_name = "L")]
    pub log_level: Option<String>,
    /// Writes to this file where the time of each pod goes, for chrome://tracing and Perfetto.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Reads and checks the configuration, and ends; touches nothing of the machine.
    #[arg(long)]
    pub check: bool,
    /// Prints the version.
    #[arg(long, short)]
    pub version: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_documented_places() {
        let args = Args::parse_from(["vmm-sandboxer"]);
        assert_eq!(args.config, PathBuf::from("/etc/kuasar/qemu.toml"));
        assert_eq!(args.dir, PathBuf::from("/run/kuasar/qemu"));
        assert_eq!(args.listen, PathBuf::from("/run/kuasar/qemu.sock"));
        assert!(Args::parse_from(["vmm-sandboxer", "-v"]).version);
    }

    #[test]
    fn an_unknown_option_is_refused() {
        let error = Args::try_parse_from(["vmm-sandboxer", "--conf", "x"]).unwrap_err().to_string();
        assert!(error.contains("--config"), "{error}");
    }
}
