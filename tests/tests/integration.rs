//! Every scenario on this machine. One test binary; each test prints `skipped: <reason>` where it
//! cannot run.

#![allow(clippy::unwrap_used, reason = "a test's panic is its error report")]

use gantry_tests::cluster::Installation;
use gantry_tests::scenario;

fn run(name: &str) {
    let installation = match Installation::find() {
        Ok(installation) => installation,
        Err(reason) => return eprintln!("skipped: {name}: {reason}"),
    };
    let scenario = scenario::ALL.iter().find(|s| s.name == name).unwrap();
    match scenario.run(&installation) {
        Ok(()) => {}
        Err(error) if error.is::<scenario::Skipped>() => eprintln!("skipped: {name}: {error}"),
        Err(error) => panic!("{error:#}"),
    }
}

/// One test a scenario: a module with the scenario's name, and in it the claim.
macro_rules! scenarios {
    ($($name:ident: $claim:ident,)*) => {
        $(mod $name {
            #[test]
            fn $claim() {
                super::run(&stringify!($name).replace('_', "-"));
            }
        })*

        #[test]
        fn every_scenario_is_a_test_here() {
            let here = [$(stringify!($name).replace('_', "-")),*];
            let all: Vec<&str> = scenario::ALL.iter().map(|s| s.name).collect();
            assert_eq!(all, here, "in the order of scenario::ALL");
        }
    };
}

scenarios! {
    main_job: three_replicas_answer_by_name_from_host_and_pod,
    limits: limits_are_in_the_kernels_files,
    devices: a_write_to_a_host_device_fails,
    isolation: capabilities_seccomp_and_masks_hold_for_init_and_exec,
    agent_kill: killing_the_agent_changes_nothing_and_loses_nothing,
    control_kill: killing_the_control_plane_loses_nothing_acknowledged,
    restore: pods_go_on_with_the_same_processes_when_a_backup_takes_the_stores_place,
    probes_and_restarts: probes_gate_and_restart_and_policies_hold,
    bad_input: bad_input_gets_a_clear_error,
    logs_and_exec: logs_follow_and_exec_returns_the_exit_code,
    security: users_profiles_and_sysctls_hold_and_refusals_say_why,
    user_namespaces: root_inside_is_nobody_outside_and_no_two_pods_share_ids,
    volumes: volumes_are_what_the_kernel_shows_and_secrets_are_on_no_disk,
    life_cycle: init_containers_sidecars_hooks_and_ends_keep_their_order,
    processes: containers_share_processes_and_memory_as_asked,
    resources: limits_resize_oom_and_pressure_are_seen_and_explained,
    guarantees: requests_weights_own_cpus_and_huge_pages_are_the_kernels,
    node_pressure: the_pod_that_takes_most_goes_and_says_why_when_disk_or_process_ids_run_out,
    streams: clients_attach_copy_and_forward_ports,
    static_pods: they_run_without_a_control_plane_and_no_deletion_stops_them,
    shutdown: pods_end_in_order_and_say_why,
    images: they_are_listed_removed_sent_and_refused_in_words,
    bad_pods: a_pod_that_goes_wrong_says_why_and_its_neighbour_notices_nothing,
    leaks: fifty_pods_execs_and_probes_leave_nothing_in_agent_and_kernel,
    workloads: claims_are_mounted_kept_and_deleted_and_every_pod_has_its_token,
    policies: what_holds_a_namespace_back_is_said_and_an_autoscaler_and_a_drain_heed_it,
    rolling_update: no_request_is_lost_and_events_say_who_was_waited_for,
    device_plugins: a_pod_gets_its_device_keeps_it_and_nobody_else_opens_it,
    csi_volumes: volumes_of_a_driver_are_staged_published_and_taken_back,
    nfs: exports_are_shared_and_a_dead_server_holds_up_nobody,
    no_ebpf: a_kernel_that_refuses_ebpf_is_answered_with_what_to_do,
    missing_controller: a_limit_that_cannot_be_held_is_refused_and_other_pods_run,
    reboot: pods_and_services_are_back_without_the_control_plane,
    host_port: a_port_of_the_node_is_a_pods_until_the_pod_has_gone,
    network_policy: traffic_is_what_the_policies_allow_and_stays_so_over_restarts,
    restarts_under_load: no_connection_is_refused_or_reset_while_the_agent_is_killed_again_and_again,
    names: they_are_answered_in_one_hop_and_kills_lose_no_query,
    see: flows_have_names_and_reasons_and_explanations_are_what_happens,
    tunnel: nodes_without_a_common_link_reach_each_other_by_vxlan,
    join: a_machine_joins_by_its_line_runs_pods_is_drained_and_refused_when_deleted,
    routed_pods: pods_without_a_bridge_and_ports_of_it_reach_each_other_and_everybody_them,
    tokens: a_pods_token_is_renewed_in_time_and_ends_with_it,
    unkillable: a_process_that_nothing_ends_is_told_and_its_neighbours_notice_nothing,
}

mod sweep {
    use gantry_tests::sweep::{self, Choice};

    /// `cargo xtask test --sweep all|SEED|POINTS` sets the variable; else one sample is tried.
    #[test]
    fn a_kill_at_any_system_call_is_repaired_and_leaves_nothing() {
        let installation = match super::Installation::find() {
            Ok(installation) => installation,
            Err(reason) => return eprintln!("skipped: sweep: {reason}"),
        };
        let strace = std::process::Command::new("strace").arg("-V").output();
        if strace.is_err() {
            return eprintln!("skipped: sweep: strace is not installed");
        }
        let choice = std::env::var("GANTRY_SWEEP").unwrap_or_else(|_| "1".into());
        let choice = Choice::parse(&choice).unwrap();
        sweep::run(&installation, &choice).unwrap();
    }
}
