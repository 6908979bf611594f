# The RuntimeClass of pods in QEMU's VMs, for `kubectl apply -f`. docs/kubernetes.md has the arithmetic of its overhead.
{ lib, runCommand }:
runCommand "runtimeclass.yaml"
  {
    text = ''
      apiVersion: node.k8s.io/v1
      kind: RuntimeClass
      metadata:
        name: kuasar-qemu
      handler: kuasar-qemu
      overhead:
        podFixed:
          # 64 MiB for the guest's kernel and agent, 72 for QEMU, virtiofsd and the relay, 24 for the files that they read.
          memory: 160Mi
          # A pod's VM boots, and every exec starts, in the pod's own CPU time.
          cpu: 250m
    '';
    passAsFile = [ "text" ];
    meta = {
      description = "RuntimeClass of pods in QEMU's VMs, with what a pod costs beside its containers";
      license = lib.licenses.asl20;
      platforms = lib.platforms.linux;
    };
  }
  ''
    cp "$textPath" "$out"
  ''
