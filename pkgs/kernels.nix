# The guest kernels: a name for every type and every hypervisor. A hypervisor that adds nothing shares the derivation of all.
{
  lib,
  callPackage,
  stdenv,
  hypervisors,
  linux,
}:
let
  folder = ../kernel-configs;
  cpu = stdenv.hostPlatform.parsed.cpu.name;
  # A line of a list is the name of a fragment or a comment.
  fragmentOf =
    line:
    let
      name = if builtins.isString line then builtins.match "[ \t]*([^# \t]+).*" line else null;
    in
    if name == null then [ ] else name;
  fragmentsOf =
    list: lib.concatMap fragmentOf (builtins.split "\n" (builtins.readFile (folder + "/${list}")));

  kernelOf =
    flavour: hypervisor:
    let
      lists = [
        "${flavour}-${cpu}.list"
      ]
      ++ lib.optional (hypervisor != null) "${hypervisor}-${cpu}.list";
    in
    callPackage ./kernel.nix {
      inherit
        flavour
        hypervisor
        linux
        lists
        ;
      fragments = lib.sort (a: b: a < b) (lib.unique (lib.concatMap fragmentsOf lists));
    };
  # One for all, with a name for each.
  mini = kernelOf "mini" null;
  micro = kernelOf "micro" null;
  named = hypervisor: {
    "kernel-${hypervisor}-micro" =
      # What there is no list of adds nothing.
      if builtins.pathExists (folder + "/${hypervisor}-${cpu}.list") then
        kernelOf "micro" hypervisor
      else
        micro;
    "kernel-${hypervisor}-mini" = mini;
  };
in
lib.foldl' (all: hypervisor: all // named hypervisor) { } hypervisors
