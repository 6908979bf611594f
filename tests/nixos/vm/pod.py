def ready():
    machine.wait_for_unit("kuasar@qemu.service")
    machine.wait_for_unit("containerd.service")
    machine.wait_until_succeeds("crictl info", timeout=60)
    machine.succeed("ctr --namespace k8s.io images import /etc/test/image.tar")


def run_pod(handler="kuasar-qemu"):
    """A pod with one container that waits. Gives the names of both."""
    pod = machine.succeed(f"crictl runp --runtime {handler} /etc/test/pod.json").strip()
    container = machine.succeed(f"crictl create {pod} /etc/test/container.json /etc/test/pod.json").strip()
    machine.succeed(f"crictl start {container}")
    return pod, container


def goes_on(container):
    """A process in the container answers, from a kernel that is not the machine's."""
    kernel = machine.wait_until_succeeds(f"crictl exec --sync {container} uname -v", timeout=60)
    assert kernel.strip() != machine.succeed("uname -v").strip(), kernel


def remove(pod):
    machine.succeed(f"crictl stopp {pod}", f"crictl rmp {pod}")
    # (Without -f, which would find the shell that asks.)
    machine.fail("pgrep qemu-system")
    machine.fail("ls /run/kuasar/qemu | grep -E '^[0-9a-f]{64}$'")
