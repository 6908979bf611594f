# Options of NixOS that modules/ reads or defines, for an evaluation without NixOS: their names, and no meaning.
{ lib, ... }:
let
  inherit (lib) mkOption types;
  free =
    default:
    mkOption {
      inherit default;
      type = types.anything;
    };
  set = free { };
in
{
  options = {
    assertions = mkOption {
      type = types.listOf types.raw;
      default = [ ];
    };
    warnings = mkOption {
      type = types.listOf types.str;
      default = [ ];
    };
    boot.isContainer = free false;
    boot.kernelModules = mkOption {
      type = types.listOf types.str;
      default = [ ];
    };
    environment.etc = set;
    security.lockKernelModules = free false;
    services.k3s = {
      enable = free false;
      role = free "server";
      extraFlags = free "";
      containerdConfigTemplate = free null;
      manifests = set;
    };
    services.kubernetes = {
      kubelet.enable = free false;
      addonManager.enable = free false;
      addonManager.bootstrapAddons = set;
    };
    systemd = {
      packages = mkOption {
        type = types.listOf types.package;
        default = [ ];
      };
      services = mkOption {
        type = types.attrsOf types.anything;
        default = { };
      };
      tmpfiles.settings = set;
    };
    virtualisation.containerd = {
      enable = free false;
      configFile = free null;
      settings = mkOption {
        type = types.attrsOf types.anything;
        default = { };
      };
    };
  };
  # As NixOS' own module has it.
  config.virtualisation.containerd.settings.version = lib.mkDefault 2;
}
