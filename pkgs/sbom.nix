# What a guest image is made from, as a CycloneDX bill of materials: the agent and its crates, runc and its modules, what both
# are linked with, the kernel. No clock and no serial number: equal inputs give equal bytes.
{
  lib,
  go,
  jq,
  pkgsStatic,
  runCommand,
  rustc,
  runc-guest,
  vmm-task,
  workspace,
  kernel,
  hypervisor,
  # What else is in the root. (A scope of nixpkgs has an attribute called `packages`, which would be filled in here.)
  contents ? [ ],
}:
let
  crateRef =
    crate: "pkg:cargo/${crate.name}@${builtins.replaceStrings [ "+" ] [ "%2B" ] crate.version}";
  crates = workspace.crates vmm-task.pname;
  componentOf =
    crate:
    {
      type = if crate.name == vmm-task.pname then "application" else "library";
      bom-ref = crateRef crate;
      purl = crateRef crate;
      inherit (crate) name version;
    }
    // lib.optionalAttrs (crate.checksum != null) {
      hashes = [
        {
          alg = "SHA-256";
          content = crate.checksum;
        }
      ];
    };
  linux = "pkg:generic/linux@${kernel.version}";
  runc = "pkg:golang/github.com/opencontainers/runc@v${runc-guest.version}";
  # Both programs are static: these are in them.
  libc = packageRef pkgsStatic.stdenv.cc.libc;
  libseccomp = packageRef pkgsStatic.libseccomp;
  rustStd = packageRef std.rust;
  goStd = packageRef std.go;
  std = {
    rust = {
      pname = "rust-std";
      inherit (rustc) version;
    };
    go = {
      pname = "go-std";
      inherit (go) version;
    };
  };
  component = type: package: {
    inherit type;
    bom-ref = packageRef package;
    purl = packageRef package;
    name = package.pname;
    inherit (package) version;
  };
  packageRef =
    package:
    "pkg:generic/${package.pname}@${builtins.replaceStrings [ "+" ] [ "%2B" ] package.version}";
  image = "pkg:generic/image-${hypervisor}@${vmm-task.version}";
  bom = {
    bomFormat = "CycloneDX";
    specVersion = "1.6";
    version = 1;
    metadata.component = {
      type = "container";
      bom-ref = image;
      name = "image-${hypervisor}";
      inherit (vmm-task) version;
    };
    components = [
      {
        type = "operating-system";
        bom-ref = linux;
        purl = linux;
        name = "linux";
        inherit (kernel) version;
      }
      {
        type = "application";
        bom-ref = runc;
        purl = runc;
        name = "runc";
        inherit (runc-guest) version;
      }
    ]
    ++ map (component "library") [
      pkgsStatic.stdenv.cc.libc
      pkgsStatic.libseccomp
      std.rust
      std.go
    ]
    ++ map (component "application") contents
    ++ map componentOf crates;
    dependencies = [
      {
        ref = image;
        dependsOn = [
          linux
          runc
          (crateRef (lib.head crates))
        ]
        ++ map packageRef contents;
      }
    ]
    ++ map (crate: {
      ref = crateRef crate;
      dependsOn =
        map crateRef crate.dependencies
        ++ lib.optionals (crate.name == vmm-task.pname) [
          libc
          rustStd
        ];
    }) crates;
  };
in
runCommand "sbom-${hypervisor}"
  {
    nativeBuildInputs = [ jq ];
    bom = builtins.toJSON bom;
    passAsFile = [ "bom" ];
    meta = {
      description = "What the guest image is made from, as CycloneDX: sbom.cdx.json";
      license = lib.licenses.asl20;
      platforms = lib.platforms.linux;
    };
  }
  ''
    mkdir "$out"
    # runc keeps its modules in its source, and names them there: "# github.com/x/y v1.2.3".
    sed -nE 's/^# ([^ ]+) (v[^ ]+)$/\1 \2/p' ${runc-guest.src}/vendor/modules.txt >modules
    jq -R 'split(" ") | "pkg:golang/\(.[0])@\(.[1] | gsub("\\+"; "%2B"))" as $ref
      | {type: "library", "bom-ref": $ref, purl: $ref, name: .[0], version: .[1]}' modules |
      jq -s --sort-keys --slurpfile bom "$bomPath" --arg runc ${lib.escapeShellArg runc} \
        --argjson linked ${
          lib.escapeShellArg (
            builtins.toJSON [
              libc
              libseccomp
              goStd
            ]
          )
        } '. as $modules | $bom[0]
        | .components += $modules
        | .dependencies += [{ref: $runc, dependsOn: ([$modules[].purl] + $linked)}, ($modules[] | {ref: .purl, dependsOn: []})]' \
        >"$out/sbom.cdx.json"
  ''
