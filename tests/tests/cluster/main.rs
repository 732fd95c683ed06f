//! The chart on a real Kubernetes cluster of two nodes, exercised with helm, kubectl and curl: one cluster, step by step.

mod ca;
mod changes;
mod churn;
mod first_moments;
mod load;
mod measurements;
mod network_policy;
mod observability;
mod outages;
mod people;
mod reboot;
mod removal;
mod rights;
mod scheduling;
mod services;
mod stage;
mod starts;
mod traffic;
mod workloads;

#[path = "../common/terminal.rs"]
mod terminal;
#[path = "../common/lifecycle_traces.rs"]
mod traces;

use std::env;
use std::time::Instant;

use mesh_tests::{Cluster, Context, Result};

use crate::stage::Stage;

type Step = fn(&Stage) -> Result<()>;

/// All steps, in order. Each starts from the cluster as the step before left it. The first [`NEEDED`] prepare the others.
const STEPS: &[(&str, Step)] = &[
    (
        "one of two CA replicas leads, and the service selects it",
        ca::one_leads,
    ),
    ("each node has a ready daemon", stage::daemons_are_ready),
    (
        "apps start, and their probes pass in STRICT",
        traffic::apps_start,
    ),
    ("every namespace has the roots", ca::roots_are_everywhere),
    (
        "a killed leader is replaced, with the same root",
        ca::the_leader_is_replaced,
    ),
    (
        "pods reach a service and each other, with TLS 1.3 between nodes",
        traffic::pods_talk_tls,
    ),
    (
        "the access log names the callers",
        traffic::log_names_callers,
    ),
    (
        "status and observe show the whole cluster through the API server alone",
        observability::through_the_api_server,
    ),
    (
        "ui and top show the whole cluster through the API server alone",
        observability::page_and_table,
    ),
    (
        "a person outside the cluster reaches a STRICT service through the API server alone",
        people::connects_through_the_api_server,
    ),
    (
        "pods outside the mesh are refused",
        traffic::outsiders_are_refused,
    ),
    (
        "a NetworkPolicy of pods and ports means the same for tunnels",
        network_policy::names_pods_and_ports,
    ),
    (
        "NodePorts follow the rules for callers outside the mesh",
        services::node_ports,
    ),
    (
        "NodePorts and host ports that pods of the mesh dial are tunnelled",
        services::exposed_ports,
    ),
    (
        "services with hand-made endpoints, with a load balancer's address and ExternalNames are tunnelled",
        services::other_services,
    ),
    (
        "pods of a StatefulSet are reached at their own addresses",
        services::stateful_set,
    ),
    (
        "an init container's first connection is tunnelled",
        services::first_connects,
    ),
    (
        "requests of native sidecars, ephemeral containers and Jobs are tunnelled",
        workloads::containers_of_every_kind,
    ),
    (
        "kubectl port-forward reaches a STRICT pod",
        workloads::port_forward,
    ),
    (
        "policies take effect once their CRDs exist",
        changes::policies_take_effect,
    ),
    (
        "something else's change of the roots is reverted",
        ca::roots_are_restored,
    ),
    ("the CA stores a revocation", ca::revocation_is_stored),
    (
        "a label removes a running pod from the mesh and adds it again",
        changes::label_changes_membership,
    ),
    (
        "a wrong label and a wrong configuration are reported",
        changes::mistakes_are_reported,
    ),
    (
        "a daemon that cannot serve reports what it lacks",
        changes::daemon_reports_what_it_lacks,
    ),
    (
        "a static pod is outside the mesh, and starts at once",
        scheduling::static_pod_starts,
    ),
    (
        "pods wait for a node's daemon, because of a taint that only daemons change",
        scheduling::pods_wait_for_the_daemon,
    ),
    (
        "a pod that starts on a node without a daemon is closed until there is one",
        first_moments::pod_without_a_daemon_is_closed,
    ),
    (
        "an evicted pod is released",
        workloads::evicted_pod_is_released,
    ),
    (
        "scaling a Deployment from 1 to 20 to 0 loses no request",
        load::scaling_loses_no_request,
    ),
    (
        "draining a node moves its pods, and the CA, under load",
        workloads::node_is_drained,
    ),
    (
        "creating and deleting many pods leaves nothing in the daemons",
        churn::many_pods,
    ),
    (
        "a rebooted node serves its pods again, and nothing stale is left",
        reboot::node_comes_back,
    ),
    (
        "restarting a node's daemon does not affect other nodes",
        load::restart_affects_one_node,
    ),
    (
        "an upgrade starts each new daemon as a standby, which takes over",
        load::upgrade,
    ),
    (
        "an upgrade that never becomes ready leaves the daemons serving, and is rolled back",
        load::failed_upgrade,
    ),
    (
        "rolling an upgrade back replaces the daemons in the same way",
        load::rollback,
    ),
    (
        "traffic continues for a minute without the API server",
        outages::without_the_api_server,
    ),
    (
        "traffic continues while the CA's pods are killed",
        outages::without_the_ca,
    ),
    (
        "the apps have not restarted or failed a probe",
        traffic::probes_have_passed,
    ),
    (
        "every API right that the chart grants was needed, and no request was forbidden",
        rights::all_are_used,
    ),
    (
        "helm uninstall leaves nothing on the nodes, and pods communicate in plaintext",
        removal::helm_uninstall,
    ),
    (
        "the rendered file installs daemons, and deleting it leaves nothing behind",
        removal::rendered_file,
    ),
];

const NEEDED: usize = 3;
/// The environment variable that limits the run to steps whose name contains it, or one of several texts separated by
/// commas, besides those that are needed.
const ONLY: &str = "KUBE_STEPS";

#[test]
fn chart_on_a_cluster_of_two_nodes() -> Result<()> {
    if let Some(why) = Cluster::missing() {
        println!("SKIPPED chart_on_a_cluster_of_two_nodes: {why}");
        return Ok(());
    }
    let start = Instant::now();
    let stage = stage::set()?;
    println!(
        "the cluster is up, with the chart installed: {:.1?}",
        start.elapsed()
    );
    let only = env::var(ONLY).unwrap_or_default();
    let measurements: [(&str, Step); 1] = [("pods start", measurements::pod_starts)];
    let steps = match env::var_os(measurements::PODS) {
        Some(_) => [&STEPS[..NEEDED], &measurements].concat(),
        None => STEPS.to_vec(),
    };
    for (number, (name, step)) in (1..).zip(steps) {
        if number > NEEDED && !only.split(',').any(|text| name.contains(text)) {
            continue;
        }
        let start = Instant::now();
        let done = step(&stage);
        let elapsed = start.elapsed();
        if let Err(error) = &done {
            // Printed first, because what follows is long, and now, because the cluster is about to be removed.
            println!("{number:2}. {name}: FAILED after {elapsed:.1?}: {error:#}");
            stage.cluster.print_state();
            stage.print_logs();
        }
        done.with_context(|| format!("step {number}, {name}, after {elapsed:.1?}"))?;
        println!("{number:2}. {name}: {elapsed:.1?}");
    }
    Ok(())
}
