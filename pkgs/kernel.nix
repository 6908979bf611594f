# A guest kernel by addition: allnoconfig plus the fragments that two lists name. See kernel-configs/README.md.
{
  lib,
  stdenv,
  bc,
  bison,
  elfutils,
  flex,
  linux_6_12,
  openssl,
  perl,
  zstd,
  hypervisor,
  flavour,
}:
let
  inherit (stdenv.hostPlatform.parsed) cpu;
  folder = ../kernel-configs;
  lists = [
    "${flavour}-${cpu.name}.list"
    "${hypervisor}-${cpu.name}.list"
  ];
  # Notes and tests of the fragments are left out: a change there must not build a kernel again.
  configs = lib.fileset.toSource {
    root = folder;
    fileset = lib.fileset.difference folder (
      lib.fileset.unions [
        (lib.fileset.maybeMissing (folder + "/README.md"))
        (lib.fileset.maybeMissing (folder + "/tests"))
      ]
    );
  };
in
stdenv.mkDerivation {
  pname = "kernel-${hypervisor}-${flavour}";
  inherit (linux_6_12) version src;

  strictDeps = true;
  nativeBuildInputs = [
    bc
    bison
    elfutils
    flex
    openssl
    perl
    zstd
  ];
  hardeningDisable = [ "all" ]; # the kernel sets its own flags
  enableParallelBuilding = true;

  postPatch = "patchShebangs scripts";
  configurePhase = ''
    runHook preConfigure
    sh ${configs}/configure -s "$PWD" -o "$NIX_BUILD_TOP/kernel" ${toString (map (list: "${configs}/${list}") lists)}
    runHook postConfigure
  '';
  buildPhase = ''
    runHook preBuild
    sh ${configs}/build -s "$PWD" -o "$NIX_BUILD_TOP/kernel" -j "$NIX_BUILD_CORES" -d "$NIX_BUILD_TOP/result"
    runHook postBuild
  '';
  installPhase = ''
    runHook preInstall
    mkdir -p "$out"
    cp "$NIX_BUILD_TOP"/result/{vmlinux,bzImage,config} "$out"
    runHook postInstall
  '';
  dontFixup = true; # nothing in it runs on the host

  passthru = { inherit lists; };
  meta = {
    description = "Guest kernel \"${flavour}\" for ${hypervisor}: vmlinux (entered by PVH), bzImage, config";
    license = lib.licenses.gpl2Only;
    platforms = lib.platforms.x86_64;
  };
}
