//! Measurements, which take minutes and depend on what else the machine does. They run instead of the other steps if
//! [`PODS`] is set.

use std::collections::HashMap;
use std::env;

use mesh_tests::{Context, Result, eventually_ok};
use serde_json::Value;

use crate::churn;
use crate::load::second_of_day;
use crate::stage::{
    APPS, DAEMON, NODES, PATIENCE, SYSTEM, Stage, account, daemons_are_ready, ensure, name,
    pods_are_gone,
};
use crate::starts::{Start, starts};

/// The environment variable with the number of pods that are started in each way.
pub(crate) const PODS: &str = "KUBE_MEASURE";
/// The number of pods that start at the same time, on both nodes together.
const AT_ONCE: usize = 10;

/// What is known of the start of pods, in milliseconds, sorted.
struct Sample {
    /// How long the runtime took for their sandboxes.
    sandboxes: Vec<f64>,
    /// From the beginning of that until they were enrolled.
    enrolled: Vec<f64>,
    /// Pods that had a socket before they were enrolled.
    unserved: usize,
}

/// How long a pod's start takes without and with the daemon as a plugin of the runtime.
pub(crate) fn pod_starts(stage: &Stage) -> Result<()> {
    let pods = env::var(PODS)?.parse().context(PODS)?;
    stage.apply(&[account("churn"), churn::deployment()])?;
    let mut p99 = Vec::new();
    for nri in [false, true] {
        let option = format!("daemon.nri={nri}");
        stage.helm("upgrade", &["--reuse-values", "--set", &option])?;
        daemons_are_ready(stage)?;
        eventually_ok(PATIENCE, "the end of the old daemons", || {
            let list = stage.get(&format!("pods -n {SYSTEM} -l {DAEMON}"))?;
            let left = list["items"].as_array().map_or(0, Vec::len);
            ensure(left == NODES.len(), || format!("{left} pods"))
        })?;
        // The first pods fill caches.
        sample(stage, AT_ONCE)?;
        let sample = sample(stage, pods)?;
        println!(
            "    {pods} pods, plugin {}: sandbox p50 {:.0} ms, p99 {:.0} ms; enrolled after p50 {:.0} ms, p99 {:.0} ms; {} \
             had a socket before",
            if nri { "on" } else { "off" },
            percentile(&sample.sandboxes, 50),
            percentile(&sample.sandboxes, 99),
            percentile(&sample.enrolled, 50),
            percentile(&sample.enrolled, 99),
            sample.unserved,
        );
        ensure(!nri || sample.unserved == 0, || {
            "the runtime did not wait for the daemon".to_owned()
        })?;
        p99.push(percentile(&sample.sandboxes, 99));
    }
    println!("    added to p99: {:.0} ms", p99[1] - p99[0]);
    stage
        .kubectl(&format!(
            "delete -n {APPS} deployment/churn serviceaccount/churn"
        ))
        .map(drop)
}

/// Starts this many pods, some at a time, and deletes them.
fn sample(stage: &Stage, pods: usize) -> Result<Sample> {
    let mut sample = Sample {
        sandboxes: Vec::new(),
        enrolled: Vec::new(),
        unserved: 0,
    };
    while sample.sandboxes.len() < pods {
        churn::scale(stage, AT_ONCE)?;
        stage.rolled_out(APPS, "deployment/churn")?;
        let enrolments = enrolments(stage)?;
        let mut sandboxes: HashMap<String, Start> = HashMap::new();
        for node in stage.cluster.nodes() {
            sandboxes.extend(starts(node)?);
        }
        for pod in stage.pods(APPS, "app=churn")? {
            let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
            let start = sandboxes
                .get(uid)
                .context("no start in the runtime's log")?;
            let pod = format!("{APPS}/{}", name(&pod));
            let enrolled = enrolments
                .get(&pod)
                .with_context(|| format!("{pod} is not enrolled"))?;
            sample.sandboxes.push(start.took());
            sample.enrolled.push((enrolled.0 - start.begin) * 1000.0);
            sample.unserved += usize::from(enrolled.1);
        }
        churn::scale(stage, 0)?;
        pods_are_gone(stage, APPS, "app=churn")?;
    }
    for times in [&mut sample.sandboxes, &mut sample.enrolled] {
        times.sort_by(f64::total_cmp);
    }
    Ok(sample)
}

/// When pods were enrolled, in seconds since midnight, and whether they had a socket before.
fn enrolments(stage: &Stage) -> Result<HashMap<String, (f64, bool)>> {
    let mut enrolments = HashMap::new();
    for node in NODES {
        let log = stage.daemon_log(node)?;
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        for line in lines.filter(|line: &Value| line["message"] == "pod enrolled") {
            let text = |field: &str| line[field].as_str().unwrap_or_default();
            let time = second_of_day(text("timestamp")).context("an enrolment without a time")?;
            let had_socket = line.get("unserved_microseconds").is_some();
            enrolments.insert(text("pod").to_owned(), (time, had_socket));
        }
    }
    Ok(enrolments)
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last * percent).div_ceil(100))
        .copied()
        .unwrap_or(f64::NAN)
}
