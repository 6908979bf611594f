# What nixpkgs' stdenv does between a source and an output, cut down to the phases and hooks this project uses.
# Run by `bash -e` as the builder of every derivation of the stand-in; attributes arrive as environment variables.
# shellcheck shell=bash disable=SC2154
set -eu -o pipefail
export PATH="${depsPath:+$depsPath:}/rust/bin:/go/bin:/usr/bin:/usr/sbin:/bin:/sbin"
export HOME=/homeless-shelter LC_ALL=C TZ=UTC SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-315532800}"
umask 022

patchShebangs() { :; } # the host has the interpreters where scripts look for them

runHook() {
    if [ -n "${!1:-}" ]; then eval "${!1}"; fi
}

# runPhase NAME: preNAME, then the derivation's NAMEPhase or else the function NAME_KIND, then postNAME.
runPhase() {
    local phase="$1Phase" default="$1_${builderKind:-make}"
    if [ -n "${!phase:-}" ]; then
        eval "${!phase}" # as in nixpkgs, a phase of one's own runs its hooks itself
    elif declare -F "$default" >/dev/null; then
        runHook "pre${1^}"
        "$default"
        runHook "post${1^}"
    fi
}

unpack() {
    mkdir unpacked
    if [ -d "$src" ]; then cp -r "$src" unpacked/source; else tar -xf "$src" -C unpacked; fi
    chmod -R u+w unpacked
    mv unpacked/* source
    cd source
}

# Rust: rustPlatform.buildRustPackage
configure_rust() {
    mkdir -p .cargo
    # As in nixpkgs the crates are below the build folder: whoever remaps that one has remapped them.
    ln -s "$cargoDeps" "$NIX_BUILD_TOP/cargo-vendor"
    printf '%s\n' '[source.crates-io]' 'replace-with = "vendored"' '[source.vendored]' \
        "directory = \"$NIX_BUILD_TOP/cargo-vendor\"" >.cargo/config.toml
    export CARGO_HOME="$NIX_BUILD_TOP/cargo"
}
build_rust() {
    # shellcheck disable=SC2086 # a list of flags
    cargo build -j "$NIX_BUILD_CORES" --offline --target "$rustTarget" --profile "$cargoBuildType" ${cargoBuildFlags:-}
}
install_rust() {
    mkdir -p "$out/bin"
    find "target/$rustTarget/$cargoBuildType" -maxdepth 1 -type f -executable -exec install -m 0755 -t "$out/bin" {} +
}

# Go: buildGoModule with a source that brings its vendor folder
configure_go() {
    export GOCACHE="$NIX_BUILD_TOP/go-cache" GOPATH="$NIX_BUILD_TOP/go" GOFLAGS="-mod=vendor -trimpath" GOTOOLCHAIN=local GOPROXY=off
}
build_go() {
    local packages=()
    for sub in ${subPackages:-.}; do packages+=("./$sub"); done
    go install -p "$NIX_BUILD_CORES" ${tags:+-tags=${tags// /,}} -ldflags="${ldflags:-} -buildid=" "${packages[@]}"
}
install_go() {
    mkdir -p "$out"
    cp -r "$GOPATH/bin" "$out/bin"
}

cd "$NIX_BUILD_TOP"
if [ -n "${buildCommand:-}" ]; then
    eval "$buildCommand"
    exit
fi
unpack
runHook prePatch
runHook postPatch
for phase in configure build check install; do
    if [ "$phase" != check ] || [ -n "${doCheck:-}" ]; then runPhase "$phase"; fi
done
runHook preFixup
runHook postFixup
