//! A second implementation of the policies as a test oracle, straight from Istio's documentation and on the objects as
//! written.
//!
//! It uses nothing of this crate, so that the scenarios, which do not link the daemon, compile this file as well.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde_json::Value;

/// The namespace whose policies apply to the whole mesh.
pub(crate) const ROOT: &str = "istio-system";

/// The attributes of a connection, with the documentation's names. An absent one is empty.
pub(crate) struct Attributes {
    trust_domain: String,
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
    /// Returns those of a connection from `source` to `destination`, a pod with these labels. `client` is the SPIFFE ID
    /// of the caller, `None` for plaintext, and `trust_domain` the mesh's own.
    pub(crate) fn new(
        (client, source): (Option<&str>, IpAddr),
        destination: SocketAddr,
        namespace: &str,
        labels: &BTreeMap<String, String>,
        trust_domain: &str,
    ) -> Self {
        let principal = client.unwrap_or_default().trim_start_matches("spiffe://");
        let parts: Vec<&str> = principal.split('/').collect();
        let part = |n: usize| parts.get(n).copied().unwrap_or_default();
        Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            labels: labels.clone(),
            principal: principal.into(),
            source_namespace: part(2).into(),
            service_account: part(4).into(),
            source_ip: source,
            destination_ip: destination.ip(),
            destination_port: destination.port(),
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
fn principal_match(pattern: &str, a: &Attributes) -> bool {
    match pattern.strip_prefix("cluster.local/") {
        Some(path) => string_match(&format!("{}/{path}", a.trust_domain), &a.principal),
        None => string_match(pattern, &a.principal),
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
        principal_match(p, a)
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
        "source.principal" => principal_match(value, a),
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

pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// "A match occurs when at least one source, one operation and all conditions matches the request. An empty rule is
/// always matched."
pub(crate) fn rule_match(rule: &Value, action: &str, namespace: &str, a: &Attributes) -> bool {
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
pub(crate) fn applies(policy: &Value, a: &Attributes) -> bool {
    let namespace = policy["metadata"]["namespace"].as_str().unwrap();
    let labels = policy["spec"]["selector"]["matchLabels"].as_object();
    (namespace == ROOT || namespace == a.namespace)
        && labels
            .into_iter()
            .flatten()
            .all(|(key, value)| a.labels.get(key).map(String::as_str) == value.as_str())
}

/// Name of a policy, and the index of its first rule that matches.
pub(crate) type Found = Option<(String, usize)>;

/// What the policies say of a connection.
#[derive(Debug, PartialEq)]
pub(crate) struct Expected {
    pub(crate) allowed: bool,
    pub(crate) by: Found,
    pub(crate) audits: Vec<(String, usize)>,
    pub(crate) dry_run: Option<bool>,
    /// Whether it is refused because the pod is STRICT and the caller has no identity.
    pub(crate) plaintext: bool,
}

pub(crate) fn full_name(policy: &Value) -> String {
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

/// Evaluates the policies, in a mesh whose mode is `default`, `STRICT` or `PERMISSIVE`.
pub(crate) fn naive(policies: &[Value], default: &str, a: &Attributes) -> Expected {
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
    let plaintext = a.principal.is_empty() && mode(&peers, default, a) == "STRICT";
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
