# NixOS' containerd. The runtimes go into the table of the version that the configuration has: containerd migrates a table of another
# version over the user's settings, and says nothing.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.kuasar;
  runtimes = lib.filterAttrs (_: runtime: runtime.enable) cfg.runtimes;
  byHandler = f: lib.mapAttrs' (_: runtime: lib.nameValuePair runtime.handler (f runtime)) runtimes;
  # No `options` below a runtime: containerd before 2.3.1 fails every container start with them.
  runtimeOf = runtime: {
    runtime_type = "io.containerd.kuasar-vmm.v1";
    sandboxer = runtime.handler;
    io_type = "fifo";
    privileged_without_host_devices = true;
  };
  shared.proxy_plugins = byHandler (runtime: {
    type = "sandbox";
    address = runtime.socket;
  });
  tables = {
    v2."io.containerd.grpc.v1.cri".containerd.runtimes = byHandler runtimeOf;
    v3."io.containerd.cri.v1.runtime".containerd.runtimes = byHandler runtimeOf;
  };
  version = config.virtualisation.containerd.settings.version or 2;
in
{
  config = lib.mkIf cfg.enable {
    services.kuasar.containerd.config = lib.mapAttrs (
      _: plugins: shared // { inherit plugins; }
    ) tables;

    virtualisation.containerd = lib.mkIf cfg.containerd.enable {
      enable = true;
      settings = lib.mkMerge [
        shared
        {
          # Both names are there whatever the version is: a name that depends on a setting is a question that asks itself.
          plugins = {
            "io.containerd.grpc.v1.cri" = lib.mkIf (version < 3) tables.v2."io.containerd.grpc.v1.cri";
            "io.containerd.cri.v1.runtime" = lib.mkIf (version >= 3) (
              tables.v3."io.containerd.cri.v1.runtime"
              // {
                # NixOS says it in the table of version 2 only, which counts for nothing here.
                cni.bin_dirs = lib.mkDefault [ "${pkgs.cni-plugins}/bin" ];
              }
            );
          };
        }
      ];
    };
    systemd.services.containerd = lib.mkIf cfg.containerd.enable { path = [ cfg.shimPackage ]; };
  };
}
