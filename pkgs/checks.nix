# What every package promises, checked on what was built. `nix flake check` runs all of them.
{ pkgs, self }:
let
  inherit (pkgs) lib runCommand file;
  twice = import ./twice.nix { inherit runCommand; };

  # A program that starts, is static where it runs in the guest or once per pod, and tells nothing of where it was built.
  program =
    package:
    { flag, static }:
    runCommand "check-${package.pname}" { nativeBuildInputs = [ file ]; } ''
      program=${lib.getExe package}
      "$program" ${flag} >/dev/null
      ${lib.optionalString static ''
        file "$program" | grep -q 'static' || { echo "$program is not static" >&2; exit 1; }
      ''}
      # A wrapper is no program: all that lies there is looked at.
      ! grep -raqF "$NIX_BUILD_TOP/source" ${package} || { echo "${package} contains $NIX_BUILD_TOP/source" >&2; exit 1; }
      touch "$out"
    '';
  # A file that must not grow beyond so many bytes.
  atMost =
    limit: name: path:
    runCommand "check-size-of-${name}" { } ''
      size=$(stat -Lc %s ${path})
      [ "$size" -le ${toString limit} ] || { echo "${path} has $size bytes, more than ${toString limit}" >&2; exit 1; }
      touch "$out"
    '';
in
{
  vmm-sandboxer = program self.vmm-sandboxer {
    flag = "--version";
    static = false;
  };
  kuasar-image = program self.kuasar-image {
    flag = "--version";
    static = false;
  };
  # It brings the tools it runs.
  kuasar-image-alone = runCommand "check-kuasar-image-alone" { } ''
    alone() { PATH=/nowhere ${lib.getExe self.kuasar-image} "$@"; }
    for fs in ext4 erofs xfs; do
      alone build --rootfs ${self.rootfs} --output image --fs "$fs" --verity >verity
      alone verify --root-hash "$(sed -n 's/^root_hash = "\(.*\)"$/\1/p' verity)" image
    done
    alone initrd --rootfs ${self.rootfs} --output initrd --compress zstd
    alone verify initrd
    touch "$out"
  '';
  vmm-task = program self.vmm-task {
    flag = "--version";
    static = true;
  };
  relay = program self.containerd-shim-kuasar-vmm-v1 {
    flag = "-v";
    static = true;
  };
  # What every pod has in its memory, and every node in its page cache.
  vmm-task-size = atMost 5000000 "vmm-task" (lib.getExe self.vmm-task);
  runc-guest = program self.runc-guest {
    flag = "--version";
    static = true;
  };
}
# Of the other hypervisors' images, which want kernels of their own, `make check-all` builds `tests.good`.
// lib.mapAttrs (_: image: image.tests.good) (
  lib.filterAttrs (name: _: lib.hasPrefix "image-qemu" name) self
)
# All that goes into a guest but its kernel, which takes as long as all the rest: `rebuild-check` builds that again, and the daemon.
// lib.mapAttrs' (name: package: lib.nameValuePair "twice-${name}" (twice name package)) (
  {
    inherit (self) kuasar-image vmm-task runc-guest;
  }
  // lib.filterAttrs (name: _: builtins.match "(rootfs|disk-qemu|initrd-qemu|sbom-qemu|image-qemu).*" name != null && !lib.hasSuffix "nixos" name) self
)
