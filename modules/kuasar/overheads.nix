# What a pod costs beside its containers, by hypervisor. docs/kubernetes.md has the arithmetic; pkgs/runtimeclass.nix says the same.
{
  qemu = {
    memory = "160Mi";
    cpu = "250m";
  };
}
