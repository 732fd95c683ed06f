//! Manifests that a command reads instead of querying a daemon.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, ensure};
use clap::ValueEnum;

use crate::discovery::{files, manifest};
use auth_mesh::{
    Membership, Memberships, TrustDomain,
    policy::{
        Policies, Settings,
        api::Mode,
        question::{EnabledNamespace, KUBE_SYSTEM, Known},
    },
};

/// Namespace of the daemon and its CA in the project's chart.
pub(super) const DAEMON_NAMESPACE: &str = "auth-system";

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Manifests {
    /// Folder of manifests, or one file: pods with their addresses, services, policies. Without it, a daemon is
    /// queried.
    #[arg(long)]
    pub(super) files: Option<PathBuf>,
    /// The trust domain of the pods' identities.
    #[arg(long, default_value = "cluster.local")]
    pub(super) trust_domain: String,
    /// Another name of the trust domain (trustDomainAliases). May be repeated.
    #[arg(long = "trust-domain-alias")]
    pub(super) trust_domain_aliases: Vec<String>,
    /// A foreign trust domain (federation). May be repeated.
    #[arg(long = "foreign-trust-domain")]
    pub(super) foreign_trust_domains: Vec<String>,
    /// Namespace whose policies apply to all namespaces.
    #[arg(long, default_value = "istio-system")]
    pub(super) root_namespace: String,
    /// Mode of pods that no PeerAuthentication applies to.
    #[arg(long, value_enum, default_value_t = DefaultMode::Strict, ignore_case = true)]
    pub(super) mode: DefaultMode,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum DefaultMode {
    Strict,
    Permissive,
}

impl Manifests {
    /// Reads a file, or all manifests in a folder. Fails with all errors in them, except for policies, which are
    /// rejected one by one.
    pub(super) fn read(&self, path: &Path) -> anyhow::Result<Known> {
        read(path, self.settings()?)
    }

    /// Returns the settings of the mesh.
    pub(super) fn settings(&self) -> anyhow::Result<Settings> {
        let trust_domain: TrustDomain = self
            .trust_domain
            .parse()
            .with_context(|| format!("--trust-domain {:?}", self.trust_domain))?;
        let aliases = self.trust_domain_aliases.iter().map(|alias| {
            alias
                .parse::<TrustDomain>()
                .with_context(|| format!("--trust-domain-alias {alias:?}"))
        });
        let trust_domain = trust_domain.with_aliases(aliases.collect::<anyhow::Result<Vec<_>>>()?);
        let foreign = self.foreign_trust_domains.iter().map(|name| {
            name.parse::<TrustDomain>()
                .with_context(|| format!("--foreign-trust-domain {name:?}"))
        });
        Ok(Settings {
            root_namespace: self.root_namespace.clone(),
            mode: match self.mode {
                DefaultMode::Strict => Mode::Strict,
                DefaultMode::Permissive => Mode::Permissive,
            },
            trust_domain,
            foreign_trust_domains: foreign.collect::<anyhow::Result<_>>()?,
        })
    }
}

/// Reads a file, or all manifests in a folder, for a mesh with these settings.
pub(super) fn read(path: &Path, settings: Settings) -> anyhow::Result<Known> {
    let mut errors = Vec::new();
    let (mut pods, mut services, mut policies) = (Vec::new(), Vec::new(), Vec::new());
    let (mut named, mut files_of) = (BTreeSet::new(), HashMap::new());
    let (mut memberships, mut enabled_namespaces) = (Memberships::default(), Vec::new());
    let paths = if path.is_dir() {
        files::manifests(path)
            .with_context(|| format!("cannot read the folder {}", path.display()))?
    } else {
        vec![path.to_owned()]
    };
    for path in paths {
        let file = path.display().to_string();
        let mut invalid = |what: String| errors.push(format!("{file}: {what}"));
        let text = files::read_file(&path).map_err(|error| error.to_string());
        let read = text.and_then(|text| files::parse(&text, &settings.trust_domain));
        let objects = read.unwrap_or_else(|error| {
            invalid(error);
            Vec::new()
        });
        for (name, object) in objects {
            if !named.insert((object.kind(), name.clone())) {
                invalid(format!("{} {name} is defined a second time", object.kind()));
            }
            match object {
                manifest::Object::Pod(pod) => pods.push(pod),
                manifest::Object::Service(service) => services.push(service),
                manifest::Object::Policy(policy) => {
                    files_of.insert((policy.kind(), name), file.clone());
                    policies.push(policy);
                }
                manifest::Object::Namespace(membership) => {
                    if membership == Some(Membership::Enabled) {
                        enabled_namespaces.push(EnabledNamespace {
                            name: name.name.clone(),
                            file: Some(file.clone()),
                        });
                    }
                    let namespaces = &mut memberships.namespaces;
                    namespaces.extend(membership.map(|set| (name.name, set)));
                }
                manifest::Object::Slice(_)
                | manifest::Object::Node(_)
                | manifest::Object::ServiceNetworks(_) => {}
            }
        }
    }
    ensure!(errors.is_empty(), "{}", errors.join("\nauth-daemon: "));
    Ok(Known {
        source: path.display().to_string(),
        pods,
        services,
        policies: Arc::new(Policies::compile(settings, policies)),
        memberships,
        enabled_namespaces,
        system_namespaces: vec![KUBE_SYSTEM.to_owned(), DAEMON_NAMESPACE.to_owned()],
        files: files_of,
    })
}
