# What guests start from: roots as disks and initrds, and images, folders with all that a hypervisor needs. Roots are any
# hypervisor's: their names for each are one derivation.
{
  lib,
  pkgs,
  stdenv,
  accel,
  vsock,
  hypervisors,
  # Whether the machine that builds is of another architecture, and the packages of that machine.
  isCross,
  tools,
  # The scope of this project's packages.
  self,
  workspace,
}:
let
  packer = {
    inherit (tools) kuasar-image;
    # It takes a root for the machine that it runs on, unless told.
    arch = lib.optionalString isCross " --arch ${stdenv.hostPlatform.parsed.cpu.name}";
  };
  disk = args: self.callPackage ../rootfs/disk.nix (packer // args);
  initrd = args: self.callPackage ../rootfs/initrd.nix (packer // args);

  disks = {
    ext4 = disk { };
    erofs = disk { fs = "erofs"; };
    xfs = disk { fs = "xfs"; };
    verity = disk {
      fs = "erofs";
      verity = true;
    };
  };
  initrds = {
    gzip = initrd { };
    zstd = initrd { compress = "zstd"; };
  };
  # Programs for people. A cross build has none in the stand-in, which takes them from the machine.
  debug = lib.optionalAttrs (!isCross) rec {
    rootfs = self.callPackage ../rootfs/debug.nix {
      inherit (pkgs.pkgsStatic)
        bash
        busybox
        iproute2
        strace
        ;
    };
    disk' = disk { inherit rootfs; };
    initrd' = initrd {
      inherit rootfs;
      compress = "zstd";
    };
  };

  of =
    hypervisor:
    let
      kernel = type: self."kernel-${hypervisor}-${type}";
      sbom = self.callPackage ./sbom.nix {
        inherit hypervisor workspace;
        kernel = kernel "micro";
      };
      image =
        args:
        self.callPackage ./image.nix (
          {
            inherit hypervisor sbom;
            kernel = kernel "micro";
            initrd = initrds.gzip;
            inherit accel vsock;
            qemu = self.vmms.qemu;
          }
          // args
        );
    in
    {
      "disk-${hypervisor}" = disks.ext4;
      "disk-${hypervisor}-erofs" = disks.erofs;
      "disk-${hypervisor}-xfs" = disks.xfs;
      "disk-${hypervisor}-verity" = disks.verity;
      "initrd-${hypervisor}" = initrds.gzip;
      "initrd-${hypervisor}-zstd" = initrds.zstd;
      "sbom-${hypervisor}" = sbom;
      "image-${hypervisor}" = image { disk = disks.ext4; };
      "image-${hypervisor}-erofs" = image {
        disk = disks.erofs;
        initrd = initrds.zstd;
        suffix = "-erofs";
      };
      # The micro kernel knows no XFS.
      "image-${hypervisor}-xfs" = image {
        disk = disks.xfs;
        kernel = kernel "mini";
        suffix = "-xfs";
      };
      "image-${hypervisor}-verity" = image {
        disk = disks.verity;
        suffix = "-verity";
      };
      "guests-${hypervisor}" = self.callPackage ./guests.nix {
        inherit (packer) arch kuasar-image;
        inherit hypervisor initrds;
        kernels = lib.genAttrs [ "micro" "mini" ] kernel;
        disks = disks // lib.optionalAttrs (debug != { }) { debug = debug.disk'; };
      };
    }
    // lib.optionalAttrs (hypervisor == "qemu" && debug != { }) rec {
      rootfs-debug = debug.rootfs;
      sbom-qemu-debug = sbom.override { contents = debug.rootfs.packages; };
      # A root with a shell, and the console that serves it.
      image-qemu-debug = image {
        disk = debug.disk';
        initrd = debug.initrd';
        sbom = sbom-qemu-debug;
        suffix = "-debug";
      };
    };
in
lib.foldl' (all: hypervisor: all // of hypervisor) { } hypervisors
# Not everything that answers to nixpkgs' names has NixOS.
// lib.optionalAttrs (pkgs ? nixos) {
  rootfs-nixos = self.callPackage ../rootfs/nixos.nix { };
  disk-qemu-nixos = disk { rootfs = self.rootfs-nixos; };
}
