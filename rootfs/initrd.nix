# The same root as an initial RAM disk.
{
  lib,
  kuasar-image,
  rootfs,
  runCommand,
  stdenv,
  # "gzip" or "zstd".
  compress ? "gzip",
}:
let
  # It takes a root for the machine that it runs on, unless told.
  arch = lib.optionalString (
    stdenv.buildPlatform.system != stdenv.hostPlatform.system
  ) " --arch ${stdenv.hostPlatform.parsed.cpu.name}";
in
runCommand "kuasar-initrd"
  {
    nativeBuildInputs = [ kuasar-image ];
    passthru = { inherit compress; };
    meta = {
      description = "Root of the guest as an initrd (newc, ${compress}): kuasar.initrd";
      license = lib.licenses.asl20;
      platforms = lib.platforms.linux;
    };
  }
  ''
    mkdir "$out"
    kuasar-image initrd --rootfs ${rootfs} --output "$out/kuasar.initrd" --compress ${compress}${arch}
  ''
