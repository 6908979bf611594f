# The guest's root with what a person needs at three in the morning: a shell for the debug console, and tools to look around with.
# Anything that is in the minimal root is here, too, and the same.
{
  lib,
  bash,
  busybox,
  iproute2,
  nukeReferences,
  rootfs,
  runCommand,
  strace,
}:
runCommand "kuasar-rootfs-debug"
  {
    allowedReferences = [ ];
    nativeBuildInputs = [ nukeReferences ];
    passthru = {
      shell = "/bin/bash";
      packages = [
        bash
        busybox
        iproute2
        strace
      ];
    };
    meta = {
      description = "Root file tree of the guest with a shell, iproute2, strace and busybox";
      license = [
        lib.licenses.asl20
        lib.licenses.gpl2Only
      ];
      platforms = lib.platforms.linux;
    };
  }
  ''
    cp -r ${rootfs} "$out"
    chmod -R u+w "$out"
    # A package that is not static brings its loader and its libraries in the folders where they look for them.
    for package in ${bash} ${iproute2} ${strace}; do
      for folder in bin sbin lib lib64; do
        if [ -d "$package/$folder" ]; then
          mkdir -p "$out/$folder"
          cp -rn "$package/$folder/." "$out/$folder/"
          chmod -R u+w "$out/$folder" # folders of a store may not be written to
        fi
      done
    done
    install -m 0755 ${lib.getExe busybox} "$out/bin/busybox"
    # What busybox can do goes by its name, unless the real program is there.
    for name in $("$out/bin/busybox" --list); do
      [ -e "$out/bin/$name" ] || [ -e "$out/sbin/$name" ] || ln -s busybox "$out/bin/$name"
    done
    rm -rf "$out"/lib/{pkgconfig,*.a,*.la}
    find "$out" -type f -exec nuke-refs {} +
  ''
