//! The examples of Istio's documentation, verbatim, with the verdicts that it states.
//!
//! From istio.io/latest/docs: reference/config/security (authorization-policy, peer_authentication, conditions),
//! concepts/security, tasks/security/authorization (authz-tcp, authz-deny, authz-dry-run),
//! tasks/security/authentication (authn-policy, mtls-migration), ambient/usage (l4-policy), ambient/getting-started
//! (enforce-auth-policies), news/security/istio-security-2021-004.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use serde_json::Value;

use super::{
    Connection, Decision, Policies, Settings, Verdict,
    api::{Mode, Object},
};
use crate::Identity;

struct Mesh {
    policies: Policies,
    warnings: Vec<String>,
}

/// Creates a mesh whose default mode is PERMISSIVE, as in Istio without a PeerAuthentication.
fn mesh(manifests: &str) -> Mesh {
    let documents: Vec<Value> = serde_saphyr::from_multiple(manifests).unwrap();
    let objects: Vec<_> = documents
        .into_iter()
        .map(|mut document| {
            let kind = if document["spec"]["mtls"].is_object()
                || document["spec"]["portLevelMtls"].is_object()
            {
                "PeerAuthentication"
            } else {
                "AuthorizationPolicy"
            };
            document["apiVersion"] = "security.istio.io/v1".into();
            document["kind"] = kind.into();
            Arc::new(Object::read(&document).unwrap())
        })
        .collect();
    Mesh {
        warnings: objects
            .iter()
            .flat_map(|object| object.warnings())
            .map(ToString::to_string)
            .collect(),
        policies: Policies::compile(
            Settings {
                root_namespace: "istio-system".into(),
                mode: Mode::Permissive,
                ..Settings::default()
            },
            objects,
        ),
    }
}

impl Mesh {
    /// Evaluates a connection from `client`, a principal or plaintext, to `server`, a namespace and labels, at `port`.
    fn verdict(&self, client: &str, server: &str, port: u16) -> Verdict {
        self.from(client, "10.0.0.9", server, port)
    }

    fn from(&self, client: &str, address: &str, server: &str, port: u16) -> Verdict {
        let client: Option<Identity> =
            (!client.is_empty()).then(|| format!("spiffe://{client}").parse().unwrap());
        let (namespace, labels) = server.split_once(' ').unwrap_or((server, ""));
        let labels: BTreeMap<String, String> = labels
            .split(',')
            .filter_map(|label| label.split_once('='))
            .map(|(key, value)| (key.into(), value.into()))
            .collect();
        self.policies
            .workload(namespace, &labels)
            .evaluate(&Connection {
                client: client.as_ref(),
                source: address.parse().unwrap(),
                destination: SocketAddr::new("10.0.1.1".parse().unwrap(), port),
            })
    }

    fn allows(&self, client: &str, server: &str, port: u16) -> bool {
        self.verdict(client, server, port).allowed()
    }
}

const SLEEP: &str = "cluster.local/ns/foo/sa/sleep";
const PLAINTEXT: &str = "";

#[test]
fn without_policies_everything_is_allowed() {
    let mesh = mesh("");
    assert_eq!(
        mesh.verdict(SLEEP, "foo", 80).decision,
        Decision::Unrestricted
    );
    assert!(mesh.allows(PLAINTEXT, "foo", 80));
}

/// Authorization for TCP traffic, step by step.
#[test]
fn tcp_traffic() {
    let policy = |spec: &str| {
        mesh(&format!(
            "metadata: {{name: tcp-policy, namespace: foo}}\nspec:\n  selector: {{matchLabels: {{app: tcp-echo}}}}\n{spec}"
        ))
    };
    let echo = "foo app=tcp-echo";
    let step =
        policy("  action: ALLOW\n  rules: [{to: [{operation: {ports: ['9000', '9001']}}]}]\n");
    assert!(step.allows(SLEEP, echo, 9000));
    assert!(step.allows(SLEEP, echo, 9001));
    assert!(!step.allows(SLEEP, echo, 9002));
    assert!(step.allows(SLEEP, "foo app=sleep", 9002), "not selected");

    // "Istio ignores the invalid ALLOW rule. The final result is that the request is rejected."
    let step = policy(
        "  action: ALLOW\n  rules: [{to: [{operation: {methods: [GET], ports: ['9000']}}]}]\n",
    );
    assert!(!step.allows(SLEEP, echo, 9000));
    assert!(!step.allows(SLEEP, echo, 9001));
    assert_eq!(
        step.warnings,
        ["spec.rules[0].to[0].operation.methods: is unknown below HTTP, so this rule never allows"]
    );

    // "It denies all the traffic to the tcp ports."
    let step = policy("  action: DENY\n  rules: [{to: [{operation: {methods: [GET]}}]}]\n");
    assert!(!step.allows(SLEEP, echo, 9000));
    assert!(!step.allows(SLEEP, echo, 9001));

    let step = policy(
        "  action: DENY\n  rules: [{to: [{operation: {methods: [GET], ports: ['9000']}}]}]\n",
    );
    assert!(!step.allows(SLEEP, echo, 9000));
    assert!(step.allows(SLEEP, echo, 9001));
    assert!(
        step.warnings[0].contains("denies without it"),
        "{:?}",
        step.warnings
    );
}

/// Ambient: use layer 4 security policy.
#[test]
fn ambient_layer_4() {
    let policy = "
metadata: {name: allow-curl-to-httpbin, namespace: ambient-demo}
spec:
  selector: {matchLabels: {app: httpbin}}
  action: ALLOW
  rules:
  - from:
    - source: {principals: [cluster.local/ns/ambient-demo/sa/curl]}
";
    let (curl, httpbin) = (
        "cluster.local/ns/ambient-demo/sa/curl",
        "ambient-demo app=httpbin",
    );
    let l4 = mesh(policy);
    assert!(l4.allows(curl, httpbin, 8000));
    assert!(!l4.allows("cluster.local/ns/ambient-demo/sa/other", httpbin, 8000));
    assert!(!l4.allows(PLAINTEXT, httpbin, 8000));
    assert!(l4.allows(
        "cluster.local/ns/ambient-demo/sa/other",
        "ambient-demo app=curl",
        8000
    ));
    // "Even if the identity of the client pod is correct, the presence of a L7 attribute causes the ztunnel to deny."
    let l7 = mesh(&format!(
        "{policy}    to: [{{operation: {{methods: [GET]}}}}]\n"
    ));
    assert!(!l7.allows(curl, httpbin, 8000));
}

/// Ambient: enforce authorization policies.
#[test]
fn ambient_getting_started() {
    let mesh = mesh(
        "
metadata: {name: productpage-ztunnel, namespace: default}
spec:
  selector: {matchLabels: {app: productpage}}
  action: ALLOW
  rules:
  - from:
    - source:
        principals: [cluster.local/ns/default/sa/bookinfo-gateway-istio]
",
    );
    let productpage = "default app=productpage";
    assert!(mesh.allows(
        "cluster.local/ns/default/sa/bookinfo-gateway-istio",
        productpage,
        9080
    ));
    assert!(!mesh.allows("cluster.local/ns/default/sa/curl", productpage, 9080));
}

/// Reference: allow-nothing in a namespace, for a workload, in the mesh; allow-all; deny-all.
#[test]
fn nothing_and_all() {
    let nothing = mesh("metadata: {name: allow-nothing, namespace: foo}\nspec: {}\n");
    assert!(!nothing.allows(SLEEP, "foo", 80));
    assert!(nothing.allows(SLEEP, "bar", 80));

    let all = mesh("metadata: {name: allow-all, namespace: foo}\nspec: {rules: [{}]}\n");
    assert!(all.allows(SLEEP, "foo", 80) && all.allows(PLAINTEXT, "foo", 80));

    let workload = mesh(
        "metadata: {name: allow-nothing, namespace: bar}\nspec: {selector: {matchLabels: {app: httpbin}}}\n",
    );
    assert!(!workload.allows(SLEEP, "bar app=httpbin", 80));
    assert!(workload.allows(SLEEP, "bar app=sleep", 80));

    let root = mesh(
        "metadata: {name: allow-nothing, namespace: istio-system}\nspec: {selector: {matchLabels: {version: v1}}}\n",
    );
    assert!(!root.allows(SLEEP, "foo version=v1", 80));
    assert!(!root.allows(SLEEP, "bar app=x,version=v1", 80));
    assert!(root.allows(SLEEP, "bar version=v2", 80));

    let deny = "metadata: {name: deny-all, namespace: foo}\nspec: {action: DENY, rules: [{}]}\n";
    let both = mesh(&format!(
        "{deny}---\nmetadata: {{name: allow-all, namespace: foo}}\nspec: {{rules: [{{}}]}}\n"
    ));
    let verdict = both.verdict(SLEEP, "foo", 80);
    assert_eq!(
        verdict.decision.to_string(),
        "denied by AuthorizationPolicy foo/deny-all rules[0]"
    );
    // A DENY policy without rules never matches.
    let empty = mesh("metadata: {name: deny, namespace: foo}\nspec: {action: DENY, rules: []}\n");
    assert!(empty.allows(SLEEP, "foo", 80));
}

/// Concepts: httpbin-deny, and that a deny policy takes precedence; authenticated and unauthenticated identity; TCP.
#[test]
fn concepts() {
    let deny = mesh(
        "
metadata: {name: httpbin-deny, namespace: foo}
spec:
  selector: {matchLabels: {app: httpbin, version: v1}}
  action: DENY
  rules:
  - from:
    - source: {notNamespaces: [foo]}
---
metadata: {name: httpbin-allow, namespace: foo}
spec:
  selector: {matchLabels: {app: httpbin}}
  rules: [{from: [{source: {namespaces: [foo, dev]}}]}]
",
    );
    let httpbin = "foo app=httpbin,version=v1";
    assert!(deny.allows(SLEEP, httpbin, 80));
    assert!(!deny.allows("cluster.local/ns/dev/sa/sleep", httpbin, 80));
    assert!(deny.allows(
        "cluster.local/ns/dev/sa/sleep",
        "foo app=httpbin,version=v2",
        80
    ));

    let authenticated = mesh(
        "metadata: {name: httpbin, namespace: foo}\nspec: {rules: [{from: [{source: {principals: ['*']}}]}]}\n",
    );
    assert!(authenticated.allows(SLEEP, "foo", 80));
    assert!(!authenticated.allows(PLAINTEXT, "foo", 80));

    let mongodb = mesh(
        "
metadata: {name: mongodb-policy, namespace: default}
spec:
  selector: {matchLabels: {app: mongodb}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/bookinfo-ratings-v2]}}]
    to: [{operation: {ports: ['27017']}}]
",
    );
    let ratings = "cluster.local/ns/default/sa/bookinfo-ratings-v2";
    assert!(mongodb.allows(ratings, "default app=mongodb", 27017));
    assert!(!mongodb.allows(ratings, "default app=mongodb", 27018));
    assert!(!mongodb.allows(
        "cluster.local/ns/default/sa/bookinfo-ratings",
        "default app=mongodb",
        27017
    ));
}

/// ISTIO-SECURITY-2021-004: fields that need mutual TLS "will be compared to an empty value" in plaintext.
#[test]
fn plaintext_has_no_identity() {
    let policy = |action: &str, rules: &str| {
        mesh(&format!(
            "metadata: {{name: a, namespace: bar}}\nspec: {{action: {action}, rules: {rules}}}\n"
        ))
    };
    let allow = policy("ALLOW", "[{from: [{source: {notNamespaces: [foo]}}]}]");
    assert!(allow.allows(PLAINTEXT, "bar", 80), "as documented");
    assert!(!allow.allows(SLEEP, "bar", 80));
    let allow = policy(
        "ALLOW",
        "[{from: [{source: {notNamespaces: [foo], namespaces: ['*']}}]}]",
    );
    assert!(!allow.allows(PLAINTEXT, "bar", 80));
    let deny = policy("DENY", "[{from: [{source: {namespaces: [foo]}}]}]");
    assert!(deny.allows(PLAINTEXT, "bar", 80), "as documented");
    let deny = policy(
        "DENY",
        "[{from: [{source: {namespaces: [foo]}}]}, {from: [{source: {notNamespaces: ['*']}}]}]",
    );
    assert!(!deny.allows(PLAINTEXT, "bar", 80));
    assert!(deny.allows("cluster.local/ns/bar/sa/a", "bar", 80));
    // Security policy examples: require mTLS in the authorization layer.
    let require = policy("DENY", "[{from: [{source: {notPrincipals: ['*']}}]}]");
    assert!(!require.allows(PLAINTEXT, "bar", 80));
    assert!(require.allows(SLEEP, "bar", 80));
}

/// Reference: the source that "matches if the principal is admin or dev and the namespace is prod or test and the ip
/// is not 203.0.113.4"; service accounts of the policy's own namespace; the examples of the conditions.
#[test]
fn sources_and_conditions() {
    let mesh = mesh(
        "
metadata: {name: source, namespace: a}
spec:
  rules:
  - from:
    - source:
        principals: ['*/sa/admin', '*/sa/dev']
        namespaces: [prod, test]
        notIpBlocks: [203.0.113.4]
---
metadata: {name: account, namespace: b}
spec: {rules: [{from: [{source: {serviceAccounts: [waypoint, other/waypoint]}}]}]}
---
metadata: {name: conditions, namespace: c}
spec:
  rules:
  - when:
    - {key: source.ip, values: [10.1.2.3]}
    - {key: source.namespace, values: [default]}
    - {key: source.principal, values: [cluster.local/ns/default/sa/productpage]}
    - {key: destination.ip, values: [10.1.2.3, 10.0.0.0/16]}
    - {key: destination.port, values: ['80', '443']}
",
    );
    let admin = "cluster.local/ns/prod/sa/admin";
    assert!(mesh.from(admin, "203.0.113.5", "a", 80).allowed());
    assert!(!mesh.from(admin, "203.0.113.4", "a", 80).allowed());
    assert!(!mesh.allows("cluster.local/ns/stage/sa/admin", "a", 80));
    assert!(!mesh.allows("cluster.local/ns/prod/sa/ops", "a", 80));

    assert!(mesh.allows("cluster.local/ns/b/sa/waypoint", "b", 80));
    assert!(mesh.allows("cluster.local/ns/other/sa/waypoint", "b", 80));
    assert!(!mesh.allows("cluster.local/ns/c/sa/waypoint", "b", 80));
    assert!(!mesh.allows(PLAINTEXT, "b", 80));

    let productpage = "cluster.local/ns/default/sa/productpage";
    assert!(mesh.from(productpage, "10.1.2.3", "c", 443).allowed());
    assert!(!mesh.from(productpage, "10.1.2.3", "c", 8080).allowed());
    assert!(!mesh.from(productpage, "10.1.2.4", "c", 443).allowed());
    assert!(
        !mesh
            .from("cluster.local/ns/default/sa/reviews", "10.1.2.3", "c", 443)
            .allowed()
    );
}

/// Dry run: annotated policies are reported but not enforced. AUDIT policies are reported and deny nothing.
#[test]
fn dry_run_and_audit() {
    let mesh = mesh(
        "
metadata: {name: deny-path-headers, namespace: foo, annotations: {istio.io/dry-run: 'true'}}
spec: {selector: {matchLabels: {app: httpbin}}, action: DENY, rules: [{to: [{operation: {paths: [/headers]}}]}]}
---
metadata: {name: anyname, namespace: foo}
spec: {action: AUDIT, rules: [{from: [{source: {namespaces: [bar]}}]}, {from: [{source: {namespaces: [foo]}}]}]}
",
    );
    let verdict = mesh.verdict(SLEEP, "foo app=httpbin", 80);
    assert_eq!(verdict.decision, Decision::Unrestricted);
    assert_eq!(
        verdict.dry_run.unwrap().to_string(),
        "denied by AuthorizationPolicy foo/deny-path-headers rules[0]"
    );
    assert_eq!(verdict.audits.len(), 1);
    assert_eq!(
        verdict.audits[0].to_string(),
        "AuthorizationPolicy foo/anyname rules[1]"
    );
    assert_eq!(mesh.verdict(SLEEP, "foo app=x", 80).dry_run, None);
}

/// Authentication policy and mutual TLS migration: which servers `legacy`, which has no mutual TLS, can reach.
#[test]
fn peer_authentication_tasks() {
    let strict = |namespace: &str, selector: &str, more: &str| {
        format!(
            "metadata: {{name: default{selector}, namespace: {namespace}}}\nspec: {{mtls: {{mode: STRICT}}{more}}}\n"
        )
    };
    let reached = |mesh: &Mesh, server: &str, port: u16| {
        assert!(mesh.allows(SLEEP, server, port), "with mutual TLS: always");
        mesh.allows(PLAINTEXT, server, port)
    };
    let namespace = mesh(&strict("foo", "", ""));
    assert!(!reached(&namespace, "foo app=httpbin", 8000));
    assert!(reached(&namespace, "bar app=httpbin", 8000));

    let whole = mesh(&strict("istio-system", "", ""));
    assert!(!reached(&whole, "foo", 8000) && !reached(&whole, "bar", 8000));
    let verdict = whole.verdict(PLAINTEXT, "bar", 8000);
    assert_eq!(
        verdict.decision.to_string(),
        "denied: plaintext, and the port takes STRICT by PeerAuthentication istio-system/default"
    );

    let httpbin = ", selector: {matchLabels: {app: httpbin}}";
    let workload = mesh(&strict("bar", "-httpbin", httpbin));
    assert!(!reached(&workload, "bar app=httpbin", 8000));
    assert!(reached(&workload, "bar app=sleep", 8000));

    let port = mesh(&strict(
        "bar",
        "",
        &format!("{httpbin}, portLevelMtls: {{80: {{mode: DISABLE}}}}"),
    ));
    assert!(!reached(&port, "bar app=httpbin", 8000));
    assert!(reached(&port, "bar app=httpbin", 80));

    // "The policy for workload has precedence over the namespace's."
    let overwritten = mesh(&format!(
        "{}---\nmetadata: {{name: overwrite-example, namespace: foo}}\nspec: {{mtls: {{mode: DISABLE}}{httpbin}}}\n",
        strict("foo", "", "")
    ));
    assert!(reached(&overwritten, "foo app=httpbin", 8000));
    assert!(!reached(&overwritten, "foo app=sleep", 8000));
}

/// Reference of PeerAuthentication. Of two policies in one scope, the older takes precedence.
#[test]
fn peer_authentication_reference() {
    let finance = ", selector: {matchLabels: {app: finance}}";
    let mode = |mesh: &Mesh, server: &str, port: u16| {
        let (namespace, app) = server.split_once(' ').unwrap();
        let labels = BTreeMap::from([("app".to_owned(), app.to_owned())]);
        mesh.policies.workload(namespace, &labels).mode(port).mode
    };
    let narrower = mesh(&format!(
        "metadata: {{name: default, namespace: foo}}\nspec: {{mtls: {{mode: PERMISSIVE}}}}\n---\n\
         metadata: {{name: finance, namespace: foo}}\nspec: {{mtls: {{mode: STRICT}}{finance}}}\n"
    ));
    assert_eq!(mode(&narrower, "foo finance", 80), Mode::Strict);
    assert_eq!(mode(&narrower, "foo other", 80), Mode::Permissive);

    let inherited = mesh(&format!(
        "metadata: {{name: default, namespace: foo}}\nspec: {{mtls: {{mode: STRICT}}}}\n---\n\
         metadata: {{name: finance, namespace: foo}}\n\
         spec: {{mtls: {{mode: UNSET}}, portLevelMtls: {{8080: {{mode: DISABLE}}, 81: {{mode: UNSET}}}}{finance}}}\n"
    ));
    assert_eq!(mode(&inherited, "foo finance", 8080), Mode::Disable);
    assert_eq!(mode(&inherited, "foo finance", 81), Mode::Strict);
    assert_eq!(mode(&inherited, "foo finance", 80), Mode::Strict);

    let oldest = mesh(
        "metadata: {name: a, namespace: foo, creationTimestamp: '2024-02-01T00:00:00Z'}\n\
         spec: {mtls: {mode: PERMISSIVE}}\n---\n\
         metadata: {name: b, namespace: foo, creationTimestamp: '2024-01-31T23:59:59Z'}\n\
         spec: {mtls: {mode: STRICT}}\n",
    );
    assert_eq!(mode(&oldest, "foo x", 80), Mode::Strict);
    assert!(
        oldest.policies.warnings()[0]
            .text
            .contains("foo/b is older"),
        "{:?}",
        oldest.policies.warnings()
    );
}

/// An unreadable policy allows nothing, and leaves the others in force.
#[test]
fn unreadable_fails_closed() {
    let with = |action: &str, selector: &str| {
        mesh(&format!(
            "metadata: {{name: bad, namespace: foo}}\n\
             spec: {{action: {action}, selector: {selector}, rules: [{{from: [{{source: {{ipBlocks: [x]}}}}]}}]}}\n---\n\
             metadata: {{name: good, namespace: foo}}\nspec: {{rules: [{{from: [{{source: {{namespaces: [foo]}}}}]}}]}}\n"
        ))
    };
    let httpbin = "{matchLabels: {app: httpbin}}";
    let other = "cluster.local/ns/bar/sa/x";
    let allow = with("ALLOW", httpbin);
    assert!(
        allow.allows(SLEEP, "foo app=httpbin", 80),
        "another policy allows it"
    );
    assert!(!allow.allows(other, "foo app=httpbin", 80));
    let deny = with("DENY", httpbin);
    let verdict = deny.verdict(SLEEP, "foo app=httpbin", 80);
    assert_eq!(
        verdict.decision.to_string(),
        "denied by AuthorizationPolicy foo/bad, which cannot be read"
    );
    assert!(deny.allows(SLEEP, "foo app=sleep", 80));
    assert!(!with("Deny", httpbin).allows(SLEEP, "foo app=httpbin", 80));
    assert!(
        !with("DENY", "7").allows(SLEEP, "foo app=sleep", 80),
        "whole namespace"
    );
    assert!(with("DENY", "7").allows(SLEEP, "bar app=sleep", 80));

    let alone = mesh("metadata: {name: bad, namespace: foo}\nspec: {rules: 5}\n");
    assert!(!alone.allows(SLEEP, "foo", 80));
    let root =
        mesh("metadata: {name: bad, namespace: istio-system}\nspec: {action: DENY, rules: 5}\n");
    assert!(!root.allows(SLEEP, "foo", 80));
    let peer = mesh("metadata: {name: bad, namespace: foo}\nspec: {mtls: {mode: PERMISIVE}}\n");
    assert!(!peer.allows(PLAINTEXT, "foo", 80) && peer.allows(SLEEP, "foo", 80));
    assert!(
        peer.policies.warnings()[0]
            .text
            .contains("mutual TLS is required"),
        "{:?}",
        peer.policies.warnings()
    );
}

/// A policy that is bound to a gateway or waypoint is enforced there.
#[test]
fn policies_for_waypoints_select_nothing() {
    let mesh = mesh(
        "metadata: {name: target-ref-example, namespace: default}\n\
         spec: {action: DENY, rules: [{}], targetRefs: [{kind: Gateway, name: waypoint}]}\n",
    );
    assert!(mesh.allows(SLEEP, "default", 80));
    assert!(
        mesh.warnings[0].contains("spec.targetRefs"),
        "{:?}",
        mesh.warnings
    );
}
