//! Pods over CRI: life, processes, output, images, network. One lab for all; most cases make a pod of their
//! own.

mod attributes;
mod begins;
mod cancelled;
mod cgroups;
mod common;
mod devices;
mod disks;
mod ends;
mod figures;
mod full;
mod guest;
mod hung;
mod io;
mod kubelet;
mod layers;
mod life;
mod network;
mod phases;
mod refused;
mod restart;
mod rights;
mod sandbox;
mod security;
mod sharing;
mod sockets;
mod task;
mod tenants;
mod verity;
mod volumes;

use std::process::ExitCode;

use kuasar_e2e::{
    cases,
    lab::{Containerd, Lab, QEMU, QEMU_9P, QEMU_INITRD, thin_pool},
    suite::{self, Case},
};

use cancelled::a_pod_whose_start_is_cancelled_leaves_nothing;
use cgroups::{
    a_guest_runs_on_the_cpus_of_its_containers, a_pod_is_below_its_cgroup_and_unlimited_stays_unlimited,
};
use devices::{devices_are_bound_from_the_guest, devices_of_every_guest_are_passed};
use figures::{a_pod_is_resized, figures_of_pods_never_fail};
use full::pods_are_stopped_and_removed_while_run_is_full;
use guest::{
    a_guest_is_reached_any_number_of_times, a_kernel_panic_is_the_reason_of_a_pods_end,
    a_pod_has_its_name_sysctls_and_shared_memory, a_wrong_clock_is_put_right,
    nobody_calls_a_guest_that_is_not_up,
};
use hung::a_container_of_a_hung_guest_is_stopped;
use io::{
    exec_reads_stdin_to_its_end, exec_with_a_terminal, execs_of_many_sizes_over_streams,
    ten_mebibytes_of_log_are_complete, ten_mebibytes_of_log_over_streams, two_streams_stay_apart,
    two_streams_stay_apart_over_streams,
};
use kubelet::{
    a_pod_lives_in_the_cgroup_that_kubelet_made, memory_that_a_guest_frees_is_the_hosts_again,
    what_kubelet_sends_starts_and_is_resized,
};
use life::{
    a_command_that_does_not_exist, a_container_restarts_in_a_living_pod, a_pod_of_the_least_size_works,
    an_image_of_another_architecture, containers_of_a_pod_share_processes,
    exec_of_a_command_that_does_not_exist, exit_codes_arrive, pod_life_is_idempotent,
    the_want_of_memory_is_a_reason, two_images_in_one_pod,
};
use network::{
    guest_kernel_is_not_the_hosts, guest_runs_from_the_initrd, guest_runs_without_virtiofsd,
    pod_answers_at_its_ip,
};
use phases::{
    containerd_dies_in_every_phase, containerd_dies_in_every_phase_over_streams,
    the_daemon_dies_in_every_phase,
};
use refused::{
    checkpoints_are_refused, containers_with_what_is_the_hosts_are_refused,
    pods_with_namespaces_that_a_vm_cannot_have_are_refused, profiles_and_huge_pages_of_the_host_are_refused,
};
use restart::{
    a_hung_guest_holds_nobody_up_and_can_be_removed, a_killed_daemon_finds_its_pods_again,
    a_killed_relay_ends_its_pod_and_no_other, a_log_is_complete_across_a_restart_of_containerd,
    a_log_is_complete_across_a_restart_over_streams,
};
use rights::processes_have_only_what_they_need;
use sandbox::{
    a_daemon_killed_while_a_container_is_made, a_daemon_killed_while_a_pod_starts,
    a_killed_vm_is_a_pod_that_is_not_ready_and_says_why, a_pod_that_containerd_forgot_is_collected,
    a_pod_whose_record_cannot_be_read_is_removed, a_pods_cpus_are_counted_apart,
};
use security::a_container_sees_the_processes_of_its_target;
use sharing::{
    a_guest_cannot_lead_the_host_astray, a_volume_is_read_only_until_somebody_writes,
    containers_share_a_volume_as_one, containers_share_a_volume_by_9p,
};
use sockets::{containers_talk_to_a_socket_of_the_host, sockets_are_served_while_the_daemon_is_away};
use task::{
    a_paused_container_can_be_ended, independent_steps_go_on_side_by_side, limits_beyond_the_vm_are_refused,
    pause_resume_figures_pids_and_limits, the_daemon_traces_where_time_goes,
};

use attributes::{
    access_lists_of_a_volume_hold, an_overlay_has_its_upper_folder_in_a_volume, capabilities_of_files_hold,
    many_files_are_all_found, privileged_containers_have_the_guests_devices,
    what_a_mount_forbids_is_forbidden,
};
use begins::{a_containerd_killed_while_a_container_is_made, a_containerd_killed_while_a_pod_starts};
use disks::{
    a_disk_is_a_device_of_the_container, a_disk_that_is_bound_is_a_node, a_hung_vm_gives_its_disks_back,
    a_root_is_a_device_of_the_mapper, a_root_is_an_image_file, a_vm_ends_with_its_disks,
    a_vmm_that_stands_still_while_the_daemon_restarts_goes_on, the_file_system_of_a_disk_is_a_volume,
};
use ends::{
    a_daemon_killed_while_a_container_is_deleted, a_daemon_killed_while_a_pod_stops,
    a_relay_killed_in_every_phase, a_relay_killed_while_its_pod_ends,
};
use layers::{
    a_root_is_made_of_erofs_layers, a_root_of_more_erofs_layers_than_slots, roots_of_mounted_erofs_layers,
    roots_that_are_folders,
};
use tenants::{
    a_hung_volume_is_its_own_trouble, a_node_in_a_volume_is_no_disk_of_the_host,
    files_without_a_length_are_refused,
};
use verity::a_damaged_image_is_the_reason_of_a_pods_end;
use volumes::{
    a_root_has_any_number_of_layers, a_vm_without_its_file_server_ends,
    a_volume_can_be_read_only_with_all_below, a_volume_in_memory_has_its_size,
    mounts_of_the_host_arrive_later, shared_memory_is_the_pods, updates_of_a_projected_volume_arrive,
    users_files_survive_a_busy_mount_and_a_killed_daemon, volumes_are_what_was_asked_for,
    what_cannot_be_mounted_is_refused_by_name,
};

fn main() -> ExitCode {
    let containerd = Containerd { thin_pool: thin_pool::missing().is_none(), ..Containerd::given() };
    suite::in_lab(
        suite::deadline(),
        containerd,
        &[QEMU, QEMU_9P, QEMU_INITRD],
        cases![
            pod_life_is_idempotent,
            exit_codes_arrive,
            the_want_of_memory_is_a_reason,
            a_pod_of_the_least_size_works,
            what_kubelet_sends_starts_and_is_resized,
            a_pod_lives_in_the_cgroup_that_kubelet_made,
            memory_that_a_guest_frees_is_the_hosts_again,
            exec_of_a_command_that_does_not_exist,
            a_command_that_does_not_exist,
            an_image_of_another_architecture,
            two_images_in_one_pod,
            a_container_restarts_in_a_living_pod,
            containers_of_a_pod_share_processes,
            a_pod_has_its_name_sysctls_and_shared_memory,
            a_wrong_clock_is_put_right,
            nobody_calls_a_guest_that_is_not_up,
            a_guest_is_reached_any_number_of_times,
            a_kernel_panic_is_the_reason_of_a_pods_end,
            pause_resume_figures_pids_and_limits,
            a_paused_container_can_be_ended,
            limits_beyond_the_vm_are_refused,
            the_daemon_traces_where_time_goes,
            independent_steps_go_on_side_by_side,
            exec_reads_stdin_to_its_end,
            exec_with_a_terminal,
            two_streams_stay_apart,
            ten_mebibytes_of_log_are_complete,
            two_streams_stay_apart_over_streams,
            ten_mebibytes_of_log_over_streams,
            execs_of_many_sizes_over_streams,
            pod_answers_at_its_ip,
            guest_kernel_is_not_the_hosts,
            guest_runs_without_virtiofsd,
            guest_runs_from_the_initrd,
            pods_with_namespaces_that_a_vm_cannot_have_are_refused,
            containers_with_what_is_the_hosts_are_refused,
            profiles_and_huge_pages_of_the_host_are_refused,
            checkpoints_are_refused,
            devices_of_every_guest_are_passed,
            devices_are_bound_from_the_guest,
            figures_of_pods_never_fail,
            a_killed_daemon_finds_its_pods_again,
            pods_are_stopped_and_removed_while_run_is_full,
            a_daemon_killed_while_a_pod_starts,
            a_daemon_killed_while_a_container_is_made,
            a_daemon_killed_while_a_pod_stops,
            a_daemon_killed_while_a_container_is_deleted,
            a_relay_killed_while_its_pod_ends,
            a_containerd_killed_while_a_pod_starts,
            the_daemon_dies_in_every_phase,
            a_killed_vm_is_a_pod_that_is_not_ready_and_says_why,
            a_pod_that_containerd_forgot_is_collected,
            a_pod_whose_record_cannot_be_read_is_removed,
            a_pods_cpus_are_counted_apart,
            a_pod_is_below_its_cgroup_and_unlimited_stays_unlimited,
            a_guest_runs_on_the_cpus_of_its_containers,
            a_container_sees_the_processes_of_its_target,
            processes_have_only_what_they_need,
            a_log_is_complete_across_a_restart_of_containerd,
            a_log_is_complete_across_a_restart_over_streams,
            a_killed_relay_ends_its_pod_and_no_other,
            a_hung_guest_holds_nobody_up_and_can_be_removed,
            a_container_of_a_hung_guest_is_stopped,
            volumes_are_what_was_asked_for,
            updates_of_a_projected_volume_arrive,
            mounts_of_the_host_arrive_later,
            a_volume_can_be_read_only_with_all_below,
            a_volume_in_memory_has_its_size,
            what_cannot_be_mounted_is_refused_by_name,
            containers_share_a_volume_as_one,
            a_volume_is_read_only_until_somebody_writes,
            containers_share_a_volume_by_9p,
            a_guest_cannot_lead_the_host_astray,
            containers_talk_to_a_socket_of_the_host,
            sockets_are_served_while_the_daemon_is_away,
            capabilities_of_files_hold,
            an_overlay_has_its_upper_folder_in_a_volume,
            access_lists_of_a_volume_hold,
            what_a_mount_forbids_is_forbidden,
            many_files_are_all_found,
            privileged_containers_have_the_guests_devices,
            a_node_in_a_volume_is_no_disk_of_the_host,
            files_without_a_length_are_refused,
            a_root_has_any_number_of_layers,
            shared_memory_is_the_pods,
            users_files_survive_a_busy_mount_and_a_killed_daemon,
            a_vm_without_its_file_server_ends,
        ]
        .into_iter()
        .chain(suite::unless(figures::missing(), cases![a_pod_is_resized]))
        .chain(suite::unless(verity::missing(), cases![a_damaged_image_is_the_reason_of_a_pods_end]))
        .chain(disk_cases())
        .chain(layer_cases())
        .chain(long_cases())
        .collect(),
    )
}

fn disk_cases() -> Vec<Case<Lab>> {
    let mut cases = suite::unless(
        disks::missing(),
        cases![
            a_disk_is_a_device_of_the_container,
            a_disk_that_is_bound_is_a_node,
            the_file_system_of_a_disk_is_a_volume,
            a_vm_ends_with_its_disks,
            a_hung_vm_gives_its_disks_back,
            a_vmm_that_stands_still_while_the_daemon_restarts_goes_on,
            a_hung_volume_is_its_own_trouble,
            a_root_is_an_image_file,
        ],
    );
    cases.extend(suite::unless(thin_pool::missing(), cases![a_root_is_a_device_of_the_mapper]));
    cases
}

fn layer_cases() -> Vec<Case<Lab>> {
    let mut cases = suite::unless(
        layers::missing(),
        cases![a_root_is_made_of_erofs_layers, a_root_of_more_erofs_layers_than_slots],
    );
    cases.extend(suite::unless(layers::missing_mounted(), cases![roots_of_mounted_erofs_layers]));
    cases.extend(cases![roots_that_are_folders]);
    cases
}

/// Those that `make check` has no time for.
fn long_cases() -> Vec<Case<Lab>> {
    let missing = (!suite::is_full())
        .then(|| "it takes long, and runs in `make check-all` (KUASAR_ENDURANCE=full)".to_owned());
    suite::unless(
        missing,
        cases![
            containerd_dies_in_every_phase,
            containerd_dies_in_every_phase_over_streams,
            a_containerd_killed_while_a_container_is_made,
            a_relay_killed_in_every_phase,
            a_pod_whose_start_is_cancelled_leaves_nothing,
        ],
    )
}

/// A command that keeps a container alive and ends at once when asked to, as soon as there is a file `/up`.
const IDLE: &[&str] =
    &["/bin/sh", "-c", "trap 'exit 0' TERM; touch /up; while :; do sleep 1000 & wait; done"];
