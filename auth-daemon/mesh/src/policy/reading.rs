//! Reads the policy objects once: what each enforces and for which workloads, or why it enforces nothing.
//!
//! Verdicts, explanations and warnings all derive from this.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use super::{
    api::{
        Action, AuthorizationPolicy, FieldWarning, Instead, Kind, Mode, Object, PeerAuthentication,
        Rule,
    },
    compile::Settings,
    fields::Ports,
    rules::port_set,
    trust_domain,
};
use crate::{ObjectName, Workload};

/// A policy object, as this mesh enforces it.
#[derive(Debug)]
pub(super) struct Policy {
    /// The object as its author wrote it.
    pub(super) object: Arc<Object>,
    /// Name of the object.
    pub(super) name: Arc<ObjectName>,
    /// What the object enforces.
    pub(super) effect: Effect,
    /// Whether the policy is in the root namespace, so that it applies to all namespaces.
    pub(super) is_mesh_wide: bool,
    /// What the object's author should know.
    pub(super) warnings: Vec<FieldWarning>,
}

/// What a policy enforces.
#[derive(Debug)]
pub(super) enum Effect {
    /// Allows, denies or audits connections.
    Authorization {
        /// Effect of a match.
        action: Action,
        /// Whether the verdict is only reported.
        dry_run: bool,
        /// The rules, with the mesh's own trust domain in their principals.
        rules: Arc<[Rule]>,
    },
    /// Sets the mutual TLS mode.
    Peer {
        /// Mode of all ports. `None` inherits the mode of the enclosing scope.
        mode: Option<Mode>,
        /// Modes of single ports.
        ports: BTreeMap<u16, Mode>,
        /// Position among all PeerAuthentications by age. The lowest takes precedence.
        age: usize,
    },
    /// Nothing.
    Nothing(NoEffect),
}

/// Why a policy enforces nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoEffect {
    /// It is bound to a waypoint or gateway.
    ForGateway,
    /// It is a PeerAuthentication with a selector in the root namespace.
    SelectorInRoot,
    /// This PeerAuthentication applies to the same workloads and is older.
    Older(Arc<ObjectName>),
    /// It is unreadable and could not have denied anything.
    Unreadable,
}

/// Whether a policy applies to a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Selection {
    /// It applies.
    Selected,
    /// It is for another namespace.
    OtherNamespace,
    /// It does not apply, for this reason.
    NotSelected(String),
}

/// A warning for the author of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Warning {
    /// Kind of the policy.
    pub kind: Kind,
    /// Name of the policy.
    pub policy: ObjectName,
    /// Path of the field.
    pub field: String,
    /// What the field means, and what to do.
    pub text: String,
}

/// Reads `objects`. Returns them by kind and name.
pub(super) fn read(
    settings: &Settings,
    objects: impl IntoIterator<Item = Arc<Object>>,
) -> Vec<Policy> {
    let mut objects: Vec<_> = objects.into_iter().collect();
    objects.sort_by(|a, b| (a.kind(), a.name()).cmp(&(b.kind(), b.name())));
    let mut by_age: Vec<&PeerAuthentication> = objects
        .iter()
        .filter_map(|object| match &**object {
            Object::Peer(policy) => Some(policy),
            _ => None,
        })
        .collect();
    by_age.sort_by(|a, b| (&a.created, &a.name).cmp(&(&b.created, &b.name)));
    let ages: HashMap<&ObjectName, usize> = by_age
        .iter()
        .enumerate()
        .map(|(age, policy)| (&policy.name, age))
        .collect();
    let mut oldest: HashMap<&str, Arc<ObjectName>> = HashMap::new();
    for policy in by_age.iter().filter(|policy| policy.selector.is_empty()) {
        oldest
            .entry(&policy.name.namespace)
            .or_insert_with(|| Arc::new(policy.name.clone()));
    }
    objects
        .iter()
        .map(|object| {
            let name = Arc::new(object.name().clone());
            let is_mesh_wide = name.namespace == settings.root_namespace;
            let mut warnings: Vec<_> = object.warnings().cloned().collect();
            let effect = match &**object {
                Object::Authorization(policy) => {
                    warnings.extend(trust_domain::warnings(policy, settings));
                    authorization(policy, settings)
                }
                Object::Peer(policy) => {
                    let oldest = oldest.get(name.namespace.as_str());
                    peer(policy, ages[&policy.name], oldest, is_mesh_wide)
                }
                Object::Unreadable(unreadable) => {
                    warnings.push(FieldWarning {
                        field: unreadable.field.clone(),
                        text: format!("{}; {} instead", unreadable.reason, unreadable.instead),
                    });
                    in_place_of_unreadable(unreadable.instead)
                }
            };
            warnings.extend(effect.warning());
            Policy {
                object: object.clone(),
                name,
                effect,
                is_mesh_wide,
                warnings,
            }
        })
        .collect()
}

fn authorization(policy: &AuthorizationPolicy, settings: &Settings) -> Effect {
    if policy.elsewhere {
        return Effect::Nothing(NoEffect::ForGateway);
    }
    Effect::Authorization {
        action: policy.action,
        dry_run: policy.dry_run,
        rules: trust_domain::resolve(policy, &settings.trust_domain),
    }
}

/// `oldest` is the oldest policy without a selector in the same namespace.
fn peer(
    policy: &PeerAuthentication,
    age: usize,
    oldest: Option<&Arc<ObjectName>>,
    is_mesh_wide: bool,
) -> Effect {
    match oldest {
        _ if is_mesh_wide && !policy.selector.is_empty() => {
            Effect::Nothing(NoEffect::SelectorInRoot)
        }
        Some(oldest) if policy.selector.is_empty() && **oldest != policy.name => {
            Effect::Nothing(NoEffect::Older(oldest.clone()))
        }
        _ => Effect::Peer {
            mode: policy.mode,
            ports: policy.ports.clone(),
            age,
        },
    }
}

fn in_place_of_unreadable(instead: Instead) -> Effect {
    let authorization = |action, rules: Vec<Rule>| Effect::Authorization {
        action,
        dry_run: false,
        rules: rules.into(),
    };
    match instead {
        Instead::AllowNothing => authorization(Action::Allow, vec![]),
        Instead::DenyAll => authorization(Action::Deny, vec![Rule::default()]),
        Instead::Nothing => Effect::Nothing(NoEffect::Unreadable),
        Instead::Strict => Effect::Peer {
            mode: Some(Mode::Strict),
            ports: BTreeMap::new(),
            age: 0,
        },
    }
}

impl Policy {
    /// Reports whether the object could be read.
    pub(super) fn is_readable(&self) -> bool {
        !matches!(*self.object, Object::Unreadable(_))
    }

    /// Returns whether the policy applies to workloads in `namespace` that have `labels`.
    pub(super) fn selection(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
    ) -> Selection {
        let selector = self.object.selector();
        if !self.is_mesh_wide && self.name.namespace != namespace {
            Selection::OtherNamespace
        } else if !selector.selects(labels) {
            Selection::NotSelected(format!("it selects {selector}"))
        } else {
            match &self.effect {
                Effect::Nothing(NoEffect::ForGateway) => {
                    Selection::NotSelected("it is for a waypoint or gateway".into())
                }
                Effect::Nothing(NoEffect::SelectorInRoot) => Selection::NotSelected(
                    "with a selector, in the root namespace, it selects nothing".into(),
                ),
                _ => Selection::Selected,
            }
        }
    }

    /// Reports whether the policy applies to `pod`.
    pub(super) fn applies_to(&self, pod: &Workload) -> bool {
        self.selection(&pod.name.namespace, &pod.labels) == Selection::Selected
    }

    /// Reports whether the policy allows any connection.
    pub(super) fn can_allow(&self) -> bool {
        match &self.effect {
            Effect::Authorization {
                action: Action::Allow,
                dry_run: false,
                rules,
            } => !rules.iter().all(Rule::matches_nothing),
            _ => false,
        }
    }

    /// Returns the field because of which the policy denies every connection to the workloads that it selects. An ALLOW
    /// policy does so only if no other one allows connections to them.
    pub(super) fn denies_everything(&self) -> Option<(Action, String)> {
        let Effect::Authorization {
            action,
            dry_run: false,
            rules,
        } = &self.effect
        else {
            return None;
        };
        match action {
            _ if !self.is_readable() => None,
            Action::Allow => rules
                .iter()
                .all(Rule::matches_nothing)
                .then(|| (*action, "spec.rules".to_owned())),
            Action::Deny => {
                let all = rules.iter().position(|rule| {
                    rule.requirements().next().is_none() && !rule.matches_nothing()
                })?;
                Some((*action, format!("spec.rules[{all}]")))
            }
            Action::Audit => None,
        }
    }

    /// Returns the warnings, with the policy's name.
    pub(super) fn warnings(&self) -> impl Iterator<Item = Warning> {
        self.warnings
            .iter()
            .map(|warning| self.warning(&warning.field, &warning.text))
    }

    /// Creates a warning about a field of the policy.
    pub(super) fn warning(&self, field: &str, text: &str) -> Warning {
        Warning {
            kind: self.object.kind(),
            policy: (*self.name).clone(),
            field: field.to_owned(),
            text: text.to_owned(),
        }
    }
}

impl Rule {
    /// Reports whether no connection can match the rule.
    fn matches_nothing(&self) -> bool {
        self.never.is_some() || port_set(self) == Ports::nothing()
    }
}

impl Effect {
    /// Returns a warning if the policy has no effect, unless its object says why already.
    fn warning(&self) -> Option<FieldWarning> {
        let (field, text) = match self {
            Self::Nothing(NoEffect::SelectorInRoot) => (
                "spec.selector",
                "in the root namespace it has no effect; leave it out for the whole mesh"
                    .to_owned(),
            ),
            Self::Nothing(NoEffect::Older(oldest)) => (
                "spec",
                format!(
                    "has no effect: {oldest} is older (or first by name), for the same workloads; remove one of them"
                ),
            ),
            _ => return None,
        };
        Some(FieldWarning {
            field: field.to_owned(),
            text,
        })
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            policy,
            field,
            text,
        } = self;
        write!(f, "{kind} {policy}: {field}: {text}")
    }
}
