# Every package of this project. What runs inside the guest, and the relay, is static: nixpkgs' pkgsStatic builds it.
{
  pkgs,
  # How the images' config.toml wants guests to be run: "kvm" or "tcg" (emulation); "vhost" (the kernel's vsock) or "vhost-user".
  accel ? "kvm",
  vsock ? "vhost",
}:
let
  inherit (pkgs) lib stdenv;
  hypervisors = [
    "qemu"
    "cloud-hypervisor"
    "stratovirt"
  ];
  workspace = import ./workspace.nix { inherit lib; };

  # What makes images runs on the machine that builds, which may be of another architecture than the guest.
  isCross = stdenv.buildPlatform.system != stdenv.hostPlatform.system;
  toolsOf = self: if isCross then import ./. { pkgs = pkgs.buildPackages; } else self;
  static = file: args: pkgs.pkgsStatic.callPackage file args;

  packagesOf =
    self:
    {
      vmm-sandboxer = self.callPackage ./vmm-sandboxer.nix { inherit workspace; };
      kuasar-image = self.callPackage ./kuasar-image.nix { inherit workspace; };
      kuasar-demo = self.callPackage ./kuasar-demo.nix { inherit workspace; };
      vmm-task = static ./vmm-task.nix { inherit workspace; };
      containerd-shim-kuasar-vmm-v1 = static ./shim.nix { inherit workspace; };
      runc-guest = static ./runc-guest.nix { inherit (pkgs) runc; };
      rootfs = self.callPackage ../rootfs { };
      runtimeclass = self.callPackage ./runtimeclass.nix { };
      # What a node has of it.
      default = pkgs.symlinkJoin {
        name = "kuasar-${workspace.version}";
        paths = [
          self.vmm-sandboxer
          self.containerd-shim-kuasar-vmm-v1
          self.kuasar-image
        ];
        meta = {
          description = "Daemon, relay and image builder: microVMs for containerd's pods";
          license = lib.licenses.asl20;
          mainProgram = "vmm-sandboxer";
          platforms = lib.platforms.linux;
        };
      };
    }
    // import ./kernels.nix {
      inherit hypervisors lib stdenv;
      inherit (self) callPackage;
      # The long-term release that the fragments are written for.
      linux = pkgs.linux_6_12;
    }
    // import ./images.nix {
      inherit
        accel
        hypervisors
        isCross
        lib
        pkgs
        self
        stdenv
        vsock
        workspace
        ;
      tools = toolsOf self;
    };
in
lib.makeScope pkgs.newScope (
  self:
  let
    packages = packagesOf self;
    tests = import ./tests.nix {
      inherit lib pkgs self;
      inherit (toolsOf self) kuasar-image;
      names = lib.attrNames packages;
    };
    about = workspace.about;
  in
  # A package knows its tests and where it is from. Neither is a part of what is built.
  lib.mapAttrs (
    name: package:
    package.overrideAttrs (old: {
      meta = about // old.meta or { };
      passthru = (old.passthru or { }) // {
        tests = tests.${name};
      };
    })
  ) packages
  // {
    # Names and tests are known without a look at any package: one that a release of nixpkgs breaks takes no other with it.
    names = lib.attrNames packages;
    checks =
      lib.concatMapAttrs (name: lib.mapAttrs' (test: lib.nameValuePair "${name}-${test}")) tests
      // {
        # `services.kuasar` with good and bad configurations: one that is not as expected does not evaluate.
        module-evaluation = self.callPackage ../tests/nixos/configurations.nix {
          inherit pkgs;
          kuasar = self;
        };
      }
      # The same in machines with NixOS, which want KVM. Not everything that answers to nixpkgs' names has NixOS.
      // lib.optionalAttrs (pkgs ? testers.runNixOSTest) (
        import ../tests/nixos/vm {
          inherit lib;
          inherit (pkgs) testers;
          kuasar = self;
        }
      );
    # What works on all of it: `make check` looks for the rest itself.
    shell = pkgs.mkShell {
      inputsFrom = [
        self.vmm-sandboxer
        self.kuasar-image
        self.kernel-qemu-micro
      ];
      packages = [
        pkgs.cargo-deny
        pkgs.clippy
        pkgs.deadnix
        pkgs.jq
        pkgs.nixfmt
        pkgs.python3
        pkgs.rustfmt
        pkgs.shellcheck
      ];
    };
    # The hypervisor's program as a node wants it.
    vmms.qemu = self.callPackage ./qemu.nix { };
  }
)
