//! The chart and the file that is rendered from it, checked by helm and by dry runs against an API server. Nothing is
//! created.

use std::fs;

use mesh_tests::{AUTH_DAEMON_IMAGE, Context, Kubernetes, Result, chart};
use serde_json::{Value, json};

/// Sets of values, with a name: the defaults, and each way to deviate from them.
fn values() -> [(&'static str, Value); 4] {
    let everything = json!({
        "image": {"repository": "registry.example.com/auth-daemon", "pullPolicy": "Always"},
        "imagePullSecrets": ["registry"],
        "trustDomain": "example.org", "mode": "STRICT",
        "podNetworks": ["10.244.0.0/16"], "serviceNetworks": ["10.96.0.0/16", "fd00:96::/112"],
        "daemon": {
            "config": {"nonTcp": "deny", "log": {"level": "debug"}},
            "drainSeconds": 60, "maxSurge": "5%", "nodeTaint": true,
            "resources": {"limits": {"memory": "2Gi"}},
        },
        "ca": {
            "config": {"certificateLifetime": "1h"}, "replicas": 3, "separateNodes": true,
            "clients": ["10.0.0.0/8", "fd00::/8"],
        },
        "priorityQuota": true,
    });
    let elsewhere = json!({
        "ca": {
            "enabled": false, "address": "istiod.istio-system.svc:15012", "audience": "istio-ca",
            "rootConfigMap": "istio-ca-root-cert",
        },
    });
    let istio = json!({
        "istio": {
            "enabled": true, "address": "istiod.mesh.svc:15012", "rootConfigMap": "mesh-roots",
            "clusterId": "c1", "network": "n1",
        },
    });
    [
        ("the defaults", json!({})),
        ("every value", everything),
        ("a CA elsewhere", elsewhere),
        ("an Istio mesh", istio),
    ]
}

/// Renders the chart with these values, hooks included.
fn rendered(values: &Value) -> Result<String> {
    // `--set-json` takes one top-level value each.
    let sets = values.as_object().context("no object")?.iter();
    let sets = sets.flat_map(|(name, value)| ["--set-json".to_owned(), format!("{name}={value}")]);
    let chart = chart::folder().display().to_string();
    let template = [
        "template",
        "x",
        &chart,
        "--namespace",
        chart::SYSTEM_NAMESPACE,
    ];
    chart::helm(template.map(str::to_owned).into_iter().chain(sets))
}

/// Prints why a test is skipped, and returns true, if helm is missing.
fn skipped(test: &str) -> bool {
    let missing = chart::helm_missing();
    if let Some(why) = &missing {
        println!("SKIPPED {test}: {why}");
    }
    missing.is_some()
}

#[test]
fn rendered_file_is_of_this_chart() -> Result<()> {
    let rendered = fs::read_to_string(chart::rendered_file())?;
    let current = "`cargo xtask chart` renders it again";
    assert_eq!(
        chart::rendered_digest(&rendered),
        Some(chart::digest()?.as_str()),
        "{current}"
    );
    if !skipped("rendered_file_is_of_this_chart") {
        assert!(rendered == chart::render()?, "{current}");
    }
    Ok(())
}

#[test]
fn helm_accepts_the_chart() -> Result<()> {
    if skipped("helm_accepts_the_chart") {
        return Ok(());
    }
    let chart = chart::folder().display().to_string();
    let lint = chart::helm(["lint", "--strict", &chart])?;
    assert!(lint.contains("0 chart(s) failed"), "{lint}");
    Ok(())
}

#[test]
fn values_that_the_schema_does_not_know_are_refused() -> Result<()> {
    if skipped("values_that_the_schema_does_not_know_are_refused") {
        return Ok(());
    }
    for (values, message) in [
        (
            json!({"mod": "STRICT"}),
            "additional properties 'mod' not allowed",
        ),
        (
            json!({"daemon": {"drain": 5}}),
            "additional properties 'drain' not allowed",
        ),
        (json!({"mode": "strict"}), "/mode"),
        (json!({"podNetworks": ["10.0.0.1"]}), "/podNetworks/0"),
        (json!({"ca": {"enabled": false}}), "/ca/address"),
        (json!({"ca": {"address": "elsewhere:15012"}}), "/ca/address"),
    ] {
        let error = rendered(&values)
            .err()
            .with_context(|| format!("accepted: {values}"))?;
        let error = format!("{error:#}");
        assert!(error.contains(message), "{values}: {error}");
    }
    Ok(())
}

#[test]
fn api_server_accepts_every_object_without_warning() -> Result<()> {
    let test = "api_server_accepts_every_object_without_warning";
    if skipped(test) {
        return Ok(());
    }
    let Some(cluster) = Kubernetes::shared(test) else {
        return Ok(());
    };
    // A dry run creates nothing, so the objects' namespace must exist.
    cluster.apply(&chart::rendered_file())?;
    let file = std::env::temp_dir().join(format!("chart-{}.yaml", std::process::id()));
    for (what, values) in values() {
        let objects = rendered(&values)?;
        fs::write(&file, &objects)?;
        let path = file.display().to_string();
        let apply = [
            "apply",
            "--dry-run=server",
            "--validate=strict",
            "-f",
            &path,
        ];
        let answer = cluster
            .kubectl(apply)
            .and_then(|finished| finished.ok())
            .context(what)?;
        let accepted = answer.stdout.lines().count();
        let sent = objects
            .lines()
            .filter(|line| line.starts_with("kind: "))
            .count();
        assert_eq!(accepted, sent, "{what}: {}", answer.stdout);
        assert_eq!(answer.stderr, "", "{what}");
    }
    fs::remove_file(&file)?;
    Ok(())
}

#[test]
fn pods_use_the_image_that_xtask_builds() -> Result<()> {
    let rendered = fs::read_to_string(chart::rendered_file())?;
    let name = AUTH_DAEMON_IMAGE.trim_start_matches("docker.io/library/");
    let images: Vec<&str> = rendered
        .lines()
        .filter_map(|line| line.trim().strip_prefix("image: "))
        .collect();
    assert_eq!(images, [format!("\"{name}\""), format!("\"{name}\"")]);
    Ok(())
}
