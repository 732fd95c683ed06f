//! Compiles all policies of the mesh after each change, and derives for each workload the view that its connections are
//! checked against.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    api::{Action, Kind, Mode, Object, Rule, Selector, Values},
    reading::{self, Effect, Policy, Warning},
    rules::{Facts, Rules},
};
use crate::{Identity, ObjectName, TrustDomain};

/// Settings of the mesh that apply in addition to the policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Namespace whose policies apply to all namespaces.
    pub root_namespace: String,
    /// Mode of workloads for which no PeerAuthentication sets one.
    pub mode: Mode,
    /// The mesh's own trust domain. `cluster.local` and its aliases in a policy stand for it, too.
    pub trust_domain: TrustDomain,
    /// The foreign trust domains whose workloads may call. A policy that names another one gets a warning.
    pub foreign_trust_domains: Vec<TrustDomain>,
}

impl Default for Settings {
    /// Returns Istio's root namespace and trust domain, and STRICT.
    fn default() -> Self {
        Self {
            root_namespace: "istio-system".into(),
            mode: Mode::Strict,
            trust_domain: TrustDomain::default(),
            foreign_trust_domains: Vec::new(),
        }
    }
}

/// A connection, as seen by the server.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// The client's identity, from its certificate or the kernel's record. `None` in plaintext.
    pub client: Option<&'a Identity>,
    /// The client's address.
    pub source: IpAddr,
    /// The workload's own address, and the port of the app itself.
    pub destination: SocketAddr,
}

/// The result of an evaluation: whether a connection is allowed, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The decision that is enforced.
    pub decision: Decision,
    /// AUDIT policies that match, each with its first matching rule.
    pub audits: Vec<Hit>,
    /// The decision if all dry-run policies were enforced. `None` if there are no dry-run policies.
    pub dry_run: Option<Decision>,
}

/// Whether a connection is allowed, with the policies that decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Allowed, because no policy restricts the connection.
    Unrestricted,
    /// Allowed by an ALLOW policy that matches.
    Allowed(Hit),
    /// Denied by a DENY policy that matches.
    Denied(Hit),
    /// Denied, because there are ALLOW policies (these), and none of them matches.
    NotAllowed(Arc<[Arc<ObjectName>]>),
    /// Denied, because the connection is plaintext and the port requires mutual TLS.
    Plaintext(PeerMode),
}

/// A policy that matches, with the rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Name of the AuthorizationPolicy.
    pub policy: Arc<ObjectName>,
    /// Index of the rule, from 0. `None` if the policy is unreadable.
    pub rule: Option<usize>,
}

/// The mutual TLS mode of a port, and where it is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerMode {
    /// The mode.
    pub mode: Mode,
    /// Name of the PeerAuthentication that sets the mode. `None` if it is the mesh's default.
    pub policy: Option<Arc<ObjectName>>,
}

/// All policies, compiled.
#[derive(Debug)]
pub struct Policies {
    settings: Settings,
    /// By kind and name.
    policies: Vec<Policy>,
    /// Policies with an effect, by namespace, as indexes into [`Policies::policies`].
    scopes: HashMap<String, Selectors>,
    /// Views by selected policies. Workloads that the same policies select share a view.
    views: Mutex<HashMap<Selected, Arc<WorkloadPolicy>>>,
}

/// Policies by selector. A selector with labels is found by its first label and then compared in full.
#[derive(Debug, Default)]
struct Selectors {
    without_labels: Vec<u32>,
    by_label: HashMap<String, HashMap<String, Vec<(Selector, u32)>>>,
}

/// The policies that select a workload, as indexes into [`Policies::policies`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Selected {
    authorizations: Vec<u32>,
    /// The mesh-wide, the namespace-wide and the workload's own PeerAuthentication.
    peers: [Option<u32>; 3],
    /// An unreadable PeerAuthentication, which enforces STRICT.
    strict: Option<u32>,
}

/// The policies of one workload, compiled.
#[derive(Debug)]
pub struct WorkloadPolicy {
    deny: Group,
    allow: Group,
    audit: Group,
    dry_deny: Group,
    dry_allow: Group,
    mode: PeerMode,
    pub(super) ports: BTreeMap<u16, PeerMode>,
    /// Names of all ALLOW policies, and of those together with the dry-run ones.
    allowing: Arc<[Arc<ObjectName>]>,
    dry_allowing: Arc<[Arc<ObjectName>]>,
}

/// The policies of one action.
#[derive(Debug)]
struct Group {
    policies: Vec<(Arc<ObjectName>, bool)>,
    rules: Rules,
}

impl Default for Policies {
    /// Compiles no policies, with the default settings.
    fn default() -> Self {
        Self::compile(Settings::default(), [])
    }
}

impl Policies {
    /// Compiles `objects`. They must not contain two objects of the same kind and name.
    pub fn compile(settings: Settings, objects: impl IntoIterator<Item = Arc<Object>>) -> Self {
        let policies = reading::read(&settings, objects);
        let mut scopes: HashMap<String, Selectors> = HashMap::new();
        for (number, policy) in policies.iter().enumerate() {
            if !matches!(policy.effect, Effect::Nothing(_)) {
                scopes
                    .entry(policy.name.namespace.clone())
                    .or_default()
                    .add(policy.object.selector(), number as u32);
            }
        }
        Self {
            settings,
            policies,
            scopes,
            views: Mutex::default(),
        }
    }

    /// Returns the settings of the mesh.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns all objects, by kind and name.
    pub fn objects(&self) -> impl ExactSizeIterator<Item = &Arc<Object>> {
        self.policies.iter().map(|policy| &policy.object)
    }

    /// Returns all policies, by kind and name.
    pub(super) fn policies(&self) -> &[Policy] {
        &self.policies
    }

    /// Returns warnings for the authors of objects: unreadable objects, fields that cannot be enforced, and objects that
    /// another object overrides.
    pub fn warnings(&self) -> Vec<Warning> {
        self.policies.iter().flat_map(Policy::warnings).collect()
    }

    /// Reports whether a rule of any policy compares an attribute with such values.
    pub(super) fn compares(&self, wanted: impl Fn(&Values) -> bool) -> bool {
        let rules = self.objects().flat_map(|object| match &**object {
            Object::Authorization(policy) => &*policy.rules,
            _ => &[],
        });
        let mut requirements = rules.flat_map(Rule::requirements);
        requirements.any(|requirement| wanted(&requirement.values))
    }

    /// Returns the compiled policies of workloads in `namespace` that have `labels`.
    pub fn workload(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
    ) -> Arc<WorkloadPolicy> {
        let selected = self.select(namespace, labels);
        // A panic cannot leave the map inconsistent, because each view is inserted whole.
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(view) = views.get(&selected) {
            return view.clone();
        }
        let view = Arc::new(self.view(&selected));
        views.insert(selected, view.clone());
        view
    }

    fn select(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Selected {
        let root = self.settings.root_namespace.as_str();
        let mut selected = Selected::default();
        let namespaces = [Some(root), Some(namespace).filter(|own| *own != root)];
        for namespace in namespaces.into_iter().flatten() {
            let Some(scope) = self.scopes.get(namespace) else {
                continue;
            };
            scope.find(labels, |number| {
                let policy = &self.policies[number as usize];
                let Effect::Peer { age, .. } = policy.effect else {
                    selected.authorizations.push(number);
                    return;
                };
                let is_wide = policy.object.selector().is_empty();
                let place = match (policy.is_readable(), is_wide) {
                    (false, _) => &mut selected.strict,
                    (true, true) if policy.is_mesh_wide => &mut selected.peers[0],
                    (true, true) => &mut selected.peers[1],
                    (true, false) => &mut selected.peers[2],
                };
                let older = place.filter(|other| match self.policies[*other as usize].effect {
                    Effect::Peer { age: other, .. } => other <= age,
                    _ => false,
                });
                *place = older.or(Some(number));
            });
        }
        selected.authorizations.sort_unstable();
        selected
    }

    fn view(&self, selected: &Selected) -> WorkloadPolicy {
        let group = |wanted: Action, wanted_dry_run: bool| {
            let mut policies = Vec::new();
            let mut of_policies = Vec::new();
            for number in &selected.authorizations {
                let policy = &self.policies[*number as usize];
                if let Effect::Authorization {
                    action,
                    dry_run,
                    rules,
                } = &policy.effect
                    && (*action, *dry_run) == (wanted, wanted_dry_run)
                {
                    policies.push((policy.name.clone(), policy.is_readable()));
                    of_policies.push(&**rules);
                }
            }
            Group {
                policies,
                rules: Rules::new(of_policies.into_iter()),
            }
        };
        let (mode, ports) = self.modes(selected);
        let (allow, dry_allow) = (group(Action::Allow, false), group(Action::Allow, true));
        let names = |group: &Group| -> Vec<_> {
            let names = group.policies.iter().map(|(name, _)| name.clone());
            names.collect()
        };
        WorkloadPolicy {
            deny: group(Action::Deny, false),
            audit: group(Action::Audit, false),
            dry_deny: group(Action::Deny, true),
            allowing: names(&allow).into(),
            dry_allowing: [names(&allow), names(&dry_allow)].concat().into(),
            allow,
            dry_allow,
            mode,
            ports,
        }
    }

    /// Returns the modes. The narrowest scope that sets a mode takes precedence.
    fn modes(&self, selected: &Selected) -> (PeerMode, BTreeMap<u16, PeerMode>) {
        let by = |policy: &Policy, mode: Mode| PeerMode {
            mode,
            policy: Some(policy.name.clone()),
        };
        if let Some(strict) = selected.strict {
            let strict = &self.policies[strict as usize];
            return (by(strict, Mode::Strict), BTreeMap::new());
        }
        let mut mode = PeerMode {
            mode: self.settings.mode,
            policy: None,
        };
        let mut ports = BTreeMap::new();
        for number in selected.peers.into_iter().flatten() {
            let policy = &self.policies[number as usize];
            let Effect::Peer {
                mode: own,
                ports: own_ports,
                ..
            } = &policy.effect
            else {
                continue;
            };
            if let Some(own) = own {
                mode = by(policy, *own);
            }
            ports = own_ports
                .iter()
                .map(|(port, mode)| (*port, by(policy, *mode)))
                .collect();
        }
        (mode, ports)
    }
}

impl Selectors {
    fn add(&mut self, selector: &Selector, number: u32) {
        match selector.labels().first_key_value() {
            None => self.without_labels.push(number),
            Some((key, value)) => self
                .by_label
                .entry(key.clone())
                .or_default()
                .entry(value.clone())
                .or_default()
                .push((selector.clone(), number)),
        }
    }

    fn find(&self, labels: &BTreeMap<String, String>, mut found: impl FnMut(u32)) {
        self.without_labels.iter().for_each(|number| found(*number));
        let by_label = labels
            .iter()
            .filter_map(|(key, value)| self.by_label.get(key)?.get(value))
            .flatten();
        for (selector, number) in by_label {
            if selector.selects(labels) {
                found(*number);
            }
        }
    }
}

impl WorkloadPolicy {
    /// Decides whether `connection` is allowed.
    pub fn evaluate(&self, connection: &Connection<'_>) -> Verdict {
        let port = connection.destination.port();
        let facts = Facts::new(
            connection.client,
            connection.source,
            connection.destination.ip(),
            port,
        );
        let audits = self.audit.each(&facts);
        let peer = self.mode(port);
        if connection.client.is_none() && !peer.mode.takes_plaintext() {
            return Verdict {
                decision: Decision::Plaintext(peer.clone()),
                audits,
                dry_run: None,
            };
        }
        let denied = self.deny.first(&facts);
        let allowed = self.allow.first(&facts);
        let dry_run = (!self.dry_deny.is_empty() || !self.dry_allow.is_empty()).then(|| {
            decide(
                || denied.clone().or_else(|| self.dry_deny.first(&facts)),
                || allowed.clone().or_else(|| self.dry_allow.first(&facts)),
                &self.dry_allowing,
            )
        });
        Verdict {
            decision: decide(|| denied, || allowed, &self.allowing),
            audits,
            dry_run,
        }
    }

    /// Returns the mode of `port`.
    pub fn mode(&self, port: u16) -> &PeerMode {
        self.ports.get(&port).unwrap_or(&self.mode)
    }

    /// Returns the modes of single ports, which take precedence over [`WorkloadPolicy::default_mode`].
    pub fn port_modes(&self) -> &BTreeMap<u16, PeerMode> {
        &self.ports
    }

    /// Returns the mode of all other ports.
    pub fn default_mode(&self) -> &PeerMode {
        &self.mode
    }

    /// Reports whether no policy can deny, audit or dry-run anything, so that callers with an identity need not be
    /// evaluated.
    pub fn is_unrestricted(&self) -> bool {
        let groups = [
            &self.deny,
            &self.allow,
            &self.audit,
            &self.dry_deny,
            &self.dry_allow,
        ];
        groups.iter().all(|group| group.is_empty())
    }
}

fn decide(
    denied: impl FnOnce() -> Option<Hit>,
    allowed: impl FnOnce() -> Option<Hit>,
    allowing: &Arc<[Arc<ObjectName>]>,
) -> Decision {
    if let Some(hit) = denied() {
        return Decision::Denied(hit);
    }
    if allowing.is_empty() {
        return Decision::Unrestricted;
    }
    match allowed() {
        Some(hit) => Decision::Allowed(hit),
        None => Decision::NotAllowed(allowing.clone()),
    }
}

impl Group {
    fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    fn hit(&self, (policy, rule): (usize, usize)) -> Hit {
        let (name, readable) = &self.policies[policy];
        Hit {
            policy: name.clone(),
            rule: readable.then_some(rule),
        }
    }

    fn first(&self, facts: &Facts<'_>) -> Option<Hit> {
        if self.is_empty() {
            return None;
        }
        self.rules.first(facts).map(|found| self.hit(found))
    }

    /// Returns the first matching rule of each policy that matches.
    fn each(&self, facts: &Facts<'_>) -> Vec<Hit> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut hits = Vec::new();
        self.rules.matching(facts, |matching| {
            let mut last = None;
            for found in matching {
                if last.replace(found.0) != Some(found.0) {
                    hits.push(self.hit(found));
                }
            }
        });
        hits
    }
}

impl Verdict {
    /// Reports whether the connection is allowed.
    pub fn allowed(&self) -> bool {
        self.decision.allowed()
    }
}

impl Decision {
    /// Reports whether the connection is allowed.
    pub fn allowed(&self) -> bool {
        matches!(self, Self::Unrestricted | Self::Allowed(_))
    }

    /// Returns the policies that decide.
    pub fn policies(&self) -> impl Iterator<Item = (Kind, &ObjectName)> {
        let (kind, policies) = match self {
            Self::Unrestricted => (Kind::Authorization, &[][..]),
            Self::Allowed(hit) | Self::Denied(hit) => {
                (Kind::Authorization, std::slice::from_ref(&hit.policy))
            }
            Self::NotAllowed(policies) => (Kind::Authorization, &**policies),
            Self::Plaintext(peer) => (Kind::Peer, peer.policy.as_slice()),
        };
        policies.iter().map(move |policy| (kind, &**policy))
    }
}

/// Maximum number of policies named in a text.
const MAX_NAMED: usize = 3;

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unrestricted => f.write_str("allowed: no policy restricts it"),
            Self::Allowed(hit) => write!(f, "allowed by {hit}"),
            Self::Denied(hit) => write!(f, "denied by {hit}"),
            Self::NotAllowed(policies) => {
                f.write_str("denied: no rule matches of AuthorizationPolicy ")?;
                for (index, policy) in policies.iter().take(MAX_NAMED).enumerate() {
                    let comma = if index > 0 { ", " } else { "" };
                    write!(f, "{comma}{policy}")?;
                }
                match policies.len().saturating_sub(MAX_NAMED) {
                    0 => Ok(()),
                    more => write!(f, " and {more} more"),
                }
            }
            Self::Plaintext(peer) => write!(f, "denied: plaintext, and the port takes {peer}"),
        }
    }
}

impl fmt::Display for Hit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuthorizationPolicy {}", self.policy)?;
        match self.rule {
            Some(rule) => write!(f, " rules[{rule}]"),
            None => f.write_str(", which cannot be read"),
        }
    }
}

impl fmt::Display for PeerMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mode.as_str())?;
        match &self.policy {
            Some(policy) => write!(f, " by PeerAuthentication {policy}"),
            None => f.write_str(" by the mesh's default"),
        }
    }
}
