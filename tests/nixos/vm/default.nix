# The VM tests by name, for nixpkgs' `testers`. Each file is one behaviour: a module of NixOS' test framework, with what ./node.nix says of
# the machine and ./pod.py of what a script can do with it.
{
  lib,
  testers,
  kuasar,
}:
let
  files = lib.filterAttrs (
    name: _: lib.hasSuffix ".nix" name && name != "default.nix" && name != "node.nix"
  ) (builtins.readDir ./.);
  test =
    name: file:
    testers.runNixOSTest {
      inherit name;
      imports = [ file ];
      globalTimeout = 900;
      defaults = {
        imports = [ ./node.nix ];
        services.kuasar.packages = kuasar;
      };
    };
in
lib.mapAttrs' (
  file: _:
  let
    name = lib.removeSuffix ".nix" file;
  in
  lib.nameValuePair "vm-${name}" (test "kuasar-${name}" (./. + "/${file}"))
) files
