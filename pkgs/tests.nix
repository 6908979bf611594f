# What every package promises, checked on what was built: a set of tests for each name. `nix flake check` runs all of them.
{
  lib,
  pkgs,
  self,
  kuasar-image,
  names,
}:
let
  inherit (pkgs) runCommand file jq;
  twice = import ./twice.nix { inherit runCommand; };
  imageCheck = import ./image-check.nix {
    inherit lib kuasar-image;
    inherit (pkgs)
      cryptsetup
      jq
      python3Packages
      runCommand
      ;
  };

  # A program that starts, is static where it runs in the guest or once per pod, and tells nothing of where it was built.
  program =
    package:
    {
      flag ? "--version",
      static ? false,
    }:
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
  # A folder in which these are, and are not empty.
  holds =
    package: paths:
    runCommand "check-${package.name}" { } ''
      cd ${package}
      for path in ${lib.escapeShellArgs paths}; do
        [ -s "$path" ] || { echo "${package} has no $path, or an empty one" >&2; exit 1; }
      done
      touch "$out"
    '';
  verified =
    package: part:
    runCommand "check-${package.name}" { nativeBuildInputs = [ kuasar-image ]; } ''
      kuasar-image verify ${package}/${part}
      touch "$out"
    '';

  programs = {
    default.good = holds self.default [
      "bin/vmm-sandboxer"
      "bin/containerd-shim-kuasar-vmm-v1"
      "bin/kuasar-image"
      "lib/systemd/system/kuasar@.service"
    ];
    runtimeclass.good = runCommand "check-runtimeclass" { } ''
      for line in 'kind: RuntimeClass' 'handler: kuasar-qemu' '    memory: [0-9]+Mi' '    cpu: [0-9]+m'; do
        grep -xE "$line" ${self.runtimeclass} || { echo "no line $line in ${self.runtimeclass}" >&2; exit 1; }
      done
      touch "$out"
    '';
    vmm-sandboxer.starts = program self.vmm-sandboxer { };
    kuasar-demo.starts = program self.kuasar-demo { flag = "--help"; };
    kuasar-image = {
      starts = program self.kuasar-image { };
      # It brings the tools it runs.
      alone = runCommand "check-kuasar-image-alone" { } ''
        alone() { PATH=/nowhere ${lib.getExe self.kuasar-image} "$@"; }
        for fs in ext4 erofs xfs; do
          alone build --rootfs ${self.rootfs} --output image --fs "$fs" --verity >verity
          alone verify --root-hash "$(sed -n 's/^root_hash = "\(.*\)"$/\1/p' verity)" image
        done
        alone initrd --rootfs ${self.rootfs} --output initrd --compress zstd
        alone verify initrd
        touch "$out"
      '';
    };
    vmm-task = {
      starts = program self.vmm-task { static = true; };
      # What every pod has in its memory, and every node in its page cache.
      size = atMost 5000000 "vmm-task" (lib.getExe self.vmm-task);
    };
    containerd-shim-kuasar-vmm-v1.starts = program self.containerd-shim-kuasar-vmm-v1 {
      flag = "-v";
      static = true;
    };
    runc-guest.starts = program self.runc-guest { static = true; };
  };
  # Kinds of packages by the beginning of their names.
  kinds = {
    "rootfs.*".good = package: holds package [ "init" ];
    "disk-.*".good = package: verified package "kuasar.img";
    "initrd-.*".good = package: verified package "kuasar.initrd";
    "image-.*".good = imageCheck;
    "kernel-.*".good = package: holds package ([ "config" ] ++ package.images);
    "guests-.*".good =
      package:
      runCommand "check-${package.name}" { } ''
        [ -z "$(find ${package} -xtype l)" ] || { find ${package} -xtype l && exit 1; }
        [ -s ${package}/roots/floor/kuasar.img ]
        touch "$out"
      '';
    "sbom-.*".good =
      package:
      runCommand "check-${package.name}" { nativeBuildInputs = [ jq ]; } ''
        jq -e '.bomFormat == "CycloneDX" and (.components | length) > 100' ${package}/sbom.cdx.json
        touch "$out"
      '';
    # All that goes into a guest but its kernel, which takes as long as all the rest: `rebuild-check` builds that again, and the
    # daemon. NixOS' systemd is nixpkgs' to build twice.
    "kuasar-image|vmm-task|runc-guest|rootfs|rootfs-debug|(disk|initrd|sbom|image)-qemu(-(erofs|xfs|verity|debug|zstd))?" =
      {
        twice = package: twice package.name package;
      };
  };
  ofKind =
    name: pattern: tests:
    lib.optionalAttrs (builtins.match pattern name != null) (
      lib.mapAttrs (_: test: test self.${name}) tests
    );
in
lib.genAttrs names (
  name:
  lib.foldl' (all: pattern: all // ofKind name pattern kinds.${pattern}) (programs.${name} or { }) (
    lib.attrNames kinds
  )
)
