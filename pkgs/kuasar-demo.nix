{
  lib,
  rustPlatform,
  stdenv,
  workspace,
}:
rustPlatform.buildRustPackage (
  workspace.package {
    crate = "kuasar-e2e";
    inherit stdenv;
  }
  // {
    pname = "kuasar-demo";
    meta = {
      description = "Runs one container of an OCI image in a microVM pod, over CRI, and shows what came of it";
      license = lib.licenses.asl20;
      mainProgram = "kuasar-demo";
      platforms = lib.platforms.linux;
    };
  }
)
