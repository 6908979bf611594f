{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
  inputs.kuasar.url = "github:kuasar-nix/kuasar-nix";

  outputs =
    { nixpkgs, kuasar, ... }:
    {
      nixosConfigurations.node = nixpkgs.lib.nixosSystem {
        system = "x86_64-linux";
        modules = [
          ./hardware-configuration.nix
          kuasar.nixosModules.default
          {
            services.k3s.enable = true;
            services.kuasar.enable = true;
            services.k3s.manifests.hello.source = ./pod.yaml;
          }
        ];
      };
    };
}
