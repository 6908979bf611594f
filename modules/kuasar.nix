# `services.kuasar`: containerd's or k3s' pods in microVMs. Each runtime is one daemon, one handler of containerd, one RuntimeClass.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.kuasar;
  toml = pkgs.formats.toml { };
  k3s = config.services.k3s.enable or false;
  readOnly =
    type: description:
    mkOption {
      inherit type description;
      readOnly = true;
    };
in
{
  imports = [
    ./kuasar/assertions.nix
    ./kuasar/containerd.nix
    ./kuasar/k3s.nix
    ./kuasar/kubernetes.nix
    ./kuasar/units.nix
  ];

  options.services.kuasar = {
    enable = lib.mkEnableOption "pods in microVMs for containerd or k3s";

    packages = mkOption {
      type = types.raw;
      default = import ../pkgs { inherit pkgs; };
      defaultText = lib.literalExpression "import ../pkgs { inherit pkgs; }";
      description = "The set of this project's packages that the other options take theirs from. The flake's module sets its own, tested ones.";
    };
    package = mkOption {
      type = types.package;
      default = cfg.packages.vmm-sandboxer;
      defaultText = lib.literalExpression "config.services.kuasar.packages.vmm-sandboxer";
      description = "The daemon.";
    };
    shimPackage = mkOption {
      type = types.package;
      default = cfg.packages.containerd-shim-kuasar-vmm-v1;
      defaultText = lib.literalExpression "config.services.kuasar.packages.containerd-shim-kuasar-vmm-v1";
      description = "The relay, of which there is one process a pod.";
    };

    runtimes = mkOption {
      type = types.attrsOf (
        types.submodule (
          import ./kuasar/runtime.nix {
            inherit
              cfg
              lib
              pkgs
              toml
              ;
          }
        )
      );
      default = {
        qemu = { };
      };
      example = lib.literalExpression ''
        {
          qemu = { };
          qemu-large = {
            hypervisor = "qemu";
            settings.hypervisor.memory_in_mb = 2048;
          };
        }
      '';
      description = "Kinds of VMs by name. Each is a daemon, a handler of containerd and a RuntimeClass.";
    };

    containerdAddress = mkOption {
      type = types.path;
      default =
        if cfg.k3s.enable then "/run/k3s/containerd/containerd.sock" else "/run/containerd/containerd.sock";
      defaultText = lib.literalExpression "containerd's own, or k3s'";
      description = "containerd's socket.";
    };
    containerd = {
      enable = mkOption {
        type = types.bool;
        default = !cfg.k3s.enable;
        defaultText = lib.literalExpression "!config.services.kuasar.k3s.enable";
        description = "Whether to enable NixOS' containerd and to wire the runtimes into it.";
      };
      config = readOnly (types.attrsOf types.raw) "What is wired into containerd's settings, by the version of its configuration: `v2`, `v3` (and later). For those who wire it themselves.";
    };
    k3s = {
      enable = mkOption {
        type = types.bool;
        default =
          k3s
          && !lib.hasInfix "--container-runtime-endpoint" (toString (config.services.k3s.extraFlags or ""));
        defaultText = lib.literalExpression "config.services.k3s.enable, unless it is told of another containerd";
        description = "Whether to wire the runtimes into the containerd that k3s starts.";
      };
      containerdConfig = readOnly (types.attrsOf types.raw) "What is wired into k3s' containerd, as files by the version of its configuration: `v2`, `v3`. For a template of one's own.";
    };
    kubernetes.enable = mkOption {
      type = types.bool;
      default = config.services.kubernetes.kubelet.enable or false;
      defaultText = lib.literalExpression "config.services.kubernetes.kubelet.enable";
      description = "Whether this is a node of NixOS' own Kubernetes, whose addon manager gets the RuntimeClasses.";
    };
    runtimeClasses = {
      deploy = mkOption {
        type = types.bool;
        default =
          cfg.k3s.enable && config.services.k3s.role or "" == "server"
          || cfg.kubernetes.enable && config.services.kubernetes.addonManager.enable or false;
        defaultText = lib.literalExpression "on a server of k3s, and with Kubernetes' addon manager";
        description = "Whether this machine tells the cluster of the RuntimeClasses.";
      };
      manifest = readOnly types.package "The RuntimeClasses as a file for `kubectl apply -f`.";
    };

    hardening = mkOption {
      type = types.bool;
      default = true;
      description = "Whether the daemon's unit takes from it, and from the VMs that inherit it, what they do not need. Off for debuggers.";
    };
    limits = {
      openFiles = mkOption {
        type = types.either types.ints.positive (types.enum [ "infinity" ]);
        default = 1048576;
        description = "Open files of the daemon, and of each VM.";
      };
      tasks = mkOption {
        type = types.either types.ints.positive (types.enum [ "infinity" ]);
        default = "infinity";
        description = "Processes and threads of the daemon's unit.";
      };
    };
    debug = mkOption {
      type = types.bool;
      default = false;
      description = "Whether guests have a shell on their debug console, and daemons say what they do.";
    };
  };
}
