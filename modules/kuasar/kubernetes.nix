# RuntimeClasses: as a file, by k3s' own deployment, and by NixOS' addon manager.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.kuasar;
  runtimes = lib.filterAttrs (_: runtime: runtime.enable) cfg.runtimes;
  classOf =
    runtime:
    let
      class = runtime.runtimeClass;
      scheduling =
        lib.optionalAttrs (class.nodeSelector != { }) { inherit (class) nodeSelector; }
        // lib.optionalAttrs (class.tolerations != [ ]) { inherit (class) tolerations; };
    in
    {
      apiVersion = "node.k8s.io/v1";
      kind = "RuntimeClass";
      metadata = {
        name = runtime.handler;
      }
      // lib.optionalAttrs (class.labels != { }) { inherit (class) labels; }
      // lib.optionalAttrs (class.annotations != { }) { inherit (class) annotations; };
      inherit (runtime) handler;
      overhead.podFixed = { inherit (class.overhead) cpu memory; };
    }
    // lib.optionalAttrs (scheduling != { }) { inherit scheduling; };
  classes = map classOf (lib.attrValues runtimes);
in
{
  config = lib.mkIf cfg.enable {
    # What is JSON is YAML.
    services.kuasar.runtimeClasses.manifest = pkgs.writeText "kuasar-runtimeclasses.yaml" (
      lib.concatMapStrings (class: "---\n${builtins.toJSON class}\n") classes
    );
    services.k3s.manifests = lib.mkIf (cfg.runtimeClasses.deploy && cfg.k3s.enable) {
      kuasar-runtimeclasses.source = cfg.runtimeClasses.manifest;
    };
    services.kubernetes.addonManager.bootstrapAddons = lib.mkIf (
      cfg.runtimeClasses.deploy && cfg.kubernetes.enable
    ) (lib.listToAttrs (map (class: lib.nameValuePair "kuasar-${class.handler}" class) classes));
  };
}
