{
  lib,
  rustPlatform,
  stdenv,
  workspace,
}:
rustPlatform.buildRustPackage (
  workspace.package {
    crate = "vmm-sandboxer";
    inherit stdenv;
  }
  // {
    meta = {
      description = "containerd sandbox controller that runs every pod in a microVM";
      license = lib.licenses.asl20;
      mainProgram = "vmm-sandboxer";
      platforms = lib.platforms.linux;
    };
  }
)
