# The guest kernels: every type for every hypervisor. Mini is one derivation with a name for each.
{
  lib,
  callPackage,
  stdenv,
}:
let
  cpu = stdenv.hostPlatform.parsed.cpu.name;
  hypervisors = [
    "qemu"
    "cloud-hypervisor"
    "stratovirt"
  ];
  # A line of a list is the name of a fragment or a comment.
  fragmentOf =
    line:
    let
      name = if builtins.isString line then builtins.match "[ \t]*([^# \t]+).*" line else null;
    in
    if name == null then [ ] else name;
  fragmentsOf =
    list:
    lib.concatMap fragmentOf (
      builtins.split "\n" (builtins.readFile (../kernel-configs + "/${list}"))
    );

  kernelOf =
    flavour: hypervisor:
    let
      # Mini has what any of them wants; to micro each adds its own.
      lists = [ "${flavour}-${cpu}.list" ] ++ lib.optional (hypervisor != null) "${hypervisor}-${cpu}.list";
    in
    {
      inherit flavour hypervisor lists;
      fragments = lib.sort (a: b: a < b) (lib.unique (lib.concatMap fragmentsOf lists));
    };
  mini = callPackage ./kernel.nix (kernelOf "mini" null);
  named = hypervisor: {
    "kernel-${hypervisor}-micro" = callPackage ./kernel.nix (kernelOf "micro" hypervisor);
    "kernel-${hypervisor}-mini" = mini;
  };
in
builtins.foldl' (all: hypervisor: all // named hypervisor) { } hypervisors
