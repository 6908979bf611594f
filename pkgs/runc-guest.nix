# nixpkgs' runc is dynamic and wrapped in a shell script; the guest has neither a loader nor a shell. Same source, static.
{
  lib,
  buildGoModule,
  libseccomp,
  pkg-config,
  runc,
}:
buildGoModule {
  pname = "runc-guest";
  inherit (runc) version src;
  vendorHash = null; # runc keeps its dependencies in its source

  nativeBuildInputs = [ pkg-config ];
  buildInputs = [ libseccomp ];
  env.CGO_ENABLED = "1";
  subPackages = [ "." ];
  tags = [
    "seccomp"
    "netgo"
    "osusergo"
  ];
  ldflags = [
    "-s"
    "-w"
    "-linkmode=external"
    "-extldflags=-static"
  ];
  # Its tests want root, cgroups and a network.
  doCheck = false;

  meta = {
    description = "OCI runtime of the guest (static, with seccomp)";
    license = lib.licenses.asl20;
    mainProgram = "runc";
    platforms = lib.platforms.linux;
  };
}
