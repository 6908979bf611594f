//! Command line of `kuasar-image`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use kuasar_image::cpio::Packing;
use kuasar_image::disk::{self, Content, FileSystem, Options};
use kuasar_image::elf::Arch;
use kuasar_image::{MIB, examine};

/// Builds, inspects and verifies guest images. Equal root file systems give equal bytes; every time stamp is
/// SOURCE_DATE_EPOCH (seconds since 1970; 0 when unset, but 1 in ext4, whose tools take 0 for "now").
#[derive(Parser)]
#[command(name = "kuasar-image", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make an initrd; the root needs an executable /init
    Initrd {
        #[command(flatten)]
        place: Place,
        /// Compression of the archive
        #[arg(long, value_enum, default_value = "gzip")]
        compress: Compress,
    },
    /// Make a disk image that boots from virtio-blk and, with DAX, from pmem; the root needs an executable
    /// /sbin/init
    Build {
        #[command(flatten)]
        place: Place,
        /// File system
        #[arg(long, value_enum, default_value = "ext4")]
        fs: FileSystemName,
        /// Free space to leave in the file system, MiB
        #[arg(long, value_name = "N", default_value_t = 0)]
        reserve_mib: u32,
        /// Put a hash tree for dm-verity behind the file system, and print what the daemon's
        /// [hypervisor.verity] needs
        #[arg(long)]
        verity: bool,
    },
    /// Print both partition tables, the PFN superblock and the file system, field by field
    Inspect {
        /// Disk image or initrd
        file: PathBuf,
    },
    /// Fail, naming the field, when an image is not as it should be
    Verify {
        /// Disk image or initrd
        file: PathBuf,
        /// Also check every block against this root hash of its dm-verity tree
        #[arg(long, value_name = "HEX")]
        root_hash: Option<String>,
    },
    /// Write the partition tables and the PFN superblock only, for a file system put at 3 MiB by other means
    Header {
        /// File to write them to; the rest of it stays as it is
        #[arg(long)]
        output: PathBuf,
        /// Make the file, full of zeros, of this size (even, at least 4)
        #[arg(long, value_name = "N")]
        size_mib: Option<u32>,
    },
}

#[derive(clap::Args)]
struct Place {
    /// Folder that becomes the guest's root
    #[arg(long, value_name = "DIR")]
    rootfs: PathBuf,
    /// File to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Machine the guest runs on [default: this one]
    #[arg(long, value_enum)]
    arch: Option<ArchName>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Compress {
    Gzip,
    Zstd,
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum FileSystemName {
    Ext4,
    Erofs,
    Xfs,
}

#[derive(Clone, Copy, ValueEnum)]
enum ArchName {
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "aarch64")]
    Aarch64,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kuasar-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Initrd { place, compress } => {
            let packing = match compress {
                Compress::Gzip => Packing::Gzip,
                Compress::Zstd => Packing::Zstd,
                Compress::None => Packing::None,
            };
            Ok(disk::build_initrd(&place.options()?, packing)?)
        }
        Command::Build { place, fs, reserve_mib, verity } => {
            let fs = match fs {
                FileSystemName::Ext4 => FileSystem::Ext4,
                FileSystemName::Erofs => FileSystem::Erofs,
                FileSystemName::Xfs => FileSystem::Xfs,
            };
            let content = Content { fs, reserve: u64::from(reserve_mib) * MIB, verity };
            if let Some(verity) = disk::build(&place.options()?, content)? {
                print!("{verity}");
            }
            Ok(())
        }
        Command::Inspect { file } => {
            print!("{}", examine::examine(&file)?);
            Ok(())
        }
        Command::Verify { file, root_hash } => verify(&file, root_hash.as_deref()),
        Command::Header { output, size_mib } => {
            disk::write_header(&output, size_mib.map(|n| u64::from(n) * MIB))?;
            Ok(())
        }
    }
}

fn verify(file: &Path, root_hash: Option<&str>) -> Result<()> {
    let report = examine::examine(file)?;
    let mut count = 0;
    for field in report.problems() {
        let problem = field.problem.as_deref().unwrap_or_default();
        eprintln!("kuasar-image: {}: {} is {}: {problem}", field.section, field.name, field.value);
        count += 1;
    }
    if count > 0 {
        bail!("{}: {count} of {} fields are wrong", file.display(), report.fields.len());
    }
    if let Some(root_hash) = root_hash {
        kuasar_image::verity::check(file, root_hash)?;
    }
    println!("{}: good, {} fields", file.display(), report.fields.len());
    Ok(())
}

impl Place {
    fn options(&self) -> Result<Options<'_>> {
        let arch = match self.arch {
            Some(ArchName::X86_64) => Arch::X86_64,
            Some(ArchName::Aarch64) => Arch::Aarch64,
            None => Arch::native()
                .context("guests do not run on this machine's architecture; name one with --arch")?,
        };
        let epoch = kuasar_image::source_date_epoch()?;
        Ok(Options { rootfs: &self.rootfs, output: &self.output, arch, epoch })
    }
}
