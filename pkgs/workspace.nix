# What the crates of the cargo workspace have in common: filtered sources, and flags that keep build paths out.
{ lib }:
let
  inherit (lib) fileset;
  root = ../.;
  cargo = lib.importTOML (root + "/Cargo.toml");
  inherit (cargo.workspace) members;
  manifests = lib.genAttrs members (member: lib.importTOML (root + "/${member}/Cargo.toml"));
  memberOf = lib.listToAttrs (
    map (member: {
      inherit (manifests.${member}.package) name;
      value = member;
    }) members
  );

  # The folders of a crate and of every crate of the workspace it is built from.
  needed =
    member:
    let
      deps = (manifests.${member}.dependencies or { }) // (manifests.${member}.build-dependencies or { });
      local = lib.filter (name: memberOf ? ${name}) (lib.attrNames deps);
    in
    [ member ] ++ lib.concatMap (name: needed memberOf.${name}) local;

  # Cargo.lock as a graph. What it says of a crate of the workspace includes what only its tests need; the manifest knows.
  lock = (lib.importTOML (root + "/Cargo.lock")).package;
  locked =
    dependency:
    let
      words = lib.filter builtins.isString (builtins.split " " dependency);
      same =
        package:
        package.name == lib.head words
        && (builtins.length words == 1 || package.version == builtins.elemAt words 1);
    in
    lib.head (lib.filter same lock);
  dependenciesOf =
    package:
    let
      manifest = manifests.${memberOf.${package.name}};
      asked = (manifest.dependencies or { }) // (manifest.build-dependencies or { });
      # Cargo.lock says nothing of targets; these are of other systems only.
      isForeign = dependency: builtins.match "(windows.*|wasi.*|r-efi)" dependency.name != null;
      all = lib.filter (dependency: !isForeign dependency) (map locked (package.dependencies or [ ]));
    in
    if package ? source || !(memberOf ? ${package.name}) then
      all
    else
      lib.filter (dependency: asked ? ${dependency.name}) all;
  keyOf = package: "${package.name} ${package.version}";

  # Cargo wants every target that a manifest names to exist, built or not. Empty files stand in for those left out of
  # a source, so that a change in one crate, or in a test, builds no other crate again.
  named =
    member: kind: dir:
    map (target: "${member}/${target.path or "${dir}/${target.name}.rs"}") (
      manifests.${member}.${kind} or [ ]
    );
  testsOf = member: named member "test" "tests" ++ named member "bench" "benches";
  allOf = member: [ "${member}/src/lib.rs" ] ++ named member "bin" "src/bin" ++ testsOf member;
in
{
  inherit (cargo.workspace.package) version;

  # Of every package, for `meta`.
  about = {
    homepage = cargo.workspace.package.repository;
    changelog = "${cargo.workspace.package.repository}/releases/tag/v${cargo.workspace.package.version}";
  };

  # The crate and every crate it is built from on Linux: name, version, checksum, dependencies.
  crates =
    crate:
    map
      (item: {
        inherit (item.package) name version;
        checksum = item.package.checksum or null;
        dependencies = map (package: { inherit (package) name version; }) (dependenciesOf item.package);
      })
      (
        builtins.genericClosure {
          startSet = [
            {
              key = keyOf (locked crate);
              package = locked crate;
            }
          ];
          operator =
            item:
            map (package: {
              key = keyOf package;
              inherit package;
            }) (dependenciesOf item.package);
        }
      );

  # Attributes for buildRustPackage of the crate called `crate`.
  package =
    {
      crate,
      stdenv,
      # Null for a program that does not tell its version.
      versionCheckHook ? null,
    }:
    let
      crates = needed memberOf.${crate};
      others = lib.filter (member: !lib.elem member crates) members;
      code =
        member:
        fileset.difference (root + "/${member}") (
          fileset.unions [
            (fileset.maybeMissing (root + "/${member}/tests"))
            (fileset.maybeMissing (root + "/${member}/benches"))
            (fileset.maybeMissing (root + "/${member}/README.md"))
          ]
        );
      stubs = lib.concatMap allOf others ++ lib.concatMap testsOf crates;
    in
    {
      pname = crate;
      inherit (cargo.workspace.package) version;
      src = fileset.toSource {
        inherit root;
        fileset = fileset.unions (
          [
            (root + "/Cargo.toml")
            (root + "/Cargo.lock")
          ]
          ++ map (member: root + "/${member}/Cargo.toml") members
          ++ map code crates
        );
      };
      cargoLock.lockFile = root + "/Cargo.lock";
      cargoBuildFlags = [
        "--package"
        crate
      ];
      postPatch = ''
        for stub in ${lib.escapeShellArgs stubs}; do
          mkdir -p "$(dirname "$stub")"
          touch "$stub"
        done
      '';
      # RUSTFLAGS replaces the flags that nixpkgs' cargo configuration gives a static target: say them again.
      preBuild = ''
        export RUSTFLAGS="--remap-path-prefix=$NIX_BUILD_TOP=. ${lib.optionalString stdenv.hostPlatform.isStatic "-C target-feature=+crt-static"}"
      '';
      # `make check` runs the tests of the whole workspace once, with the debug assertions that a release build lacks.
      doCheck = false;
      nativeInstallCheckInputs = lib.optional (versionCheckHook != null) versionCheckHook;
      doInstallCheck = versionCheckHook != null && stdenv.buildPlatform.canExecute stdenv.hostPlatform;
    };
}
