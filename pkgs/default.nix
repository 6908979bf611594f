# Every package of this project. What runs inside the guest, and the relay, is static: nixpkgs' pkgsStatic builds it.
{ pkgs }:
let
  inherit (pkgs) lib;
  inherit (pkgs.stdenv.hostPlatform) isx86_64;
in
lib.makeScope pkgs.newScope (
  self:
  let
    workspace = import ./workspace.nix { inherit lib; };
    static = file: args: pkgs.pkgsStatic.callPackage file args;
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
  // pkgs.callPackage ./kernels.nix { inherit (self) callPackage; }
  // lib.optionalAttrs isx86_64 {
    initrd-qemu = self.callPackage ../rootfs/initrd.nix { };
    disk-qemu = self.callPackage ../rootfs/disk.nix { };
    sbom-qemu = self.callPackage ./sbom.nix {
      inherit workspace;
      kernel = self.kernel-qemu-micro;
      hypervisor = "qemu";
    };
    image-qemu = self.callPackage ./image-qemu.nix {
      sbom = self.sbom-qemu;
      kernel = self.kernel-qemu-micro;
      initrd = self.initrd-qemu;
      disk = self.disk-qemu;
      # A package set that knows its machines have neither KVM nor vhost-vsock says so; nixpkgs knows nothing of it.
      accel = pkgs.kuasarAccel or "kvm";
      vsock = pkgs.kuasarVsock or "vhost";
    };
  }
)
