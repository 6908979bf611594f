# `services.kuasar` in NixOS' own module system: every module of a system, and packages of the stand-in where it has them. What nothing
# of ours is made of is a package with a name and no content. Gives what differs from what is expected, by name.
{
  # Folders: a checkout of nixpkgs with nixos/, nixpkgs' lib, and a copy of ../nixpkgs-standin that `prepare` has made.
  tree,
  lib,
  standin,
  system ? "x86_64-linux",
}:
let
  lib' = import lib;
  base = import (standin + "/packages.nix") {
    inherit system;
    lib = lib';
    inputs = builtins.fromJSON (builtins.readFile (standin + "/inputs.json"));
  };
  kuasar = import ../../pkgs { pkgs = base; };
  stub =
    name:
    derivation {
      inherit name system;
      builder = "/bin/sh";
    }
    // {
      pname = name;
      version = "2.1.9"; # containerd's is asked for
      meta = { };
      passthru = { };
      override = _: stub name;
      overrideAttrs = _: stub name;
    };
  platform = lib'.systems.elaborate system;
  writeText = name: base.writeText (lib'.strings.sanitizeDerivationName name);
  pkgs =
    base
    // lib'.genAttrs (lib'.splitString "\n" (lib'.trim (builtins.readFile ./system.stubs))) stub
    // {
      _type = "pkgs";
      inherit writeText;
      lib = lib';
      config = { };
      overlays = [ ];
      path = tree;
      appendOverlays = _: pkgs;
      __splicedPackages = pkgs;
      buildPackages = pkgs;
      stdenv = base.stdenv // {
        hostPlatform = platform;
        buildPlatform = platform;
        targetPlatform = platform;
        inherit (platform) isAarch64 isLinux isx86_64;
      };
      formats = lib'.genAttrs [
        "gitIni"
        "ini"
        "iniWithGlobalSection"
        "json"
        "keyValue"
        "toml"
        "yaml"
      ] (_: base.formats.toml);
      buildEnv = _: stub "env";
      closureInfo = _: stub "closure";
      linkFarm = name: _: stub name;
      runCommandLocal = base.runCommand;
      substituteAll = _: stub "substitute";
      writeScript = writeText;
      writeScriptBin = writeText;
      writeShellScript = writeText;
      writeShellScriptBin = writeText;
      writeTextFile =
        {
          name,
          text ? "",
          ...
        }:
        writeText name text;
      linuxPackages = {
        extend = _: pkgs.linuxPackages;
        kernel = stub "linux" // {
          version = "6.12";
          features = { };
          config.isEnabled = _: true;
        };
      };
    };
  with' = configuration: (evaluated configuration).config;
  evaluated =
    configuration:
    import (tree + "/nixos/lib/eval-config.nix") {
      inherit pkgs;
      lib = lib';
      system = null;
      modules = [
        ../../modules/kuasar.nix
        {
          services.kuasar = {
            enable = true;
            packages = kuasar;
          };
          nixpkgs.hostPlatform = system;
          boot.loader.grub.enable = false;
          fileSystems."/".device = "none";
          system.stateVersion = "24.05";
        }
        configuration
      ];
    };

  runtime = {
    runtime_type = "io.containerd.kuasar-vmm.v1";
    sandboxer = "kuasar-qemu";
    io_type = "fifo";
    privileged_without_host_devices = true;
  };
  plain = with' { };
  unit = plain.systemd.units."kuasar@qemu.service";
  ofVersion =
    version: table:
    (with' {
      virtualisation.containerd.settings = {
        version = lib'.mkForce version;
        plugins.${table}.containerd = {
          snapshotter = "zfs";
          runtimes.runc.options.SystemdCgroup = true;
        };
      };
    }).virtualisation.containerd.settings.plugins;
  v2 = ofVersion 2 "io.containerd.grpc.v1.cri";
  v3 = ofVersion 3 "io.containerd.cri.v1.runtime";
  k3s = with' { services.k3s.enable = true; };
  # Of our own module: those of all others ask for most of nixpkgs.
  ours =
    configuration:
    lib'.concatMap (
      definition:
      lib'.filter (one: !one.assertion) (
        lib'.optionals (lib'.hasSuffix "/kuasar/assertions.nix" definition.file) definition.value
      )
    ) (evaluated configuration).options.assertions.definitionsWithLocations;
  has =
    text: whole:
    lib'.hasInfix (builtins.unsafeDiscardStringContext text) (
      builtins.unsafeDiscardStringContext whole
    );
  fails = value: !(builtins.tryEval (builtins.deepSeq value value)).success;

  # The VM tests as NixOS' own framework takes them: each node's units, and the script.
  framework = import (tree + "/nixos/lib") { lib = lib'; };
  vmTests = import ./vm {
    inherit kuasar;
    lib = lib';
    testers.runNixOSTest =
      test:
      (framework.evalTest {
        imports = [ test ];
        hostPkgs = pkgs;
        node.pkgs = pkgs;
      }).config;
  };
  isWired =
    test:
    let
      inherit (test.nodes) machine;
    in
    has "ExecStart=${lib'.getExe kuasar.vmm-sandboxer} "
      machine.systemd.units."kuasar@qemu.service".text
    && has "machine.wait_for_unit(\"kuasar@qemu.service\")" test.testScriptString;

  results =
    lib'.mapAttrs' (
      name: test: lib'.nameValuePair "the test ${name} has the daemon" (isWired test)
    ) vmTests
    // {
      "nothing of ours is refused" = ours { } == [ ];
      "the unit is a drop-in of the package's" = unit.overrideStrategy == "asDropin";
      "containerd wants the unit" = lib'.elem "containerd.service" unit.wantedBy;
      "the unit starts our daemon, and no other" =
        has "\nExecStart=\nExecStart=${lib'.getExe kuasar.vmm-sandboxer} --config /etc/kuasar/qemu.toml --dir /run/kuasar/qemu --listen /run/kuasar/qemu.sock\n" unit.text;
      "the unit is restarted with its configuration" = has "X-Restart-Triggers" unit.text;
      "the unit is restarted in one step" = has "X-StopIfChanged=false" unit.text;
      "the unit is ordered" = has "Before=containerd.service\n" unit.text;
      "version 2: our runtime and the user's" =
        v2."io.containerd.grpc.v1.cri".containerd.runtimes == {
          runc.options.SystemdCgroup = true;
          kuasar-qemu = runtime;
        };
      "version 2: NixOS' own settings are kept" =
        v2."io.containerd.grpc.v1.cri".cni ? bin_dir
        && v2."io.containerd.grpc.v1.cri".containerd.snapshotter == "zfs";
      "version 2: no other table" = lib'.attrNames v2 == [ "io.containerd.grpc.v1.cri" ];
      "version 3: our runtime and the user's" =
        v3."io.containerd.cri.v1.runtime".containerd.runtimes == {
          runc.options.SystemdCgroup = true;
          kuasar-qemu = runtime;
        };
      "version 3: CNI is where it is looked for" =
        v3."io.containerd.cri.v1.runtime".cni.bin_dirs == [ "${base.cni-plugins}/bin" ];
      "version 3: no runtime of ours in the other table" =
        !(v3."io.containerd.grpc.v1.cri".containerd or { } ? runtimes);
      "k3s: files beside its configuration" =
        lib'.attrNames k3s.systemd.tmpfiles.settings."10-kuasar" == [
          "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/kuasar.toml"
          "/var/lib/rancher/k3s/agent/etc/containerd/config.toml.d/kuasar.toml"
        ];
      "k3s: no containerd of NixOS" = !k3s.virtualisation.containerd.enable;
      "k3s wants the unit" = lib'.elem "k3s.service" k3s.systemd.units."kuasar@qemu.service".wantedBy;
      "a NixOS container is refused" =
        lib'.length (ours {
          boot.isContainer = true;
        }) == 1;
      "a hypervisor without a driver is refused" =
        fails
          (with' { services.kuasar.runtimes.xen = { }; }).services.kuasar.runtimes.xen.hypervisor;
      "a key of the wrong type is refused" =
        fails
          (with' { services.kuasar.runtimes.qemu.settings.hypervisor.vcpus = "two"; })
          .services.kuasar.runtimes.qemu.settings.hypervisor.vcpus;
      "modules of the kernel are loaded" = lib'.elem "vhost_net" plain.boot.kernelModules;
    };
in
{
  passed = lib'.attrNames (lib'.filterAttrs (_: passed: passed) results);
  failed = lib'.attrNames (lib'.filterAttrs (_: passed: !passed) results);
}
