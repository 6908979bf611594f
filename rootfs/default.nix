# The guest's root: the agent as PID 1, runc, and the folders that something gets mounted on. No shell, no library.
{
  lib,
  nukeReferences,
  runCommand,
  runc-guest,
  vmm-task,
}:
let
  # The image is read-only: what the agent mounts needs its folder here.
  folders = [
    "dev"
    "etc"
    "mnt"
    "proc"
    "root"
    "run"
    "sys"
    "tmp"
    "var"
  ];
in
runCommand "kuasar-rootfs"
  {
    # The guest has no store. (nixpkgs' Go writes the store paths of time zones and port numbers into its programs.)
    allowedReferences = [ ];
    nativeBuildInputs = [ nukeReferences ];
    meta = {
      description = "Root file tree of the guest: vmm-task as init, runc, mount points";
      license = lib.licenses.asl20;
      platforms = lib.platforms.linux;
    };
  }
  ''
    mkdir -p "$out/sbin" "$out/bin"
    (cd "$out" && mkdir ${toString folders})
    install -m 0755 ${lib.getExe vmm-task} "$out/sbin/init"
    install -m 0755 ${lib.getExe runc-guest} "$out/bin/runc"
    chmod -R u+w "$out"
    nuke-refs "$out/sbin/init" "$out/bin/runc"
    ln -s sbin/init "$out/init"
    # The root is read-only; the agent writes the pod's resolver configuration there.
    ln -s /run/kuasar/resolv.conf "$out/etc/resolv.conf"
  ''
