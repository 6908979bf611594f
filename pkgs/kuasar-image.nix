{
  lib,
  rustPlatform,
  stdenv,
  workspace,
}:
rustPlatform.buildRustPackage (
  workspace.package {
    crate = "kuasar-image";
    inherit stdenv;
  }
  // {
    meta = {
      description = "Builds, inspects and verifies guest images: initrd, disk image, DAX header";
      license = lib.licenses.asl20;
      mainProgram = "kuasar-image";
      platforms = lib.platforms.linux;
    };
  }
)
