{
  description = "Kuasar for Nix: Kubernetes pods in microVMs, built bit for bit by Nix";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs, ... }:
    let
      inherit (nixpkgs) lib;
      forSystems =
        f: lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: f nixpkgs.legacyPackages.${system});
      # A stand-in for nixpkgs may say how its machines run guests.
      scope = pkgs: import ./pkgs ({ inherit pkgs; } // nixpkgs.kuasar or { });
      named = kuasar: lib.genAttrs kuasar.names (name: kuasar.${name});
      app = description: program: {
        inherit program;
        type = "app";
        meta = { inherit description; };
      };
      program = package: app package.meta.description (lib.getExe package);
    in
    {
      packages = forSystems (pkgs: named (scope pkgs));
      checks = forSystems (pkgs: (scope pkgs).checks);
      # Guests of the other architecture, built on this one.
      legacyPackages.x86_64-linux.cross.aarch64 = lib.filterAttrs (
        name: _: builtins.match "(kernel|rootfs|disk|initrd|guests)-?.*" name != null
      ) (named (scope nixpkgs.legacyPackages.x86_64-linux.pkgsCross.aarch64-multiplatform));
      overlays.default = final: _: { kuasar = scope final; };
      nixosModules = {
        default = self.nixosModules.kuasar;
        # Of this flake's nixpkgs; a host with the overlay may say `services.kuasar.packages = pkgs.kuasar`.
        kuasar =
          { pkgs, ... }:
          {
            imports = [ ./modules/kuasar.nix ];
            services.kuasar.packages = lib.mkDefault (
              scope nixpkgs.legacyPackages.${pkgs.stdenv.hostPlatform.system}
            );
          };
      };
      apps = forSystems (pkgs: {
        default = program (scope pkgs).default;
        kuasar-image = program (scope pkgs).kuasar-image;
        demo = app "Runs a container in a microVM pod, as `make demo`" (
          toString (pkgs.writeShellScript "kuasar-demo" ''exec ${self}/tests/lab/demo "$@"'')
        );
      });
      devShells = forSystems (pkgs: {
        default = (scope pkgs).shell;
      });
      formatter = forSystems (pkgs: pkgs.nixfmt-tree);
      templates.node = {
        path = ./modules/template;
        description = "A k3s node whose pods can have microVMs";
      };
    };
}
