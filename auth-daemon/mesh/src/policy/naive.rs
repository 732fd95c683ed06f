//! A second implementation of the policies as a test oracle, straight from Istio's documentation and on the objects as
//! written, and a million generated cases on which both implementations must agree.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde_json::{Value, json};

use super::{
    Connection, Decision, Outcome, Policies, Settings, Verdict,
    api::{Mode, Object},
    explain,
};
use crate::Identity;

const ROOT: &str = "istio-system";

/// The attributes of a connection, with the documentation's names. An absent one is empty.
struct Attributes {
    namespace: String,
    labels: BTreeMap<String, String>,
    principal: String,
    source_namespace: String,
    service_account: String,
    source_ip: IpAddr,
    destination_ip: IpAddr,
    destination_port: u16,
}

impl Attributes {
    fn new(
        connection: &Connection<'_>,
        namespace: &str,
        labels: &BTreeMap<String, String>,
    ) -> Self {
        let id = connection.client.map(Identity::as_str).unwrap_or_default();
        let parts: Vec<&str> = id.trim_start_matches("spiffe://").split('/').collect();
        let part = |n: usize| parts.get(n).copied().unwrap_or_default();
        Self {
            namespace: namespace.into(),
            labels: labels.clone(),
            principal: id.trim_start_matches("spiffe://").into(),
            source_namespace: part(2).into(),
            service_account: part(4).into(),
            source_ip: connection.source,
            destination_ip: connection.destination.ip(),
            destination_port: connection.destination.port(),
        }
    }
}

/// "Exact match: "abc" will match on value "abc". Prefix match: "abc*" will match on value "abc" and "abcd". Suffix
/// match: "*abc" will match on value "abc" and "xabc". Presence match: "*" will match when value is not empty."
fn string_match(pattern: &str, value: &str) -> bool {
    if pattern == "*" {
        !value.is_empty()
    } else if let Some(suffix) = pattern.strip_prefix('*') {
        !value.is_empty() && value.ends_with(suffix)
    } else if let Some(prefix) = pattern.strip_suffix('*') {
        value.starts_with(prefix)
    } else {
        value == pattern
    }
}

/// "cluster.local is a pointer to the local trust domain" (Istio, pilot/pkg/trustdomain).
fn principal_match(pattern: &str, value: &str) -> bool {
    match pattern.strip_prefix("cluster.local/") {
        Some(path) => string_match(&format!("{TRUST_DOMAIN}/{path}"), value),
        None => string_match(pattern, value),
    }
}

/// "Single IP (e.g. "203.0.113.4") and CIDR (e.g. "203.0.113.0/24") are supported."
fn ip_match(block: &str, ip: IpAddr) -> bool {
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => (u128::from(u32::from(ip)) << 96, 32),
        IpAddr::V6(ip) => (u128::from(ip), 128),
    };
    let (network, length) = block.split_once('/').unwrap_or((block, ""));
    let network: IpAddr = network.parse().unwrap();
    let ((network_bits, width), (ip_bits, ip_width)) = (bits(network), bits(ip));
    let length = length.parse().unwrap_or(width);
    width == ip_width && (length == 0 || (network_bits ^ ip_bits) >> (128 - length) == 0)
}

/// Evaluates a field and its negative: "If not set, any … is allowed."
fn allows(any: &Value, none: &Value, matches: impl Fn(&str) -> bool) -> bool {
    let (any, none) = (list(any), list(none));
    let matches = |one: &Value| matches(one.as_str().unwrap());
    (any.is_empty() || any.iter().any(matches)) && !none.iter().any(matches)
}

/// "This takes the format <namespace>/<serviceaccount>. <serviceaccount> may also be used to use the same namespace as
/// the AuthorizationPolicy."
fn account_match(account: &str, policy_namespace: &str, attributes: &Attributes) -> bool {
    let (namespace, name) = account
        .split_once('/')
        .unwrap_or((policy_namespace, account));
    namespace == attributes.source_namespace && name == attributes.service_account
}

/// "Fields in the source are ANDed together."
fn source_match(source: &Value, namespace: &str, a: &Attributes) -> bool {
    allows(&source["principals"], &source["notPrincipals"], |p| {
        principal_match(p, &a.principal)
    }) && allows(&source["namespaces"], &source["notNamespaces"], |p| {
        string_match(p, &a.source_namespace)
    }) && allows(
        &source["serviceAccounts"],
        &source["notServiceAccounts"],
        |p| account_match(p, namespace, a),
    ) && allows(&source["ipBlocks"], &source["notIpBlocks"], |p| {
        ip_match(p, a.source_ip)
    }) && allows(
        &source["remoteIpBlocks"],
        &source["notRemoteIpBlocks"],
        |p| ip_match(p, a.source_ip),
    )
}

fn operation_match(operation: &Value, a: &Attributes) -> bool {
    allows(&operation["ports"], &operation["notPorts"], |port| {
        port.parse() == Ok(a.destination_port)
    })
}

fn condition_match(when: &Value, namespace: &str, a: &Attributes) -> bool {
    let key = when["key"].as_str().unwrap();
    allows(&when["values"], &when["notValues"], |value| match key {
        "source.ip" | "remote.ip" => ip_match(value, a.source_ip),
        "source.namespace" => string_match(value, &a.source_namespace),
        "source.principal" => principal_match(value, &a.principal),
        "source.serviceAccount" => account_match(value, namespace, a),
        "destination.ip" => ip_match(value, a.destination_ip),
        "destination.port" => value.parse() == Ok(a.destination_port),
        other => panic!("{other}"),
    })
}

/// Reports whether a rule contains anything that is only known for HTTP.
fn http_only(rule: &Value) -> bool {
    let http = ["methods", "notPaths", "hosts", "requestPrincipals"];
    match rule {
        Value::Array(elements) => elements.iter().any(http_only),
        Value::Object(fields) => fields.iter().any(|(field, value)| {
            http.contains(&field.as_str())
                || field == "key" && value.as_str().unwrap().starts_with("request.")
                || value.is_array() && value[0].is_object() && http_only(value)
                || value.is_object() && http_only(value)
        }),
        _ => false,
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// "A match occurs when at least one source, one operation and all conditions matches the request. An empty rule is
/// always matched."
fn rule_match(rule: &Value, action: &str, namespace: &str, a: &Attributes) -> bool {
    if action == "ALLOW" && http_only(rule) {
        return false;
    }
    let (from, to, when) = (list(&rule["from"]), list(&rule["to"]), list(&rule["when"]));
    (from.is_empty()
        || from
            .iter()
            .any(|from| source_match(&from["source"], namespace, a)))
        && (to.is_empty() || to.iter().any(|to| operation_match(&to["operation"], a)))
        && when.iter().all(|when| {
            // "For a DENY rule, missing attributes are treated as matches."
            http_only(when) || condition_match(when, namespace, a)
        })
}

/// "metadata/namespace tells which namespace the policy applies. If set to root namespace, the policy applies to all
/// namespaces in a mesh. Workload selector can be used to further restrict where a policy applies."
fn applies(policy: &Value, a: &Attributes) -> bool {
    let namespace = policy["metadata"]["namespace"].as_str().unwrap();
    let labels = policy["spec"]["selector"]["matchLabels"].as_object();
    (namespace == ROOT || namespace == a.namespace)
        && labels
            .into_iter()
            .flatten()
            .all(|(key, value)| a.labels.get(key).map(String::as_str) == value.as_str())
}

/// Name of a policy, and the index of its first rule that matches.
type Found = Option<(String, usize)>;

#[derive(Debug, PartialEq)]
struct Expected {
    allowed: bool,
    by: Found,
    audits: Vec<(String, usize)>,
    dry_run: Option<bool>,
    plaintext: bool,
}

fn full_name(policy: &Value) -> String {
    let metadata = &policy["metadata"];
    format!(
        "{}/{}",
        metadata["namespace"].as_str().unwrap(),
        metadata["name"].as_str().unwrap()
    )
}

/// Finds the matches among the policies of an action. Returns whether there are any such policies, and the matches.
fn action(
    policies: &[&Value],
    wanted: &str,
    dry: &[bool],
    a: &Attributes,
) -> (bool, Vec<(String, usize)>) {
    let mut any = false;
    let mut found = Vec::new();
    for policy in policies {
        let annotated = policy["metadata"]["annotations"]["istio.io/dry-run"] == "true";
        let action = policy["spec"]["action"].as_str().unwrap_or("ALLOW");
        // AUDIT does not affect the verdict, dry or not.
        if action != wanted || (wanted != "AUDIT" && !dry.contains(&annotated)) {
            continue;
        }
        any = true;
        let namespace = policy["metadata"]["namespace"].as_str().unwrap();
        let rules = list(&policy["spec"]["rules"]);
        if let Some(rule) = rules
            .iter()
            .position(|rule| rule_match(rule, action, namespace, a))
        {
            found.push((full_name(policy), rule));
        }
    }
    (any, found)
}

/// "1. … 2. If there are any DENY policies that match the request, deny the request. 3. If there are no ALLOW policies
/// for the workload, allow the request. 4. If any of the ALLOW policies match the request, allow the request. 5. Deny
/// the request."
fn decide(policies: &[&Value], dry: &[bool], a: &Attributes) -> (bool, Found) {
    let (_, denied) = action(policies, "DENY", dry, a);
    if let Some(found) = denied.into_iter().next() {
        return (false, Some(found));
    }
    let (any, allowed) = action(policies, "ALLOW", dry, a);
    if !any {
        return (true, None);
    }
    match allowed.into_iter().next() {
        Some(found) => (true, Some(found)),
        None => (false, None),
    }
}

/// "Istio applies the narrowest matching policy for each workload: workload-specific, namespace-wide, mesh-wide"; of
/// several in one scope "the oldest one"; "when the mode is unset, the mode of the parent scope is inherited".
fn mode(peers: &[&Value], default: &str, a: &Attributes) -> String {
    let matching: Vec<_> = peers.iter().filter(|peer| applies(peer, a)).collect();
    let selects = |peer: &Value| {
        let labels = peer["spec"]["selector"]["matchLabels"].as_object();
        labels.is_some_and(|labels| !labels.is_empty())
    };
    let in_root = |peer: &Value| peer["metadata"]["namespace"] == ROOT;
    let oldest = |scope: &dyn Fn(&Value) -> bool| {
        let mut in_scope: Vec<_> = matching.iter().filter(|peer| scope(peer)).collect();
        in_scope.sort_by_key(|peer| {
            let created = peer["metadata"]["creationTimestamp"]
                .as_str()
                .unwrap_or_default();
            (created.to_owned(), full_name(peer))
        });
        in_scope.first().map(|peer| (***peer).clone())
    };
    let mut mode = default.to_owned();
    let mesh = oldest(&|peer| in_root(peer) && !selects(peer));
    let namespace = oldest(&|peer| !in_root(peer) && !selects(peer));
    let workload = oldest(&|peer| !in_root(peer) && selects(peer));
    for peer in [&mesh, &namespace, &workload].into_iter().flatten() {
        match peer["spec"]["mtls"]["mode"].as_str() {
            None | Some("UNSET") => {}
            Some(own) => mode = own.to_owned(),
        }
    }
    let port = workload
        .map(|peer| peer["spec"]["portLevelMtls"][a.destination_port.to_string()]["mode"].clone());
    match port.as_ref().and_then(Value::as_str) {
        None | Some("UNSET") => mode,
        Some(own) => own.to_owned(),
    }
}

fn naive(policies: &[Value], default: Mode, a: &Attributes) -> Expected {
    let of = |kind: &str| {
        let mut of: Vec<_> = policies
            .iter()
            .filter(|policy| policy["kind"] == kind)
            .collect();
        of.sort_by_key(|policy| {
            let name = full_name(policy);
            let (namespace, name) = name.split_once('/').unwrap();
            (namespace.to_owned(), name.to_owned())
        });
        of
    };
    let (authorization, peers) = (of("AuthorizationPolicy"), of("PeerAuthentication"));
    let authorization: Vec<_> = authorization
        .into_iter()
        .filter(|policy| applies(policy, a))
        .collect();
    let (_, audits) = action(&authorization, "AUDIT", &[], a);
    let plaintext = a.principal.is_empty() && mode(&peers, default.as_str(), a) == "STRICT";
    let (allowed, by) = decide(&authorization, &[false], a);
    let dry = authorization.iter().any(|policy| {
        policy["metadata"]["annotations"]["istio.io/dry-run"] == "true"
            && policy["spec"]["action"] != "AUDIT"
    });
    Expected {
        allowed: allowed && !plaintext,
        by: by.filter(|_| !plaintext),
        audits,
        dry_run: (dry && !plaintext).then(|| decide(&authorization, &[false, true], a).0),
        plaintext,
    }
}

fn said(verdict: &Verdict) -> Expected {
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
        let attributes = Attributes::new(&connection, namespace, &labels);
        let expected = naive(&documents, mode, &attributes);
        let verdict = policies.workload(namespace, &labels).evaluate(&connection);
        if said(&verdict) != expected {
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
                let told = match &finding.outcome {
                    Outcome::Matches(rule) => Some(*rule),
                    _ => None,
                };
                let expected = first.filter(|_| applies(document, &attributes));
                if told != expected {
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
