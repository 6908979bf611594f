# Without /dev/kvm a pod is refused with a sentence, and pods of runc live.
{
  nodes.machine = { };
  testScript = builtins.readFile ./pod.py + ''
    machine.succeed("rm -f /dev/kvm")
    ready()
    said = machine.fail("crictl runp --runtime kuasar-qemu /etc/test/pod.json 2>&1")
    assert "kvm" in said, said
    pod = machine.succeed("crictl runp --runtime runc /etc/test/pod.json").strip()
    machine.succeed(f"crictl stopp {pod}", f"crictl rmp {pod}")
  '';
}
