# The death of a VM ends its pod, and no other.
{
  nodes.machine = { };
  testScript = builtins.readFile ./pod.py + ''
    ready()
    pod, container = run_pod()
    machine.succeed("pkill -KILL qemu-system")
    machine.wait_until_succeeds(f"crictl inspectp {pod} | grep -q SANDBOX_NOTREADY", timeout=60)
    machine.succeed(f"crictl stopp {pod}", f"crictl rmp {pod}")
    pod, container = run_pod()
    goes_on(container)
    remove(pod)
  '';
}
