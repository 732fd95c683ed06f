//! Compares two sets of policies: which connections would end or be refused, and which would newly be allowed.

mod observed;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    Connection, Policies, Settings, WorkloadPolicy,
    api::{Mode, Object, Rule, Values},
    reading::Selection,
};
use crate::{Identity, Membership, Memberships, Snapshot, TrustDomain, Workload};

pub use observed::Observed;
use observed::judge_observed;

/// Maximum number of pods that a text names.
const MAX_NAMED: usize = 3;
/// Name of callers without an identity.
const PLAINTEXT: &str = "plaintext";
/// The verdict of a server that judges nobody.
const OUTSIDE: &str = "not in the mesh";

/// A pod, as far as the mesh and its policies depend on it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's SPIFFE ID.
    pub identity: String,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The pod's labels.
    pub labels: BTreeMap<String, String>,
    /// Ports that its containers name.
    pub ports: BTreeSet<u16>,
    /// Whether the pod is in the mesh, if it says so itself.
    #[serde(default)]
    pub membership: Option<Membership>,
}

/// The pods that a daemon knows, and the settings of its mesh.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Inventory {
    /// See [`Settings::root_namespace`].
    pub root_namespace: String,
    /// Whether the mesh's default mode is STRICT.
    pub strict: bool,
    /// See [`Settings::trust_domain`].
    pub trust_domain: String,
    /// Its aliases.
    #[serde(default)]
    pub trust_domain_aliases: Vec<String>,
    /// See [`Settings::foreign_trust_domains`].
    #[serde(default)]
    pub foreign_trust_domains: Vec<String>,
    /// The pods in the mesh.
    pub pods: Vec<Pod>,
    /// Other pods that could be in it.
    #[serde(default)]
    pub outside: Vec<Pod>,
    /// What decides which pods are in the mesh.
    #[serde(default)]
    pub memberships: Memberships,
}

/// A set of policies, and the pods that they apply to.
#[derive(Clone, Debug)]
pub struct Side {
    /// The policies.
    pub policies: Arc<Policies>,
    /// The pods, in the mesh or not.
    pub pods: Vec<Pod>,
    /// What decides which of them are in the mesh.
    pub memberships: Memberships,
}

/// The differences between two sets of policies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Differences {
    /// Open connections that would end.
    pub ending: Vec<Change>,
    /// Calls between pods that are allowed, and would be refused.
    pub refused: Vec<Change>,
    /// Calls between pods that are refused, and would be allowed.
    pub allowed: Vec<Change>,
    /// Number of open connections that were judged. `None` if none were observed.
    pub observed: Option<usize>,
    /// Open connections to a server that is no known pod, so that they could not be judged.
    pub unknown: Vec<String>,
}

/// Calls that are judged differently, for the same reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// The pods that call, or `plaintext` for callers without an identity; the first few names.
    pub client: String,
    /// The pods that are called; the first few names.
    pub server: String,
    /// The ports: numbers, `other` for all others, or `all`.
    pub ports: String,
    /// Number of open connections, or of pairs of pods.
    pub count: usize,
    /// The present verdict.
    pub before: String,
    /// The new verdict.
    pub after: String,
}

impl Inventory {
    /// Creates the inventory of a mesh with these settings.
    pub fn new(settings: &Settings, snapshot: &Snapshot) -> Self {
        let pod = |pod: &Arc<Workload>| Pod::from(&**pod);
        Self {
            root_namespace: settings.root_namespace.clone(),
            strict: settings.mode == Mode::Strict,
            trust_domain: settings.trust_domain.to_string(),
            trust_domain_aliases: {
                let aliases = settings.trust_domain.aliases().iter();
                aliases.map(ToString::to_string).collect()
            },
            foreign_trust_domains: {
                let foreign = settings.foreign_trust_domains.iter();
                foreign.map(ToString::to_string).collect()
            },
            pods: snapshot.workloads().map(pod).collect(),
            outside: snapshot.outside().map(pod).collect(),
            memberships: snapshot.memberships(),
        }
    }

    /// Returns the settings of the mesh.
    pub fn settings(&self) -> anyhow::Result<Settings> {
        Ok(Settings {
            root_namespace: self.root_namespace.clone(),
            mode: match self.strict {
                true => Mode::Strict,
                false => Mode::Permissive,
            },
            trust_domain: {
                let aliases = self.trust_domain_aliases.iter();
                let aliases: Vec<TrustDomain> = aliases
                    .map(|alias| alias.parse())
                    .collect::<Result<_, _>>()?;
                let own: TrustDomain = self.trust_domain.parse()?;
                own.with_aliases(aliases)
            },
            foreign_trust_domains: {
                let foreign = self.foreign_trust_domains.iter();
                foreign.map(|name| name.parse()).collect::<Result<_, _>>()?
            },
        })
    }
}

impl From<&Workload> for Pod {
    fn from(pod: &Workload) -> Self {
        Self {
            namespace: pod.name.namespace.clone(),
            name: pod.name.name.clone(),
            identity: pod.identity.to_string(),
            addresses: pod.addresses.clone(),
            labels: pod.labels.clone(),
            ports: pod.named_ports.values().copied().collect(),
            membership: pod.membership,
        }
    }
}

impl Pod {
    fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

impl Side {
    fn is_member(&self, pod: &Pod) -> bool {
        self.memberships.include(&pod.namespace, pod.membership)
    }

    /// Returns the policies of `pod`. `None` if it is not in the mesh.
    fn view(&self, pod: &Pod) -> Option<Arc<WorkloadPolicy>> {
        let is_member = self.is_member(pod);
        is_member.then(|| self.policies.workload(&pod.namespace, &pod.labels))
    }

    fn by_address(&self) -> HashMap<IpAddr, &Pod> {
        let pods = self.pods.iter().flat_map(|pod| {
            let addresses = pod.addresses.iter();
            addresses.map(move |address| (address.to_canonical(), pod))
        });
        pods.collect()
    }

    /// Returns the identity as which `pod` calls others. `None` if it is not in the mesh.
    fn identity(&self, pod: &Pod) -> Option<Identity> {
        self.is_member(pod)
            .then(|| pod.identity.parse().ok())
            .flatten()
    }
}

/// Returns whether a pod with these policies admits a connection, and why. A pod that is not in the mesh admits all.
fn judge(view: Option<&WorkloadPolicy>, connection: &Connection<'_>) -> (bool, String) {
    view.map_or_else(
        || (true, OUTSIDE.to_owned()),
        |view| {
            let verdict = view.evaluate(connection);
            (verdict.allowed(), verdict.decision.to_string())
        },
    )
}

impl Differences {
    /// Reports whether anything that works would end or be refused.
    pub fn breaks_something(&self) -> bool {
        !self.ending.is_empty() || !self.refused.is_empty()
    }
}

/// Compares `old` with `new`, for all pairs of pods that are in both, and for the `observed` connections, if there are
/// any. A pod that is in the mesh on one side only calls others in plaintext on the other, where nothing refuses its callers.
pub fn compare(old: &Side, new: &Side, observed: Option<&[Observed]>) -> Differences {
    let mut differences = pairs(old, new);
    if let Some(observed) = observed {
        judge_observed(old, new, observed, &mut differences);
    }
    differences
}

/// Pods that call alike.
struct Clients {
    names: Vec<String>,
    /// Identity by the old and the new side. `None` is plaintext.
    identities: [Option<Identity>; 2],
    addresses: Vec<IpAddr>,
}

/// Pods that are called alike.
struct Servers {
    names: Vec<String>,
    /// By the old and the new side. `None` is not in the mesh.
    views: [Option<Arc<WorkloadPolicy>>; 2],
    addresses: Vec<IpAddr>,
    /// Ports that can differ from others.
    ports: BTreeSet<u16>,
}

fn pairs(old: &Side, new: &Side) -> Differences {
    let by_name: HashMap<_, _> = new
        .pods
        .iter()
        .map(|pod| ((&pod.namespace, &pod.name), pod))
        .collect();
    let in_both: Vec<(&Pod, &Pod)> = old
        .pods
        .iter()
        .filter_map(|pod| Some((pod, *by_name.get(&(&pod.namespace, &pod.name))?)))
        .filter(|(before, after)| old.is_member(before) || new.is_member(after))
        .collect();
    let (clients, servers) = (clients(old, new, &in_both), servers(old, new, &in_both));
    let mut differences = Differences::default();
    for client in &clients {
        for server in &servers {
            let own = client
                .names
                .iter()
                .filter(|name| server.names.contains(name));
            // A pod always reaches itself.
            let count = client.names.len() * server.names.len() - own.count();
            if count == 0 {
                continue;
            }
            // Ports by the verdicts on them.
            let mut changes: BTreeMap<(bool, String, String), Vec<Option<u16>>> = BTreeMap::new();
            let ports = server.ports.iter().copied().map(Some).chain([None]);
            for port in ports {
                let number = port.unwrap_or_else(|| unlisted(&server.ports));
                let [(was_allowed, before), (is_allowed, after)] = client.call(server, number);
                if was_allowed != is_allowed {
                    let key = (is_allowed, before, after);
                    changes.entry(key).or_default().push(port);
                }
            }
            for ((is_allowed, before, after), ports) in changes {
                let all = ports.len() == server.ports.len() + 1;
                let named: Vec<_> = ports.into_iter().map(port_name).collect();
                let change = Change {
                    client: names(&client.names),
                    server: names(&server.names),
                    ports: if all { "all".into() } else { named.join(",") },
                    count,
                    before,
                    after,
                };
                match is_allowed {
                    true => differences.allowed.push(change),
                    false => differences.refused.push(change),
                }
            }
        }
    }
    differences
}

/// Groups pods that no policy distinguishes as callers, and adds callers in plaintext.
fn clients(old: &Side, new: &Side, pods: &[(&Pod, &Pod)]) -> Vec<Clients> {
    let sides = [&old.policies, &new.policies];
    let by_address = sides
        .iter()
        .any(|policies| policies.compares(|v| matches!(v, Values::Sources(_))));
    let mut clients: BTreeMap<_, Clients> = BTreeMap::new();
    for (before, after) in pods {
        let identities = [old.identity(before), new.identity(after)];
        let addresses = if by_address {
            after.addresses.clone()
        } else {
            vec![]
        };
        let key = (
            identities
                .each_ref()
                .map(|of| of.as_ref().map(ToString::to_string)),
            addresses,
        );
        let group = clients.entry(key).or_insert_with(|| Clients {
            names: Vec::new(),
            identities,
            addresses: after.addresses.clone(),
        });
        group.names.push(after.full_name());
    }
    let plaintext = Clients {
        names: vec![PLAINTEXT.to_owned()],
        identities: [None, None],
        addresses: Vec::new(),
    };
    clients.into_values().chain([plaintext]).collect()
}

/// Groups pods with the same policies.
fn servers(old: &Side, new: &Side, pods: &[(&Pod, &Pod)]) -> Vec<Servers> {
    let sides = [&old.policies, &new.policies];
    let by_address = sides
        .iter()
        .any(|policies| policies.compares(|v| matches!(v, Values::Destinations(_))));
    let mut servers: Vec<Servers> = Vec::new();
    let mut index: HashMap<_, usize> = HashMap::new();
    for (before, after) in pods {
        let views = [old.view(before), new.view(after)];
        let addresses = by_address.then(|| after.addresses.clone());
        let pointers = views.each_ref().map(|view| view.as_ref().map(Arc::as_ptr));
        let key = (pointers, addresses);
        let group = *index.entry(key).or_insert_with(|| {
            let mut ports = BTreeSet::new();
            ports.extend(old.policies.ports_of(&before.namespace, &before.labels));
            ports.extend(new.policies.ports_of(&after.namespace, &after.labels));
            servers.push(Servers {
                names: Vec::new(),
                views,
                addresses: after.addresses.clone(),
                ports,
            });
            servers.len() - 1
        });
        servers[group].names.push(after.full_name());
        servers[group]
            .ports
            .extend(before.ports.union(&after.ports));
    }
    servers
}

impl Clients {
    /// Returns the old and the new verdict on a call of one of these pods: whether it is allowed, and why.
    fn call(&self, server: &Servers, port: u16) -> [(bool, String); 2] {
        let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let same_family = self.addresses.iter().find_map(|source| {
            let mut servers = server.addresses.iter();
            let address = servers.find(|address| address.is_ipv4() == source.is_ipv4())?;
            Some((*source, *address))
        });
        let (source, address) = same_family.unwrap_or_else(|| {
            let first = |addresses: &[IpAddr]| addresses.first().copied().unwrap_or(unspecified);
            (first(&self.addresses), first(&server.addresses))
        });
        [0, 1].map(|side: usize| {
            let connection = Connection {
                client: self.identities[side].as_ref(),
                source,
                destination: SocketAddr::new(address, port),
            };
            judge(server.views[side].as_deref(), &connection)
        })
    }
}

impl Policies {
    /// Returns the ports that policies of a workload treat differently from others.
    fn ports_of(&self, namespace: &str, labels: &BTreeMap<String, String>) -> BTreeSet<u16> {
        let view = self.workload(namespace, labels);
        let mut ports: BTreeSet<u16> = view.port_modes().keys().copied().collect();
        for policy in self.policies() {
            if let Object::Authorization(authorization) = &*policy.object
                && policy.selection(namespace, labels) == Selection::Selected
            {
                let requirements = authorization.rules.iter().flat_map(Rule::requirements);
                ports.extend(requirements.flat_map(|one| match &one.values {
                    Values::Ports(ports) => ports.as_slice(),
                    _ => &[],
                }));
            }
        }
        ports
    }
}

/// Returns a port that stands for all that are not in `ports`.
fn unlisted(ports: &BTreeSet<u16>) -> u16 {
    let mut unlisted = (1..=u16::MAX).filter(|port| !ports.contains(port));
    unlisted.next().unwrap_or(0)
}

fn port_name(port: Option<u16>) -> String {
    port.map_or_else(|| "other".to_owned(), |port| port.to_string())
}

/// Names the first few pods, and the number of the others.
pub(super) fn names(pods: &[String]) -> String {
    let named = pods[..pods.len().min(MAX_NAMED)].join(", ");
    match pods.len().saturating_sub(MAX_NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn policies(specs: &[Value]) -> Arc<Policies> {
        let objects = specs.iter().enumerate().map(|(number, spec)| {
            let kind = match spec.get("mtls") {
                Some(_) => "PeerAuthentication",
                None => "AuthorizationPolicy",
            };
            let document = json!({
                "apiVersion": "security.istio.io/v1", "kind": kind,
                "metadata": {"namespace": "shop", "name": format!("p{number}")}, "spec": spec,
            });
            Arc::new(Object::read(&document).unwrap())
        });
        Arc::new(Policies::compile(Settings::default(), objects))
    }

    fn side(specs: &[Value]) -> Side {
        let pods = [("web-1", 1), ("web-2", 2), ("front", 3), ("db", 4)];
        let pods = pods.map(|(name, number)| {
            let app = name.split('-').next().unwrap();
            Pod {
                namespace: "shop".into(),
                name: name.into(),
                identity: format!("spiffe://cluster.local/ns/shop/sa/{app}"),
                addresses: vec![IpAddr::V4(Ipv4Addr::new(10, 0, 0, number))],
                labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
                ports: BTreeSet::from([8080]),
                membership: None,
            }
        });
        Side {
            policies: policies(specs),
            pods: pods.to_vec(),
            memberships: Memberships::default(),
        }
    }

    fn for_web(spec: Value) -> Value {
        let mut spec = spec;
        spec["selector"] = json!({"matchLabels": {"app": "web"}});
        spec
    }

    fn lines(changes: &[Change]) -> Vec<String> {
        let line = |change: &Change| {
            format!(
                "{} {} {} {}",
                change.client, change.server, change.ports, change.count
            )
        };
        changes.iter().map(line).collect()
    }

    fn observed(client: &str, identity: Option<&str>, endpoint: &str, path: &str) -> Observed {
        Observed {
            client: client.parse().unwrap(),
            destination: None,
            endpoint: Some(endpoint.parse().unwrap()),
            client_identity: identity
                .map(|account| format!("spiffe://cluster.local/ns/shop/sa/{account}")),
            path: path.into(),
        }
    }

    #[test]
    fn equal_policies_do_not_differ() {
        let policy =
            for_web(json!({"rules": [{"from": [{"source": {"serviceAccounts": ["front"]}}]}]}));
        let side = side(&[policy]);
        let differences = compare(&side, &side, None);
        assert_eq!(differences, Differences::default());
        assert!(!differences.breaks_something());
    }

    #[test]
    fn groups_pods_and_ports_that_change_alike() {
        let old = side(&[]);
        let account = json!([{"source": {"serviceAccounts": ["front"]}}]);
        let new = side(&[for_web(json!({
            "rules": [{"from": account, "to": [{"operation": {"ports": ["8080"]}}]}],
        }))]);
        let differences = compare(&old, &new, None);
        assert_eq!(
            lines(&differences.refused),
            [
                "shop/db shop/web-1, shop/web-2 all 2",
                "shop/front shop/web-1, shop/web-2 other 2",
                // Not of each to itself.
                "shop/web-1, shop/web-2 shop/web-1, shop/web-2 all 2",
            ]
        );
        assert!(differences.allowed.is_empty() && differences.breaks_something());
        let differences = compare(&new, &old, None);
        assert_eq!(differences.allowed.len(), 3, "{differences:?}");
        assert!(!differences.breaks_something());
    }

    #[test]
    fn a_change_of_mode_concerns_plaintext_callers() {
        let permissive = side(&[json!({"mtls": {"mode": "PERMISSIVE"}})]);
        let differences = compare(&permissive, &side(&[]), None);
        assert_eq!(
            lines(&differences.refused),
            ["plaintext shop/web-1, shop/web-2, shop/front and 1 more all 4"]
        );
    }

    #[test]
    fn judges_observed_connections_once_each() {
        let old = side(&[]);
        let new = side(&[
            for_web(
                json!({"action": "DENY", "rules": [{"from": [{"source": {"serviceAccounts": ["front"]}}]}]}),
            ),
            json!({"mtls": {"mode": "STRICT"}}),
        ]);
        let connections = [
            observed("10.0.0.3:4000", Some("front"), "10.0.0.1:8080", "tunnel"),
            observed("10.0.0.3:4000", Some("front"), "10.0.0.1:8080", "same-node"),
            observed("10.0.0.3:4001", Some("front"), "10.0.0.1:8080", "tunnel"),
            observed("10.0.0.4:4002", Some("db"), "10.0.0.1:8080", "tunnel"),
            observed("10.0.0.1:4003", Some("web"), "10.0.0.1:8080", "self"),
            observed("192.0.2.1:4004", None, "10.0.0.4:8080", "plaintext"),
            observed("10.0.0.3:4005", Some("front"), "192.0.2.7:8080", "tunnel"),
        ];
        let differences = compare(&old, &new, Some(&connections));
        assert_eq!(
            lines(&differences.ending),
            [
                "plaintext from 192.0.2.1 shop/db 8080 1",
                "shop/front shop/web-1 8080 2"
            ]
        );
        assert_eq!(differences.observed, Some(5));
        assert_eq!(differences.unknown, ["10.0.0.3:4005 to 192.0.2.7:8080"]);
        assert!(
            differences.ending[1]
                .after
                .starts_with("denied by AuthorizationPolicy shop/p0")
        );
    }

    #[test]
    fn compares_addresses_only_if_a_policy_does() {
        let new = side(&[for_web(
            json!({"action": "DENY", "rules": [{"from": [{"source": {"ipBlocks": ["10.0.0.2"]}}]}]}),
        )]);
        let differences = compare(&side(&[]), &new, None);
        assert_eq!(
            lines(&differences.refused),
            ["shop/web-2 shop/web-1, shop/web-2 all 1"]
        );
    }

    /// As [`side`], with what the pods' namespace sets.
    fn with_label(specs: &[Value], membership: Membership) -> Side {
        let mut side = side(specs);
        let namespaces = &mut side.memberships.namespaces;
        namespaces.insert("shop".into(), membership);
        side
    }

    #[test]
    fn a_namespace_that_leaves_the_mesh_loses_its_connections() {
        let member = Pod {
            namespace: "other".into(),
            name: "api".into(),
            identity: "spiffe://cluster.local/ns/other/sa/api".into(),
            addresses: vec!["10.0.0.9".parse().unwrap()],
            ..Pod::clone(&side(&[]).pods[0])
        };
        let [mut old, mut new] =
            [Membership::Enabled, Membership::Disabled].map(|label| with_label(&[], label));
        // What a pod says itself comes first.
        old.pods[1].membership = Some(Membership::Enabled);
        new.pods[1].membership = Some(Membership::Enabled);
        for side in [&mut old, &mut new] {
            side.pods.push(member.clone());
        }
        let connections = [
            observed("10.0.0.3:4000", Some("front"), "10.0.0.1:8080", "tunnel"),
            observed("10.0.0.3:4001", Some("front"), "10.0.0.9:8080", "same-node"),
            observed("10.0.0.3:4002", Some("front"), "192.0.2.7:8080", "tunnel"),
        ];
        let differences = compare(&old, &new, Some(&connections));
        assert_eq!(
            lines(&differences.ending),
            [
                "shop/front 192.0.2.7:8080 8080 1",
                "shop/front other/api 8080 1",
                "shop/front shop/web-1 8080 1",
            ]
        );
        assert_eq!(differences.ending[0].after, "shop/front leaves the mesh");
        // Those that leave call those that stay in plaintext, which STRICT refuses, and admit everybody.
        assert_eq!(
            lines(&differences.refused),
            [
                "shop/db shop/web-2, other/api all 2",
                "shop/front shop/web-2, other/api all 2",
                "shop/web-1 shop/web-2, other/api all 2",
            ]
        );
        assert_eq!(
            lines(&differences.allowed),
            ["plaintext shop/web-1, shop/front, shop/db all 3"]
        );
    }

    #[test]
    fn a_namespace_that_joins_the_mesh_refuses_plaintext() {
        let old = with_label(&[], Membership::Disabled);
        let new = with_label(&[], Membership::Enabled);
        let differences = compare(&old, &new, Some(&[]));
        assert_eq!(
            lines(&differences.refused),
            ["plaintext shop/web-1, shop/web-2, shop/front and 1 more all 4"]
        );
        assert_eq!(differences.refused[0].before, OUTSIDE);
        assert!(differences.allowed.is_empty() && differences.ending.is_empty());
        assert_eq!(
            compare(&old, &old, Some(&[])).refused,
            [],
            "outside before and after"
        );
    }
}
