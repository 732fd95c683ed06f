//! The status of all daemons in one view.

use anyhow::bail;
use serde_json::{Value, json};

use super::{
    super::daemons::{Daemons, Unanswered},
    items, problems, section, state, text,
};

/// Number of certificates that are shown, of those that expire next.
const CERTIFICATES: usize = 10;

/// The answers of all daemons, and the nodes that cannot be reached.
pub(super) struct Cluster {
    nodes: Vec<Value>,
    unanswered: Vec<Unanswered>,
}

impl Cluster {
    /// Asks all daemons. Fails if none answers.
    pub(super) fn ask(daemons: &Daemons) -> anyhow::Result<Self> {
        let (answers, mut unanswered) = daemons.ask_all::<Value>("/summary");
        if answers.is_empty() {
            let reasons: Vec<_> = unanswered.iter().map(ToString::to_string).collect();
            bail!("{}", reasons.join("; "));
        }
        match daemons.nodes_without_daemon() {
            Ok(nodes) => unanswered.extend(nodes),
            Err(error) => {
                eprintln!("auth-daemon: nodes without a daemon are not shown: {error:#}");
            }
        }
        let nodes = answers.into_iter().map(|(_, answer)| answer).collect();
        Ok(Self { nodes, unanswered })
    }

    /// What is wrong, with the node.
    pub(super) fn problems(&self) -> Vec<(String, String)> {
        let of_nodes = self.nodes.iter().flat_map(|status| {
            let node = text(&status["node"]);
            let found = problems(status).into_iter();
            found.map(move |problem| (node.clone(), problem))
        });
        let unanswered = self.unanswered.iter().map(|unanswered| {
            let reason = format!("cannot be reached: {}", unanswered.reason);
            (unanswered.node.clone(), reason)
        });
        of_nodes.chain(unanswered).collect()
    }

    pub(super) fn json(&self) -> Value {
        let problems = self.problems().into_iter();
        json!({
            "nodes": self.nodes,
            "unanswered": self.unanswered,
            "problems": problems
                .map(|(node, problem)| json!({"node": node, "problem": problem}))
                .collect::<Vec<_>>(),
        })
    }

    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        let head = [
            "NODE",
            "VERSION",
            "MODE",
            "STATE",
            "PODS",
            "NOT PROTECTED",
            "CONNECTIONS",
            "NEXT EXPIRY",
            "CA",
            "TRUST",
        ];
        let known = self.nodes.iter().map(row);
        let unknown = self.unanswered.iter().map(|unanswered| {
            let mut row = vec!["-".to_owned(); head.len()];
            row[0] = unanswered.node.clone();
            row[3] = "UNREACHABLE".to_owned();
            row
        });
        section(&mut out, "NODES", &head, known.chain(unknown));

        let bad = self.all("pods", |pod| {
            pod["enrolled"] != true || pod["tampered"].is_string()
        });
        let rows = bad.map(|(node, pod)| vec![node, text(&pod["pod"]), state(pod)]);
        section(
            &mut out,
            "PODS NOT PROTECTED",
            &["NODE", "POD", "STATE"],
            rows,
        );

        let mut certificates: Vec<_> = self.all("certificates", |_| true).collect();
        certificates.sort_by_key(|(_, certificate)| certificate["notAfter"].as_str());
        let title = format!("CERTIFICATES BY NEXT EXPIRY, OF {}", certificates.len());
        let rows = certificates
            .into_iter()
            .take(CERTIFICATES)
            .map(|(node, certificate)| {
                vec![
                    node,
                    text(&certificate["identity"]),
                    text(&certificate["notAfter"]),
                ]
            });
        section(&mut out, &title, &["NODE", "IDENTITY", "NOT AFTER"], rows);

        let count = self
            .nodes
            .iter()
            .map(|node| items(&node["policies"]).len())
            .max();
        let title = format!("POLICIES WITH ERRORS, OF {}", count.unwrap_or(0));
        let errors = self.all("policies", |policy| !policy["error"].is_null());
        let rows = errors.map(|(node, policy)| {
            let name = format!("{} {}", text(&policy["kind"]), text(&policy["name"]));
            vec![node, name, text(&policy["error"])]
        });
        section(&mut out, &title, &["NODE", "POLICY", "ERROR"], rows);

        let rows = self
            .problems()
            .into_iter()
            .map(|(node, problem)| vec![node, problem]);
        section(&mut out, "PROBLEMS", &["NODE", "PROBLEM"], rows);
        // The first section needs no empty line above it.
        out.trim_start().to_owned()
    }

    /// The items in the lists of all nodes for which `wanted` holds.
    fn all<'a>(
        &'a self,
        list: &'a str,
        wanted: impl Fn(&Value) -> bool + Copy + 'a,
    ) -> impl Iterator<Item = (String, &'a Value)> {
        self.nodes.iter().flat_map(move |node| {
            let items = items(&node[list]).iter().filter(move |item| wanted(item));
            items.map(move |item| (text(&node["node"]), item))
        })
    }
}

fn row(node: &Value) -> Vec<String> {
    let pods = items(&node["pods"]);
    let bad = pods.iter().filter(|pod| pod["enrolled"] != true).count();
    let expiry = items(&node["certificates"])
        .iter()
        .map(|certificate| text(&certificate["notAfter"]));
    let roots = node["trust"]["roots"].as_u64().unwrap_or(0);
    let phase = node["trust"]["phase"].as_str().unwrap_or_default();
    vec![
        text(&node["node"]),
        text(&node["version"]),
        text(&node["mode"]),
        if node["ready"] == true {
            "ready"
        } else {
            "NOT READY"
        }
        .to_owned(),
        pods.len().to_string(),
        bad.to_string(),
        text(&node["openConnections"]),
        expiry.min().unwrap_or_else(|| "-".to_owned()),
        if node["ca"]["reachable"] == false {
            "UNREACHABLE"
        } else {
            "reachable"
        }
        .to_owned(),
        format!(
            "version {}, {roots} {}{}",
            text(&node["trust"]["version"]),
            if roots == 1 { "root" } else { "roots" },
            if phase.is_empty() {
                String::new()
            } else {
                format!(" ({phase})")
            },
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_all_nodes_and_what_is_wrong() {
        let node = |name: &str, end: &str, enrolled: bool| {
            json!({
                "node": name, "version": "1.2.3", "mode": "STRICT", "ready": true,
                "time": "2026-01-01T00:00:00.000Z", "openConnections": 4,
                "pods": [{"pod": "shop/web", "enrolled": enrolled, "reason": "no netns"}],
                "certificates": [{"identity": format!("spiffe://{name}"), "notAfter": end}],
                "ca": {"reachable": true}, "trust": {"version": 5, "roots": 1, "phase": ""},
                "policies": [{"kind": "AuthorizationPolicy", "name": "a/p", "error": null}],
            })
        };
        let cluster = Cluster {
            nodes: vec![
                node("a", "2026-01-03T00:00:00Z", true),
                node("b", "2026-01-02T00:00:00Z", false),
            ],
            unanswered: vec![Unanswered {
                node: "c".into(),
                reason: "no answer".into(),
            }],
        };
        let text = cluster.text();
        assert!(text.starts_with("NODES (3)\n"), "{text}");
        for expected in [
            "  a     1.2.3    STRICT  ready        1     0              4            2026-01-03T00:00:00Z  reachable  version 5, 1 root\n",
            "  c     -        -       UNREACHABLE",
            "PODS NOT PROTECTED (1)\n  NODE  POD       STATE\n  b     shop/web  no netns\n",
            "CERTIFICATES BY NEXT EXPIRY, OF 2 (2)\n  NODE  IDENTITY    NOT AFTER\n  b ",
            "POLICIES WITH ERRORS, OF 1 (0)\n",
            "PROBLEMS (2)\n  NODE  PROBLEM\n  b     pod shop/web: no netns\n  c     cannot be reached: no answer\n",
        ] {
            assert!(text.contains(expected), "{expected:?} in\n{text}");
        }
        assert_eq!(cluster.json()["nodes"][1]["node"], "b");
        assert_eq!(cluster.json()["unanswered"][0]["node"], "c");
    }
}
