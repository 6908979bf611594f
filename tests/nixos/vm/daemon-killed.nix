# A pod lives through a restart of the daemon, its death, and a daemon that hangs.
{
  nodes.machine = { };
  testScript = builtins.readFile ./pod.py + ''
    ready()
    pod, container = run_pod()
    machine.succeed("systemctl restart kuasar@qemu.service")
    goes_on(container)
    machine.succeed("systemctl kill --signal=KILL --kill-whom=main kuasar@qemu.service")
    machine.wait_for_unit("kuasar@qemu.service")
    goes_on(container)
    machine.succeed("systemctl kill --signal=STOP --kill-whom=main kuasar@qemu.service")
    machine.wait_until_succeeds("journalctl -u kuasar@qemu.service | grep -q \"Watchdog timeout\"", timeout=120)
    machine.wait_for_unit("kuasar@qemu.service")
    goes_on(container)
    remove(pod)
  '';
}
