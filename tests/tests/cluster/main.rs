//! deploy/ on a real Kubernetes of two nodes, shown with kubectl and curl: one cluster, step after step.

mod ca;
mod changes;
mod load;
mod outages;
mod removal;
mod stage;
mod traffic;

#[path = "../common/lifecycle_traces.rs"]
mod traces;

use std::time::Instant;

use mesh_tests::{Cluster, Context, Result};

use crate::stage::Stage;

type Step = fn(&Stage) -> Result<()>;

/// What is shown, in this order: each step goes on from the cluster that the one before has left.
const STEPS: [(&str, Step); 19] = [
    (
        "one of two CA replicas leads, and the service finds it",
        ca::one_leads,
    ),
    ("the roots are in every namespace", ca::roots_are_everywhere),
    (
        "a killed leader is replaced, with the same root",
        ca::the_leader_is_replaced,
    ),
    ("a daemon is ready on each node", stage::daemons_are_ready),
    (
        "apps start, and their probes pass in STRICT",
        traffic::apps_start,
    ),
    (
        "pods reach a service and each other, with TLS 1.3 between the nodes",
        traffic::pods_talk_tls,
    ),
    ("the access log says who called", traffic::the_log_says_who),
    (
        "who is outside of the mesh is refused",
        traffic::outsiders_are_refused,
    ),
    (
        "a label takes a running pod out and in",
        changes::a_label_takes_out_and_in,
    ),
    (
        "a wrong label and a wrong configuration are named",
        changes::mistakes_are_named,
    ),
    (
        "a daemon that could serve no pod says what it lacks",
        changes::what_a_daemon_lacks_is_named,
    ),
    (
        "a Deployment scaled 1 to 20 to 0 loses no request",
        load::scaling_loses_nothing,
    ),
    (
        "a node's daemon restarts, and others' connections go on",
        load::a_restart_is_its_nodes,
    ),
    ("a rolling update of all daemons", load::a_rolling_update),
    (
        "the next daemons stand by, and take over",
        load::the_next_daemons_stand_by,
    ),
    (
        "the CA's pods are killed, and traffic goes on",
        outages::without_the_ca,
    ),
    (
        "a minute without the API server",
        outages::without_the_api_server,
    ),
    (
        "the apps have not been restarted, nor failed a probe",
        traffic::probes_have_passed,
    ),
    (
        "what is deleted leaves nothing, and pods talk plainly",
        removal::nothing_is_left,
    ),
];

#[test]
fn deploy_on_a_cluster_of_two_nodes() -> Result<()> {
    if let Some(why) = Cluster::missing() {
        println!("SKIPPED deploy_on_a_cluster_of_two_nodes: {why}");
        return Ok(());
    }
    let start = Instant::now();
    let stage = Stage::set()?;
    println!(
        "the cluster is up, with deploy/ applied: {:.1?}",
        start.elapsed()
    );
    for (number, (name, step)) in (1..).zip(STEPS) {
        let start = Instant::now();
        let done = step(&stage);
        let elapsed = start.elapsed();
        if done.is_err() {
            // Before it goes.
            stage.cluster.print_state();
            stage.print_logs();
        }
        done.with_context(|| format!("step {number}, {name}, after {elapsed:.1?}"))?;
        println!("{number:2}. {name}: {elapsed:.1?}");
    }
    Ok(())
}
