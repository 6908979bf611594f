# Go for whoever needs it. Source it after common.sh; it defines, it does nothing.
# shellcheck shell=bash

# Fetches a Go module and prints its folder. usage: go_module_dir MODULE@VERSION
go_module_dir() {
    mkdir -p "$CACHE/go"
    (cd "$CACHE/go" && GO111MODULE=on go mod download -json "$1") | sed -n 's/^[[:space:]]*"Dir": "\(.*\)",*$/\1/p'
}

# Prints the root of a Go that is new enough: the machine's, or else one that is fetched as a Go module.
# usage: go_root AT-LEAST TOOLCHAIN
go_root() {
    local at_least=$1 toolchain=$2 version root=$CACHE/go/$2
    if ! have go; then
        step "no Go here; installing golang-go with apt-get from the configured sources"
        DEBIAN_FRONTEND=noninteractive quietly "$CACHE/log/apt-go.log" "apt-get install" \
            apt-get install -y --no-install-recommends golang-go
    fi
    version=$(cd / && GOTOOLCHAIN=local go env GOVERSION)
    if printf '%s\n' "$at_least" "${version#go}" | sort -CV; then
        (cd / && GOTOOLCHAIN=local go env GOROOT)
        return
    fi
    if [ ! -x "$root/bin/go" ]; then
        step "$version is older than $at_least; fetching $toolchain as a Go module"
        rm -rf "$root.new"
        mkdir -p "$CACHE/go"
        cp -r "$(go_module_dir "golang.org/toolchain@v0.0.1-$toolchain.$(go env GOOS)-$(go env GOARCH)")" "$root.new"
        # A module has no executable files; the go command that unpacks a toolchain for itself sets the bits, too.
        chmod -R u+w "$root.new"
        find "$root.new/bin" "$root.new/pkg/tool" -type f -exec chmod +x {} +
        mv "$root.new" "$root"
    fi
    printf '%s\n' "$root"
}
