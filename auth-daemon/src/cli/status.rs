//! `auth-daemon status`: asks the daemons of the cluster, or one, and prints their status.

mod cluster;
mod problems;

use std::process::ExitCode;

use serde_json::Value;

use self::{cluster::Cluster, problems::problems};
use super::daemons::{Daemons, Selection};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print the status as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    daemons: Selection,
}

/// Exit code if something is wrong with what the daemons report, or if a node cannot be reached.
const PROBLEMS: u8 = 1;
/// Exit code if no daemon can be reached.
const UNKNOWN: u8 = 2;

pub(super) fn status(arguments: &Arguments) -> ExitCode {
    match show(arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => PROBLEMS.into(),
        Err(error) => {
            eprintln!("auth-daemon: {error:#}");
            UNKNOWN.into()
        }
    }
}

/// Prints the status. Returns whether there are no problems.
fn show(arguments: &Arguments) -> anyhow::Result<bool> {
    let daemons = Daemons::find(&arguments.daemons)?;
    if let ([daemon], []) = (daemons.list(), daemons.missing()) {
        let is_alone = !daemons.in_cluster() || arguments.daemons.names_a_node();
        if is_alone {
            let status: Value = daemons.ask(daemon, "/status")?;
            match arguments.json {
                true => println!("{status}"),
                false => print!("{}", table(&status)),
            }
            return Ok(problems(&status).is_empty());
        }
    }
    let cluster = Cluster::ask(&daemons)?;
    match arguments.json {
        true => println!("{}", cluster.json()),
        false => print!("{}", cluster.text()),
    }
    Ok(cluster.problems().is_empty())
}

fn table(status: &Value) -> String {
    let mut out = format!(
        "node {}  version {}  trust domain {}  mode {}  {}\n",
        text(&status["node"]),
        text(&status["version"]),
        text(&status["trustDomain"]),
        text(&status["mode"]),
        if status["ready"] == true {
            "ready"
        } else {
            "NOT READY"
        },
    );
    let trust = &status["trust"];
    if let Some(roots) = trust["roots"].as_u64() {
        let revoked = |kind: &str| trust["revoked"][kind].as_array().map_or(0, Vec::len);
        out.push_str(&format!(
            "trust: {roots} {}{}; revoked: {} certificates, {} identities, {} nodes\n",
            if roots == 1 { "root" } else { "roots" },
            match trust["phase"].as_str() {
                None | Some("") => String::new(),
                Some(phase) => format!(" ({phase})"),
            },
            trust["revoked"]["certificates"],
            revoked("identities"),
            revoked("nodes"),
        ));
    }
    let own = &status["ca"]["authentication"];
    match own["by"].as_str() {
        Some("certificate") => out.push_str(&format!(
            "CA: known as node {} by its own certificate, until {}\n",
            text(&own["node"]),
            text(&own["notAfter"]),
        )),
        Some("joinToken") => out.push_str("CA: NOT JOINED, waits for a join token\n"),
        _ => {}
    }
    for domain in items(&status["federation"]) {
        out.push_str(&format!(
            "federation: {}, {}, {} from {}\n",
            text(&domain["trustDomain"]),
            match &domain["roots"] {
                one if *one == 1 => "1 root".to_owned(),
                roots => format!("{} roots", text(roots)),
            },
            match domain["refreshed"].as_str() {
                Some(time) => format!("current at {time},"),
                None => "never read".to_owned(),
            },
            text(&domain["source"]),
        ));
    }
    for cluster in items(&status["remoteClusters"]) {
        out.push_str(&format!(
            "remote cluster: {}, {} pods and {} services of {}, from Secret {}{}{}\n",
            text(&cluster["name"]),
            text(&cluster["pods"]),
            text(&cluster["services"]),
            text(&cluster["trustDomain"]),
            text(&cluster["secret"]),
            match cluster["since"].as_str() {
                Some(since) => format!("; NOT READABLE since {since}, last known state"),
                None => String::new(),
            },
            match cluster["trusted"] == false {
                true => "; NOT TRUSTED",
                false => "",
            },
        ));
    }
    section(
        &mut out,
        "PODS",
        &["POD", "IDENTITY", "ADDRESSES", "STATE"],
        items(&status["pods"]).iter().map(|pod| {
            let identity = text(&pod["identity"]);
            vec![
                text(&pod["pod"]),
                identity,
                text(&pod["addresses"]),
                state(pod),
            ]
        }),
    );
    section(
        &mut out,
        "CERTIFICATES",
        &["IDENTITY", "SERIAL", "NOT AFTER"],
        items(&status["certificates"]).iter().map(|certificate| {
            let fields = ["identity", "serial", "notAfter"];
            fields.map(|field| text(&certificate[field])).to_vec()
        }),
    );
    let errors: Vec<_> = items(&status["policies"])
        .iter()
        .filter(|policy| !policy["error"].is_null())
        .collect();
    if !errors.is_empty() {
        let rows = errors.iter().map(|policy| {
            let fields = ["kind", "name", "error"];
            fields.map(|field| text(&policy[field])).to_vec()
        });
        section(
            &mut out,
            "POLICIES WITH ERRORS",
            &["KIND", "NAME", "ERROR"],
            rows,
        );
    }
    section(
        &mut out,
        "CONNECTIONS",
        &[
            "DIRECTION",
            "CLIENT",
            "DESTINATION",
            "PEER",
            "TO SERVER",
            "TO CLIENT",
            "SECONDS",
        ],
        items(&status["connections"]).iter().map(|connection| {
            let outbound = connection["direction"] == "outbound";
            let peer = if outbound {
                "serverIdentity"
            } else {
                "clientIdentity"
            };
            vec![
                text(&connection["direction"]),
                text(&connection["client"]),
                text(&connection["destination"]),
                text(&connection[peer]),
                text(&connection["bytesToServer"]),
                text(&connection["bytesToClient"]),
                format!("{:.1}", connection["seconds"].as_f64().unwrap_or(0.0)),
            ]
        }),
    );
    out
}

/// Says whether a pod is protected.
fn state(pod: &Value) -> String {
    if let Some(tampered) = pod["tampered"].as_str() {
        format!("enrolled; TAMPERED: {tampered}")
    } else if let Some(refused) = pod["overShare"].as_u64() {
        format!("enrolled; {refused} connections over its share refused")
    } else if let Some(shared) = pod["sharedLink"].as_str() {
        format!("enrolled; TLS within the node: {shared}")
    } else if pod["enrolled"] == true {
        "enrolled".to_owned()
    } else {
        text(&pod["reason"])
    }
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn section(out: &mut String, title: &str, head: &[&str], items: impl Iterator<Item = Vec<String>>) {
    let mut rows = vec![head.iter().map(|cell| (*cell).to_owned()).collect()];
    rows.extend(items);
    out.push_str(&format!("\n{title} ({})\n", rows.len() - 1));
    if rows.len() == 1 {
        return;
    }
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    for row in rows {
        let line: Vec<_> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        out.push_str("  ");
        out.push_str(line.join("  ").trim_end());
        out.push('\n');
    }
}

/// Formats a value for a line of a terminal.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.replace(char::is_control, " "),
        Value::Null => "-".to_owned(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn says_why_connections_within_the_node_use_tls() {
        let pod = json!({"pod": "default/web", "enrolled": true, "sharedLink": "a bridge"});
        assert_eq!(state(&pod), "enrolled; TLS within the node: a bridge");
    }

    #[test]
    fn prints_a_table() {
        let table = table(&json!({
            "node": "a", "version": "1.2.3", "trustDomain": "cluster.local", "mode": "STRICT", "ready": true,
            "pods": [
                {"pod": "default/web", "identity": "spiffe://x", "addresses": ["10.0.0.1", "fd00::1"], "enrolled": true},
                {"pod": "default/a", "identity": "spiffe://z", "addresses": [], "enrolled": true, "overShare": 7},
                {"pod": "default/b", "identity": "spiffe://y", "addresses": [], "enrolled": false, "reason": "no netns"},
            ],
            "certificates": [{"identity": "spiffe://x", "serial": null, "notAfter": null}],
            "trust": {
                "roots": 2, "phase": "retiring 5d0f",
                "revoked": {"certificates": 3, "identities": [{"identity": "spiffe://y"}], "nodes": []},
            },
            "federation": [
                {"trustDomain": "partner.example", "roots": 1, "refreshed": "2026-01-02T03:04:05Z", "source": "/p.json"},
                {"trustDomain": "other.example", "roots": 0, "refreshed": null, "source": "https://o.example/"},
            ],
            "remoteClusters": [
                {"name": "east", "secret": "east-1", "trustDomain": "b", "pods": 3, "services": 2, "error": null, "since": null},
                {
                    "name": "west", "secret": "west-1", "trustDomain": "c", "pods": 1, "services": 0,
                    "error": "no route", "since": "2026-01-02T03:04:05Z", "trusted": false,
                },
            ],
            "connections": [],
            "ca": {"authentication": {"by": "certificate", "node": "vm-1", "notAfter": "2026-01-02T03:04:05Z"}},
        }));
        assert!(
            table.starts_with(
                "node a  version 1.2.3  trust domain cluster.local  mode STRICT  ready\n"
            ),
            "{table}"
        );
        assert!(
            table.contains("default/web  spiffe://x  10.0.0.1,fd00::1  enrolled"),
            "{table}"
        );
        let trust =
            "trust: 2 roots (retiring 5d0f); revoked: 3 certificates, 1 identities, 0 nodes\n";
        assert!(table.contains(trust), "{table}");
        for line in [
            "CA: known as node vm-1 by its own certificate, until 2026-01-02T03:04:05Z\n",
            "federation: partner.example, 1 root, current at 2026-01-02T03:04:05Z, from /p.json\n",
            "federation: other.example, 0 roots, never read from https://o.example/\n",
            "remote cluster: east, 3 pods and 2 services of b, from Secret east-1\n",
            "remote cluster: west, 1 pods and 0 services of c, from Secret west-1; NOT READABLE since 2026-01-02T03:04:05Z, \
             last known state; NOT TRUSTED\n",
        ] {
            assert!(table.contains(line), "{table}");
        }
        assert!(table.contains("no netns"), "{table}");
        assert!(
            table.contains("enrolled; 7 connections over its share refused"),
            "{table}"
        );
        assert!(table.contains("CONNECTIONS (0)\n"), "{table}");
    }
}
