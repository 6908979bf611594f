//! Networks of pods: every kind of link, both families, port-forward, and what is left when something is
//! killed.

mod crash;
mod forward;
mod kinds;
mod netns;
mod rules;
mod traffic;

use std::process::ExitCode;

use kuasar_e2e::{cases, lab::QEMU, suite};

use crash::{
    a_killed_daemon_gives_the_network_back, a_killed_virtiofsd_gives_the_network_back,
    a_killed_vmm_gives_the_network_back, a_tap_of_cni_is_left_as_it_was,
};
use forward::{
    forwarding_goes_on_without_the_daemon, ports_are_forwarded_on_both_loopbacks,
    ports_are_forwarded_over_cri,
};
use kinds::{
    a_macvlan_pod, a_pod_on_a_tap, a_pod_with_a_tun_is_refused, a_pod_with_routing_rules_is_refused,
    a_pod_with_two_interfaces, a_pod_with_what_is_rare, a_ptp_pod, an_ipv6_pod,
};
use rules::{
    packet_filters_of_plugins_hold, rules_of_plugins_that_a_vm_cannot_have_are_refused,
    sysctls_of_plugins_are_the_guests,
};
use traffic::{
    a_dual_stack_pod, a_pod_with_two_processors_has_two_queues, host_ports_are_mapped,
    limits_of_the_bandwidth_plugin_hold, pods_reach_each_other, the_kernel_moves_the_frames, vhost_missing,
};

fn main() -> ExitCode {
    let mut all = suite::unless(vhost_missing(), cases![the_kernel_moves_the_frames]);
    all.extend(cases![
        ports_are_forwarded_over_cri,
        ports_are_forwarded_on_both_loopbacks,
        forwarding_goes_on_without_the_daemon,
        a_dual_stack_pod,
        pods_reach_each_other,
        a_pod_with_two_processors_has_two_queues,
        an_ipv6_pod,
        a_ptp_pod,
        a_pod_with_what_is_rare,
        a_pod_on_a_tap,
        a_pod_with_a_tun_is_refused,
        a_macvlan_pod,
        a_pod_with_two_interfaces,
        a_pod_with_routing_rules_is_refused,
        packet_filters_of_plugins_hold,
        sysctls_of_plugins_are_the_guests,
        rules_of_plugins_that_a_vm_cannot_have_are_refused,
        limits_of_the_bandwidth_plugin_hold,
        host_ports_are_mapped,
        a_killed_vmm_gives_the_network_back,
        a_killed_virtiofsd_gives_the_network_back,
        a_killed_daemon_gives_the_network_back,
        a_tap_of_cni_is_left_as_it_was,
    ]);
    suite::with_lab(&[QEMU], all)
}

/// A command that keeps a container alive and ends at once when asked to.
const IDLE: &[&str] = &["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"];
