//! `auth-daemon strict-readiness`: who would be cut off if ports accepted mutual TLS only.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
};

use auth_mesh::policy::question::table;
use serde::Serialize;

use super::{
    daemons::{Daemons, Selection, Unanswered},
    pairs,
};
use crate::observe::{access_log::Direction, flows::Verdict, pairs::Answer};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only servers in this namespace.
    #[arg(long)]
    namespace: Option<String>,
    /// How to print the answer.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    daemons: Selection,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
}

/// Exit code if a caller would be cut off.
const CUT_OFF: u8 = 1;
/// Exit code if it is not known whether one would be.
const UNKNOWN: u8 = 2;
/// The most callers of a port that the table names.
const MAX_NAMED: usize = 10;

/// The answer, in the form of `-o json`, which is stable: later versions only add fields.
#[derive(Debug, Serialize)]
struct Report {
    /// By namespace and port.
    ports: Vec<Port>,
    /// For how long the node with the youngest daemon has counted, in seconds.
    seconds: u64,
    /// Pods that may have callers that no daemon sees.
    unseen: Vec<String>,
    /// Why more may be missing.
    gaps: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
struct Port {
    namespace: String,
    port: u16,
    /// Connections with mutual TLS, or between two pods of a node.
    authenticated: u64,
    /// Who would be cut off.
    cut_off: Vec<Caller>,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Caller {
    /// The client's address.
    address: String,
    /// The workload with this address, if it is known.
    workload: Option<String>,
    connections: u64,
    /// When the last of them ended.
    last: String,
}

pub(super) fn strict_readiness(arguments: &Arguments) -> ExitCode {
    let asked = Daemons::find(&arguments.daemons).and_then(|daemons| pairs::read(&daemons));
    let report = match asked {
        Ok((answers, missing)) => Report::new(&answers, &missing, arguments.namespace.as_deref()),
        Err(error) => {
            eprintln!("auth-daemon: {error:#}");
            return UNKNOWN.into();
        }
    };
    match arguments.output {
        Output::Table => print!("{}", report.text()),
        // A struct of texts and numbers is always serializable.
        Output::Json => println!("{}", serde_json::json!(report)),
    }
    report.code().into()
}

impl Report {
    fn new(answers: &[Answer], missing: &[Unanswered], namespace: Option<&str>) -> Self {
        let wanted = |name: &str| namespace.is_none_or(|wanted| wanted == name);
        let mut ports: BTreeMap<(String, u16), Port> = BTreeMap::new();
        let mut callers: BTreeMap<(String, u16, String), Caller> = BTreeMap::new();
        let pairs = answers.iter().flat_map(|answer| &answer.pairs);
        // What was refused stays refused, and a pod always reaches itself.
        for pair in pairs.filter(|pair| {
            pair.direction == Direction::Inbound
                && pair.verdict == Verdict::Allowed
                && pair.path != "self"
        }) {
            let server = pair
                .server
                .namespace
                .clone()
                .unwrap_or_else(|| "?".to_owned());
            if !wanted(&server) {
                continue;
            }
            let key = (server.clone(), pair.port);
            let port = ports.entry(key).or_insert_with(|| Port {
                namespace: server.clone(),
                port: pair.port,
                ..Port::default()
            });
            if pair.path != "plaintext" {
                port.authenticated += pair.seen();
                continue;
            }
            let address = pair
                .client
                .address
                .map_or("?".to_owned(), |ip| ip.to_string());
            let caller = callers
                .entry((server, pair.port, address.clone()))
                .or_default();
            caller.address = address;
            if pair.client.workload.is_some() {
                caller.workload = Some(pairs::name(&pair.client));
            }
            caller.connections += pair.seen();
            caller.last = std::mem::take(&mut caller.last).max(pair.last.clone());
        }
        for ((namespace, port, _), caller) in callers {
            if let Some(port) = ports.get_mut(&(namespace, port)) {
                port.cut_off.push(caller);
            }
        }
        let unseen = answers.iter().flat_map(|answer| &answer.unseen);
        let unseen = unseen.filter(|pod| wanted(pod.split('/').next().unwrap_or_default()));
        let mut gaps: Vec<_> = missing.iter().map(ToString::to_string).collect();
        gaps.extend(answers.iter().filter(|answer| answer.uncounted + answer.dropped > 0).map(
            |answer| {
                format!(
                    "node {} has not recorded all that it saw: {} connections uncounted, {} pairs dropped",
                    answer.node, answer.uncounted, answer.dropped
                )
            },
        ));
        Self {
            ports: ports.into_values().collect(),
            seconds: answers
                .iter()
                .map(|answer| answer.seconds)
                .min()
                .unwrap_or(0),
            unseen: unseen.cloned().collect(),
            gaps,
        }
    }

    fn code(&self) -> u8 {
        if self.ports.iter().any(|port| !port.cut_off.is_empty()) {
            CUT_OFF
        } else if self.unseen.is_empty() && self.gaps.is_empty() {
            0
        } else {
            UNKNOWN
        }
    }

    fn text(&self) -> String {
        let span = pairs::span(self.seconds);
        let unseen: BTreeSet<_> = self
            .unseen
            .iter()
            .filter_map(|pod| pod.split('/').next())
            .collect();
        let mut rows = vec![["NAMESPACE", "PORT", "STRICT"].map(str::to_owned)];
        for port in &self.ports {
            let row = |what| [port.namespace.clone(), port.port.to_string(), what];
            let count = port.authenticated;
            if port.cut_off.is_empty() {
                rows.push(row(match unseen.contains(port.namespace.as_str()) {
                    false => format!("safe: {count} connections in {span}, all mTLS"),
                    true => {
                        format!("{count} connections in {span}, all mTLS, of those that were seen")
                    }
                }));
                continue;
            }
            for caller in port.cut_off.iter().take(MAX_NAMED) {
                let workload = caller.workload.as_ref().map(|name| format!(" ({name})"));
                rows.push(row(format!(
                    "cuts off {}{}: {} connections, the last at {}",
                    caller.address,
                    workload.unwrap_or_default(),
                    caller.connections,
                    caller.last
                )));
            }
            if let Some(more @ 1..) = port.cut_off.len().checked_sub(MAX_NAMED) {
                rows.push(row(format!("cuts off {more} more; -o json names them")));
            }
        }
        let mut text = match rows.len() {
            1 => format!("no connection was seen in {span}\n"),
            _ => table(&rows),
        };
        if !self.unseen.is_empty() {
            text.push_str(&format!(
                "\nNot known for callers in plaintext from outside the networks of pods, who reach these pods without the \
                 daemon: {}\nAn AUDIT policy for all connections makes the daemon see them, and changes nothing else. In each \
                 namespace:\n  apiVersion: security.istio.io/v1\n  kind: AuthorizationPolicy\n  metadata: {{name: \
                 see-all-callers}}\n  spec: {{action: AUDIT, rules: [{{}}]}}\n",
                self.unseen.join(", ")
            ));
        }
        for gap in &self.gaps {
            text.push_str(&format!("\nNot known: {gap}\n"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::pairs::{Counts, Pair, Party};

    fn pair(namespace: &str, port: u16, path: &str, address: Option<&str>) -> Pair {
        Pair {
            direction: Direction::Inbound,
            client: Party {
                identity: address
                    .is_none()
                    .then(|| "spiffe://cluster.local/ns/a/sa/b".into()),
                address: address.map(|ip| ip.parse().unwrap()),
                ..Party::default()
            },
            server: Party {
                namespace: Some(namespace.into()),
                ..Party::default()
            },
            port,
            path: path.into(),
            verdict: Verdict::Allowed,
            counts: Counts {
                connections: 4,
                ..Counts::default()
            },
            open: 0,
            first: "2026-01-01T00:00:00.000Z".into(),
            last: "2026-01-02T00:00:00.000Z".into(),
        }
    }

    fn answer(pairs: Vec<Pair>) -> Answer {
        Answer {
            node: "a".into(),
            since: "2026-01-01T00:00:00.000Z".into(),
            seconds: 3 * 3600,
            uncounted: 0,
            dropped: 0,
            unseen: Vec::new(),
            pairs,
        }
    }

    #[test]
    fn names_who_would_be_cut_off() {
        let mut refused = pair("shop", 82, "plaintext", Some("10.0.0.9"));
        refused.verdict = Verdict::Denied;
        let mut answers = [
            answer(vec![
                pair("shop", 80, "tunnel", None),
                pair("shop", 80, "same-node", None),
                pair("shop", 81, "tunnel", None),
                pair("shop", 81, "plaintext", Some("192.0.2.1")),
                pair("bank", 80, "self", None),
                refused,
            ]),
            answer(vec![pair("shop", 81, "plaintext", Some("192.0.2.1"))]),
        ];
        let report = Report::new(&answers, &[], None);
        assert_eq!(
            report.text(),
            "NAMESPACE  PORT  STRICT\n\
             shop       80    safe: 8 connections in 3.0 h, all mTLS\n\
             shop       81    cuts off 192.0.2.1: 8 connections, the last at 2026-01-02T00:00:00.000Z\n"
        );
        assert_eq!(report.code(), CUT_OFF);
        assert_eq!(Report::new(&answers, &[], Some("bank")).code(), 0);

        answers[1].unseen = vec!["bank/db".into()];
        let report = Report::new(&answers, &[], Some("bank"));
        assert_eq!(report.code(), UNKNOWN);
        assert!(
            report.text().contains("without the daemon: bank/db\n"),
            "{}",
            report.text()
        );
        assert_eq!(Report::new(&answers, &[], Some("shop")).unseen.len(), 0);
    }

    #[test]
    fn a_node_that_cannot_be_asked_makes_nothing_safe() {
        let missing = [Unanswered {
            node: "c".into(),
            reason: "down".into(),
        }];
        let report = Report::new(
            &[answer(vec![pair("shop", 80, "tunnel", None)])],
            &missing,
            None,
        );
        assert_eq!(report.code(), UNKNOWN);
        assert!(
            report
                .text()
                .ends_with("Not known: node c cannot be reached: down\n")
        );
    }
}
