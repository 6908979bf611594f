# The daemons: instances of the package's own unit, and what they need of the kernel.
{
  config,
  lib,
  ...
}:
let
  cfg = config.services.kuasar;
  runtimes = lib.filterAttrs (_: runtime: runtime.enable) cfg.runtimes;
  clients =
    lib.optional cfg.containerd.enable "containerd.service"
    ++ lib.optional cfg.k3s.enable "k3s.service";
  usesVhost = lib.any (runtime: runtime.settings.hypervisor.vsock == "vhost") (
    lib.attrValues runtimes
  );

  unit =
    name: runtime:
    lib.nameValuePair "kuasar@${name}" {
      # The unit is the package's; this is what differs here.
      overrideStrategy = "asDropin";
      # Never "required by": pods of runc live without it.
      wantedBy = clients;
      before = clients;
      restartTriggers = [ runtime.configFile ];
      # One step instead of stopping, activating and starting: pods do not notice, and containerd waits less.
      stopIfChanged = false;
      serviceConfig = {
        ExecStart = [
          ""
          (lib.concatStringsSep " " [
            (lib.getExe cfg.package)
            "--config /etc/kuasar/${name}.toml"
            "--dir ${runtime.stateDir}"
            "--listen ${runtime.socket}"
          ])
        ];
        LimitNOFILE = toString cfg.limits.openFiles;
        TasksMax = toString cfg.limits.tasks;
      }
      // lib.optionalAttrs (!cfg.hardening) {
        # An empty value takes back what the package's unit says.
        CapabilityBoundingSet = "~";
        LockPersonality = false;
        NoNewPrivileges = false;
        RestrictAddressFamilies = "";
        SystemCallArchitectures = "";
        SystemCallFilter = "";
      };
    };
in
{
  config = lib.mkIf cfg.enable {
    systemd.packages = [ cfg.package ];
    systemd.services = lib.mapAttrs' unit runtimes;
    environment.etc = lib.mapAttrs' (
      name: runtime: lib.nameValuePair "kuasar/${name}.toml" { source = runtime.configFile; }
    ) runtimes;
    # Loaded when the machine starts, because it may lock its modules afterwards.
    boot.kernelModules = [
      "act_mirred"
      "cls_u32"
      "sch_ingress"
      "tun"
      "vhost_net"
    ]
    ++ lib.optional usesVhost "vhost_vsock";
  };
}
