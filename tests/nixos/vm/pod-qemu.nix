# A pod starts, runs a container, answers exec, and leaves nothing.
{
  nodes.machine = { };
  testScript = builtins.readFile ./pod.py + ''
    ready()
    pod, container = run_pod()
    goes_on(container)
    assert "started" in machine.succeed("cat /var/log/pods/idle.log")
    remove(pod)
  '';
}
