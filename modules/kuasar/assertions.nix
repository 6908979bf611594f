# What cannot work, in the words of whoever set it.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.kuasar;
  runtimes = lib.filterAttrs (_: runtime: runtime.enable) cfg.runtimes;
  names = lib.attrNames runtimes;
  all = lib.attrValues runtimes;
  containerd = config.virtualisation.containerd;
  template = config.services.k3s.containerdConfigTemplate or null;
  wants = containerd.enable && cfg.containerd.enable;

  # The first that more than one has, or null.
  twice =
    values:
    let
      again = lib.filter (value: lib.length (lib.filter (other: other == value) values) > 1) values;
    in
    if again == [ ] then null else lib.head again;
  once = values: message: {
    assertion = twice values == null;
    message = message (toString (twice values));
  };
  # k3s' own base has the folders that hold our files.
  isWired =
    text:
    lib.hasInfix "{{ template \"base\"" text
    || lib.any (file: lib.hasInfix (builtins.unsafeDiscardStringContext "${file}") text) (
      lib.attrValues cfg.k3s.containerdConfig
    );
  # The longest path below a pod's folder, with its name, leaves so much.
  longest = 25;
  cpu = pkgs.stdenv.hostPlatform;
  usesVhost = lib.filter (runtime: runtime.settings.hypervisor.vsock == "vhost") all;
  usesKvm = lib.any (runtime: runtime.settings.hypervisor.accel == "kvm") all;

  ofRuntime =
    name: runtime:
    let
      at = "services.kuasar.runtimes.${name}";
      root = runtime.settings.hypervisor.root;
      reason =
        if cpu.isAarch64 then
          "QEMU has no virtio-pmem for aarch64"
        else
          "a root that is checked block by block has no DAX";
    in
    [
      {
        assertion = lib.stringLength runtime.stateDir <= longest;
        message = "${at}.stateDir has ${toString (lib.stringLength runtime.stateDir)} characters; sockets below it may have 107, so it may have ${toString longest}.";
      }
      {
        assertion = runtime.image.hypervisor or runtime.hypervisor == runtime.hypervisor;
        message = "${at}.image is of ${runtime.image.hypervisor or ""}, and the runtime's hypervisor is ${runtime.hypervisor}.";
      }
      {
        assertion = runtime.image.architecture or cpu.parsed.cpu.name == cpu.parsed.cpu.name;
        message = "${at}.image is of ${
          runtime.image.architecture or ""
        }, and the machine is ${cpu.parsed.cpu.name}.";
      }
      {
        assertion = root != "pmem" || !(cpu.isAarch64 || runtime.image.disk.verity or false);
        message = "${at}.settings.hypervisor.root is \"pmem\", and ${reason}: use \"blk\".";
      }
    ];
in
{
  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = names != [ ];
        message = "services.kuasar.enable is set but no runtime is: set services.kuasar.runtimes.qemu = { }.";
      }
      (once (map (runtime: runtime.handler) all) (
        handler:
        "services.kuasar.runtimes: ${handler} is the handler of more than one runtime; give each its own `handler`."
      ))
      (once (map (runtime: runtime.socket) all) (
        socket:
        "services.kuasar.runtimes: two runtimes have the socket ${socket}; one daemon serves one socket."
      ))
      (once (map (runtime: runtime.stateDir) all) (
        folder:
        "services.kuasar.runtimes: two runtimes have the stateDir ${folder}; one daemon keeps its pods in one folder."
      ))
      {
        assertion = cfg.containerd.enable || cfg.k3s.enable;
        message = "services.kuasar: neither containerd nor k3s is wired, so no pod can reach it (Docker asks no sandbox controller, CRI-O has none): set services.kuasar.containerd.enable or services.k3s.enable.";
      }
      {
        assertion = !wants || lib.versionAtLeast pkgs.containerd.version "2.1";
        message = "services.kuasar needs containerd 2.1 or later, and pkgs.containerd is ${pkgs.containerd.version}: an older one cannot use a sandbox controller.";
      }
      {
        assertion = !wants || containerd.configFile == null;
        message = "virtualisation.containerd.configFile is set, so NixOS ignores virtualisation.containerd.settings and with it services.kuasar: move the file's content to `settings`, or wire it yourself with services.kuasar.containerd.config.";
      }
      {
        assertion = !cfg.k3s.enable || template == null || isWired template;
        message = "services.k3s.containerdConfigTemplate does not contain services.kuasar.k3s.containerdConfig: append it to yours.";
      }
      {
        assertion = !config.boot.isContainer;
        message = "services.kuasar cannot run in a NixOS container: it needs /dev/kvm, network namespaces and mounts of its own.";
      }
      {
        assertion = lib.length usesVhost <= 16;
        message = "services.kuasar.runtimes: ${toString (lib.length usesVhost)} runtimes have vsock = \"vhost\", and the agents' ports on one kernel's vsock are for 16 daemons.";
      }
    ]
    ++ lib.concatLists (lib.mapAttrsToList ofRuntime runtimes);

    warnings =
      lib.optional
        (
          cpu.isx86_64
          && usesKvm
          && !lib.any (module: lib.elem module config.boot.kernelModules) [
            "kvm-amd"
            "kvm-intel"
          ]
        )
        "services.kuasar: boot.kernelModules has neither kvm-intel nor kvm-amd, without which accel = \"kvm\" finds no /dev/kvm."
      ++
        lib.optional (config.security.lockKernelModules or false)
          "services.kuasar: security.lockKernelModules is set; kernel modules of the cluster's network plugin have to be in boot.kernelModules.";
  };
}
