{
  lib,
  rustPlatform,
  stdenv,
  versionCheckHook,
  workspace,
}:
rustPlatform.buildRustPackage (
  workspace.package {
    crate = "vmm-task";
    inherit stdenv versionCheckHook;
  }
  // {
    # Its size is memory of every guest: what a daemon does without, because it doubles the time of a build, is worth it here.
    env = {
      CARGO_PROFILE_RELEASE_LTO = "thin";
      CARGO_PROFILE_RELEASE_CODEGEN_UNITS = "1";
    };
    # For roots whose process 1 is systemd. Its paths are the guest's.
    postInstall = ''
      install -D -m 0644 rust/task/systemd/vmm-task.service "$out/lib/systemd/system/vmm-task.service"
    '';
    # nixpkgs' cargo keeps symbols, of which its own fixup removes debug sections only.
    stripAllList = [ "bin" ];
    meta = {
      description = "PID 1 of the microVM: runs the containers of a pod (static)";
      license = lib.licenses.asl20;
      mainProgram = "vmm-task";
      platforms = lib.platforms.linux;
    };
  }
)
