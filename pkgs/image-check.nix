# Whether an image's every part is as the manifest says, the disk as a DAX reader and a plain one want it, and nothing else is there.
{
  lib,
  cryptsetup,
  jq,
  kuasar-image,
  python3Packages,
  runCommand,
}:
image:
let
  # Bytes of an image at most, of one with tools for people twice that: it is in every node's page cache.
  largest = 32 * 1024 * 1024;
  # Of what a boot loader reads and unpacks; compare a peer's 6.47 MB for what is mini here.
  largestKernel = if image.kernel.flavour == "mini" then 6500000 else 3500000;
in
runCommand "check-${image.pname}"
  {
    nativeBuildInputs = [
      jq
      python3Packages.jsonschema
      cryptsetup
      kuasar-image
    ];
  }
  ''
    cd ${image}
    jq -r '.parts | to_entries[] | "\(.value.sha256)  \(.key)"' manifest.json | sha256sum -c
    test "$(ls)" = "$(jq -r '.parts | keys[]' manifest.json | cat - <(echo manifest.json) | LC_ALL=C sort)"
    jsonschema -i manifest.json ${./manifest.schema.json}
    # A schema that takes everything would say the same.
    for wrong in 'del(.parts["kuasar.img"].sha256)' '.root[0].mode = 493' '.parts["kuasar.img"].size = -1' 'del(.parts["${lib.head image.kernels}"])' '.more = 1' \
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
      hash=$(cat *.toml | sed -n 's/^root_hash = "\(.*\)"$/\1/p')
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
    if [ -e bzImage ] && [ "$(stat -Lc %s bzImage)" -gt ${toString largestKernel} ]; then
      echo "bzImage has $(stat -Lc %s bzImage) bytes, more than ${toString largestKernel}" >&2
      exit 1
    fi
    kuasar-image verify kuasar.initrd
    for part in ${toString image.kernels} kuasar.img kuasar.initrd; do
      ! grep -aqE "$NIX_BUILD_TOP/(source|kernel)" "$part" || { echo "$part contains $NIX_BUILD_TOP" >&2; exit 1; }
    done
    touch "$out"
  ''
