# NixOS for a guest: systemd, the journal, the agent as a service; what runs beside containers is added by further modules. Nothing
# activates it: the root is made when it is built, and read-only.
{
  config,
  lib,
  modulesPath,
  ...
}:
{
  imports = [ (modulesPath + "/profiles/minimal.nix") ];

  options.kuasar.agent = lib.mkOption {
    type = lib.types.package;
    description = "The agent, whose unit is in lib/systemd/system; the root has it as /usr/bin/vmm-task.";
  };

  config = {
    # In NixOS' words: no kernel, no boot loader, no udev, no root file system to name. All of that is the VM's.
    boot.isContainer = true;

    systemd.packages = [ config.kuasar.agent ];
    systemd.services.vmm-task.wantedBy = [ "multi-user.target" ];

    # The root is read-only. The agent mounts what is a pod's.
    fileSystems."/var" = {
      fsType = "tmpfs";
      options = [
        "mode=0755"
        "nosuid"
        "nodev"
      ];
    };
    boot.tmp.useTmpfs = true;

    # The host says what the links are, what they are called, and who resolves names.
    networking = {
      hostName = "";
      useDHCP = false;
      useHostResolvConf = false;
      resolvconf.enable = false;
      firewall.enable = false;
    };
    services.timesyncd.enable = false; # so is the clock

    # Nobody logs in: a person has the debug console. No console of ours is a terminal either.
    systemd.services = {
      audit.enable = false;
      console-getty.enable = false;
      "getty@".enable = false;
      "serial-getty@".enable = false;
      "autovt@".enable = false;
      mount-pstore.enable = false;
      network-local-commands.enable = false;
      save-hwclock.enable = false;
      suid-sgid-wrappers.enable = false;
    };
    systemd.shutdownRamfs.enable = false;
    systemd.generators.systemd-getty-generator = "/dev/null";
    systemd.enableEmergencyMode = false;
    systemd.suppressedSystemUnits = [
      "systemd-logind.service"
      # It would name links, and start where /sys can be written to.
      "systemd-udevd.service"
      "systemd-udevd-control.socket"
      "systemd-udevd-kernel.socket"
      "user.slice"
      "user@.service"
      "user-runtime-dir@.service"
    ];
    services.dbus.enable = lib.mkForce false;
    security.sudo.enable = false;
    security.polkit.enable = false;

    # Nothing is installed, named, or dumped in it.
    nix.enable = false;
    services.nscd.enable = false;
    system.nssModules = lib.mkForce [ ];
    systemd.oomd.enable = false;
    systemd.coredump.enable = false;
    environment.systemPackages = lib.mkForce [ ];
    fonts.fontconfig.enable = false;
    security.pam.services = lib.mkForce { };
    # What a person's shell and a person's programs read, with the packages that it names.
    environment.etc = {
      "resolv.conf".source = lib.mkForce "/run/kuasar/resolv.conf";
      # (Files, because the options' names have changed with time.) A guest that is to end does not wait for services that do not.
      "systemd/system.conf.d/kuasar.conf".text = ''
        [Manager]
        DefaultTimeoutStopSec=10s
      '';
      "systemd/journald.conf.d/kuasar.conf".text = ''
        [Journal]
        Storage=volatile
        RuntimeMaxUse=8M
      '';
    }
    //
      lib.genAttrs
        [
          "bashrc"
          "default/useradd"
          "fuse.conf"
          "inputrc"
          "issue"
          "login.defs"
          "lvm/lvm.conf"
          "nanorc"
          "pam/environment"
          "profile"
          "resolvconf.conf"
          "set-environment"
          "shells"
          "ssh/ssh_config"
          "ssh/ssh_known_hosts"
          "terminfo"
        ]
        (_: {
          enable = false;
        });

    system.stateVersion = config.system.nixos.release;
  };
}
