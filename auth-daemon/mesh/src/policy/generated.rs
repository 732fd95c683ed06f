//! A million generated cases, on which the policies and the test oracle must agree.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use serde_json::{Value, json};

use super::{
    Connection, Decision, Outcome, Policies, Settings, Verdict,
    api::{Mode, Object},
    explain,
    naive::{Attributes, Expected, ROOT, applies, full_name, list, naive, rule_match},
};
use crate::Identity;

fn summary(verdict: &Verdict) -> Expected {
    let hit = |hit: &super::Hit| (hit.policy.to_string(), hit.rule.unwrap());
    Expected {
        allowed: verdict.allowed(),
        by: match &verdict.decision {
            Decision::Allowed(by) | Decision::Denied(by) => Some(hit(by)),
            _ => None,
        },
        audits: verdict.audits.iter().map(hit).collect(),
        dry_run: verdict.dry_run.as_ref().map(Decision::allowed),
        plaintext: matches!(verdict.decision, Decision::Plaintext(_)),
    }
}

/// SplitMix64 (S. Steele, D. Lea, C. Flood 2014), so that a seed always yields the same cases.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn chance(&mut self, of_hundred: usize) -> bool {
        self.below(100) < of_hundred
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }

    /// Returns one to three elements of `of`.
    fn some(&mut self, of: &[&str]) -> Value {
        let count = 1 + self.below(3);
        (0..count).map(|_| Value::from(self.one(of))).collect()
    }
}

const NAMESPACES: [&str; 4] = [ROOT, "a", "b", "ab"];
/// The mesh's own trust domain.
const TRUST_DOMAIN: &str = "td";
const PRINCIPALS: [&str; 16] = [
    "cluster.local/ns/a/sa/x",
    "cluster.local/ns/a*",
    "td/ns/a/sa/x",
    "td/ns/a/sa/y",
    "td/ns/b/sa/x",
    "other/ns/a/sa/x",
    "td/ns/ab/sa/x.y",
    "td/ns/a*",
    "td/ns/ab/*",
    "td*",
    "*/sa/x",
    "*/a/sa/x",
    "*x",
    "*",
    "*.y",
    "nobody",
];
const NAMES: [&str; 8] = ["a", "b", "ab", "a*", "*b", "*", "c", "*a"];
const ACCOUNTS: [&str; 6] = ["x", "y", "a/x", "b/x", "ab/x.y", "c/z"];
const BLOCKS: [&str; 10] = [
    "10.0.0.1",
    "10.0.0.0/8",
    "10.0.0.0/31",
    "10.0.1.0/24",
    "0.0.0.0/0",
    "fd00::1",
    "fd00::/64",
    "::/0",
    "10.0.0.2/32",
    "192.168.0.0/16",
];
const PORTS: [&str; 4] = ["80", "81", "443", "0"];
const ADDRESSES: [&str; 7] = [
    "10.0.0.1",
    "10.0.0.2",
    "10.0.1.9",
    "192.168.1.1",
    "fd00::1",
    "fd00::2",
    "fd01::1",
];
const CLIENTS: [&str; 7] = [
    "td/ns/a/sa/x",
    "td/ns/a/sa/y",
    "td/ns/b/sa/x",
    "other/ns/a/sa/x",
    "td/ns/ab/sa/x.y",
    "td/ns/c/sa/z",
    "td/ns/ab/sa/x",
];

fn selector(random: &mut Random) -> Value {
    match random.below(6) {
        0..3 => Value::Null,
        3 => json!({}),
        4 => json!({"matchLabels": {"app": random.one(&["web", "db"])}}),
        _ => json!({"matchLabels": {"app": random.one(&["web", "db"]), "v": "1"}}),
    }
}

fn source(random: &mut Random) -> Value {
    let mut source = json!({});
    let fields: &[(&str, &[&str])] = if random.chance(20) {
        &[
            ("serviceAccounts", &ACCOUNTS),
            ("notServiceAccounts", &ACCOUNTS),
            ("ipBlocks", &BLOCKS),
        ]
    } else {
        &[
            ("principals", &PRINCIPALS),
            ("notPrincipals", &PRINCIPALS),
            ("namespaces", &NAMES),
            ("notNamespaces", &NAMES),
            ("ipBlocks", &BLOCKS),
            ("notIpBlocks", &BLOCKS),
            ("remoteIpBlocks", &BLOCKS),
            ("notRemoteIpBlocks", &BLOCKS),
        ]
    };
    for _ in 0..1 + random.below(2) {
        let (field, values) = fields[random.below(fields.len())];
        source[field] = random.some(values);
    }
    if random.chance(3) {
        source["requestPrincipals"] = json!(["*"]);
    }
    source
}

fn operation(random: &mut Random) -> Value {
    let mut operation = json!({});
    operation[random.one(&["ports", "notPorts"])] = random.some(&PORTS);
    if random.chance(10) {
        operation["notPorts"] = random.some(&PORTS);
    }
    if random.chance(4) {
        operation[random.one(&["methods", "notPaths", "hosts"])] = json!(["x"]);
    }
    operation
}

fn condition(random: &mut Random) -> Value {
    let keys: [(&str, &[&str]); 8] = [
        ("source.ip", &BLOCKS),
        ("remote.ip", &BLOCKS),
        ("source.namespace", &NAMES),
        ("source.principal", &PRINCIPALS),
        ("source.serviceAccount", &ACCOUNTS),
        ("destination.ip", &BLOCKS),
        ("destination.port", &PORTS),
        ("request.headers[a]", &["b"]),
    ];
    let known = if random.chance(90) { 7 } else { 8 };
    let (key, values) = keys[random.below(known)];
    let mut condition = json!({"key": key});
    condition[random.one(&["values", "notValues"])] = random.some(values);
    if random.chance(20) {
        condition["values"] = random.some(values);
    }
    condition
}

fn rule(random: &mut Random) -> Value {
    let mut rule = json!({});
    if random.chance(70) {
        let count = 1 + random.below(3);
        rule["from"] = (0..count)
            .map(|_| json!({"source": source(random)}))
            .collect();
    }
    if random.chance(35) {
        let count = 1 + random.below(2);
        rule["to"] = (0..count)
            .map(|_| json!({"operation": operation(random)}))
            .collect();
    }
    if random.chance(30) {
        let count = 1 + random.below(3);
        rule["when"] = (0..count).map(|_| condition(random)).collect();
    }
    rule
}

fn policy(random: &mut Random, number: usize) -> Value {
    let mut policy = json!({
        "apiVersion": random.one(&["security.istio.io/v1", "security.istio.io/v1beta1"]),
        "metadata": {"namespace": random.one(&NAMESPACES), "name": format!("p{number}")},
        "spec": {"selector": selector(random)},
    });
    if random.chance(25) {
        policy["kind"] = "PeerAuthentication".into();
        let modes = ["STRICT", "PERMISSIVE", "DISABLE", "UNSET"];
        if random.chance(80) {
            policy["spec"]["mtls"] = json!({"mode": random.one(&modes)});
        }
        if policy["spec"]["selector"]["matchLabels"].is_object() && random.chance(60) {
            let port = random.one(&PORTS);
            policy["spec"]["portLevelMtls"] = json!({port: {"mode": random.one(&modes)}});
        }
        if random.chance(50) {
            let created = random.one(&["2024-01-01T00:00:00Z", "2023-12-31T23:59:59Z"]);
            policy["metadata"]["creationTimestamp"] = created.into();
        }
        return policy;
    }
    policy["kind"] = "AuthorizationPolicy".into();
    if random.chance(90) {
        let actions = ["ALLOW", "ALLOW", "DENY", "DENY", "AUDIT"];
        policy["spec"]["action"] = random.one(&actions).into();
    }
    if random.chance(15) {
        policy["metadata"]["annotations"] =
            json!({"istio.io/dry-run": random.one(&["true", "false"])});
    }
    if random.chance(92) {
        let count = random.below(4);
        policy["spec"]["rules"] = (0..count).map(|_| rule(random)).collect();
    }
    policy
}

/// Checks the set of policies that a seed yields, on generated connections.
fn check(
    seed: u64,
    connections: usize,
    seen: &mut BTreeMap<&'static str, usize>,
) -> Result<(), String> {
    let mut random = Random(seed);
    let count = 1 + random.below(7);
    let documents: Vec<_> = (0..count)
        .map(|number| policy(&mut random, number))
        .collect();
    let objects = documents
        .iter()
        .map(|document| match Object::read(document) {
            Some(Object::Unreadable(refused)) => panic!("seed {seed}: {refused}"),
            object => Arc::new(object.unwrap()),
        });
    let mode = [Mode::Strict, Mode::Permissive][random.below(2)];
    let settings = Settings {
        root_namespace: ROOT.into(),
        mode,
        trust_domain: TRUST_DOMAIN.parse().unwrap(),
        foreign_trust_domains: Vec::new(),
    };
    let policies = Policies::compile(settings, objects);
    for _ in 0..connections {
        let namespace = random.one(&NAMESPACES);
        let mut labels =
            BTreeMap::from([("app".to_owned(), random.one(&["web", "db"]).to_owned())]);
        if random.chance(50) {
            labels.insert("v".into(), random.one(&["1", "2"]).into());
        }
        let client: Option<Identity> = random.chance(85).then(|| {
            format!("spiffe://{}", random.one(&CLIENTS))
                .parse()
                .unwrap()
        });
        let connection = Connection {
            client: client.as_ref(),
            source: random.one(&ADDRESSES).parse().unwrap(),
            destination: SocketAddr::new(
                random.one(&ADDRESSES).parse().unwrap(),
                random.one(&PORTS).parse().unwrap(),
            ),
        };
        let attributes = Attributes::new(
            (client.as_ref().map(Identity::as_str), connection.source),
            connection.destination,
            namespace,
            &labels,
            TRUST_DOMAIN,
        );
        let expected = naive(&documents, mode.as_str(), &attributes);
        let verdict = policies.workload(namespace, &labels).evaluate(&connection);
        if summary(&verdict) != expected {
            let documents = Value::from(documents);
            return Err(format!(
                "{connection:?} to {namespace} {labels:?} by {documents}: {verdict:?}, not {expected:?}"
            ));
        }
        let outcome = match &verdict.decision {
            Decision::Unrestricted => "unrestricted",
            Decision::Allowed(_) => "allowed",
            Decision::Denied(_) => "denied",
            Decision::NotAllowed(_) => "not allowed",
            Decision::Plaintext(_) => "plaintext",
        };
        *seen.entry(outcome).or_default() += 1;
        *seen.entry("audited").or_default() += usize::from(!verdict.audits.is_empty());
        let differs = verdict
            .dry_run
            .as_ref()
            .is_some_and(|dry| dry.allowed() != verdict.allowed());
        *seen.entry("dry run differs").or_default() += usize::from(differs);
        // The explanation evaluates the rules in a third way. A sample is enough.
        if random.chance(10) && !expected.plaintext {
            let explanation = explain(&policies, namespace, &labels, &connection);
            for finding in &explanation.findings {
                let name = finding.policy.to_string();
                let document = documents
                    .iter()
                    .find(|document| full_name(document) == name)
                    .unwrap();
                if document["kind"] == "PeerAuthentication" {
                    continue;
                }
                let scope = document["metadata"]["namespace"].as_str().unwrap();
                let action = document["spec"]["action"].as_str().unwrap_or("ALLOW");
                let rules = list(&document["spec"]["rules"]);
                let first = rules
                    .iter()
                    .position(|rule| rule_match(rule, action, scope, &attributes));
                let found = match &finding.outcome {
                    Outcome::Matches(rule) => Some(*rule),
                    _ => None,
                };
                let expected = first.filter(|_| applies(document, &attributes));
                if found != expected {
                    return Err(format!("{connection:?}: {finding}, not {expected:?}"));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_million_cases_agree() {
    let (sets, connections) = if cfg!(debug_assertions) {
        (500, 40)
    } else {
        (25_000, 40)
    };
    let mut seen = BTreeMap::new();
    for seed in 0..sets {
        if let Err(difference) = check(seed, connections, &mut seen) {
            panic!("seed {seed}: {difference}");
        }
    }
    // Each outcome must occur often enough to count as tested.
    let least = sets as usize * connections / 100;
    for outcome in [
        "unrestricted",
        "allowed",
        "denied",
        "not allowed",
        "plaintext",
        "audited",
        "dry run differs",
    ] {
        assert!(seen[outcome] > least, "{outcome}: {seen:?}");
    }
}
