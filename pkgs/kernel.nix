# A guest kernel by addition: allnoconfig plus the fragments that two lists name. See kernel-configs/README.md.
{
  lib,
  stdenv,
  buildPackages,
  bc,
  bison,
  elfutils,
  flex,
  openssl,
  perl,
  xz,
  zstd,
  # Whose version and sources.
  linux,
  # Null: the kernel serves any.
  hypervisor,
  flavour,
  lists,
  fragments,
}:
let
  inherit (stdenv.hostPlatform) isx86_64 linuxArch;
  folder = ../kernel-configs;
  arch = lib.optionalString (!isx86_64) "-a ${linuxArch} ";
  # An Image is entered as it is, like x86's vmlinux.bin; there is nothing packed beside it.
  images =
    if isx86_64 then
      [
        "vmlinux"
        "vmlinux.bin"
        "bzImage"
      ]
    else
      [ "Image" ];
  results = "{${lib.concatStringsSep "," (images ++ [ "config" ])}}";
  # Only what these lists name: a change to another kernel's fragment must not build this one again. A fragment that is not
  # there is for `configure` to tell.
  configs = lib.fileset.toSource {
    root = folder;
    fileset = lib.fileset.unions (
      map (name: folder + "/${name}") (
        [
          "configure"
          "build"
          "explain.awk"
          "missing.awk"
          "requests.awk"
        ]
        ++ lib.optional isx86_64 "flat"
        ++ lists
      )
      ++ map (name: lib.fileset.maybeMissing (folder + "/fragments/${name}.config")) fragments
    );
  };
in
stdenv.mkDerivation (
  {
    pname = "kernel-${lib.optionalString (hypervisor != null) "${hypervisor}-"}${flavour}";
    inherit (linux) version src;
    patches = [ ../kernel-configs/patches/fuse-submounts-check-acls.patch ];

    strictDeps = true;
    # Programs of the build (objtool) are linked with libraries of `nativeBuildInputs`, whose headers this compiler alone is told of.
    depsBuildBuild = [ buildPackages.stdenv.cc ];
    nativeBuildInputs = [
      bc
      bison
      elfutils
      flex
      openssl
      perl
      xz
      zstd
    ];
    hardeningDisable = [ "all" ]; # the kernel sets its own flags
    enableParallelBuilding = true;

    postPatch = "patchShebangs scripts";
    configurePhase = ''
      runHook preConfigure
      sh ${configs}/configure -s "$PWD" -o "$NIX_BUILD_TOP/kernel" ${arch}${
        toString (map (list: "${configs}/${list}") lists)
      }
      runHook postConfigure
    '';
    buildPhase = ''
      runHook preBuild
      sh ${configs}/build -s "$PWD" -o "$NIX_BUILD_TOP/kernel" ${arch}-j "$NIX_BUILD_CORES" -d "$NIX_BUILD_TOP/result"
      runHook postBuild
    '';
    installPhase = ''
      runHook preInstall
      mkdir -p "$out"
      cp "$NIX_BUILD_TOP"/result/${results} "$out"
      runHook postInstall
    '';
    dontFixup = true; # nothing in it runs on the host

    passthru = {
      inherit
        flavour
        fragments
        images
        lists
        ;
    };
    meta = {
      description = "Guest kernel \"${flavour}\" for ${
        if hypervisor == null then "any hypervisor" else hypervisor
      }: ${
        if isx86_64 then
          "vmlinux (entered by PVH), vmlinux.bin (entered as it lies in memory), bzImage"
        else
          "Image"
      }, config";
      license = lib.licenses.gpl2Only;
      platforms = lib.platforms.linux;
    };
  }
  // lib.optionalAttrs (stdenv.buildPlatform.system != stdenv.hostPlatform.system) {
    env.CROSS_COMPILE = stdenv.cc.targetPrefix;
  }
)
