# One of `services.kuasar.runtimes`.
{
  cfg,
  lib,
  pkgs,
  toml,
}:
{ config, name, ... }:
let
  inherit (lib) mkOption types;
  handlers = {
    qemu = "kuasar-qemu";
    cloud-hypervisor = "kuasar-clh";
    stratovirt = "kuasar-stratovirt";
  };
  overheads = import ./overheads.nix;
  usesInitrd = config.settings.hypervisor.root == "initrd";
  setting =
    type: description:
    mkOption {
      inherit type description;
    };
  # What is checked when it is built is what runs; a daemon of another architecture cannot look at it.
  canCheck = pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform;
in
{
  options = {
    enable = mkOption {
      type = types.bool;
      default = true;
      description = "Whether there is this runtime.";
    };
    hypervisor = mkOption {
      # Those that the daemon has drivers for.
      type = types.enum [ "qemu" ];
      default = name;
      defaultText = lib.literalExpression "<name>";
      description = "The VMM.";
    };
    handler = mkOption {
      # A name that Kubernetes takes for a RuntimeClass.
      type = types.strMatching "[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?";
      default = handlers.${name} or "kuasar-${name}";
      defaultText = lib.literalExpression "kuasar-<name>";
      description = "Name of containerd's handler and proxy plugin, and of the RuntimeClass.";
    };
    vmm = mkOption {
      type = types.package;
      default = cfg.packages.vmms.${config.hypervisor};
      defaultText = lib.literalExpression "config.services.kuasar.packages.vmms.<hypervisor>";
      description = "The VMM's package. The default has no graphics.";
    };
    image = mkOption {
      type = types.package;
      default = cfg.packages."image-${config.hypervisor}${lib.optionalString cfg.debug "-debug"}";
      defaultText = lib.literalExpression "config.services.kuasar.packages.image-<hypervisor>";
      description = "Kernel, root and manifest of the guests, which also say what the defaults of `settings` are.";
    };
    socket = mkOption {
      type = types.path;
      default = "/run/kuasar/${name}.sock";
      defaultText = lib.literalExpression ''"/run/kuasar/<name>.sock"'';
      description = "Socket that containerd connects to.";
    };
    stateDir = mkOption {
      type = types.path;
      default = "/run/kuasar/${name}";
      defaultText = lib.literalExpression ''"/run/kuasar/<name>"'';
      description = "Folder of the pods' state, on a file system that a reboot empties.";
    };
    settings = mkOption {
      default = { };
      description = "The daemon's configuration, as docs/config.md has it.";
      type = types.submodule {
        freeformType = toml.type;
        options = {
          sandbox.log_level = setting types.str "error, warn, info, debug, trace, or directives as in RUST_LOG.";
          task.log_level = setting (types.enum [
            "error"
            "warn"
            "info"
            "debug"
            "trace"
          ]) "How much the agent in the guest says.";
          hypervisor = {
            accel = setting (types.enum [
              "kvm"
              "tcg"
            ]) "`kvm`, or `tcg`: emulation, slow, needs no hardware.";
            machine_type = setting types.str "QEMU's machine: `q35`, `pc`, `microvm`; `virt` on aarch64.";
            vcpus = setting (types.ints.between 1 1024) "CPUs of a pod without a CPU limit.";
            memory_in_mb = setting (types.ints.between (
              if usesInitrd then 60 else 48
            ) 16777216) "Memory of a pod without a memory limit: 48 MiB at least, 60 with the initrd as root.";
            memory_overhead_in_mb = setting (types.ints.between 0 16777216) "Added to a pod's memory limit where its RuntimeClass names no overhead.";
            root = setting (types.enum [
              "pmem"
              "blk"
              "initrd"
            ]) "How the guest gets its root.";
            share_fs = setting (types.enum [
              "virtiofs"
              "9p"
            ]) "How volumes get into the guest.";
            vsock = setting (types.enum [
              "vhost"
              "vhost-user"
            ]) "The kernel's vsock, or a process of its own.";
            allowed_annotations = setting (types.listOf types.str) "Annotations with which pods may ask for another VM.";
            kernel_params = setting types.str "Added to the guest's command line.";
          };
        };
      };
    };
    configFile = mkOption {
      type = types.path;
      readOnly = true;
      description = "The daemon's configuration, which the daemon itself has looked at when it was built.";
    };
    runtimeClass = {
      overhead = {
        memory = mkOption {
          type = types.strMatching "[0-9]+(Ki|Mi|Gi)";
          default = (overheads.${config.hypervisor} or overheads.qemu).memory;
          defaultText = lib.literalExpression "what was measured (docs/kubernetes.md)";
          description = "Memory that a pod costs beside its containers, which the VM gets and the scheduler counts.";
        };
        cpu = mkOption {
          type = types.strMatching "[0-9]+m?";
          default = (overheads.${config.hypervisor} or overheads.qemu).cpu;
          defaultText = lib.literalExpression "what was measured (docs/kubernetes.md)";
          description = "CPU time that a pod costs beside its containers.";
        };
      };
      nodeSelector = mkOption {
        type = types.attrsOf types.str;
        default = { };
        example = {
          "kuasar.io/kvm" = "true";
        };
        description = "Labels of the nodes that pods of this class may run on.";
      };
      tolerations = mkOption {
        type = types.listOf (types.attrsOf types.anything);
        default = [ ];
        description = "Taints that pods of this class tolerate.";
      };
      annotations = mkOption {
        type = types.attrsOf types.str;
        default = { };
        description = "Annotations of the RuntimeClass.";
      };
      labels = mkOption {
        type = types.attrsOf types.str;
        default = { };
        description = "Labels of the RuntimeClass.";
      };
    };
  };

  config = {
    settings = lib.mkMerge [
      (lib.mapAttrsRecursive (_: lib.mkDefault) config.image.settings)
      {
        sandbox = {
          hypervisor = lib.mkDefault config.hypervisor;
          log_level = lib.mkDefault (if cfg.debug then "debug" else "info");
          relay_path = lib.mkDefault (lib.getExe cfg.shimPackage);
          containerd_address = lib.mkDefault cfg.containerdAddress;
        };
        task.log_level = lib.mkDefault "info";
        hypervisor = {
          path = lib.mkDefault (
            lib.getExe' config.vmm "qemu-system-${pkgs.stdenv.hostPlatform.parsed.cpu.name}"
          );
          vcpus = lib.mkDefault 1;
          memory_in_mb = lib.mkDefault 512;
          memory_overhead_in_mb = lib.mkDefault 64;
          allowed_annotations = lib.mkDefault [ ];
          share_fs = lib.mkDefault "virtiofs";
        };
      }
    ];
    configFile = pkgs.runCommand "kuasar-${name}.toml" { } ''
      cp ${toml.generate "kuasar-${name}-settings.toml" config.settings} "$out"
      chmod u+w "$out"
      ${lib.optionalString config.image.disk.verity ''(echo && cat ${config.image.disk}/verity.toml) >>"$out"''}
      ${lib.optionalString canCheck ''
        ${lib.getExe cfg.package} --check --config "$out"
      ''}
    '';
  };
}
