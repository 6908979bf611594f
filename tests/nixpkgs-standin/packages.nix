# The package set. Compilers and build tools are the host's, seen through `sandbox-paths` below /usr, /rust and /go.
{
  lib,
  inputs,
  system,
}:
let
  cpu = builtins.head (lib.filter builtins.isString (builtins.split "-" system));
  # Everything is built on this machine; for the other architecture by the host's cross compilers.
  isCross = system != inputs.builder;

  # A tool of the host. "${flex}/bin/flex" is /usr/bin/flex; its version is part of `inputs.toolchain`. Inputs of a derivation that are
  # the host's are left out of it: they are there anyway.
  hostTool = name: {
    pname = name;
    outPath = "/usr";
    type = "host-tool";
  };

  # A file or tree that ./prepare has put into the store. It is never built: the builder only says what is missing.
  prepared =
    {
      name,
      hash,
      recursive ? false,
      ...
    }:
    derivation {
      inherit name;
      system = inputs.builder;
      builder = "/bin/sh";
      args = [
        "-c"
        "echo '${name} is not in the store: run tests/nixpkgs-standin/prepare' >&2; exit 1"
      ];
      outputHashAlgo = "sha256";
      outputHashMode = if recursive then "recursive" else "flat";
      outputHash = hash;
    };

  mkSet =
    isStatic:
    let
      hostPlatform = {
        inherit system isStatic;
        isLinux = true;
        isx86_64 = cpu == "x86_64";
        isAarch64 = cpu == "aarch64";
        parsed.cpu.name = cpu;
        linuxArch = if cpu == "aarch64" then "arm64" else cpu;
        rust.rustcTarget = "${cpu}-unknown-linux-gnu";
      };

      mkDerivation =
        argsOrFn:
        let
          args = if lib.isFunction argsOrFn then argsOrFn finalAttrs else argsOrFn;
          finalAttrs = args // {
            finalPackage = drv;
          };
          # As in nixpkgs: no compiler but the build machine's is told of the headers of `nativeBuildInputs`.
          lost = lib.filter (dep: dep.isLibrary or false) (args.nativeBuildInputs or [ ]);
          compilers = args.depsBuildBuild or [ ];
          checked =
            if args.strictDeps or false && lost != [ ] && compilers == [ ] then
              throw "${args.pname}: with strictDeps no compiler sees the headers of ${
                lib.concatMapStringsSep ", " (dep: dep.pname) lost
              } in nativeBuildInputs: it wants depsBuildBuild = [ buildPackages.stdenv.cc ]"
            else
              args;
          deps = (args.nativeBuildInputs or [ ]) ++ (args.buildInputs or [ ]);
          own =
            builtins.removeAttrs checked [
              "depsBuildBuild"
              "nativeInstallCheckInputs"
              "meta"
              "passthru"
              "env"
              "strictDeps"
            ]
            // lib.optionalAttrs isCross (lib.filterAttrs (name: _: name == "depsBuildBuild") args);
          drv =
            derivation (
              {
                name = args.name or "${args.pname}-${args.version}";
                system = inputs.builder;
                builder = "/bin/bash";
                # Nothing but a second build has this hook; others are what they were.
                args =
                  if args ? preUnpack then
                    [
                      "-ec"
                      ''export PATH=/usr/bin:/bin; cd "$NIX_BUILD_TOP"; eval "$preUnpack"; source ${./setup.sh}''
                    ]
                  else
                    [
                      "-e"
                      ./setup.sh
                    ];
                # A new compiler is a new derivation, though Nix cannot see the compiler.
                toolchain =
                  inputs.toolchain.${args.builderKind or (if args ? buildCommand then "command" else "make")}
                  + lib.optionalString isCross inputs.toolchain.cross;
                depsPath = lib.concatMapStringsSep ":" (dep: "${lib.getBin dep}/bin") (
                  lib.filter (dep: dep.type or "" != "host-tool") deps
                );
              }
              // lib.optionalAttrs isCross { crossPrefix = "${cpu}-linux-gnu-"; }
              // own
              // (args.env or { })
              # Here, and not in setup.sh, which every derivation has for its builder.
              // lib.optionalAttrs (args ? patches) {
                prePatch =
                  lib.concatMapStringsSep "" (file: "patch -p1 <${file}\n") args.patches + args.prePatch or "";
              }
              // {
                nativeBuildInputs = lib.filter (dep: dep.type or "" != "host-tool") (args.nativeBuildInputs or [ ]);
                buildInputs = lib.filter (dep: dep.type or "" != "host-tool") (args.buildInputs or [ ]);
              }
            )
            // (args.passthru or { })
            // {
              meta = args.meta or { };
              pname = args.pname or args.name;
              version = args.version or "";
              src = args.src or null;
              overrideAttrs = more: mkDerivation (args // more args);
            };
        in
        drv;

      stdenv = {
        inherit mkDerivation hostPlatform;
        buildPlatform = hostPlatform // {
          system = inputs.builder;
          canExecute = host: host.system == inputs.builder;
        };
        cc = hostTool "gcc" // {
          targetPrefix = lib.optionalString isCross "${cpu}-linux-gnu-"; # as Debian calls them
          libc = hostTool "glibc" // {
            version = inputs.debian.libc6-dev;
          };
        };
      };

      self = rec {
        inherit lib stdenv;
        buildPackages =
          if isCross then
            import ./packages.nix {
              inherit lib inputs;
              system = inputs.builder;
            }
          else
            self;
        newScope = extra: lib.callPackageWith (self // extra);
        callPackage = newScope { };
        pkgsStatic = mkSet true;

        runCommand =
          name: env: buildCommand:
          mkDerivation (
            {
              inherit name buildCommand;
            }
            // env
          );
        runCommandCC = name: env: runCommand name ({ CC = "${stdenv.cc.targetPrefix}gcc"; } // env); # what `stdenv` sets there
        writeText =
          name: text:
          runCommand name {
            inherit text;
            passAsFile = [ "text" ];
          } ''cp "$textPath" "$out"'';

        writeShellScript =
          name: text:
          runCommand name {
            text = "#!/bin/bash\n${text}\n";
            passAsFile = [ "text" ];
          } ''install -m 0755 "$textPath" "$out"'';
        symlinkJoin =
          args:
          runCommand args.name { inherit (args) meta paths; } ''
            mkdir "$out"
            for path in $paths; do cp -rsn --no-preserve=mode "$path/." "$out"; done
          '';
        mkShell =
          args:
          runCommand "shell" {
            nativeBuildInputs =
              args.packages ++ lib.concatMap (package: package.nativeBuildInputs or [ ]) args.inputsFrom;
          } ''touch "$out"'';

        # The kinds of values that a configuration of ours has.
        formats.toml = _: {
          type = lib.types.attrsOf lib.types.anything;
          generate =
            name: value:
            let
              key = key: builtins.toJSON key;
              isTable = value: lib.isAttrs value && !(value ? outPath);
              line = name: value: "${key name} = ${builtins.toJSON value}\n";
              table =
                path: set:
                let
                  tables = lib.filterAttrs (_: isTable) set;
                in
                lib.optionalString (path != [ ]) "[${lib.concatMapStringsSep "." key path}]\n"
                + lib.concatStrings (lib.mapAttrsToList line (lib.filterAttrs (_: value: !isTable value) set))
                + lib.concatStrings (lib.mapAttrsToList (name: table (path ++ [ name ])) tables);
            in
            writeText name (table [ ] value);
        };

        rustPlatform.buildRustPackage =
          argsOrFn:
          mkDerivation (
            finalAttrs:
            let
              args = if lib.isFunction argsOrFn then argsOrFn finalAttrs else argsOrFn;
              lock = builtins.hashFile "sha256" args.cargoLock.lockFile;
            in
            if lock != inputs.cargoVendor.lock then
              throw "Cargo.lock has changed: run tests/nixpkgs-standin/prepare"
            else
              builtins.removeAttrs args [ "cargoLock" ]
              // {
                cargoDeps = prepared inputs.cargoVendor;
                rustTarget = hostPlatform.rust.rustcTarget;
                cargoBuildType = args.buildType or "release";
                staticCrt = isStatic;
                builderKind = "rust";
                builderPhases = ./rust.sh;
              }
          );

        buildGoModule =
          args:
          assert args.vendorHash == null;
          mkDerivation (
            args
            // {
              builderKind = "go";
              builderPhases = ./go.sh;
              goArch = if cpu == "aarch64" then "arm64" else "amd64";
            }
          );

        nukeReferences = runCommand "nuke-references" { } ''
          mkdir -p "$out/bin"
          printf '%s\n' '#!/bin/sh' \
            "exec sed -i -E 's|(${builtins.storeDir}/)[a-z0-9]{32}-|\1eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-|g' \"\$@\"" >"$out/bin/nuke-refs"
          chmod +x "$out/bin/nuke-refs"
        '';

        # A program where nixpkgs has a function, which knows `--suffix PATH : FOLDERS` only. Debian keeps half of its tools in sbin.
        makeBinaryWrapper = runCommand "make-binary-wrapper" { } ''
          mkdir -p "$out/bin"
          cat >"$out/bin/wrapProgram" <<'EOF'
          #!/bin/sh
          set -eu
          [ "$2 $3 $4" = '--suffix PATH :' ] || { echo "wrapProgram: $* is not known here" >&2 && exit 1; }
          wrapped=''${1%/*}/.''${1##*/}-wrapped
          mv "$1" "$wrapped"
          printf '#!/bin/sh\nPATH=$PATH:%s:/usr/sbin exec %s "$@"\n' "$5" "$wrapped" >"$1"
          chmod +x "$1"
          EOF
          chmod +x "$out/bin/wrapProgram"
        '';

        # Sources.
        containerd = hostTool "containerd" // {
          version = inputs.tools.containerd or "2.1";
        };
        linux_6_12 = {
          inherit (inputs.linux) version;
          modDirVersion = inputs.linux.version;
          src = prepared inputs.linux;
        };
        runc = {
          inherit (inputs.runc) version;
          src = prepared inputs.runc;
        };

        # What pkgsStatic has for a guest: Debian's static programs, and its dynamic ones with their loader and libraries.
        busybox = staticProgram "busybox" inputs.static.busybox;
        bash = staticProgram "bash" inputs.static.bash-static;
        strace = withLibraries "strace" [ "/usr/bin/strace" ];
        iproute2 = withLibraries "iproute2" [
          "/usr/sbin/ip"
          "/usr/bin/ss"
          "/usr/sbin/tc"
          "/usr/sbin/bridge"
        ];

        libseccomp = hostTool "libseccomp" // {
          version = inputs.debian.libseccomp-dev;
        };
        rustc = hostTool "rustc" // {
          version = inputs.compilers.rustc;
        };
        go = hostTool "go" // {
          version = inputs.compilers.go;
        };
        python3Packages.jsonschema = hostTool "python3-jsonschema";

        nixfmt-tree = launcher "nixfmt-tree" "treefmt" {
          version = "0";
          path = "${dirOf inputs.tools.qemu.path}/nixfmt";
        };

        # Programs that the daemon starts: launchers in the tools cache.
        qemu = launcher "qemu" "qemu-system-x86_64" inputs.tools.qemu // {
          override = {
            __functor = _: _: qemu;
            __functionArgs = { };
          };
        };
        virtiofsd = launcher "virtiofsd" "virtiofsd" inputs.tools.virtiofsd // {
          meta.mainProgram = "virtiofsd";
        };
        vhost-device-vsock =
          launcher "vhost-device-vsock" "vhost-device-vsock"
            inputs.tools.vhost-device-vsock;

        pkgsCross.aarch64-multiplatform = import ./packages.nix {
          inherit lib inputs;
          system = "aarch64-linux";
        };
      }
      // lib.genAttrs [
        "bc"
        "cargo-deny"
        "clippy"
        "deadnix"
        "nixfmt"
        "python3"
        "rustfmt"
        "shellcheck"
        "bison"
        "cni-plugins"
        "cpio"
        "cryptsetup"
        "e2fsprogs"
        "file"
        "flex"
        "jq"
        "perl"
        "pkg-config"
        "versionCheckHook" # rust.sh does it
        "xfsprogs"
        "xz"
        "zstd"
      ] hostTool
      // lib.genAttrs [
        "elfutils"
        "openssl"
      ] (name: hostTool name // { isLibrary = true; });

      staticProgram =
        name: program:
        mkDerivation {
          pname = name;
          inherit (program) version;
          buildCommand = ''install -D -m 0755 ${prepared program} "$out/bin/${name}"'';
          meta.mainProgram = name;
        };
      # Only where the machine is of that kind: another one's programs are not there to be copied.
      withLibraries =
        name: programs:
        mkDerivation {
          pname = name;
          version = inputs.debian.${name};
          toolchain = inputs.toolchain.guest;
          buildCommand = ''
            mkdir -p "$out/bin"
            for program in ${toString programs}; do
              install -m 0755 "$program" "$out/bin/"
              for library in $(ldd "$program" | grep -o '/[^ ]*'); do install -D -m 0755 "$library" "$out$library"; done
            done
          '';
        };

      launcher =
        pname: program: tool:
        mkDerivation {
          inherit pname;
          inherit (tool) version;
          buildCommand = ''mkdir -p "$out/bin" && ln -s ${lib.escapeShellArg tool.path} "$out/bin/${program}"'';
        };
    in
    self;
in
mkSet false
