# k3s with the runtime that it gets without hands, and a pod that asks for it.
{
  nodes.machine =
    { config, ... }:
    {
      services.k3s = {
        enable = true;
        # Nothing can be pulled in a test.
        images = [
          (config.services.k3s.package.airgap-images or config.services.k3s.package.airgapImages)
        ];
      };
      virtualisation.memorySize = 6144;
    };
  testScript = ''
    machine.wait_for_unit("kuasar@qemu.service")
    machine.wait_for_unit("k3s.service")
    machine.wait_until_succeeds("k3s kubectl get runtimeclass kuasar-qemu", timeout=300)
    overhead = machine.succeed("k3s kubectl get runtimeclass kuasar-qemu -o jsonpath='{.overhead.podFixed.memory}'")
    assert overhead.endswith("Mi"), overhead
    machine.succeed("k3s ctr images import /etc/test/image.tar")
    machine.wait_until_succeeds("k3s kubectl get serviceaccount default", timeout=120)
    machine.succeed(
        "k3s kubectl run pod --image=docker.io/library/busybox:test --image-pull-policy=Never "
        "--overrides='{\"spec\": {\"runtimeClassName\": \"kuasar-qemu\"}}' -- sleep 100000"
    )
    machine.wait_until_succeeds("k3s kubectl get pod pod | grep -q Running", timeout=300)
    kernel = machine.succeed("k3s kubectl exec pod -- uname -v")
    assert kernel.strip() != machine.succeed("uname -v").strip(), kernel
    machine.succeed("k3s kubectl delete pod pod --grace-period=5")
  '';
}
