# Replace with what `nixos-generate-config` writes on the machine.
{
  boot.kernelModules = [ "kvm-intel" ];
  boot.loader.systemd-boot.enable = true;
  fileSystems."/".device = "/dev/disk/by-label/nixos";
  system.stateVersion = "26.05";
}
