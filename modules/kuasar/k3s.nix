# The containerd that k3s starts: files beside its configuration, of which k3s reads those of the version that it writes. The user's
# own template stays his.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.kuasar;
  toml = pkgs.formats.toml { };
  folder = "/var/lib/rancher/k3s/agent/etc/containerd";
  file = version: toml.generate "kuasar-k3s-${version}.toml" cfg.containerd.config.${version};
  link = version: { "L+".argument = "${file version}"; };
in
{
  config = lib.mkIf cfg.enable {
    services.kuasar.k3s.containerdConfig = {
      v2 = file "v2";
      v3 = file "v3";
    };
    systemd.tmpfiles.settings = lib.mkIf cfg.k3s.enable {
      "10-kuasar" = {
        "${folder}/config.toml.d/kuasar.toml" = link "v2";
        "${folder}/config-v3.toml.d/kuasar.toml" = link "v3";
      };
    };
    systemd.services.k3s = lib.mkIf cfg.k3s.enable { path = [ cfg.shimPackage ]; };
  };
}
