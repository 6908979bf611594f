{
  description = "Kuasar for Nix: Kubernetes pods in microVMs, built bit for bit by Nix";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      forSystems =
        f: lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: f nixpkgs.legacyPackages.${system});
      scope = pkgs: import ./pkgs { inherit pkgs; };
    in
    {
      packages = forSystems (pkgs: lib.filterAttrs (_: lib.isDerivation) (scope pkgs));
      checks = forSystems (pkgs: lib.filterAttrs (_: lib.isDerivation) (scope pkgs).checks);
    };
}
