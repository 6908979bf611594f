# What every package promises, checked on what was built. `nix flake check` runs all of them.
{ pkgs, self }:
let
  inherit (pkgs) lib runCommand file;

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
// lib.optionalAttrs (self ? image-qemu) {
  # Every part is as the manifest says, the disk as a DAX reader and a plain one want it, and nothing else is there.
  image-qemu =
    runCommand "check-image-qemu"
      {
        nativeBuildInputs = [
          pkgs.jq
          pkgs.python3Packages.jsonschema
          self.kuasar-image
        ];
      }
      ''
        cd ${self.image-qemu}
        jq -r '.parts | to_entries[] | "\(.value.sha256)  \(.key)"' manifest.json | sha256sum -c
        test "$(ls)" = "$(jq -r '.parts | keys[]' manifest.json | cat - <(echo manifest.json) | LC_ALL=C sort)"
        jsonschema -i manifest.json ${./manifest.schema.json}
        # A schema that takes everything would say the same.
        for wrong in 'del(.parts.vmlinux.sha256)' '.root[0].mode = 493' '.parts.vmlinux.size = -1' '.more = 1'; do
          jq "$wrong" manifest.json >"$NIX_BUILD_TOP/wrong.json"
          ! jsonschema -i "$NIX_BUILD_TOP/wrong.json" ${./manifest.schema.json} 2>/dev/null || { echo "the schema takes $wrong" >&2; exit 1; }
        done
        # Every file of the root is in the list, and no other.
        diff <(cd ${self.rootfs} && find . -mindepth 1 -printf '/%P\n' | LC_ALL=C sort) <(jq -r '.root[].path' manifest.json)
        # Every component is named once, and every dependency is a component.
        jq -e '[.components[]."bom-ref"] as $refs | ($refs | length) > 100 and ($refs | unique | length) == ($refs | length)
          and ([.dependencies[].dependsOn[]] - $refs == [])
          and ([.components[].name] | contains(["linux", "runc", "vmm-task", "ttrpc"]))' sbom.cdx.json
        kuasar-image verify kuasar.img
        kuasar-image verify kuasar.initrd
        for part in vmlinux bzImage kuasar.img kuasar.initrd; do
          ! grep -aqE "$NIX_BUILD_TOP/(source|kernel)" "$part" || { echo "$part contains $NIX_BUILD_TOP" >&2; exit 1; }
        done
        touch "$out"
      '';
}
