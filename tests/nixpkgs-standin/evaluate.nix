# The derivations of every package and every check, by name, with the package set that is given. ./evaluate runs it.
{
  # A copy of this folder that ./prepare has made.
  standin,
  # nixpkgs' own library, or "": the stand-in's.
  lib ? "",
  # A whole nixpkgs, or "": the stand-in.
  tree ? "",
  system,
  # "x86_64-linux" builds for "aarch64-linux".
  isCross ? false,
  # Regular expressions of names that are left out.
  without ? [ ],
  # The only name that is looked at, or "".
  only ? "",
}:
let
  inputs = builtins.fromJSON (builtins.readFile (standin + "/inputs.json"));
  native =
    if tree != "" then
      import (/. + tree) {
        inherit system;
        overlays = [ (import ./evaluate-overlay.nix { tree = /. + tree; }) ];
      }
    else
      import (standin + "/packages.nix") {
        inherit inputs system;
        lib = import (if lib != "" then /. + lib else standin + "/lib.nix");
      };
  pkgs = if isCross then native.pkgsCross.aarch64-multiplatform else native;
  kuasar = import ../../pkgs { inherit pkgs; };

  isWanted =
    name:
    if only != "" then
      name == only
    else
      !builtins.any (pattern: builtins.match pattern name != null) without;
  wanted =
    set: builtins.intersectAttrs (names (builtins.filter isWanted (builtins.attrNames set))) set;
  names =
    list:
    builtins.listToAttrs (
      map (name: {
        inherit name;
        value = null;
      }) list
    );

  # nixpkgs' compiler wrappers look for headers and libraries in a "dev" output. With strictDeps those of `nativeBuildInputs` are
  # for the build machine's compiler, which is there only where it is asked for.
  isTold =
    package:
    !(package.strictDeps or false)
    || package ? buildCommand # compiles nothing
    || (package.depsBuildBuild or [ ]) != [ ]
    || !builtins.any (dep: dep ? dev) (package.nativeBuildInputs or [ ]);
  derivation =
    name: package:
    if !(isTold package) then
      throw "${name}: a library is in nativeBuildInputs, and no compiler of the build machine in depsBuildBuild"
    else if
      package ? meta.homepage && package ? meta.changelog
      || builtins.match "check-.*" package.name != null
    then
      package.drvPath
    else
      throw "${name}: meta has no homepage or no changelog";
  packages = wanted (names kuasar.names // builtins.intersectAttrs (names kuasar.names) kuasar);
in
{
  packages = builtins.mapAttrs derivation packages;
  checks = builtins.mapAttrs (_: check: check.drvPath) (wanted kuasar.checks);
  # Packages that no check is of.
  unchecked = builtins.filter (name: kuasar.${name}.tests == { }) (builtins.attrNames packages);
}
