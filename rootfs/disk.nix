# The same root as a read-only disk, fit for pmem with DAX and for virtio-blk.
{
  lib,
  e2fsprogs,
  kuasar-image,
  rootfs,
  runCommand,
}:
runCommand "kuasar-disk"
  {
    nativeBuildInputs = [
      e2fsprogs
      kuasar-image
    ];
    meta = {
      description = "Root of the guest as a disk image with DAX header and ext4: kuasar.img";
      license = lib.licenses.asl20;
      platforms = lib.platforms.linux;
    };
  }
  ''
    mkdir "$out"
    kuasar-image build --rootfs ${rootfs} --output "$out/kuasar.img" --fs ext4
  ''
