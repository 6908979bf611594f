# buildGoModule with a source that brings its vendor folder: sourced by setup.sh.
# shellcheck shell=bash disable=SC2154
configure_go() {
    export GOCACHE="$NIX_BUILD_TOP/go-cache" GOPATH="$NIX_BUILD_TOP/go" GOFLAGS="-mod=vendor -trimpath" GOTOOLCHAIN=local GOPROXY=off
    if [ -n "${crossPrefix:-}" ]; then
        export GOARCH="$goArch" CGO_ENABLED=1 CC="${crossPrefix}gcc"
        export PKG_CONFIG_SYSROOT_DIR=/cross PKG_CONFIG_LIBDIR="/cross/usr/lib/${crossPrefix%-}/pkgconfig"
    fi
}
build_go() {
    local packages=()
    for sub in ${subPackages:-.}; do packages+=("./$sub"); done
    go install -p "$NIX_BUILD_CORES" ${tags:+-tags=${tags// /,}} -ldflags="${ldflags:-} -buildid=" "${packages[@]}"
}
install_go() {
    # Programs of another architecture lie one folder deeper.
    mkdir -p "$out/bin"
    find "$GOPATH/bin" -type f -exec install -m 0755 -t "$out/bin" {} +
}
