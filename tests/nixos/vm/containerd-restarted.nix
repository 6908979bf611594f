# A pod lives through a restart of containerd.
{
  nodes.machine = { };
  testScript = builtins.readFile ./pod.py + ''
    ready()
    pod, container = run_pod()
    machine.succeed("systemctl restart containerd.service")
    machine.wait_until_succeeds("crictl info", timeout=60)
    goes_on(container)
    remove(pod)
  '';
}
