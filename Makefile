# The task menu. Each task is a script of its own; nothing is decided here.

.DEFAULT_GOAL := menu
.PHONY: menu demo check check-all e2e image bench-boot fuzz setup

NIX := tests/nixpkgs-standin/nix

menu: ## this list
	@printf 'Kuasar for Nix: pods in microVMs\n\n'
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@printf '\n  make demo IMAGE=docker.io/library/alpine:3 CMD="cat /etc/os-release"\n'

# As it was typed: make must not see variables of the shell in it.
demo: export DEMO_CMD = $(value CMD)
demo: export IMAGE ?=
demo: ## build everything, run a container in a microVM pod, show it (IMAGE=, CMD=)
	@tests/lab/demo

check: ## every test of the project; ends with one line of totals
	@tests/lab/check

check-all: ## the same, and the CRI validation suite for runc and on the newest containerd, endurance, pods with KVM and under systemd, every guest of aarch64, and of other hypervisors that are given
	@tests/lab/setup --check --deny
	@tests/lab/check style crates nix unit guest kernels matrix crashes e2e kubelet machine critest aarch64 hypervisors critest-all endurance flake rebuild-all

e2e: ## the black-box tests over CRI alone
	@tests/lab/check e2e

image: ## kernel, disk image, initrd, config.toml and manifest.json in ./result
	@$(NIX) build --print-build-logs .#image-qemu

bench-boot: ## how long a boot takes beside its floor, in seconds and guest instructions
	@tests/lab/bench-boot

fuzz: ## hostile input for every parser of what others send, ten million each (COUNT=)
	@cargo run --quiet --release --locked -p kuasar-fuzz -- all $(or $(COUNT),10000000)

setup: ## bring the tools here (says what first); the others do it themselves
	@tests/lab/setup
