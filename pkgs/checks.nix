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
      ! grep -aqF "$NIX_BUILD_TOP/source" "$program" || { echo "$program contains $NIX_BUILD_TOP/source" >&2; exit 1; }
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
  # Bytes of an image at most, of one with tools for people twice that: it is in every node's page cache.
  largest = 32 * 1024 * 1024;
  # Every part is as the manifest says, the disk as a DAX reader and a plain one want it, and nothing else is there.
  imageIsGood =
    image:
    runCommand "check-${image.pname}"
      {
        nativeBuildInputs = [
          pkgs.jq
          pkgs.python3Packages.jsonschema
          pkgs.cryptsetup
          self.kuasar-image
        ];
      }
      ''
        cd ${image}
        jq -r '.parts | to_entries[] | "\(.value.sha256)  \(.key)"' manifest.json | sha256sum -c
        test "$(ls)" = "$(jq -r '.parts | keys[]' manifest.json | cat - <(echo manifest.json) | LC_ALL=C sort)"
        jsonschema -i manifest.json ${./manifest.schema.json}
        # A schema that takes everything would say the same.
        for wrong in 'del(.parts.vmlinux.sha256)' '.root[0].mode = 493' '.parts.vmlinux.size = -1' '.more = 1' \
          'del(.root[] | select(.kind == "file") | .sha256)' 'del(.root[] | select(.kind == "link") | .target)' \
          '(.root[] | select(.kind == "folder")) += {size: 1}'; do
          jq "$wrong" manifest.json >"$NIX_BUILD_TOP/wrong.json"
          ! jsonschema -i "$NIX_BUILD_TOP/wrong.json" ${./manifest.schema.json} 2>/dev/null || { echo "the schema takes $wrong" >&2; exit 1; }
        done
        # Every file of the root is in the list as it is, and no other.
        diff <(cd ${image.disk.rootfs} && find . -mindepth 1 -printf '/%P %y %m %l\n' | LC_ALL=C sort) \
          <(jq -r '.root[] | "\(.path) \({file: "f", folder: "d", link: "l"}[.kind]) \(.mode) \(.target // "")"' manifest.json | LC_ALL=C sort)
        (cd ${image.disk.rootfs} && jq -r '.root[] | select(.kind == "file") | "\(.sha256)  .\(.path)"' ${image}/manifest.json | sha256sum --quiet -c)
        # Every component is named once, and every dependency is a component.
        jq -e '[.components[]."bom-ref"] as $refs | ($refs | length) > 100 and ($refs | unique | length) == ($refs | length)
          and ([.dependencies[].dependsOn[]] - $refs == [])
          and ${
            builtins.toJSON (
              [
                "linux"
                "runc"
                "libseccomp"
                "go-std"
                "vmm-task"
                "ttrpc"
                "rust-std"
              ]
              ++ map (package: package.pname) (image.disk.rootfs.packages or [ ])
            )
          } - [.components[].name] == []' sbom.cdx.json
        ! jq -r '.components[].name' sbom.cdx.json | grep -E '^(windows|wasi)'
        kuasar-image verify kuasar.img
        ${lib.optionalString image.disk.verity ''
          hash=$(sed -n 's/^root_hash = "\(.*\)"$/\1/p' config.toml)
          kuasar-image verify --root-hash "$hash" kuasar.img
        ''}
        ${lib.optionalString (!image.disk.rootfs ? shell) ''
          # Two programs, and nothing to run a script with.
          test "$(jq -r '.root[] | select(.kind == "file") | .path' manifest.json | tr '\n' ' ')" = '/bin/runc /sbin/init '
        ''}
        # As large as its content, with 2 % and half a MiB for tables and an XFS log of 6.5 MiB, rounded to 2 MiB.
        size=$(stat -Lc %s kuasar.img)
        content=$(find ${image.disk.rootfs} -type f -printf '%s\n' | awk '{ blocks += int(($1 + 4095) / 4096) } END { print blocks * 4096 }')
        fs=$((content + content / 50 + 524288 + ${if image.disk.fs == "xfs" then "6815744" else "0"}))
        largest=$(((3145728 + fs + 2097151) / 2097152 * 2097152))
        [ "$size" -le "$largest" ] && [ "$size" -le ${
          toString (if image.disk.rootfs ? shell then 2 * largest else largest)
        } ] || {
          echo "kuasar.img has $size bytes: more than $largest, or than an image may have" >&2
          exit 1
        }
        kuasar-image verify kuasar.initrd
        for part in vmlinux bzImage kuasar.img kuasar.initrd; do
          ! grep -aqE "$NIX_BUILD_TOP/(source|kernel)" "$part" || { echo "$part contains $NIX_BUILD_TOP" >&2; exit 1; }
        done
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
// lib.optionalAttrs pkgs.stdenv.hostPlatform.isx86_64 {
  # What a boot loader reads and unpacks; compare a peer's 6.47 MB for what is mini here.
  kernel-micro-size = atMost 3500000 "kernel-micro" "${self.kernel-qemu-micro}/bzImage";
  kernel-mini-size = atMost 6500000 "kernel-mini" "${self.kernel-qemu-mini}/bzImage";
}
// lib.mapAttrs (_: imageIsGood) (
  lib.filterAttrs (name: _: lib.hasPrefix "image-" name) self
)
# All that goes into a guest but its kernel, which takes as long as all the rest: `rebuild-check` builds that again, and the daemon.
// lib.mapAttrs' (name: package: lib.nameValuePair "twice-${name}" (twice name package)) (
  {
    inherit (self) kuasar-image vmm-task runc-guest;
  }
  // lib.filterAttrs (name: _: builtins.match "(rootfs|disk-qemu|initrd-qemu|sbom-qemu|image-qemu).*" name != null && !lib.hasSuffix "nixos" name) self
)
