# A machine with containerd, a network for pods, an image in the store, and a client of CRI. Guests run in its own KVM, which is the
# emulated machine's: the test wants nested virtualisation.
{
  lib,
  pkgs,
  ...
}:
let
  image = pkgs.dockerTools.buildImage {
    name = "docker.io/library/busybox";
    tag = "test";
    copyToRoot = pkgs.buildEnv {
      name = "root";
      paths = [ pkgs.pkgsStatic.busybox ];
      pathsToLink = [ "/bin" ];
    };
  };
  json = name: value: pkgs.writeText name (builtins.toJSON value);
in
{
  imports = [ ../../../modules/kuasar.nix ];

  services.kuasar.enable = lib.mkDefault true;
  boot.kernelModules = [
    "kvm-amd"
    "kvm-intel"
  ];
  virtualisation = {
    cores = 2;
    diskSize = 4096;
    memorySize = 4096;
    qemu.options = [ "-cpu host" ];
  };
  networking.firewall.trustedInterfaces = [ "pods" ];

  environment.systemPackages = [ pkgs.cri-tools ];
  environment.variables.CONTAINER_RUNTIME_ENDPOINT = "unix:///run/containerd/containerd.sock";
  environment.etc = {
    "cni/net.d/10-pods.conflist".text = builtins.toJSON {
      cniVersion = "1.0.0";
      name = "pods";
      plugins = [
        {
          type = "bridge";
          bridge = "pods";
          isGateway = true;
          ipMasq = true;
          ipam = {
            type = "host-local";
            ranges = [ [ { subnet = "10.88.77.0/24"; } ] ];
            routes = [ { dst = "0.0.0.0/0"; } ];
          };
        }
      ];
    };
    "test/image.tar".source = image;
    "test/pod.json".source = json "pod.json" {
      metadata = {
        name = "pod";
        namespace = "default";
        uid = "pod";
        attempt = 0;
      };
      log_directory = "/var/log/pods";
      linux = { };
    };
    "test/container.json".source = json "container.json" {
      metadata.name = "idle";
      image.image = "docker.io/library/busybox:test";
      command = [
        "/bin/sh"
        "-c"
        "echo started; trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"
      ];
      log_path = "idle.log";
      linux = { };
    };
  };
}
