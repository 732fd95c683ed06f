//! The chart and the file that is rendered from it, checked by helm and by dry runs against an API server. Nothing is
//! created.

use std::fs;

use mesh_tests::{AUTH_DAEMON_IMAGE, Context, Kubernetes, Result, chart};
use serde_json::{Value, json};

/// Sets of values, with a name: the defaults, and each way to deviate from them.
fn values() -> [(&'static str, Value); 4] {
    let everything = json!({
        "image": {
            "repository": "registry.example.com/auth-daemon", "tag": "1", "pullPolicy": "Always",
        },
        "imagePullSecrets": ["registry"],
        "trustDomain": "example.org", "mode": "STRICT", "metrics": "istio",
        "podNetworks": ["10.244.0.0/16"], "serviceNetworks": ["10.96.0.0/16", "fd00:96::/112"],
        "daemon": {
            "config": {"nonTcp": "deny", "log": {"level": "debug"}},
            "drainSeconds": 60, "maxSurge": "5%", "nri": false, "nodeTaint": true,
            "workloadApiSocket": true,
            "resources": {"limits": {"memory": "2Gi"}},
        },
        "ca": {
            "config": {"certificateLifetime": "1h"}, "replicas": 3, "separateNodes": true,
            "clients": ["10.0.0.0/8", "fd00::/8"], "resources": {"limits": {"memory": "1Gi"}},
        },
        "priorityQuota": true,
        "remoteClusters": {
            "namespace": "auth-clusters",
            "trustDomains": [{"cluster": "east", "trustDomain": "east.example"}],
        },
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

/// Values that no set of [`values`] needs: what Helm itself adds, and what only the rendered file uses.
const NOT_IN_SETS: [&str; 2] = ["global", "namespace"];

/// The properties of an object in the chart's schema.
fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema["properties"].as_object().into_iter().flatten()
}

/// Checks that an object of the schema accepts no property that it does not name, and that each is in some of the sets.
fn check_object(path: &str, schema: &Value, sets: &[Value]) {
    assert_eq!(schema["additionalProperties"], false, "{path:?}");
    for (name, property) in properties(schema) {
        let path = format!("{path}/{name}");
        let sets: Vec<_> = sets.iter().filter_map(|set| set.get(name)).collect();
        let sets: Vec<Value> = sets.into_iter().cloned().collect();
        assert!(
            !sets.is_empty() || NOT_IN_SETS.contains(&name.as_str()),
            "{path} is in none of the sets"
        );
        if property["properties"].is_object() && !sets.is_empty() {
            check_object(&path, property, &sets);
        }
    }
}

#[test]
fn schema_covers_every_value() -> Result<()> {
    let chart = chart::folder();
    let schema = fs::read(chart.join("values.schema.json"))?;
    let schema: Value = serde_json::from_slice(&schema)?;
    check_object("", &schema, &values().map(|(_, set)| set));
    // The templates use no value that the schema does not know.
    let mut used = 0;
    for template in fs::read_dir(chart.join("templates"))? {
        let template = template?.path();
        let text = fs::read_to_string(&template)?;
        for expression in text.split(".Values.").skip(1) {
            let end = expression.find(|c: char| !c.is_ascii_alphanumeric() && c != '.');
            let path = &expression[..end.unwrap_or(expression.len())];
            let mut here = &schema;
            for name in path.split('.') {
                here = &here["properties"][name];
                assert!(here.is_object(), "{}: {path}", template.display());
            }
            used += 1;
        }
    }
    assert!(used > 20, "{used}");
    Ok(())
}

/// An object of the rendered file, as the API server has it.
fn object(cluster: &Kubernetes, what: &str) -> Result<Value> {
    let namespace = ["-n", chart::SYSTEM_NAMESPACE, "-o", "json"];
    let got = ["get", what].into_iter().chain(namespace);
    let got = cluster.kubectl(got)?.ok()?.stdout;
    serde_json::from_str(&got).with_context(|| what.to_owned())
}

/// The specification of the pods of a Deployment or DaemonSet, and of their only container.
fn pod_and_container(object: &Value) -> Result<(&Value, &Value)> {
    let template = &object["spec"]["template"];
    let annotations = template["metadata"]["annotations"].to_string();
    assert!(!annotations.contains("apparmor"), "{annotations}");
    let pod = &template["spec"];
    assert_eq!(pod["initContainers"], Value::Null);
    let containers = pod["containers"].as_array().context("no containers")?;
    let [container] = containers.as_slice() else {
        panic!("{containers:?}");
    };
    Ok((pod, container))
}

fn pods_have_the_least_rights(cluster: &Kubernetes) -> Result<()> {
    let namespace = object(cluster, &format!("namespace/{}", chart::SYSTEM_NAMESPACE))?;
    // The daemon needs namespaces and folders of the host.
    let enforced = &namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"];
    assert_eq!(enforced, "privileged");

    let runtime_default = json!({"type": "RuntimeDefault"});
    let daemons = object(cluster, "daemonset/auth-daemon")?;
    let (pod, daemon) = pod_and_container(&daemons)?;
    let rights = &daemon["securityContext"];
    assert_eq!(rights["readOnlyRootFilesystem"], true);
    assert_eq!(rights["seccompProfile"], runtime_default);
    assert_eq!(rights["appArmorProfile"], json!({"type": "Unconfined"}));
    assert_eq!(rights["privileged"], Value::Null);
    assert_eq!(rights["capabilities"]["drop"], json!(["ALL"]));
    let writable: Vec<_> = daemon["volumeMounts"]
        .as_array()
        .context("no mounts")?
        .iter()
        .filter(|mount| mount["readOnly"] != true)
        .map(|mount| mount["name"].clone())
        .collect();
    assert_eq!(writable, ["run", "bpf", "nri"]);
    assert_eq!(
        (&pod["hostPID"], &pod["hostNetwork"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(pod["hostIPC"], Value::Null);

    let replicas = object(cluster, "deployment/auth-ca")?;
    let (pod, ca) = pod_and_container(&replicas)?;
    let rights = &ca["securityContext"];
    assert_eq!(rights["readOnlyRootFilesystem"], true);
    assert_eq!(rights["allowPrivilegeEscalation"], false);
    assert_eq!(rights["capabilities"], json!({"drop": ["ALL"]}));
    let rights = &pod["securityContext"];
    assert_eq!(rights["runAsNonRoot"], true);
    assert_eq!(rights["seccompProfile"], runtime_default);
    for field in ["hostPID", "hostNetwork", "hostIPC"] {
        assert_eq!(pod[field], Value::Null, "{field}");
    }
    Ok(())
}

/// The CA's pods keep to the Pod Security Standard "restricted", according to the API server. The daemon's do not, which
/// shows that it checks.
fn ca_is_restricted(cluster: &Kubernetes) -> Result<()> {
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {
            "name": "restricted", "labels": {"pod-security.kubernetes.io/warn": "restricted"},
        },
    });
    let file = std::env::temp_dir().join(format!("restricted-{}.yaml", std::process::id()));
    let path = file.display().to_string();
    fs::write(&file, namespace.to_string())?;
    cluster.apply(&file)?;
    let chart = chart::folder().display().to_string();
    let warned = |template: &str| -> Result<bool> {
        let template = ["template", "x", &chart, "-n", "restricted", "-s", template];
        fs::write(&file, chart::helm(template)?)?;
        let apply = ["apply", "--dry-run=server", "-f", &path];
        let answer = cluster.kubectl(apply)?.ok()?;
        Ok(answer.stderr.contains("would violate PodSecurity"))
    };
    assert!(!warned("templates/ca.yaml")?);
    assert!(warned("templates/daemon.yaml")?);
    fs::remove_file(&file)?;
    Ok(())
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
        (
            json!({"remoteClusters": {"namespace": chart::SYSTEM_NAMESPACE}}),
            "reads the CA's keys",
        ),
        (
            json!({"remoteClusters": {"namespace": "x"}, "istio": {"enabled": true}}),
            "/remoteClusters/namespace",
        ),
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
    // A dry run creates nothing, so the objects' namespaces must exist.
    cluster.apply(&chart::rendered_file())?;
    let file = std::env::temp_dir().join(format!("chart-{}.yaml", std::process::id()));
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "auth-clusters"}});
    fs::write(&file, namespace.to_string())?;
    cluster.apply(&file)?;
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
    pods_have_the_least_rights(&cluster)?;
    ca_is_restricted(&cluster)
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
