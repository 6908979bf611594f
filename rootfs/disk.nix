# The same root as a read-only disk, fit for pmem with DAX and for virtio-blk.
{
  lib,
  kuasar-image,
  rootfs,
  runCommand,
  # More words for kuasar-image.
  arch ? "",
  # "ext4", "erofs" or "xfs".
  fs ? "ext4",
  # With a hash tree behind the file system; verity.toml is what the daemon has to know of it.
  verity ? false,
}:
runCommand "kuasar-disk"
  {
    nativeBuildInputs = [ kuasar-image ];
    passthru = { inherit fs verity rootfs; };
    meta = {
      description = "Root of the guest as a disk image with DAX header and ${fs}${lib.optionalString verity ", checked by dm-verity"}: kuasar.img";
      license = lib.licenses.asl20;
      platforms = lib.platforms.linux;
    };
  }
  ''
    mkdir "$out"
    kuasar-image build --rootfs ${rootfs} --output "$out/kuasar.img" --fs ${fs}${arch} ${lib.optionalString verity "--verity >verity"}
    ${lib.optionalString verity "(echo '[hypervisor.verity]' && cat verity) >\"$out/verity.toml\""}
  ''
