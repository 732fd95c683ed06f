//! Generated policies, about the namespaces, accounts, labels, addresses and ports that the pods have.

use serde_json::{Value, json};

use crate::oracle::ROOT;
use crate::random::Random;

pub(crate) const NAMESPACES: [&str; 2] = ["default", "shop"];
pub(crate) const ACCOUNTS: [&str; 3] = ["x", "y", "z"];
pub(crate) const APPS: [&str; 2] = ["web", "db"];
const SCOPES: [&str; 4] = ["default", "default", "shop", ROOT];
const PRINCIPALS: [&str; 7] = [
    "cluster.local/ns/default/sa/x",
    "cluster.local/ns/default/sa/y",
    "cluster.local/ns/shop/sa/x",
    "cluster.local/ns/shop/*",
    "cluster.local/ns/default*",
    "*/sa/z",
    "*",
];
const BLOCKS: [&str; 7] = [
    "10.77.1.0/24",
    "10.77.2.0/24",
    "10.77.1.2",
    "192.0.2.0/24",
    "172.31.0.0/24",
    "fd77:1::/64",
    "fd77::/16",
];
const PORTS: [&str; 2] = ["8080", "8081"];

/// An AuthorizationPolicy or, seldom, a PeerAuthentication.
pub(crate) fn generate(random: &mut Random, name: &str) -> Value {
    if random.chance(35) {
        return peer_authentication(random, name);
    }
    // A rule of ALLOW that is too narrow refuses nearly everything, so one often names many callers.
    let action = random.one(&["ALLOW", "DENY"]);
    let count = 1 + random.below(if action == "ALLOW" { 3 } else { 2 });
    let rules: Vec<Value> = (0..count).map(|_| rule(random)).collect();
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": random.one(&SCOPES)},
        "spec": {"selector": selector(random), "action": action, "rules": rules},
    })
}

/// A PeerAuthentication of any scope.
pub(crate) fn peer_authentication(random: &mut Random, name: &str) -> Value {
    let namespace = random.one(&SCOPES);
    let modes = ["STRICT", "STRICT", "PERMISSIVE", "DISABLE", "UNSET"];
    let mut policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"mtls": {"mode": random.one(&modes)}},
    });
    if namespace != ROOT && random.chance(50) {
        policy["spec"]["selector"] = json!({"matchLabels": {"app": random.one(&APPS)}});
        if random.chance(40) {
            let port = random.one(&PORTS);
            policy["spec"]["portLevelMtls"] = json!({port: {"mode": random.one(&modes)}});
        }
    }
    policy
}

fn selector(random: &mut Random) -> Value {
    if random.chance(40) {
        Value::Null
    } else {
        json!({"matchLabels": {"app": random.one(&APPS)}})
    }
}

fn rule(random: &mut Random) -> Value {
    let mut rule = json!({});
    if random.chance(85) {
        let sources: Vec<Value> = (0..1 + random.below(2))
            .map(|_| json!({"source": source(random)}))
            .collect();
        rule["from"] = sources.into();
    }
    if random.chance(30) {
        let field = random.one(&["ports", "notPorts"]);
        rule["to"] = json!([{"operation": {field: [random.one(&PORTS)]}}]);
    }
    if random.chance(15) {
        let field = random.one(&["values", "notValues"]);
        rule["when"] = json!([{"key": "destination.ip", field: [random.one(&BLOCKS)]}]);
    }
    rule
}

fn source(random: &mut Random) -> Value {
    let fields: [(&str, &[&str]); 7] = [
        ("principals", &PRINCIPALS),
        ("principals", &PRINCIPALS),
        ("notPrincipals", &PRINCIPALS),
        ("namespaces", &NAMESPACES),
        ("notNamespaces", &NAMESPACES),
        ("ipBlocks", &BLOCKS),
        ("notIpBlocks", &BLOCKS),
    ];
    let (field, values) = random.one(&fields);
    let values: Vec<&str> = (0..1 + random.below(2))
        .map(|_| random.one(values))
        .collect();
    json!({field: values})
}
