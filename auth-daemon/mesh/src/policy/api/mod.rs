//! AuthorizationPolicy and PeerAuthentication of `security.istio.io/v1`, parsed into validated values.
//!
//! Each object is parsed independently: one that cannot be read becomes [`Unreadable`], and the others stay in force.

mod authorization;
mod pattern;
mod peer;
mod read;
mod rule;
mod selector;

use std::fmt;

use serde_json::Value;

pub use authorization::{Action, AuthorizationPolicy};
pub use pattern::{Account, Pattern};
pub use peer::{Mode, PeerAuthentication};
use read::{FieldError, Node, exceeds, quoted};
pub use rule::{MAX_VALUES, Requirement, Rule, Values, limit_values};
pub use selector::Selector;

use crate::ObjectName;

/// API group of all policies.
pub const GROUP: &str = "security.istio.io";
/// Versions of the API group, which have the same schema.
pub const VERSIONS: [&str; 2] = ["v1", "v1beta1"];
/// Maximum size of an object, in bytes of JSON: etcd's limit (`--max-request-bytes`, 1.5 MiB).
const MAX_OBJECT_BYTES: usize = 3 << 19;
/// Maximum size of a selector that is parsed, in bytes of JSON.
const MAX_SELECTOR_BYTES: usize = 1 << 20;

/// A policy object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// Which callers are allowed.
    Authorization(AuthorizationPolicy),
    /// Whether callers need mutual TLS.
    Peer(PeerAuthentication),
    /// An object that cannot be read. The last readable version, if there is one, stays in force instead.
    Unreadable(Unreadable),
}

/// Kind of a policy object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// AuthorizationPolicy.
    Authorization,
    /// PeerAuthentication.
    Peer,
}

/// An object that cannot be read, and what is enforced in its place so that the mistake does not allow anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {name}: {field}: {reason}")]
pub struct Unreadable {
    /// Kind of the object.
    pub kind: Kind,
    /// Name of the object.
    pub name: ObjectName,
    /// The first invalid field.
    pub field: String,
    /// What is wrong with the field.
    pub reason: String,
    /// What is enforced in the object's place.
    pub instead: Instead,
    /// Workloads for which that is enforced: all in the namespace if the selector cannot be read.
    pub selector: Selector,
}

/// A field of a readable object that does not have the effect that its author may expect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldWarning {
    /// Path of the field.
    pub field: String,
    /// What the field means here.
    pub text: String,
}

/// What is enforced in the place of an object that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instead {
    /// An ALLOW policy that matches no connection.
    AllowNothing,
    /// A DENY policy that matches every connection, because the object denies or its action is unknown.
    DenyAll,
    /// Nothing, because the object could not have denied anything (AUDIT, dry run).
    Nothing,
    /// Mutual TLS on all ports.
    Strict,
}

impl Object {
    /// Returns the object with a note that a later version of it cannot be read, because of `error`.
    pub fn kept_in_place_of(&self, error: &Unreadable) -> Self {
        let mut object = self.clone();
        let rejected = match &mut object {
            Self::Authorization(policy) => &mut policy.rejected,
            Self::Peer(policy) => &mut policy.rejected,
            Self::Unreadable(_) => return object,
        };
        *rejected = Some(FieldWarning {
            field: error.field.clone(),
            text: format!("{}; its last good version stays in force", error.reason),
        });
        object
    }

    /// Returns why the object, or a later version of it, cannot be read.
    pub fn error(&self) -> Option<String> {
        match self {
            Self::Unreadable(error) => Some(format!("{}: {}", error.field, error.reason)),
            Self::Authorization(AuthorizationPolicy { rejected, .. })
            | Self::Peer(PeerAuthentication { rejected, .. }) => {
                rejected.as_ref().map(FieldWarning::to_string)
            }
        }
    }

    /// Parses a document. Returns `None` if it is not a policy.
    pub fn read(document: &Value) -> Option<Self> {
        let text = |name: &str| document.get(name).and_then(Value::as_str);
        let version = text("apiVersion")?.strip_prefix(GROUP)?.strip_prefix('/')?;
        let kind = match text("kind")? {
            "AuthorizationPolicy" => Kind::Authorization,
            "PeerAuthentication" => Kind::Peer,
            _ => return None,
        };
        let read = || {
            if !VERSIONS.contains(&version) {
                return Err(Node::top(document, "apiVersion").error(format!(
                    "version {} is not supported; supported are {}",
                    quoted(version),
                    VERSIONS.join(", ")
                )));
            }
            if exceeds(document, MAX_OBJECT_BYTES) {
                return Err(Node::top(document, "spec").error(format!(
                    "the object is larger than {MAX_OBJECT_BYTES} bytes; split it"
                )));
            }
            let name = name(document)?;
            match kind {
                Kind::Authorization => {
                    AuthorizationPolicy::read(document, name).map(Self::Authorization)
                }
                Kind::Peer => PeerAuthentication::read(document, name).map(Self::Peer),
            }
        };
        Some(
            read().unwrap_or_else(|error| Self::Unreadable(Unreadable::new(kind, document, error))),
        )
    }

    /// Returns the object's kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Authorization(_) => Kind::Authorization,
            Self::Peer(_) => Kind::Peer,
            Self::Unreadable(unreadable) => unreadable.kind,
        }
    }

    /// Returns the object's namespace and name.
    pub fn name(&self) -> &ObjectName {
        match self {
            Self::Authorization(policy) => &policy.name,
            Self::Peer(policy) => &policy.name,
            Self::Unreadable(unreadable) => &unreadable.name,
        }
    }

    /// Returns the selector.
    pub fn selector(&self) -> &Selector {
        match self {
            Self::Authorization(policy) => &policy.selector,
            Self::Peer(policy) => &policy.selector,
            Self::Unreadable(unreadable) => &unreadable.selector,
        }
    }

    /// Returns warnings for the author of a readable object that cannot be fully enforced, or whose later version cannot be
    /// read.
    pub fn warnings(&self) -> impl Iterator<Item = &FieldWarning> {
        let (warnings, rejected) = match self {
            Self::Authorization(policy) => (policy.warnings.as_slice(), &policy.rejected),
            Self::Peer(policy) => (policy.warnings.as_slice(), &policy.rejected),
            Self::Unreadable(_) => (&[][..], &None),
        };
        warnings.iter().chain(rejected)
    }
}

impl Unreadable {
    fn new(kind: Kind, document: &Value, error: FieldError) -> Self {
        let metadata = |field| {
            let text = document["metadata"][field].as_str()?;
            is_name(text, 253).then(|| text.to_owned())
        };
        let spec = Node::top(document, "spec");
        let instead = match kind {
            Kind::Peer => Instead::Strict,
            Kind::Authorization if authorization::is_dry_run(document) == Ok(true) => {
                Instead::Nothing
            }
            Kind::Authorization => match Action::read(&spec.field("action")) {
                // A spec that is not an object specifies no action.
                _ if !spec.is_null() && !spec.value().is_object() => Instead::DenyAll,
                Ok(Action::Allow) => Instead::AllowNothing,
                Ok(Action::Audit) => Instead::Nothing,
                Ok(Action::Deny) | Err(_) => Instead::DenyAll,
            },
        };
        let selector = spec.field("selector");
        let contradicted =
            targets(&spec).is_some() || exceeds(selector.value(), MAX_SELECTOR_BYTES);
        let selector = match Selector::read(&selector) {
            Ok(selector) if !contradicted => selector,
            _ => Selector::default(),
        };
        Self {
            kind,
            name: ObjectName {
                namespace: metadata("namespace").unwrap_or_else(|| "default".into()),
                name: metadata("name").unwrap_or_else(|| "?".into()),
            },
            field: error.field,
            reason: error.reason,
            instead,
            selector,
        }
    }
}

impl Kind {
    /// Returns the kind's name in Kubernetes.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Authorization => "AuthorizationPolicy",
            Self::Peer => "PeerAuthentication",
        }
    }
}

impl fmt::Display for FieldWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.text)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Instead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllowNothing => "it allows no connection",
            Self::DenyAll => "it denies every connection",
            Self::Nothing => "it does nothing",
            Self::Strict => "mutual TLS is required on all ports",
        })
    }
}

/// Parses `metadata.name` and `metadata.namespace`.
fn name(document: &Value) -> Result<ObjectName, FieldError> {
    let metadata = Node::top(document, "metadata");
    let part = |field: &str, longest| {
        let node = metadata.field(field);
        match node.text()? {
            Some(text) if is_name(text, longest) => Ok(Some(text.to_owned())),
            Some(text) => Err(node.error(format!("{} is not a name", quoted(text)))),
            None => Ok(None),
        }
    };
    let name = part("name", 253)?.ok_or_else(|| metadata.field("name").error("is missing"))?;
    let namespace = part("namespace", 63)?.unwrap_or_else(|| "default".into());
    Ok(ObjectName { namespace, name })
}

/// Returns the field that binds the policy to gateways or services instead of workloads, if it is set.
fn targets<'a>(spec: &Node<'a>) -> Option<Node<'a>> {
    ["targetRefs", "targetRef"]
        .map(|field| spec.field(field))
        .into_iter()
        .find(|node| !matches!(node.value(), Value::Null) && node.value() != &Value::Array(vec![]))
}

fn is_name(text: &str, longest: usize) -> bool {
    !text.is_empty()
        && text.len() <= longest
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn object(kind: &str, spec: Value) -> Object {
        Object::read(&json!({
            "apiVersion": "security.istio.io/v1", "kind": kind,
            "metadata": {"namespace": "shop", "name": "web"}, "spec": spec,
        }))
        .unwrap()
    }

    fn refused(kind: &str, spec: Value) -> Unreadable {
        match object(kind, spec) {
            Object::Unreadable(unreadable) => unreadable,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn errors_name_object_and_field() {
        let source =
            |field: &str, value: Value| json!({"rules": [{"from": [{"source": {field: value}}]}]});
        let operation = |value: Value| json!({"rules": [{"to": [{"operation": value}]}]});
        for (spec, expected) in [
            (
                source("ipBlocks", json!(["10.0.0.0/8", "10.0.0.0/33"])),
                "spec.rules[0].from[0].source.ipBlocks[1]: \"10.0.0.0/33\" is not a CIDR",
            ),
            (
                source("principals", json!(["^cluster.local/(.*$"])),
                "spec.rules[0].from[0].source.principals[0]: \"^cluster.local/(.*$\": * is a wildcard",
            ),
            (
                source("principals", json!(["td/ns/(a|b)/sa/c"])),
                "is not a principal; there are no regular expressions",
            ),
            (
                source("principals", json!(["spiffe://td/ns/a/sa/b"])),
                "principals are written without spiffe://",
            ),
            (
                source("principal", json!(["td/ns/a/sa/b"])),
                "spec.rules[0].from[0].source.principal: is not supported",
            ),
            (
                source("namespaces", json!("a")),
                "source.namespaces: is a string, not a list",
            ),
            (
                source("namespaces", json!([1])),
                "source.namespaces[0]: is a number, not a string",
            ),
            (
                source("namespaces", json!([])),
                "spec.rules[0].from[0].source: is empty",
            ),
            (
                source("serviceAccounts", json!(["web*"])),
                "is not a service account",
            ),
            (
                json!({"rules": [{"from": [{"source":
                    {"serviceAccounts": ["a"], "notPrincipals": ["b"]}}]}]}),
                "spec.rules[0].from[0].source.serviceAccounts: cannot be combined with principals",
            ),
            (
                json!({"rules": [{"from": []}]}),
                "spec.rules[0].from: is empty",
            ),
            (
                json!({"rules": [{"from": [{}]}]}),
                "spec.rules[0].from[0].source: is missing",
            ),
            (json!({"rules": [null]}), "spec.rules[0]: is null"),
            (
                json!({"rules": [[]]}),
                "spec.rules[0]: is a list, not an object",
            ),
            (
                operation(json!({})),
                "spec.rules[0].to[0].operation: is empty",
            ),
            (
                operation(json!({"ports": ["http"]})),
                "to[0].operation.ports[0]: \"http\" is not a port",
            ),
            (
                operation(json!({"ports": [80]})),
                "to[0].operation.ports[0]: is a number, not a string",
            ),
            (
                json!({"rules": [{"when": [{"key": "source.ips", "values": ["10.0.0.1"]}]}]}),
                "spec.rules[0].when[0].key: \"source.ips\" is not supported",
            ),
            (
                json!({"rules": [{"when": [{"key": "source.ip"}]}]}),
                "spec.rules[0].when[0]: has neither values nor notValues",
            ),
            (
                json!({"rules": [{"when": [{"key": "source.ip", "notValues": ["*"]}]}]}),
                "spec.rules[0].when[0].notValues[0]: \"*\" is not an IP address",
            ),
            (
                json!({"action": "allow"}),
                "spec.action: \"allow\" is none of ALLOW, DENY, AUDIT",
            ),
            (
                json!({"action": "CUSTOM"}),
                "spec.action: CUSTOM needs an external authorizer",
            ),
            (
                json!({"selector": {"matchLabels": {"app": "web"}}, "targetRefs": [{"kind": "Service"}]}),
                "spec.targetRefs: contradicts spec.selector",
            ),
            (
                json!({"selector": {"matchLabels": {"app": "w*"}}}),
                "spec.selector.matchLabels[app]: \"w*\" is not a value",
            ),
            (
                json!({"selector": {"matchExpressions": []}}),
                "spec.selector.matchExpressions: is not supported; supported are matchLabels",
            ),
        ] {
            let error = refused("AuthorizationPolicy", spec.clone()).to_string();
            assert!(
                error.starts_with("AuthorizationPolicy shop/web: spec"),
                "{error}"
            );
            assert!(error.contains(expected), "{spec}: {error}");
        }
        for (spec, expected) in [
            (
                json!({"mtls": {"mode": "strict"}}),
                "spec.mtls.mode: \"strict\" is none of STRICT, PERMISSIVE, DISABLE, UNSET",
            ),
            (
                json!({"portLevelMtls": {"80": {"mode": "STRICT"}}}),
                "spec.portLevelMtls: needs a selector",
            ),
            (
                json!({"selector": {"matchLabels": {"a": "b"}}, "portLevelMtls": {"http": {}}}),
                "spec.portLevelMtls[http]: \"http\" is not a port",
            ),
        ] {
            let refused = refused("PeerAuthentication", spec);
            assert!(refused.to_string().contains(expected), "{refused}");
            assert_eq!(refused.instead, Instead::Strict);
        }
    }

    #[test]
    fn unreadable_objects_fail_closed() {
        let bad = json!([{"from": 5}]);
        for (mut spec, instead) in [
            (json!({}), Instead::AllowNothing),
            (json!({"action": "ALLOW"}), Instead::AllowNothing),
            (json!({"action": "DENY"}), Instead::DenyAll),
            (json!({"action": "AUDIT"}), Instead::Nothing),
            (json!({"action": "deny"}), Instead::DenyAll),
            (json!({"action": ["DENY"]}), Instead::DenyAll),
            (json!({"action": "CUSTOM"}), Instead::DenyAll),
        ] {
            spec["rules"] = bad.clone();
            assert_eq!(
                refused("AuthorizationPolicy", spec.clone()).instead,
                instead,
                "{spec}"
            );
        }
        assert_eq!(
            refused("AuthorizationPolicy", json!("x")).instead,
            Instead::DenyAll
        );

        let of = |selector: Value| {
            let spec = json!({"rules": 5, "selector": selector});
            refused("AuthorizationPolicy", spec).selector.to_string()
        };
        assert_eq!(
            of(json!({"matchLabels": {"app": "web", "v": "1"}})),
            "app=web,v=1"
        );
        assert_eq!(of(json!({"matchLabels": ["app"]})), "");
        let contradictory = json!({"selector": {"matchLabels": {"app": "web"}}, "targetRef": {}});
        assert!(
            refused("AuthorizationPolicy", contradictory)
                .selector
                .is_empty()
        );

        let mut dry = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "web", "annotations": {"istio.io/dry-run": "true"}},
            "spec": {"action": "DENY", "rules": 5},
        });
        let instead = |document: &Value| match Object::read(document) {
            Some(Object::Unreadable(unreadable)) => unreadable.instead,
            other => panic!("{other:?}"),
        };
        assert_eq!(instead(&dry), Instead::Nothing);
        dry["metadata"]["annotations"]["istio.io/dry-run"] = "perhaps".into();
        assert_eq!(instead(&dry), Instead::DenyAll);
    }

    #[test]
    fn ten_megabytes_of_rules_are_refused_cheaply() {
        let principals = vec!["cluster.local/ns/a/sa/b"; 100];
        let rule = json!({"from": [{"source": {"principals": principals}}]});
        let spec = json!({
            "action": "DENY", "selector": {"matchLabels": {"app": "web"}}, "rules": vec![rule; 4000],
        });
        assert!(spec.to_string().len() > 10_000_000);
        let start = std::time::Instant::now();
        let document = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "web"}, "spec": spec,
        });
        let copying = start.elapsed();
        let start = std::time::Instant::now();
        let Some(Object::Unreadable(refused)) = Object::read(&document) else {
            panic!("accepted");
        };
        assert!(start.elapsed() < copying, "{:?}", start.elapsed());
        assert_eq!(
            refused.to_string(),
            "AuthorizationPolicy default/web: spec: the object is larger than 1572864 bytes; split it"
        );
        assert_eq!(refused.instead, Instead::DenyAll);
        assert_eq!(refused.selector.to_string(), "app=web");
    }

    #[test]
    fn conditions_count_once_for_each_source() {
        let policy = |sources: usize, values: usize| {
            let values: Vec<_> = (0..values).map(|number| number.to_string()).collect();
            let source = json!({"source": {"namespaces": ["a"]}});
            let document = json!({
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "web"},
                "spec": {"action": "DENY", "rules": [{
                    "from": vec![source; sources],
                    "when": [{"key": "source.namespace", "values": values}],
                }]},
            });
            Object::read(&document).unwrap()
        };
        assert!(matches!(policy(512, 511), Object::Authorization(_)));
        assert!(matches!(policy(1, 100_000), Object::Authorization(_)));
        let Object::Unreadable(refused) = policy(512, 512) else {
            panic!("accepted");
        };
        assert_eq!(
            refused.to_string(),
            "AuthorizationPolicy default/web: spec.rules: has 262656 values, of which 262144 are allowed: those of operations \
             and conditions count once for each source; split the policy"
        );
    }

    #[test]
    fn ignores_other_objects() {
        for (version, kind) in [
            ("security.istio.io/v1", "RequestAuthentication"),
            ("v1", "Pod"),
            ("example.com/v1", "AuthorizationPolicy"),
        ] {
            let document = json!({"apiVersion": version, "kind": kind, "metadata": {"name": "a"}});
            assert_eq!(Object::read(&document), None, "{version} {kind}");
        }
        assert_eq!(Object::read(&json!(null)), None);
        let unknown = json!({
            "apiVersion": "security.istio.io/v2", "kind": "AuthorizationPolicy", "metadata": {"name": "a"}
        });
        let Some(Object::Unreadable(unknown)) = Object::read(&unknown) else {
            panic!();
        };
        assert!(
            unknown.to_string().contains("apiVersion: version \"v2\""),
            "{unknown}"
        );
        let unnamed =
            json!({"apiVersion": "security.istio.io/v1beta1", "kind": "PeerAuthentication"});
        let Some(Object::Unreadable(unnamed)) = Object::read(&unnamed) else {
            panic!();
        };
        assert_eq!(
            unnamed.to_string(),
            "PeerAuthentication default/?: metadata.name: is missing"
        );
    }

    fn anything() -> impl Strategy<Value = Value> {
        let text = prop::sample::select(vec![
            "ALLOW",
            "DENY",
            "*",
            "a*",
            "10.0.0.0/8",
            "80",
            "source.ip",
            "STRICT",
            "\u{1b}[31m",
            "",
        ]);
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            text.prop_map(Value::from),
        ];
        let key = prop::sample::select(vec![
            "rules",
            "from",
            "to",
            "when",
            "source",
            "operation",
            "principals",
            "ports",
            "key",
            "values",
            "notValues",
            "action",
            "selector",
            "matchLabels",
            "mtls",
            "mode",
            "portLevelMtls",
            "80",
            "app",
        ]);
        leaf.prop_recursive(6, 60, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn never_panics_and_never_echoes_control_characters(
            spec in anything(), metadata in anything(), peer in any::<bool>()
        ) {
            let kind = if peer { "PeerAuthentication" } else { "AuthorizationPolicy" };
            for metadata in [metadata, json!({"name": "a"})] {
                let object = Object::read(&json!({
                    "apiVersion": "security.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec,
                }));
                if let Some(Object::Unreadable(unreadable)) = object {
                    let clean = !unreadable.to_string().contains(char::is_control);
                    prop_assert!(clean, "{}", unreadable);
                }
            }
        }
    }
}
