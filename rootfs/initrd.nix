# The same root as an initial RAM disk.
{
  lib,
  kuasar-image,
  rootfs,
  runCommand,
  # More words for kuasar-image.
  arch ? "",
  # "gzip" or "zstd".
  compress ? "gzip",
}:
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
