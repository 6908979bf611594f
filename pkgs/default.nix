# Every package of this project. What runs inside the guest, and the relay, is static: nixpkgs' pkgsStatic builds it.
{ pkgs }:
let
  inherit (pkgs) lib stdenv;
  inherit (stdenv.hostPlatform) isx86_64;
in
lib.makeScope pkgs.newScope (
  self:
  let
    workspace = import ./workspace.nix { inherit lib; };
    static = file: args: pkgs.pkgsStatic.callPackage file args;
    # What makes images runs on the machine that builds, which may be of another architecture than the guest.
    isCross = stdenv.buildPlatform.system != stdenv.hostPlatform.system;
    tools = if isCross then import ./. { pkgs = pkgs.buildPackages; } else self;
  in
  {
    vmm-sandboxer = self.callPackage ./vmm-sandboxer.nix { inherit workspace; };
    kuasar-image = self.callPackage ./kuasar-image.nix { inherit workspace; };
    kuasar-demo = self.callPackage ./kuasar-demo.nix { inherit workspace; };
    vmm-task = static ./vmm-task.nix { inherit workspace; };
    containerd-shim-kuasar-vmm-v1 = static ./shim.nix { inherit workspace; };
    runc-guest = static ./runc-guest.nix { inherit (pkgs) runc; };
    rootfs = self.callPackage ../rootfs { };

    checks = import ./checks.nix { inherit pkgs self; };
  }
  // pkgs.callPackage ./kernels.nix {
    inherit (self) callPackage;
    # The long-term release that the fragments are written for.
    linux = pkgs.linux_6_12;
  }
  // (
    let
      packer = {
        inherit (tools) kuasar-image;
        # It takes a root for the machine that it runs on, unless told.
        arch = lib.optionalString isCross " --arch ${stdenv.hostPlatform.parsed.cpu.name}";
      };
      disk = args: self.callPackage ../rootfs/disk.nix (packer // args);
      initrd = args: self.callPackage ../rootfs/initrd.nix (packer // args);
      image =
        args:
        self.callPackage ./image-qemu.nix (
          {
            sbom = self.sbom-qemu;
            kernel = self.kernel-qemu-micro;
            initrd = self.initrd-qemu;
            # A package set that knows its machines have neither KVM nor vhost-vsock says so; nixpkgs knows nothing of it.
            accel = pkgs.kuasarAccel or "kvm";
            vsock = pkgs.kuasarVsock or "vhost";
          }
          // args
        );
      # The roots are any hypervisor's.
      guests =
        hypervisor:
        self.callPackage ./guests.nix {
          inherit (packer) arch kuasar-image;
          inherit hypervisor;
          kernels = lib.genAttrs [ "micro" "mini" ] (type: self."kernel-${hypervisor}-${type}");
          disks = {
            ext4 = self.disk-qemu;
            erofs = self.disk-qemu-erofs;
            verity = self.disk-qemu-verity;
          }
          // lib.optionalAttrs isx86_64 {
            xfs = self.disk-qemu-xfs;
            debug = self.image-qemu-debug.disk;
          };
          initrds = {
            gzip = self.initrd-qemu;
            zstd = self.initrd-qemu-zstd;
          };
        };
    in
    {
      initrd-qemu = initrd { };
      initrd-qemu-zstd = initrd { compress = "zstd"; };
      disk-qemu = disk { };
      disk-qemu-erofs = disk { fs = "erofs"; };
      disk-qemu-verity = disk {
        fs = "erofs";
        verity = true;
      };
      guests-qemu = guests "qemu";
    }
    # Not everything that answers to nixpkgs' names has NixOS.
    // lib.optionalAttrs (pkgs ? nixos) {
      rootfs-nixos = self.callPackage ../rootfs/nixos.nix { };
      disk-qemu-nixos = disk { rootfs = self.rootfs-nixos; };
    }
    // lib.optionalAttrs isx86_64 {
      guests-cloud-hypervisor = guests "cloud-hypervisor";
      guests-stratovirt = guests "stratovirt";
      # The micro kernel knows no XFS.
      disk-qemu-xfs = disk { fs = "xfs"; };
      sbom-qemu = self.callPackage ./sbom.nix {
        inherit workspace;
        kernel = self.kernel-qemu-micro;
        hypervisor = "qemu";
      };
      image-qemu = image { disk = self.disk-qemu; };
      image-qemu-erofs = image {
        disk = self.disk-qemu-erofs;
        initrd = self.initrd-qemu-zstd;
        suffix = "-erofs";
      };
      image-qemu-xfs = image {
        disk = self.disk-qemu-xfs;
        kernel = self.kernel-qemu-mini;
        suffix = "-xfs";
      };
      image-qemu-verity = image {
        disk = self.disk-qemu-verity;
        suffix = "-verity";
      };
      rootfs-debug = self.callPackage ../rootfs/debug.nix {
        inherit (pkgs.pkgsStatic)
          bash
          busybox
          iproute2
          strace
          ;
      };
      sbom-qemu-debug = self.sbom-qemu.override { packages = self.rootfs-debug.packages; };
      # A root with a shell, and the console that serves it.
      image-qemu-debug = image {
        disk = disk { rootfs = self.rootfs-debug; };
        initrd = initrd {
          rootfs = self.rootfs-debug;
          compress = "zstd";
        };
        sbom = self.sbom-qemu-debug;
        suffix = "-debug";
      };
    }
  )
)
