# What a hypervisor needs to start a pod, in one folder: with a configuration for the daemon where it drives that hypervisor.
# Variants differ in kernel, disk and initrd.
{
  lib,
  stdenv,
  jq,
  runCommand,
  containerd-shim-kuasar-vmm-v1,
  qemu,
  vhost-device-vsock,
  virtiofsd,
  vmm-task,
  runc-guest,
  hypervisor,
  kernel,
  initrd,
  disk,
  sbom,
  # What a variant adds to the name, like "-erofs".
  suffix ? "",
  # "kvm" or "tcg"; "vhost" (the host's kernel module) or "vhost-user" (a process of its own).
  accel,
  vsock,
}:
let
  inherit (stdenv.hostPlatform) isx86_64;
  cpu = stdenv.hostPlatform.parsed.cpu.name;
  isDriven = hypervisor == "qemu";
  # What the hypervisor enters comes first.
  kernels =
    if !isx86_64 then
      [ "Image" ]
    else
      [
        (if hypervisor == "stratovirt" then "vmlinux.bin" else "vmlinux")
        "bzImage"
      ];
  parts =
    kernels
    ++ [
      "kernel.config"
      "kuasar.img"
      "kuasar.initrd"
      "sbom.cdx.json"
    ]
    ++ lib.optional isDriven "config.toml"
    # What of it the daemon's configuration would have.
    ++ lib.optional (!isDriven && disk.verity) "verity.toml";
  # QEMU has no virtio-pmem for aarch64, and a root that is checked block by block has no DAX.
  root = if isx86_64 && !disk.verity then "pmem" else "blk";
  # Relative paths are relative to the file itself: the folder can be moved as a whole.
  config = ''
    [sandbox]
    hypervisor = "qemu"
    log_level = "info"
    relay_path = "${lib.getExe containerd-shim-kuasar-vmm-v1}"

    [hypervisor]
    path = "${lib.getExe' qemu "qemu-system-${cpu}"}"
    accel = "${accel}"
    machine_type = "${if isx86_64 then "q35" else "virt"}"
    vcpus = 1
    kernel_path = "${lib.head kernels}"
    image_path = "kuasar.img"
    initrd_path = "kuasar.initrd"
    ${
      lib.optionalString (
        disk.rootfs ? shell
      ) "kernel_params = \"task.debug_shell=${disk.rootfs.shell}\"\n"
    }root = "${root}"
    share_fs = "virtiofs"
    vsock = "${vsock}"

    [hypervisor.virtiofsd]
    path = "${lib.getExe virtiofsd}"

    [hypervisor.vsock_device]
    path = "${lib.getExe' vhost-device-vsock "vhost-device-vsock"}"
  '';

  # Name, version and hash of a source, without a reference that would drag the source itself along.
  source = src: {
    name = builtins.unsafeDiscardStringContext (src.name or (baseNameOf "${src}"));
    hash = src.outputHash or null;
  };
  kernelAbout = {
    inherit (kernel) version;
    sources = [ (source kernel.src) ];
    config = kernel.lists;
  };
  rootAbout = {
    inherit (vmm-task) version;
    sources = [
      {
        name = vmm-task.pname;
        inherit (vmm-task) version;
      }
      (source runc-guest.src // { inherit (runc-guest) version; })
    ];
  };
  about = lib.genAttrs (kernels ++ [ "kernel.config" ]) (_: kernelAbout) // {
    "kuasar.img" = rootAbout // {
      config = { inherit (disk) fs verity; };
    };
    "verity.toml" = rootAbout;
    "kuasar.initrd" = rootAbout // {
      config.format = "newc, ${initrd.compress}";
    };
    "sbom.cdx.json" = {
      inherit (vmm-task) version;
      sources = [ ];
      config.format = "CycloneDX 1.6";
    };
    "config.toml" = {
      inherit (vmm-task) version;
      sources = [ ];
      config = { inherit accel vsock; };
    };
  };
  pname = "image-${hypervisor}${suffix}";
  image =
    runCommand pname
      {
        inherit pname;
        inherit (vmm-task) version;
        nativeBuildInputs = [ jq ];
        about = builtins.toJSON about;
        config = lib.optionalString isDriven config;
        passthru = {
          inherit
            accel
            disk
            hypervisor
            kernel
            kernels
            vsock
            ;
          architecture = cpu;
          # What of config.toml an image decides, for those who write a configuration of their own.
          settings = lib.optionalAttrs isDriven {
            hypervisor = {
              inherit accel root vsock;
              machine_type = if isx86_64 then "q35" else "virt";
              kernel_path = "${image}/${lib.head kernels}";
              image_path = "${image}/kuasar.img";
              initrd_path = "${image}/kuasar.initrd";
              kernel_params = lib.optionalString (disk.rootfs ? shell) "task.debug_shell=${disk.rootfs.shell}";
              virtiofsd.path = lib.getExe virtiofsd;
              vsock_device.path = lib.getExe' vhost-device-vsock "vhost-device-vsock";
            };
          };
        };
        passAsFile = [
          "config"
          "about"
        ];
        meta = {
          description = "Everything for pods in ${hypervisor}: kernel, disk (${disk.fs}${lib.optionalString disk.verity ", dm-verity"}), initrd, ${lib.optionalString isDriven "config.toml, "}manifest.json";
          license = [
            lib.licenses.asl20
            lib.licenses.gpl2Only
          ];
          platforms = lib.platforms.linux;
        };
      }
      ''
        mkdir "$out"
        cd "$out"
        cp ${
          lib.concatMapStringsSep " " (name: "${kernel}/${name}") kernels
        } ${disk}/kuasar.img ${initrd}/kuasar.initrd .
        cp ${kernel}/config kernel.config
        cp ${sbom}/sbom.cdx.json .
        ${
          if isDriven then
            ''
              cp "$configPath" config.toml
              ${lib.optionalString disk.verity "(echo && cat ${disk}/verity.toml) >>config.toml"}
            ''
          else
            lib.optionalString disk.verity "cp ${disk}/verity.toml ."
        }
        for part in ${toString parts}; do
          sum=$(sha256sum <"$part")
          jq -n --slurpfile about "$aboutPath" --arg part "$part" --arg sha256 "''${sum%% *}" --argjson size "$(stat -Lc %s "$part")" \
            '{($part): ({$sha256, $size} + $about[0][$part])}'
        done | jq -s '{parts: add}' >"$NIX_BUILD_TOP/parts"
        # The guest's root, file by file: "path<tab>kind<tab>mode<tab>size<tab>target".
        (
          cd ${disk.rootfs}
          find . -mindepth 1 -printf '%P\t%y\t%m\t%s\t%l\n' | LC_ALL=C sort | while IFS= read -r line; do
            sum=
            if [ -f "''${line%%$'\t'*}" ] && [ ! -L "''${line%%$'\t'*}" ]; then sum=$(sha256sum <"''${line%%$'\t'*}"); fi
            printf '%s\t%s\n' "$line" "''${sum%% *}"
          done
        ) | jq -R 'split("\t") | {path: ("/" + .[0]), mode: .[2]} + {
            f: {kind: "file", size: (.[3] | tonumber), sha256: .[5]},
            d: {kind: "folder"},
            l: {kind: "link", target: .[4]}
          }[.[1]]' | jq -s --sort-keys --slurpfile parts "$NIX_BUILD_TOP/parts" '{root: .} + $parts[0]' >manifest.json
      '';
in
image
