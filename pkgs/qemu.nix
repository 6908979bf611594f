# nixpkgs' QEMU without windows, sound and the targets of other machines: a node has no screen, and every library is one more to patch.
{
  lib,
  qemu,
}:
qemu.override (
  # A release that does not know a word does without it.
  lib.intersectAttrs (lib.functionArgs qemu.override) {
    hostCpuOnly = true;
    alsaSupport = false;
    enableDocs = false;
    gtkSupport = false;
    jackSupport = false;
    openGLSupport = false;
    pipewireSupport = false;
    pulseSupport = false;
    rutabagaSupport = false;
    sdlSupport = false;
    smartcardSupport = false;
    spiceSupport = false;
    usbredirSupport = false;
    virglSupport = false;
    vncSupport = false;
  }
)
