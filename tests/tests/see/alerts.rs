//! The rules for Prometheus in `deploy/prometheus`.

use std::{collections::BTreeSet, path::Path, process::Command};

use anyhow::ensure;
use mesh_tests::{DaemonOptions, Process, TIMEOUT, eventually_ok};
use serde_json::json;

use crate::common::lifecycle_pair::{Echoing, call, echoes, pair};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/prometheus");

/// Runs promtool, if it is installed.
fn promtool(test: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("promtool");
    command.args(arguments).current_dir(FOLDER);
    match Process::spawn(command) {
        Ok(process) => {
            let finished = process.finish(TIMEOUT).unwrap();
            Some(finished.ok().unwrap().stdout)
        }
        Err(_) => {
            println!("SKIPPED {test}: promtool is not installed (Debian package prometheus)");
            None
        }
    }
}

#[test]
fn rules_are_valid_and_each_alert_fires_once() {
    let test = "rules_are_valid_and_each_alert_fires_once";
    let rules = std::fs::read_to_string(Path::new(FOLDER).join("rules.yaml")).unwrap();
    let tests = std::fs::read_to_string(Path::new(FOLDER).join("tests.yaml")).unwrap();
    let alerts = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "));
    for alert in alerts {
        let fires =
            format!("        alertname: {alert}\n        exp_alerts:\n          - exp_labels");
        assert_eq!(tests.matches(&fires).count(), 1, "a test of {alert}");
    }
    if let Some(output) = promtool(test, &["check", "rules", "rules.yaml"]) {
        assert!(output.contains("SUCCESS"), "{output}");
        let output = promtool(test, &["test", "rules", "tests.yaml"]).unwrap();
        assert!(output.contains("SUCCESS"), "{output}");
    }
}

#[test]
fn rules_use_metrics_that_a_daemon_has() {
    let Echoing {
        b,
        client,
        web,
        mesh,
        ..
    } = &Echoing::on(
        pair(),
        &DaemonOptions::default().setting(
            "federation",
            json!([{"trustDomain": "far.example", "bundleFile": "/nowhere"}]),
        ),
    );
    // Counters appear once they count: a connection, one refused for plaintext, one by a policy.
    echoes(client, web.at(8080));
    assert_eq!(call(mesh.outside(), web.at(8080))["event"], "failed");
    let deny = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "all", "namespace": "default"},
        "spec": {"action": "DENY", "rules": [{}]},
    });
    mesh.manifests().apply(&deny).unwrap();
    let rules = std::fs::read_to_string(Path::new(FOLDER).join("rules.yaml")).unwrap();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut names: BTreeSet<_> = rules
        .split(|c| !is_name(c))
        .filter(|word| word.starts_with("auth_daemon_") && !word.contains(':'))
        .collect();
    // Only of a daemon with an API server: lifecycle/remote_clusters.rs looks for it.
    assert!(names.remove("auth_daemon_remote_cluster_readable"));
    assert!(names.len() > 8, "{names:?}");
    eventually_ok(TIMEOUT, "all metrics of the rules", || {
        // A connection that is open when the policy comes into force is ended, not denied: try until one is denied.
        call(client, web.at(8080));
        let metrics = b.metrics()?;
        // Only with `metrics: istio`.
        assert!(!metrics.contains("istio_"), "{metrics}");
        for name in &names {
            let declared = format!("# TYPE {} ", name.trim_end_matches("_total"));
            ensure!(metrics.contains(&declared), "{name} is not in\n{metrics}");
        }
        Ok(())
    })
    .unwrap();
}
