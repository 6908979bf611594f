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
    # Its size is memory of every guest: what a daemon does without, because it doubles the time of a build, is worth it here.
    env = {
      CARGO_PROFILE_RELEASE_LTO = "thin";
      CARGO_PROFILE_RELEASE_CODEGEN_UNITS = "1";
    };
    meta = {
      description = "PID 1 of the microVM: runs the containers of a pod (static)";
      license = lib.licenses.asl20;
      mainProgram = "vmm-task";
      platforms = lib.platforms.linux;
    };
  }
)
