# Every package of this project. What runs inside the guest, and the relay, is static: nixpkgs' pkgsStatic builds it.
{ pkgs }:
let
  inherit (pkgs) lib stdenv;
  hypervisors = [
    "qemu"
    "cloud-hypervisor"
    "stratovirt"
  ];
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
  // pkgs.callPackage ./kernels.nix {
    inherit hypervisors;
    inherit (self) callPackage;
    # The long-term release that the fragments are written for.
    linux = pkgs.linux_6_12;
  }
  // import ./images.nix {
    inherit
      hypervisors
      lib
      pkgs
      self
      stdenv
      workspace
      ;
  }
)
