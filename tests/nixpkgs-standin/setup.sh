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

# The defaults of a kind of builder, in a file of its own: a change to one builds nothing again of another.
# shellcheck source=/dev/null
if [ -n "${builderPhases:-}" ]; then source "$builderPhases"; fi

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
