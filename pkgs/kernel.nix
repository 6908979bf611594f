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
  # A line of a list is the name of a fragment or a comment.
  fragmentOf =
    line:
    let
      name = if builtins.isString line then builtins.match "[ \t]*([^# \t]+).*" line else null;
    in
    if name == null then [ ] else name;
  fragments =
    list: lib.concatMap fragmentOf (builtins.split "\n" (builtins.readFile (folder + "/${list}")));
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
        ++ lists
      )
      ++ map (name: lib.fileset.maybeMissing (folder + "/fragments/${name}.config")) (
        lib.concatMap fragments lists
      )
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
