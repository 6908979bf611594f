{
  lib,
  rustPlatform,
  stdenv,
  versionCheckHook,
  workspace,
}:
rustPlatform.buildRustPackage (
  workspace.package {
    crate = "vmm-sandboxer";
    inherit stdenv versionCheckHook;
  }
  // {
    postInstall = ''
      mkdir -p "$out/lib/systemd/system"
      sed "s|/usr/bin/vmm-sandboxer|$out/bin/vmm-sandboxer|" rust/sandboxer/systemd/kuasar@.service \
        >"$out/lib/systemd/system/kuasar@.service"
    '';
    meta = {
      description = "containerd sandbox controller that runs every pod in a microVM";
      license = lib.licenses.asl20;
      mainProgram = "vmm-sandboxer";
      platforms = lib.platforms.linux;
    };
  }
)
