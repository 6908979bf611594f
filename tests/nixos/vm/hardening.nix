# The daemon's unit keeps its score, with what a pod needs left in.
{
  nodes.machine = { };
  testScript = builtins.readFile ./pod.py + ''
    ready()
    machine.succeed("systemd-analyze security --threshold=70 --no-pager kuasar@qemu.service")
    pod, container = run_pod()
    goes_on(container)
    remove(pod)
  '';
}
