{
  description = "Kuasar for Nix: Kubernetes pods in microVMs, built bit for bit by Nix";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { nixpkgs, ... }:
    let
      inherit (nixpkgs) lib;
      forSystems =
        f:
        lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (
          system: f (scope nixpkgs.legacyPackages.${system})
        );
      # What stands in for nixpkgs may say how its machines run guests.
      scope = pkgs: import ./pkgs ({ inherit pkgs; } // nixpkgs.kuasar or { });
    in
    {
      packages = forSystems (kuasar: lib.genAttrs kuasar.names (name: kuasar.${name}));
      checks = forSystems (kuasar: kuasar.checks);
    };
}
