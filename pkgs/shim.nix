{
  lib,
  rustPlatform,
  stdenv,
  versionCheckHook,
  workspace,
}:
rustPlatform.buildRustPackage (
  workspace.package {
    crate = "containerd-shim-kuasar-vmm-v1";
    inherit stdenv versionCheckHook;
  }
  // {
    # There is one relay per pod: its pages count more than its speed.
    env = {
      CARGO_PROFILE_RELEASE_OPT_LEVEL = "z";
      CARGO_PROFILE_RELEASE_LTO = "fat";
      CARGO_PROFILE_RELEASE_CODEGEN_UNITS = "1";
    };
    versionCheckProgramArg = "-v";
    # nixpkgs' cargo keeps symbols, of which its own fixup removes debug sections only.
    stripAllList = [ "bin" ];
    meta = {
      description = "Relay between containerd's Task API and the microVM of one pod (static)";
      license = lib.licenses.asl20;
      mainProgram = "containerd-shim-kuasar-vmm-v1";
      platforms = lib.platforms.linux;
    };
  }
)
