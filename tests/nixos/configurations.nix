# `services.kuasar` with good and bad configurations, by the module system alone: units, containerd's settings, the daemon's file,
# RuntimeClasses, kernel modules, and the text of what is refused. A result that is not as expected does not evaluate.
{
  lib,
  pkgs,
  runCommand,
  kuasar,
}:
let
  evaluate = evaluateWith pkgs;
  evaluateWith =
    pkgs: module:
    (lib.evalModules {
      modules = [
        ../../modules/kuasar.nix
        ./options.nix
        {
          services.kuasar.packages = kuasar;
          boot.kernelModules = [ "kvm-intel" ];
        }
        module
      ];
      specialArgs = { inherit pkgs; };
    }).config;
  with' =
    more:
    evaluate {
      imports = [
        { services.kuasar.enable = true; }
        more
      ];
    };
  messages = config: map (one: one.message) (lib.filter (one: !one.assertion) config.assertions);

  # Compared one by one, so that the first difference is told with its name.
  same =
    name: found: wanted:
    if found == wanted then
      [ name ]
    else
      throw "${name}: found ${builtins.toJSON found}, expected ${builtins.toJSON wanted}";
  refused =
    name: module: message:
    same name (messages (with' module)) [ message ];
  fails =
    name: value:
    if (builtins.tryEval (builtins.deepSeq value value)).success then
      throw "${name} is taken"
    else
      [ name ];

  off = evaluate { };
  plain = with' { };
  unit = plain.systemd.services."kuasar@qemu";
  containerd = plain.virtualisation.containerd.settings;
  runtime = {
    runtime_type = "io.containerd.kuasar-vmm.v1";
    sandboxer = "kuasar-qemu";
    io_type = "fifo";
    privileged_without_host_devices = true;
  };
  ofVersion =
    version:
    (with' {
      virtualisation.containerd.settings = {
        inherit version;
        plugins.${if version == 2 then "io.containerd.grpc.v1.cri" else "io.containerd.cri.v1.runtime"} = {
          containerd.runtimes.runc.options.SystemdCgroup = true;
        };
      };
    }).virtualisation.containerd.settings;
  v2 = ofVersion 2;
  v3 = ofVersion 3;
  v4 = ofVersion 4;
  two = with' {
    services.kuasar.runtimes = {
      qemu = { };
      large = {
        hypervisor = "qemu";
        settings.hypervisor = {
          memory_in_mb = 2048;
          allowed_annotations = [ "io.kuasar.vm.vcpus" ];
        };
        runtimeClass.nodeSelector.size = "large";
      };
      gone.enable = false;
    };
  };
  k3s = with' { services.k3s.enable = true; };
  agent = with' {
    services.k3s = {
      enable = true;
      role = "agent";
    };
  };
  external = with' {
    services.k3s = {
      enable = true;
      extraFlags = "--container-runtime-endpoint unix:///run/containerd/containerd.sock";
    };
  };
  kubernetes = with' {
    services.kubernetes = {
      kubelet.enable = true;
      addonManager.enable = true;
    };
  };
  folder = "/var/lib/rancher/k3s/agent/etc/containerd";

  good = lib.concatLists [
    (same "off: no unit" off.systemd.services { })
    (same "off: no containerd" off.virtualisation.containerd.enable false)
    (same "plain: nothing is refused" (messages plain) [ ])
    (same "plain: no warning" plain.warnings [ ])
    (same "plain: containerd runs" plain.virtualisation.containerd.enable true)
    (same "plain: proxy plugin" containerd.proxy_plugins.kuasar-qemu {
      type = "sandbox";
      address = "/run/kuasar/qemu.sock";
    })
    (same "plain: runtime" containerd.plugins {
      "io.containerd.grpc.v1.cri".containerd.runtimes.kuasar-qemu = runtime;
    })
    (same "plain: unit's order" unit.before [ "containerd.service" ])
    (same "plain: unit is wanted" unit.wantedBy [ "containerd.service" ])
    (same "plain: unit is a drop-in" unit.overrideStrategy "asDropin")
    (same "plain: unit is restarted in one step" unit.stopIfChanged false)
    (same "plain: unit's command" unit.serviceConfig.ExecStart [
      ""
      "${lib.getExe kuasar.vmm-sandboxer} --config /etc/kuasar/qemu.toml --dir /run/kuasar/qemu --listen /run/kuasar/qemu.sock"
    ])
    (same "plain: the relay is in containerd's path" plain.systemd.services.containerd.path [
      kuasar.containerd-shim-kuasar-vmm-v1
    ])
    (same "plain: the package's unit" plain.systemd.packages [ kuasar.vmm-sandboxer ])
    (same "plain: modules" (lib.elem "vhost_net" plain.boot.kernelModules) true)
    (same "plain: the daemon's file" plain.environment.etc."kuasar/qemu.toml".source
      plain.services.kuasar.runtimes.qemu.configFile
    )
    (same "plain: settings"
      {
        inherit (plain.services.kuasar.runtimes.qemu.settings) sandbox;
        inherit (plain.services.kuasar.runtimes.qemu.settings.hypervisor)
          memory_in_mb
          kernel_path
          root
          vcpus
          ;
      }
      {
        sandbox = {
          hypervisor = "qemu";
          log_level = "info";
          relay_path = lib.getExe kuasar.containerd-shim-kuasar-vmm-v1;
          containerd_address = "/run/containerd/containerd.sock";
        };
        memory_in_mb = 512;
        kernel_path = "${kuasar.image-qemu}/${lib.head kuasar.image-qemu.kernels}";
        root = if pkgs.stdenv.hostPlatform.isAarch64 then "blk" else "pmem";
        vcpus = 1;
      }
    )
    (same "version 2: the user's runc is kept" v2.plugins {
      "io.containerd.grpc.v1.cri".containerd.runtimes = {
        runc.options.SystemdCgroup = true;
        kuasar-qemu = runtime;
      };
    })
    (same "version 3: in its table, with CNI" v3.plugins {
      "io.containerd.cri.v1.runtime" = {
        containerd.runtimes = {
          runc.options.SystemdCgroup = true;
          kuasar-qemu = runtime;
        };
        cni.bin_dirs = [ "${pkgs.cni-plugins}/bin" ];
      };
    })
    (same "version 4: as version 3" v4.plugins v3.plugins)
    (same "two: units" (lib.attrNames two.systemd.services) [
      "containerd"
      "kuasar@large"
      "kuasar@qemu"
    ])
    (same "two: handlers" (lib.attrNames two.virtualisation.containerd.settings.proxy_plugins) [
      "kuasar-large"
      "kuasar-qemu"
    ])
    (same "two: a variant's memory" two.services.kuasar.runtimes.large.settings.hypervisor.memory_in_mb
      2048
    )
    (same "two: RuntimeClasses"
      (map (text: (builtins.fromJSON text).metadata.name) (
        lib.filter (text: builtins.isString text && text != "" && text != "\n") (
          builtins.split "---\n" two.services.kuasar.runtimeClasses.manifest.text
        )
      ))
      [
        "kuasar-large"
        "kuasar-qemu"
      ]
    )
    (same "k3s: its containerd" k3s.services.kuasar.runtimes.qemu.settings.sandbox.containerd_address
      "/run/k3s/containerd/containerd.sock"
    )
    (same "k3s: not NixOS' containerd" k3s.virtualisation.containerd.enable false)
    (same "k3s: files of both versions" (lib.attrNames k3s.systemd.tmpfiles.settings."10-kuasar") [
      "${folder}/config-v3.toml.d/kuasar.toml"
      "${folder}/config.toml.d/kuasar.toml"
    ])
    (same "k3s: order" k3s.systemd.services."kuasar@qemu".before [ "k3s.service" ])
    (same "k3s: a server deploys the classes" (lib.attrNames k3s.services.k3s.manifests) [
      "kuasar-runtimeclasses"
    ])
    (same "k3s: an agent does not" agent.services.k3s.manifests { })
    (same "k3s: with another containerd" external.virtualisation.containerd.enable true)
    (same "Kubernetes: addons" ((lib.head (
      lib.attrValues kubernetes.services.kubernetes.addonManager.bootstrapAddons
    )).overhead.podFixed
    ) plain.services.kuasar.runtimes.qemu.runtimeClass.overhead)
    (same "tcg and vhost-user want less of the kernel" (lib.elem "vhost_vsock"
      (with' { services.kuasar.runtimes.qemu.settings.hypervisor.vsock = "vhost-user"; })
      .boot.kernelModules
    ) false)
    (same "vhost wants its module" (lib.elem "vhost_vsock"
      (with' { services.kuasar.runtimes.qemu.settings.hypervisor.vsock = "vhost"; }).boot.kernelModules
    ) true)
    (same "no hardening" ((with' { services.kuasar.hardening = false; })
      .systemd.services."kuasar@qemu".serviceConfig.SystemCallFilter
    ) "")
    (same "the overhead is that of the RuntimeClass for those who deploy it themselves"
      (lib.hasInfix "memory: ${(import ../../modules/kuasar/overheads.nix).qemu.memory}\n" kuasar.runtimeclass.text)
      true
    )
    (same "another key of the daemon" ((with' {
      services.kuasar.runtimes.qemu.settings.sandbox.stop_timeout_s = 20;
    }).services.kuasar.runtimes.qemu.settings.sandbox.stop_timeout_s
    ) 20)
  ];

  bad = lib.concatLists [
    (refused "no runtime" {
      services.kuasar.runtimes.qemu.enable = false;
    } "services.kuasar.enable is set but no runtime is: set services.kuasar.runtimes.qemu = { }.")
    (refused "one handler twice"
      {
        services.kuasar.runtimes = {
          qemu = { };
          other = {
            hypervisor = "qemu";
            handler = "kuasar-qemu";
          };
        };
      }
      "services.kuasar.runtimes: kuasar-qemu is the handler of more than one runtime; give each its own `handler`."
    )
    (refused "one socket twice"
      {
        services.kuasar.runtimes = {
          qemu = { };
          other = {
            hypervisor = "qemu";
            socket = "/run/kuasar/qemu.sock";
          };
        };
      }
      "services.kuasar.runtimes: two runtimes have the socket /run/kuasar/qemu.sock; one daemon serves one socket."
    )
    (refused "one folder twice"
      {
        services.kuasar.runtimes = {
          qemu = { };
          other = {
            hypervisor = "qemu";
            stateDir = "/run/kuasar/qemu";
          };
        };
      }
      "services.kuasar.runtimes: two runtimes have the stateDir /run/kuasar/qemu; one daemon keeps its pods in one folder."
    )
    (refused "a long folder"
      { services.kuasar.runtimes.qemu.stateDir = "/run/kuasar/a-name-that-is-long"; }
      "services.kuasar.runtimes.qemu.stateDir has 31 characters; sockets below it may have 107, so it may have 25."
    )
    (refused "nothing is wired" { services.kuasar.containerd.enable = false; }
      "services.kuasar: neither containerd nor k3s is wired, so no pod can reach it (Docker asks no sandbox controller, CRI-O has none): set services.kuasar.containerd.enable or services.k3s.enable."
    )
    (refused "configFile" { virtualisation.containerd.configFile = "/etc/containerd.toml"; }
      "virtualisation.containerd.configFile is set, so NixOS ignores virtualisation.containerd.settings and with it services.kuasar: move the file's content to `settings`, or wire it yourself with services.kuasar.containerd.config."
    )
    (same "an old containerd"
      (messages (
        evaluateWith (pkgs // { containerd.version = "1.7.27"; }) { services.kuasar.enable = true; }
      ))
      [
        "services.kuasar needs containerd 2.1 or later, and pkgs.containerd is 1.7.27: an older one cannot use a sandbox controller."
      ]
    )
    (refused "a template of k3s"
      {
        services.k3s = {
          enable = true;
          containerdConfigTemplate = "version = 3";
        };
      }
      "services.k3s.containerdConfigTemplate does not contain services.kuasar.k3s.containerdConfig: append it to yours."
    )
    (same "a template that has k3s' own" (messages (with' {
      services.k3s = {
        enable = true;
        containerdConfigTemplate = "{{ template \"base\" . }}";
      };
    })) [ ])
    (refused "a container" { boot.isContainer = true; }
      "services.kuasar cannot run in a NixOS container: it needs /dev/kvm, network namespaces and mounts of its own."
    )
    (refused "an image of another VMM" {
      services.kuasar.runtimes.qemu.image = kuasar.image-qemu // {
        hypervisor = "stratovirt";
      };
    } "services.kuasar.runtimes.qemu.image is of stratovirt, and the runtime's hypervisor is qemu.")
    (refused "an image of another machine"
      {
        services.kuasar.runtimes.qemu.image = kuasar.image-qemu // {
          architecture = "riscv64";
        };
      }
      "services.kuasar.runtimes.qemu.image is of riscv64, and the machine is ${pkgs.stdenv.hostPlatform.parsed.cpu.name}."
    )
    (refused "verity on pmem"
      {
        services.kuasar.runtimes.qemu = {
          image = kuasar.image-qemu-verity;
          settings.hypervisor.root = "pmem";
        };
      }
      "services.kuasar.runtimes.qemu.settings.hypervisor.root is \"pmem\", and ${
        if pkgs.stdenv.hostPlatform.isAarch64 then
          "QEMU has no virtio-pmem for aarch64"
        else
          "a root that is checked block by block has no DAX"
      }: use \"blk\"."
    )
    (refused "17 on one vsock"
      {
        services.kuasar.runtimes = lib.genAttrs (map (n: "q${toString n}") (lib.genList (n: n) 17)) (_: {
          hypervisor = "qemu";
          settings.hypervisor.vsock = "vhost";
        });
      }
      "services.kuasar.runtimes: 17 runtimes have vsock = \"vhost\", and the agents' ports on one kernel's vsock are for 16 daemons."
    )
    (same "no module of KVM"
      (with' {
        boot.kernelModules = lib.mkForce [ ];
        services.kuasar.runtimes.qemu.settings.hypervisor.accel = "kvm";
      }).warnings
      (
        lib.optional pkgs.stdenv.hostPlatform.isx86_64 "services.kuasar: boot.kernelModules has neither kvm-intel nor kvm-amd, without which accel = \"kvm\" finds no /dev/kvm."
      )
    )
    (same "locked modules" (with' { security.lockKernelModules = true; }).warnings [
      "services.kuasar: security.lockKernelModules is set; kernel modules of the cluster's network plugin have to be in boot.kernelModules."
    ])
    (fails "a hypervisor without a driver"
      (with' { services.kuasar.runtimes.xen = { }; }).services.kuasar.runtimes.xen.hypervisor
    )
    (fails "an option that is not there"
      (with' { services.kuasar.runtime.qemu = { }; }).services.kuasar.enable
    )
    (fails "too little memory"
      (with' { services.kuasar.runtimes.qemu.settings.hypervisor.memory_in_mb = 47; })
      .services.kuasar.runtimes.qemu.settings.hypervisor.memory_in_mb
    )
    (fails "a handler that Kubernetes refuses"
      (with' { services.kuasar.runtimes.qemu.handler = "Kuasar_QEMU"; })
      .services.kuasar.runtimes.qemu.handler
    )
    (fails "a configuration of one's own"
      (with' { services.kuasar.runtimes.qemu.configFile = "/etc/x"; })
      .services.kuasar.runtimes.qemu.configFile
    )
  ];

  # Options by name, with those of a runtime and of its settings, as docs/nixos.md tells them.
  declared =
    (import ../../modules/kuasar.nix {
      inherit lib pkgs;
      config = { };
    }).options.services.kuasar;
  runtimeOptions =
    (import ../../modules/kuasar/runtime.nix
      {
        inherit lib pkgs;
        cfg = { };
        toml = pkgs.formats.toml { };
      }
      {
        config = { };
        name = "<name>";
      }
    ).options;
  table = import ./table.nix {
    inherit lib;
    options = removeAttrs declared [ "runtimes" ] // {
      runtimes."<name>" = runtimeOptions;
    };
  };
  documented = same "docs/nixos.md has the table of options" (lib.hasInfix table (
    builtins.readFile ../../docs/nixos.md
  )) true;
  passed = good ++ bad ++ documented;
in
runCommand "check-module-evaluation"
  {
    # What is built: the files that the module makes, whole.
    files = [
      plain.services.kuasar.runtimes.qemu.configFile
      two.services.kuasar.runtimes.large.configFile
      two.services.kuasar.runtimeClasses.manifest
      k3s.services.kuasar.k3s.containerdConfig.v2
      k3s.services.kuasar.k3s.containerdConfig.v3
    ];
    inherit table;
    passed = toString (map (name: "${name};") passed);
  }
  ''
    for file in $files; do [ -s "$file" ]; done
    echo "$passed" | tr ';' '\n' >"$out"
  ''
