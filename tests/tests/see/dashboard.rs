//! The dashboard for Grafana and the rules, in a real Prometheus that reads the daemons of a mesh.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{Node, Process, TIMEOUT, eventually_ok, http_get};
use serde_json::{Value, json};

use crate::common::lifecycle_pair::{Echoing, call, echoes, pair};

const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy");
const PROMETHEUS: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 9090);

/// A Prometheus on a node. Dropping it ends it.
struct Prometheus<'a> {
    node: &'a Node,
    process: Process,
}

impl<'a> Prometheus<'a> {
    /// Starts one on `node` that reads the daemons of `nodes` twice a second, with the rules of this project. `None` if it is not
    /// installed.
    fn start<'b>(node: &'a Node, nodes: impl IntoIterator<Item = &'b Node>) -> Option<Self> {
        let folder = node.folder().join("prometheus");
        let targets = nodes.into_iter().map(|node| {
            json!({"targets": [format!("{}:15020", node.ipv4())], "labels": {"instance": node.name()}})
        });
        let config = json!({
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [Path::new(DEPLOY).join("prometheus/rules.yaml")],
            "scrape_configs": [
                {"job_name": "auth-daemon", "static_configs": targets.collect::<Vec<_>>()},
            ],
        });
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("prometheus.yml");
        fs::write(&file, config.to_string()).unwrap();
        let mut command = node.place().command("prometheus").unwrap();
        let (address, port) = PROMETHEUS;
        command.args([
            format!("--config.file={}", file.display()),
            format!("--storage.tsdb.path={}", folder.join("data").display()),
            format!("--web.listen-address={address}:{port}"),
        ]);
        let process = Process::spawn(command).ok()?;
        Some(Self { node, process })
    }

    /// The `data` of an answer of its API.
    fn ask(&self, path: &str) -> Result<Value> {
        let server = SocketAddr::from(PROMETHEUS);
        let answer = http_get(self.node.netns(), server, &format!("/api/v1/{path}"))
            .with_context(|| self.process.stderr())?;
        let answer: Value = serde_json::from_str(&answer.body)?;
        ensure!(answer["status"] == "success", "{answer}");
        Ok(answer["data"].clone())
    }

    /// The series that a query returns now.
    fn query(&self, query: &str) -> Result<Vec<Value>> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let data = self.ask(&format!("query?query={encoded}"))?;
        let result = data["result"].as_array().context("no result")?;
        Ok(result.clone())
    }
}

/// The dashboard's panels, without rows.
fn panels() -> Vec<Value> {
    let file = PathBuf::from(DEPLOY).join("grafana/auth-daemon.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let panels = panels.iter().filter(|panel| panel["type"] != "row");
    panels.cloned().collect()
}

/// Names of labels in a legend such as `{{path}} to {{to}}`.
fn labels(legend: &str) -> impl Iterator<Item = &str> {
    let parts = legend.split("{{").skip(1);
    parts.filter_map(|part| part.split_once("}}").map(|(label, _)| label))
}

#[test]
fn each_panel_has_data_and_the_rules_are_loaded() {
    let test = "each_panel_has_data_and_the_rules_are_loaded";
    let mesh = pair();
    let policy = |kind: &str, name: &str, dry_run: bool, spec: Value| {
        let dry_run = dry_run.to_string();
        let object = json!({
            "apiVersion": "security.istio.io/v1", "kind": kind, "spec": spec,
            "metadata": {
                "name": name, "namespace": "default",
                "annotations": {"istio.io/dry-run": dry_run},
            },
        });
        mesh.manifests().apply(&object).unwrap();
    };
    let web = json!({"matchLabels": {"app": "web"}});
    let port = |port: &str| json!([{"to": [{"operation": {"ports": [port]}}]}]);
    // Plaintext to port 8080 is allowed, and to port 8081 refused. Policies deny port 8082, and would deny port 8080.
    policy(
        "PeerAuthentication",
        "modes",
        false,
        json!({"selector": web, "mtls": {"mode": "PERMISSIVE"}, "portLevelMtls": {"8081": {"mode": "STRICT"}}}),
    );
    let denies = |port_number| json!({"action": "DENY", "rules": port(port_number)});
    policy("AuthorizationPolicy", "deny", false, denies("8082"));
    policy("AuthorizationPolicy", "trial", true, denies("8080"));

    let stage = Echoing::on(mesh, &Default::default());
    let (client, web, mesh) = (&stage.client, &stage.web, &stage.mesh);
    let Some(prometheus) = Prometheus::start(mesh.node("a"), mesh.nodes()) else {
        println!("SKIPPED {test}: prometheus is not installed (Debian package prometheus)");
        return;
    };
    let panels = panels();
    assert!(panels.len() > 12, "{}", panels.len());
    let value = |query: &str| {
        let series = prometheus.query(query)?;
        let [series] = &series[..] else {
            bail!("{query}: {series:?}")
        };
        let value = series["value"][1].as_str().context("no value")?;
        Ok(value.parse::<f64>()?)
    };
    // Counters grow for as long as Prometheus has not seen each of them twice. Rules are evaluated later than that.
    eventually_ok(TIMEOUT, "data in every panel", || {
        echoes(client, web.at(8080));
        echoes(mesh.outside(), web.at(8080));
        call(client, web.at(8082));
        call(mesh.outside(), web.at(8081));
        for panel in &panels {
            for target in panel["targets"].as_array().unwrap() {
                let query = target["expr"].as_str().unwrap();
                let query = query
                    .replace("$__rate_interval", "30s")
                    .replace("$instance", ".+");
                let series = prometheus.query(&query)?;
                let title = &panel["title"];
                ensure!(!series.is_empty(), "{title} is empty: {query}");
                for series in &series {
                    let value = &series["value"][1];
                    ensure!(value != "NaN", "{title} is not a number: {query}");
                    for label in labels(target["legendFormat"].as_str().unwrap()) {
                        let has = series["metric"][label].is_string();
                        assert!(has, "{title} has no label {label}: {series}");
                    }
                }
            }
        }
        // What the panels show is the mesh's: both daemons, connections by TLS and in plaintext, and the alert that fires.
        let daemons = value("sum(up)")?;
        ensure!(daemons == 2.0, "{daemons} daemons");
        let ratio = value("auth_daemon:plaintext:ratio5m")?;
        ensure!(ratio > 0.0 && ratio < 1.0, "plaintext: {ratio}");
        let firing = value(
            "count(ALERTS{alertname=\"AuthDaemonPlaintextRefused\", alertstate=\"firing\", namespace=\"default\"})",
        )?;
        ensure!(firing == 1.0, "{firing} alerts");
        Ok(())
    })
    .unwrap();

    let text = fs::read_to_string(Path::new(DEPLOY).join("prometheus/rules.yaml")).unwrap();
    let declared = text.lines().map(str::trim);
    let declared =
        declared.filter(|line| line.starts_with("- alert: ") || line.starts_with("- record: "));
    let declared = declared.count();
    // A rule's health is unknown until its first evaluation.
    eventually_ok(TIMEOUT, "healthy rules", || {
        let loaded = prometheus.ask("rules")?;
        let groups = loaded["groups"].as_array().context("no groups")?;
        let rules = groups.iter().filter_map(|group| group["rules"].as_array());
        let rules: Vec<_> = rules.flatten().collect();
        ensure!(rules.len() == declared, "{} rules", rules.len());
        for rule in rules {
            ensure!(rule["health"] == "ok", "{rule}");
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn panels_do_not_overlap_and_have_ids_of_their_own() {
    let panels = panels();
    let ids: std::collections::BTreeSet<_> =
        panels.iter().map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len());
    let place =
        |panel: &Value| ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
    for (index, panel) in panels.iter().enumerate() {
        let [x, y, w, h] = place(panel);
        assert!(x + w <= 24, "{}", panel["title"]);
        for other in &panels[..index] {
            let [x2, y2, w2, h2] = place(other);
            let is_apart = x + w <= x2 || x2 + w2 <= x || y + h <= y2 || y2 + h2 <= y;
            assert!(is_apart, "{} and {}", panel["title"], other["title"]);
        }
    }
}
