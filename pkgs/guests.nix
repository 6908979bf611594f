# Kernels of a hypervisor, and roots, by name, for the test that boots each with each (rust/sandboxer/tests/guests).
{
  lib,
  kuasar-image,
  runCommandCC,
  # More words for kuasar-image.
  arch ? "",
  hypervisor,
  # Name to package.
  kernels,
  disks,
  initrds,
}:
let
  link = folder: name: package: ''
    mkdir -p "$out/${folder}/${name}"
    ln -s ${package}/* "$out/${folder}/${name}"
  '';
  links = folder: packages: lib.concatStrings (lib.mapAttrsToList (link folder) packages);
in
runCommandCC "guests-${hypervisor}"
  {
    nativeBuildInputs = [ kuasar-image ];
    meta = {
      description = "Every kernel and every kind of root for ${hypervisor}, and a root with an empty init: what docs/guest-matrix.md compares";
      license = [
        lib.licenses.asl20
        lib.licenses.gpl2Only
      ];
      platforms = lib.platforms.linux;
    };
  }
  ''
    mkdir -p floor/{dev,proc,sys,sbin} "$out/roots/floor"
    $CC -O2 -static -nostdlib -ffreestanding -fno-stack-protector -s -o floor/sbin/init ${../tests/bench/empty-init.c}
    kuasar-image build --rootfs floor --output "$out/roots/floor/kuasar.img" --fs ext4${arch}
    ${links "kernels" kernels}
    ${links "roots" disks}
    ${links "roots" initrds}
  ''
