# The same by emulation.
{
  nodes.machine = {
    services.kuasar.runtimes.qemu.settings.hypervisor.accel = "tcg";
  };
  testScript = builtins.readFile ./pod.py + ''
    ready()
    pod, container = run_pod()
    goes_on(container)
    remove(pod)
  '';
}
