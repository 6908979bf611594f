{
  lib,
  cryptsetup,
  e2fsprogs,
  makeBinaryWrapper,
  rustPlatform,
  stdenv,
  versionCheckHook,
  workspace,
  xfsprogs,
  zstd,
}:
let
  # What it runs to make and to check what it does not write itself; what the user has comes first.
  tools = lib.makeBinPath [
    cryptsetup
    e2fsprogs
    xfsprogs
    zstd
  ];
in
rustPlatform.buildRustPackage (
  workspace.package {
    crate = "kuasar-image";
    inherit stdenv versionCheckHook;
  }
  // {
    nativeBuildInputs = [ makeBinaryWrapper ];
    postFixup = ''
      wrapProgram "$out/bin/kuasar-image" --suffix PATH : ${tools}
    '';
    meta = {
      description = "Builds, inspects and verifies guest images: initrd, disk image, DAX header";
      license = lib.licenses.asl20;
      mainProgram = "kuasar-image";
      platforms = lib.platforms.linux;
    };
  }
)
