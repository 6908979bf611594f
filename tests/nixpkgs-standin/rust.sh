# rustPlatform.buildRustPackage: sourced by setup.sh.
# shellcheck shell=bash disable=SC2154
configure_rust() {
    mkdir -p .cargo
    # As in nixpkgs the crates are below the build folder: whoever remaps that one has remapped them.
    ln -s "$cargoDeps" "$NIX_BUILD_TOP/cargo-vendor"
    printf '%s\n' '[source.crates-io]' 'replace-with = "vendored"' '[source.vendored]' \
        "directory = \"$NIX_BUILD_TOP/cargo-vendor\"" >.cargo/config.toml
    export CARGO_HOME="$NIX_BUILD_TOP/cargo"
    if [ -n "${crossPrefix:-}" ]; then
        # The toolchain below /rust knows its own machine only; Debian's, unpacked below /cross, has the library of others.
        [ -x /cross/usr/bin/rustc ] || { echo "no compiler for $rustTarget: run tests/lab/setup --aarch64" >&2 && exit 1; }
        export PATH="/cross/usr/bin:$PATH" LD_LIBRARY_PATH="/cross/usr/lib/x86_64-linux-gnu"
        local linker="CARGO_TARGET_${rustTarget//-/_}_LINKER"
        export "${linker^^}=${crossPrefix}gcc"
    fi
}
build_rust() {
    # nixpkgs leaves that to its fixup, which removes debug sections only, unless a package asks for more.
    export CARGO_PROFILE_RELEASE_STRIP=false
    # shellcheck disable=SC2086 # a list of flags
    cargo build -j "$NIX_BUILD_CORES" --offline --target "$rustTarget" --profile "$cargoBuildType" ${cargoBuildFlags:-}
}
install_rust() {
    mkdir -p "$out/bin"
    find "target/$rustTarget/$cargoBuildType" -maxdepth 1 -type f -executable -exec install -m 0755 -t "$out/bin" {} +
    local how=(-S -p)
    case " ${stripAllList:-} " in *" bin "*) how=(-s -p) ;; esac
    find "$out/bin" -type f -exec "${crossPrefix:-}strip" "${how[@]}" {} +
    if [ -n "${doInstallCheck:-}" ]; then
        "$out/bin/$pname" "${versionCheckProgramArg:---version}" | grep -F "$version" || { echo "$pname does not tell its version, $version" >&2 && exit 1; }
    fi
}
