# The same with a configuration of version 3, beside the user's own runc.
{
  nodes.machine =
    { lib, ... }:
    {
      virtualisation.containerd.settings = {
        version = lib.mkForce 3;
        plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc = {
          runtime_type = "io.containerd.runc.v2";
          options.SystemdCgroup = true;
        };
      };
    };
  testScript = builtins.readFile ./pod.py + ''
    ready()
    command = machine.succeed("systemctl show --property ExecStart --value containerd.service")
    config = [word for word in command.split() if word.endswith(".toml")][0]
    dump = machine.succeed(f"containerd --config {config} config dump")
    assert "kuasar-qemu" in dump and "SystemdCgroup = true" in dump, dump
    pod, container = run_pod()
    goes_on(container)
    remove(pod)
  '';
}
