# What a descendant of nixpkgs may lack, or may have in a way that does not evaluate, for ./evaluate. Where the tree has it, the tree's
# is taken.
{ tree }:
final: prev:
let
  inherit (prev) lib;
  llvm = tree + "/pkgs-many/llvm";
  # corepkgs makes LLVM's scope out of a package of it, which recurses where the package set is a cross one. As nixpkgs makes it:
  scope =
    name: variant:
    lib.recurseIntoAttrs (
      final.callPackage (llvm + "/common") (
        {
          inherit (final.stdenvAdapters) overrideCC;
          patchesFn = lib.id;
          bootBintools = final.bintools;
          bootBintoolsNoLibc = final.bintoolsNoLibc;
          otherSplices = final.generateSplicesForMkScope name;
        }
        // variant
      )
    );
  variants = import (llvm + "/variants.nix");
in
lib.optionalAttrs (!prev ? linux_6_12) { linux_6_12 = final.linux; }
# Only its name is in what we make.
// lib.optionalAttrs (!prev ? vhost-device-vsock) {
  vhost-device-vsock = final.runCommand "vhost-device-vsock-0" { } "mkdir $out";
}
// lib.optionalAttrs (builtins.pathExists llvm) {
  llvmPackages_21 = scope "llvmPackages_21" variants.v21;
  llvmPackages = final.llvmPackages_21;
}
