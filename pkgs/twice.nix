# Whether a package is the same, byte for byte, when it is built again: in another folder, at another time, in another time zone,
# with one core. Says the first difference where it is not.
{ runCommand }:
name: package:
let
  # nixpkgs' builder sets TZ to UTC, so this comes after it.
  zone = ''
    export TZ=LAB-05:45 NIX_BUILD_CORES=1
  '';
  again = package.overrideAttrs (
    old:
    if old ? buildCommand then
      {
        buildCommand = ''
          ${zone}
          mkdir elsewhere
          cd elsewhere
          export NIX_BUILD_TOP=$PWD TMPDIR=$PWD
          ${old.buildCommand}
        '';
      }
    else
      {
        # Before anything is there, so that whoever takes build paths out of his results takes the new ones out.
        preUnpack = ''
          mkdir elsewhere
          cd elsewhere
          export NIX_BUILD_TOP=$PWD TMPDIR=$PWD
        ''
        + (old.preUnpack or "");
        prePatch = zone + (old.prePatch or "");
      }
  );
in
runCommand "check-twice-${name}" { } ''
  first=${package} again=${again}
  [ "$first" != "$again" ] || { echo "${name} was not built again" >&2; exit 1; }
  # A package may hold its own path.
  as_first() { LC_ALL=C sed "s|$again|$first|g" "$@"; }
  tree() { (cd "$1" && find . -printf '%P %y %m %l\n' | LC_ALL=C sort); }
  diff <(tree "$first") <(tree "$again" | as_first) || { echo "${name} has other files when built again" >&2; exit 1; }
  find "$first" -type f -printf '%P\0' | LC_ALL=C sort -z | while IFS= read -r -d "" file; do
    cmp "$first/$file" <(as_first "$again/$file") || { echo "${name} differs when built again: $file" >&2; exit 1; }
  done
  touch "$out"
''
