# The guest kernels: every type for every hypervisor. Names whose fragments come out equal are one derivation, called after
# the first of the hypervisors.
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
  flavours = [
    "micro"
    "mini"
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
      lists = [
        "${flavour}-${cpu}.list"
        "${hypervisor}-${cpu}.list"
      ];
    in
    {
      inherit flavour hypervisor lists;
      fragments = lib.sort (a: b: a < b) (lib.unique (lib.concatMap fragmentsOf lists));
    };
  named =
    flavour: hypervisor:
    let
      kernel = kernelOf flavour hypervisor;
      same = lib.filter (other: other.fragments == kernel.fragments) (map (kernelOf flavour) hypervisors);
    in
    {
      name = "kernel-${hypervisor}-${flavour}";
      value = callPackage ./kernel.nix (lib.head same);
    };
in
lib.listToAttrs (lib.concatMap (flavour: map (named flavour) hypervisors) flavours)
