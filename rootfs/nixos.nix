# The guest's root with systemd as process 1 and the agent as its service: a NixOS system without its activation, laid out as files.
{
  lib,
  closureInfo,
  nixos,
  runCommand,
  runc-guest,
  vmm-task,
  # More modules: what is to run in the guest beside containers.
  modules ? [ ],
}:
let
  inherit
    (nixos {
      imports = [ ./nixos-profile.nix ] ++ modules;
      kuasar.agent = vmm-task;
    })
    config
    ;
  inherit (config.system.build) etc;
  inherit (config.systemd) package;

  # What NixOS' activation would write: the users and groups whose numbers are fixed.
  numbered =
    kind: number:
    lib.sort (a: b: a.${number} < b.${number}) (
      lib.filter (one: one.${number} != null) (lib.attrValues config.users.${kind})
    );
  gidOf = user: toString config.users.groups.${user.group}.gid;
  passwd = lib.concatMapStrings (
    user: "${user.name}:x:${toString user.uid}:${gidOf user}::${user.home}:/bin/false\n"
  ) (lib.filter (user: user.group != "" && gidOf user != "") (numbered "users" "uid"));
  group = lib.concatMapStrings (group: "${group.name}:x:${toString group.gid}:\n") (
    numbered "groups" "gid"
  );

  folders = [
    "bin"
    "dev"
    "etc"
    "mnt"
    "nix/store"
    "proc"
    "root"
    "run"
    "sbin"
    "sys"
    "tmp"
    "usr/bin"
    "var"
  ];
in
runCommand "kuasar-rootfs-nixos"
  {
    closure = closureInfo {
      rootPaths = [
        etc
        package
      ];
    };
    inherit passwd group;
    # The store that it names is its own.
    __structuredAttrs = true;
    unsafeDiscardReferences.out = true;
    passthru = { inherit config; };
    meta = {
      description = "Root file tree of the guest with NixOS' systemd as process 1 and vmm-task as its service";
      license = [
        lib.licenses.asl20
        lib.licenses.gpl2Only
      ];
      platforms = lib.platforms.linux;
    };
  }
  ''
    mkdir -p "$out"
    (cd "$out" && mkdir -p ${toString folders})
    xargs cp -a -t "$out/nix/store" <"$closure/store-paths"
    ln -s ${package}/lib/systemd/systemd "$out/sbin/init"
    ln -s sbin/init "$out/init"
    # The store has the agent already, for its unit.
    ln -s ${lib.getExe vmm-task} "$out/usr/bin/vmm-task"
    install -m 0755 ${lib.getExe runc-guest} "$out/bin/runc"
    cp -r --no-preserve=mode ${etc}/etc/. "$out/etc/"
    # Owner and mode of what is no link there; nothing in this root has one that matters.
    find "$out/etc" \( -name '*.mode' -o -name '*.uid' -o -name '*.gid' \) -delete
    printf %s "$passwd" >"$out/etc/passwd"
    printf %s "$group" >"$out/etc/group"
    # Empty: systemd makes one for each boot.
    : >"$out/etc/machine-id"
  ''
