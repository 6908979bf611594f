{
  lib,
  rustPlatform,
  stdenv,
  workspace,
}:
rustPlatform.buildRustPackage (
  workspace.package {
    crate = "vmm-task";
    inherit stdenv;
  }
  // {
    meta = {
      description = "PID 1 of the microVM: runs the containers of a pod (static)";
      license = lib.licenses.asl20;
      mainProgram = "vmm-task";
      platforms = lib.platforms.linux;
    };
  }
)
