# Answers to the few nixpkgs names that this project's expressions use, with the tools of the host. See README.md.
{
  description = "Stand-in for nixpkgs where nixpkgs cannot be reached";

  outputs =
    _:
    let
      lib = import ./lib.nix;
      # Written by ./prepare into its copy of this folder: store paths of sources, versions of the host's tools.
      inputs = builtins.fromJSON (builtins.readFile ./inputs.json);
    in
    {
      inherit lib;
      # Arguments of this project's packages, for machines where guests die in KVM and vhost-vsock is missing.
      kuasar = {
        accel = "tcg";
        vsock = "vhost-user";
      };
      legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (
        system: import ./packages.nix { inherit lib inputs system; }
      );
    };
}
