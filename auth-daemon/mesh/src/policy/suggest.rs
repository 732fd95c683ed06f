//! Suggests AuthorizationPolicies that allow what was seen and nothing else.
//!
//! ALLOW policies add up, so a policy that selects more pods than the calls were to never refuses a call that another
//! suggestion allows. That is what makes suggestions safe to apply together.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use super::diff::Pod;
use crate::{Identity, Workload};

/// Labels by which people distinguish workloads, and which stay the same in a new version.
const IDENTIFYING: [&str; 8] = [
    "app.kubernetes.io/name",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/component",
    "app",
    "component",
    "k8s-app",
    "role",
    "tier",
];
/// Labels and prefixes of labels that change with each pod or version.
const GENERATED: [&str; 12] = [
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/part-of",
    "app.kubernetes.io/version",
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/",
    "controller-",
    "helm.sh/chart",
    "job-name",
    "pod-template-",
    "service.istio.io/",
    "statefulset.kubernetes.io/pod-name",
    "version",
];
/// A caller of more ports than this is allowed to call all ports: it looks as if ports change.
const MAX_PORTS: usize = 32;
/// The most callers in one source of a rule.
const MAX_CALLERS: usize = 256;
/// The most rules of a policy, of those that name ports. One more, without ports, holds the other callers.
const MAX_RULES: usize = 256;
/// The most callers of a rule whose evidence is shown. Readers of YAML limit how many comments may follow each other.
const MAX_EVIDENCE: usize = 20;
/// Maximum length of a name, in bytes (RFC 1123 label).
const MAX_NAME: usize = 63;

/// Connections of one caller to one port that were established.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Namespace of the server.
    pub namespace: String,
    /// Labels that select the server, by [`selecting_labels`]. Empty if none does.
    pub labels: BTreeMap<String, String>,
    /// Name of the server's workload.
    pub workload: String,
    /// The app's own port.
    pub port: u16,
    /// Who called.
    pub caller: Caller,
    /// How many connections there were.
    pub connections: u64,
    /// When the last of them ended: UTC, in the format of RFC 3339.
    pub last: String,
}

/// Who called, as a policy can name it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Caller {
    /// A workload of the mesh.
    Identity(Identity),
    /// A caller in plaintext.
    Address(IpAddr),
}

/// The suggested policies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Suggestions {
    /// The policies, by namespace and name.
    pub policies: Vec<Suggestion>,
    /// Servers that no policy is suggested for, and why.
    pub left_out: Vec<String>,
}

/// A suggested policy. Its text is YAML, with the evidence as comments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suggestion {
    /// Namespace of the policy.
    pub namespace: String,
    /// Name of the policy.
    pub name: String,
    /// Labels of the pods that it selects.
    pub selector: BTreeMap<String, String>,
    /// Its rules.
    pub rules: Vec<SuggestedRule>,
    /// Pods that it selects although no call to them was seen, so that it refuses all calls to them.
    pub also_selects: Vec<String>,
}

/// A rule of a suggested policy: callers that may call the same ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuggestedRule {
    /// The callers, with what was seen of each.
    pub callers: Vec<(Caller, Evidence)>,
    /// The ports. Empty: all.
    pub ports: BTreeSet<u16>,
}

/// What was seen of a caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// The number of connections.
    pub connections: u64,
    /// When the last of them ended.
    pub last: String,
    /// The ports.
    pub ports: BTreeSet<u16>,
}

/// Returns those labels of a pod that distinguish its workload from others, and that its next version has, too.
pub fn selecting_labels(labels: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let keep = |wanted: &dyn Fn(&str) -> bool| -> BTreeMap<_, _> {
        let wanted = labels.iter().filter(|(key, _)| wanted(key));
        wanted
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    let identifying = keep(&|key| IDENTIFYING.contains(&key));
    match identifying.is_empty() {
        true => keep(&|key| !GENERATED.iter().any(|start| key.starts_with(start))),
        false => identifying,
    }
}

/// Returns the name of a pod's workload: the beginning of the pod's own, without the parts that controllers generate.
pub fn workload_name(pod: &Workload) -> &str {
    let label = |key: &str| pod.labels.get(key).map(String::as_str);
    let name = pod.name.name.as_str();
    // A ReplicaSet's pods: NAME-HASH-SUFFIX.
    if let Some((start, _)) = label("pod-template-hash")
        .and_then(|hash| name.rsplit_once(&format!("-{hash}-")))
        .filter(|(start, _)| !start.is_empty())
    {
        return start;
    }
    let is_generated = ["pod-template-generation", "batch.kubernetes.io/job-name"]
        .iter()
        .any(|key| label(key).is_some())
        || label("statefulset.kubernetes.io/pod-name").is_some();
    match name.rsplit_once('-') {
        Some((start, _)) if is_generated && !start.is_empty() => start,
        _ => name,
    }
}

/// Suggests policies that allow `calls`. `pods` are those of the mesh now, and `root_namespace` is the one whose policies
/// apply to all namespaces.
pub fn suggest(calls: &[Call], pods: &[Pod], root_namespace: &str) -> Suggestions {
    let mut servers: BTreeMap<_, Vec<&Call>> = BTreeMap::new();
    for call in calls {
        let server = (
            &call.namespace,
            &call.labels,
            call.labels.is_empty().then_some(&call.workload),
        );
        servers.entry(server).or_default().push(call);
    }
    let called: BTreeSet<_> = servers
        .keys()
        .map(|(namespace, labels, _)| (*namespace, *labels))
        .collect();
    let mut suggestions = Suggestions::default();
    let mut names = BTreeSet::new();
    for ((namespace, labels, _), calls) in &servers {
        let workload = calls[0].workload.as_str();
        if labels.is_empty() {
            suggestions.left_out.push(format!(
                "{namespace}/{workload} has no label that selects it: add one, such as app"
            ));
            continue;
        }
        if *namespace == root_namespace {
            suggestions.left_out.push(format!(
                "{namespace}/{workload} is in the root namespace, whose policies apply to all namespaces"
            ));
            continue;
        }
        let also_selects = pods.iter().filter(|pod| {
            let own = selecting_labels(&pod.labels);
            pod.namespace == **namespace
                && labels
                    .iter()
                    .all(|(key, value)| pod.labels.get(key) == Some(value))
                && !called.contains(&(*namespace, &own))
        });
        suggestions.policies.push(Suggestion {
            namespace: (*namespace).clone(),
            name: unique_name(workload, namespace, &mut names),
            selector: (*labels).clone(),
            rules: rules(calls),
            also_selects: also_selects.map(|pod| pod.name.clone()).collect(),
        });
    }
    suggestions
}

/// Groups callers of the same ports.
fn rules(calls: &[&Call]) -> Vec<SuggestedRule> {
    let mut callers: BTreeMap<&Caller, Evidence> = BTreeMap::new();
    for call in calls {
        let seen = callers.entry(&call.caller).or_default();
        seen.connections += call.connections;
        seen.last = seen.last.clone().max(call.last.clone());
        seen.ports.insert(call.port);
    }
    let mut by_ports: BTreeMap<BTreeSet<u16>, Vec<(Caller, Evidence)>> = BTreeMap::new();
    for (caller, seen) in callers {
        let mut ports = seen.ports.clone();
        if ports.len() > MAX_PORTS || by_ports.len() >= MAX_RULES && !by_ports.contains_key(&ports)
        {
            ports.clear();
        }
        by_ports
            .entry(ports)
            .or_default()
            .push((caller.clone(), seen));
    }
    let rules = by_ports.into_iter();
    rules
        .map(|(ports, callers)| SuggestedRule { callers, ports })
        .collect()
}

fn unique_name(workload: &str, namespace: &str, taken: &mut BTreeSet<(String, String)>) -> String {
    let valid = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_lowercase()
        } else {
            '-'
        }
    };
    let start: String = workload
        .chars()
        .map(valid)
        .take(MAX_NAME - "seen--9999".len())
        .collect();
    let start = format!("seen-{}", start.trim_matches('-'));
    let mut name = start.trim_matches('-').to_owned();
    for number in 2.. {
        if taken.insert((namespace.to_owned(), name.clone())) {
            break;
        }
        name = format!("{start}-{number}");
    }
    name
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // As `principals` are written.
            Self::Identity(identity) => {
                f.write_str(identity.as_str().trim_start_matches("spiffe://"))
            }
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

impl fmt::Display for Suggestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // JSON's texts are YAML's, too.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        if !self.also_selects.is_empty() {
            writeln!(
                f,
                "# No call was seen to these pods, which the policy selects, too, so it refuses all calls to them: {}",
                self.also_selects.join(", ").replace(char::is_control, " ")
            )?;
        }
        writeln!(
            f,
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:"
        )?;
        writeln!(
            f,
            "  name: {}\n  namespace: {}",
            quoted(&self.name),
            quoted(&self.namespace)
        )?;
        writeln!(f, "spec:\n  selector:\n    matchLabels:")?;
        for (key, value) in &self.selector {
            writeln!(f, "      {}: {}", quoted(key), quoted(value))?;
        }
        writeln!(f, "  action: ALLOW\n  rules:")?;
        for rule in &self.rules {
            write!(f, "{rule}")?;
        }
        Ok(())
    }
}

impl fmt::Display for SuggestedRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (caller, seen) in self.callers.iter().take(MAX_EVIDENCE) {
            let ports: Vec<_> = seen
                .ports
                .iter()
                .take(MAX_PORTS)
                .map(u16::to_string)
                .collect();
            let more = match seen.ports.len().saturating_sub(MAX_PORTS) {
                0 => String::new(),
                more => format!(" and {more} more, so all ports are allowed"),
            };
            let plain = match caller {
                Caller::Address(_) => ", in plaintext: anybody at this address may call",
                Caller::Identity(_) => "",
            };
            writeln!(
                f,
                "  # {caller}: {} connections to port {}{more}, the last at {}{plain}",
                seen.connections,
                ports.join(", "),
                seen.last.replace(char::is_control, " ")
            )?;
        }
        let more = self.callers.len().saturating_sub(MAX_EVIDENCE);
        if more > 0 {
            writeln!(f, "  # and {more} more callers")?;
        }
        writeln!(f, "  - from:")?;
        let of = |wanted: fn(&Caller) -> bool| {
            let callers = self.callers.iter().map(|(caller, _)| caller);
            let wanted = callers.filter(move |caller| wanted(caller));
            wanted
                .map(|caller| format!("\"{caller}\""))
                .collect::<Vec<_>>()
        };
        let principals = of(|caller| matches!(caller, Caller::Identity(_)));
        let addresses = of(|caller| matches!(caller, Caller::Address(_)));
        for (field, values) in [("principals", principals), ("ipBlocks", addresses)] {
            for values in values.chunks(MAX_CALLERS) {
                writeln!(f, "    - source:\n        {field}: [{}]", values.join(", "))?;
            }
        }
        if !self.ports.is_empty() {
            let ports: Vec<_> = self
                .ports
                .iter()
                .map(|port| format!("\"{port}\""))
                .collect();
            writeln!(
                f,
                "    to:\n    - operation:\n        ports: [{}]",
                ports.join(", ")
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use proptest::prelude::*;

    use super::*;
    use crate::policy::{Connection, Policies, Settings, api::Object};

    const ADDRESS: [u8; 4] = [10, 0, 0, 1];

    fn identity(account: &str) -> Identity {
        format!("spiffe://cluster.local/ns/shop/sa/{account}")
            .parse()
            .unwrap()
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let pairs = pairs
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()));
        pairs.collect()
    }

    fn call(pod: &[(&str, &str)], port: u16, caller: Caller) -> Call {
        Call {
            namespace: "shop".into(),
            labels: selecting_labels(&labels(pod)),
            workload: "web".into(),
            port,
            caller,
            connections: 3,
            last: "2026-01-02T03:04:05.006Z".into(),
        }
    }

    fn in_force(suggestions: &Suggestions) -> Policies {
        let objects = suggestions.policies.iter().map(|policy| {
            let document = serde_saphyr::from_str(&policy.to_string()).unwrap();
            let object = Object::read(&document).unwrap();
            assert_eq!(object.error(), None, "{policy}");
            assert_eq!(object.warnings().next(), None, "{policy}");
            Arc::new(object)
        });
        Policies::compile(Settings::default(), objects.collect::<Vec<_>>())
    }

    fn is_allowed(
        policies: &Policies,
        pod: &BTreeMap<String, String>,
        caller: &Caller,
        port: u16,
    ) -> bool {
        let (client, source) = match caller {
            Caller::Identity(identity) => (Some(identity), IpAddr::from([192, 0, 2, 200])),
            Caller::Address(address) => (None, *address),
        };
        // STRICT would refuse plaintext before any of these policies.
        let decided = policies.workload("shop", pod).evaluate(&Connection {
            client,
            source,
            destination: SocketAddr::from((ADDRESS, port)),
        });
        decided.allowed()
    }

    #[test]
    fn a_policy_names_callers_ports_and_evidence() {
        let web = [("app", "web"), ("pod-template-hash", "5f")];
        let calls = [
            call(&web, 8080, Caller::Identity(identity("front"))),
            call(&web, 8081, Caller::Identity(identity("front"))),
            call(&web, 8080, Caller::Address([192, 0, 2, 7].into())),
        ];
        let suggestions = suggest(&calls, &[], "istio-system");
        assert_eq!(
            suggestions.policies[0].to_string(),
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: \"seen-web\"\n  \
             namespace: \"shop\"\nspec:\n  selector:\n    matchLabels:\n      \"app\": \"web\"\n  action: ALLOW\n  rules:\n  \
             # 192.0.2.7: 3 connections to port 8080, the last at 2026-01-02T03:04:05.006Z, in plaintext: anybody at this \
             address may call\n  - from:\n    - source:\n        ipBlocks: [\"192.0.2.7\"]\n    to:\n    - operation:\n        \
             ports: [\"8080\"]\n  # cluster.local/ns/shop/sa/front: 6 connections to port 8080, 8081, the last at \
             2026-01-02T03:04:05.006Z\n  - from:\n    - source:\n        principals: [\"cluster.local/ns/shop/sa/front\"]\n    \
             to:\n    - operation:\n        ports: [\"8080\", \"8081\"]\n"
        );
    }

    #[test]
    fn pods_without_labels_and_the_root_namespace_get_no_policy() {
        let mut in_root = call(&[("app", "web")], 80, Caller::Identity(identity("a")));
        in_root.namespace = "istio-system".into();
        let calls = [call(&[], 80, Caller::Identity(identity("a"))), in_root];
        let suggestions = suggest(&calls, &[], "istio-system");
        assert!(suggestions.policies.is_empty());
        assert_eq!(suggestions.left_out.len(), 2, "{:?}", suggestions.left_out);
    }

    #[test]
    fn a_caller_of_many_ports_may_call_all_and_many_callers_are_readable() {
        let web = [("app", "web")];
        let calls: Vec<_> = (0..1000_u16)
            .map(|port| call(&web, 1000 + port, Caller::Identity(identity("scan"))))
            .chain((0..1000).map(|number| {
                let ports = 1 + number % 600;
                call(
                    &web,
                    ports,
                    Caller::Identity(identity(&format!("c{number}"))),
                )
            }))
            .collect();
        let policies = in_force(&suggest(&calls, &[], "istio-system"));
        for call in &calls {
            assert!(
                is_allowed(&policies, &labels(&web), &call.caller, call.port),
                "{call:?}"
            );
        }
        let scan = Caller::Identity(identity("scan"));
        assert!(is_allowed(&policies, &labels(&web), &scan, 9));
    }

    #[test]
    fn names_of_workloads_and_their_labels_outlast_a_version() {
        for (name, extra, expected) in [
            (
                "web-5f7b-x2x9z",
                &[("pod-template-hash", "5f7b")][..],
                "web",
            ),
            (
                "db-0",
                &[("statefulset.kubernetes.io/pod-name", "db-0")],
                "db",
            ),
            (
                "log-x2x9z",
                &[
                    ("pod-template-generation", "1"),
                    ("controller-revision-hash", "7"),
                ],
                "log",
            ),
            ("by-hand", &[], "by-hand"),
        ] {
            let object = crate::ObjectName {
                namespace: "shop".into(),
                name: name.into(),
            };
            let mut pod = Workload::new(object, identity("a"));
            pod.labels = labels(extra);
            assert_eq!(workload_name(&pod), expected);
            pod.labels.insert("name".into(), "x".into());
            assert_eq!(selecting_labels(&pod.labels), labels(&[("name", "x")]));
            pod.labels.insert("app".into(), "y".into());
            assert_eq!(selecting_labels(&pod.labels), labels(&[("app", "y")]));
        }
    }

    fn any_pod() -> impl Strategy<Value = BTreeMap<String, String>> {
        let keys = ["app", "tier", "version", "name", "pod-template-hash"].map(str::to_owned);
        proptest::collection::btree_map(
            proptest::sample::select(keys.to_vec()),
            proptest::sample::select(vec!["a".to_owned(), "b".to_owned()]),
            0..4,
        )
    }

    fn any_caller() -> impl Strategy<Value = Caller> {
        prop_oneof![
            (0..4_u8).prop_map(|number| Caller::Identity(identity(&format!("c{number}")))),
            (0..4_u8).prop_map(|number| Caller::Address([192, 0, 2, number].into())),
        ]
    }

    proptest! {
        /// Applied together, the suggestions refuse nothing that was seen, and allow nothing else to the pods that were
        /// called, unless a suggestion for pods with fewer labels does.
        #[test]
        fn suggestions_allow_what_was_seen_and_nothing_else(
            seen in proptest::collection::vec((any_pod(), any_caller(), 80..84_u16), 0..20),
            others in proptest::collection::vec((any_pod(), any_caller(), 80..85_u16), 0..20),
        ) {
            let calls: Vec<_> = seen.iter().map(|(pod, caller, port)| Call {
                labels: selecting_labels(pod),
                ..call(&[], *port, caller.clone())
            }).collect();
            let suggestions = suggest(&calls, &[], "istio-system");
            let objects = suggestions.policies.iter().map(|policy| {
                let document = serde_saphyr::from_str(&policy.to_string()).unwrap();
                Arc::new(Object::read(&document).unwrap())
            });
            let settings = Settings { mode: crate::policy::api::Mode::Permissive, ..Settings::default() };
            let policies = Policies::compile(settings, objects.collect::<Vec<_>>());
            for (pod, caller, port) in &seen {
                prop_assert!(is_allowed(&policies, pod, caller, *port), "{pod:?} {caller} {port}");
            }
            for (pod, caller, port) in &others {
                let selected: Vec<_> = calls.iter().filter(|call| {
                    !call.labels.is_empty() && call.labels.iter().all(|(key, value)| pod.get(key) == Some(value))
                }).collect();
                let was_seen = selected.iter().any(|call| call.caller == *caller && call.port == *port);
                let expected = selected.is_empty() || was_seen;
                prop_assert_eq!(is_allowed(&policies, pod, caller, *port), expected, "{:?} {} {}", pod, caller, port);
            }
        }
    }
}
