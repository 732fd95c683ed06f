//! `auth-daemon status`: queries the running daemon and prints its status.

use anyhow::Context;
use serde_json::Value;

use super::daemon_client::request;
use crate::admin::ADMIN_PORT;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print the status as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn status(arguments: &Arguments) -> anyhow::Result<()> {
    let url = format!("http://127.0.0.1:{ADMIN_PORT}/status");
    let deadline = std::time::Duration::from_secs(5);
    let status: Value = request("/status", None::<&()>, deadline).with_context(|| {
        format!(
            "no daemon answers at {url}; is it running, and is this the node's network namespace?"
        )
    })?;
    if arguments.json {
        println!("{status}");
    } else {
        print!("{}", table(&status));
    }
    Ok(())
}

fn table(status: &Value) -> String {
    let mut out = format!(
        "node {}  trust domain {}  mode {}  {}\n",
        text(&status["node"]),
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
    section(
        &mut out,
        "PODS",
        &["POD", "IDENTITY", "ADDRESSES", "STATE"],
        &status["pods"],
        |pod| {
            let state = if let Some(tampered) = pod["tampered"].as_str() {
                format!("enrolled; TAMPERED: {tampered}")
            } else if let Some(refused) = pod["overShare"].as_u64() {
                format!("enrolled; {refused} connections over its share refused")
            } else if pod["enrolled"] == true {
                "enrolled".to_owned()
            } else {
                text(&pod["reason"])
            };
            vec![
                text(&pod["pod"]),
                text(&pod["identity"]),
                text(&pod["addresses"]),
                state,
            ]
        },
    );
    section(
        &mut out,
        "CERTIFICATES",
        &["IDENTITY", "SERIAL", "NOT AFTER"],
        &status["certificates"],
        |certificate| {
            ["identity", "serial", "notAfter"]
                .map(|field| text(&certificate[field]))
                .to_vec()
        },
    );
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
        &status["connections"],
        |connection| {
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
        },
    );
    out
}

fn section(
    out: &mut String,
    title: &str,
    head: &[&str],
    items: &Value,
    row: impl Fn(&Value) -> Vec<String>,
) {
    let items = items.as_array().map_or(&[][..], Vec::as_slice);
    out.push_str(&format!("\n{title} ({})\n", items.len()));
    let mut rows = vec![head.iter().map(|cell| (*cell).to_owned()).collect()];
    rows.extend(items.iter().map(row));
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

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
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
    fn prints_a_table() {
        let table = table(&json!({
            "node": "a", "trustDomain": "cluster.local", "mode": "STRICT", "ready": true,
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
            "connections": [],
        }));
        assert!(
            table.starts_with("node a  trust domain cluster.local  mode STRICT  ready\n"),
            "{table}"
        );
        assert!(
            table.contains("default/web  spiffe://x  10.0.0.1,fd00::1  enrolled"),
            "{table}"
        );
        let trust =
            "trust: 2 roots (retiring 5d0f); revoked: 3 certificates, 1 identities, 0 nodes\n";
        assert!(table.contains(trust), "{table}");
        assert!(table.contains("no netns"), "{table}");
        assert!(
            table.contains("enrolled; 7 connections over its share refused"),
            "{table}"
        );
        assert!(table.contains("CONNECTIONS (0)\n"), "{table}");
    }
}
