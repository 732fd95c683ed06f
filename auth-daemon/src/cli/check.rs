//! `auth-daemon check`: checks the daemon's requirements, and reports what is missing and how to provide it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::bail;

use super::{
    daemons::{Daemons, Selection},
    manifests, policy_diff,
};
use crate::config::{CaSource, Config, DEFAULT_PINS, Discovery, NonTcp, Proof};
use auth_datapath::features;
use auth_mesh::{
    Membership, MeshDefault,
    policy::{
        diff::{Inventory, Observed, Side, compare},
        question::{KUBE_SYSTEM, Known},
    },
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Check for this configuration, and the configuration itself.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn check(arguments: &Arguments) -> anyhow::Result<()> {
    let config = arguments.config.as_deref().map(Config::load).transpose()?;
    let pins = config
        .as_ref()
        .map_or_else(|| DEFAULT_PINS.into(), |config| config.pins.clone());
    let cgroup = config.as_ref().and_then(|config| config.cgroup.clone());
    let findings = features::check(cgroup.as_deref(), &pins);
    let warnings = config.as_ref().map(warnings).unwrap_or_default();
    let missing = findings.iter().filter(|finding| !finding.ok).count();
    if arguments.json {
        let report = serde_json::json!({
            "ok": missing == 0, "findings": findings, "warnings": warnings,
        });
        println!("{report}");
    } else {
        for finding in &findings {
            let mark = if finding.ok { "ok     " } else { "MISSING" };
            println!("{mark} {:30} {}", finding.name, finding.detail);
        }
        for warning in warnings {
            println!("WARNING {warning}");
        }
    }
    if missing > 0 {
        bail!("{missing} of {} requirements are not met", findings.len());
    }
    Ok(())
}

/// Returns consequences of the configuration, and of the manifests that it names, that a security team should know.
fn warnings(config: &Config) -> Vec<String> {
    let non_tcp = match config.non_tcp {
        NonTcp::Allow => {
            "nonTcp: allow: UDP, SCTP and everything else that is not TCP is neither encrypted nor authenticated, also \
             between pods of the mesh; `nonTcp: deny` refuses it"
        }
        NonTcp::Deny => {
            "nonTcp: deny: pods cannot ask a DNS server in the mesh over UDP; keep the cluster's DNS outside of the mesh"
        }
    };
    let mut warnings = vec![non_tcp.to_owned()];
    // A token file is often there only where the daemon runs.
    if let CaSource::Server(server) = &config.ca
        && let Proof::Join(_) = &server.proof
        && let Err(errors) = server.check()
    {
        warnings.extend(errors.lines().map(str::to_owned));
    }
    match &config.discovery {
        Discovery::Files(folder) => match manifests::read(folder, config.policy.clone()) {
            Ok(known) => {
                warnings.extend(known.warnings());
                warnings.extend(ending(folder, known));
            }
            Err(error) => warnings.push(format!("discovery.files: {error:#}")),
        },
        // Istio's labels say which pods are in the mesh, and none is without one.
        Discovery::Istiod { .. } => {}
        Discovery::Kubernetes {
            defaults, remote, ..
        } => {
            for (cluster, domain) in remote.iter().flat_map(|remote| &remote.trust_domains) {
                let mut foreign = config.federation.domains().iter();
                let is_own = config.trust_domain.is_named(domain.as_str());
                if !is_own && !foreign.any(|entry| entry.trust_domain == *domain) {
                    warnings.push(format!(
                        "discovery.kubernetes.remoteClusters: cluster {cluster} is of trust domain {domain}, which has no \
                         entry in federation: connections to and from its pods are refused"
                    ));
                }
            }
            if defaults.of(KUBE_SYSTEM, None) == Membership::Enabled {
                warnings.push(
                    "discovery.kubernetes.excludedNamespaces: lacks kube-system, so pods that the cluster itself depends \
                     on are in the mesh, and under STRICT refuse plaintext from outside the mesh; add kube-system"
                        .to_owned(),
                );
            }
            warnings.extend(leaving(defaults));
        }
    }
    warnings
}

/// Returns the open connections of this node that would end with this configuration, where `then` is what it makes of the
/// manifests in `folder`. Without a running daemon, there are none.
fn ending(folder: &Path, then: Known) -> Vec<String> {
    let Ok((inventory, observed)) = running() else {
        return Vec::new();
    };
    let now = inventory.settings().map(|now| manifests::read(folder, now));
    let Ok(Ok(now)) = now else {
        return Vec::new();
    };
    let side = |known: Known| Side {
        pods: known.pods.iter().map(|pod| (&**pod).into()).collect(),
        policies: known.policies,
        memberships: known.memberships,
    };
    ends(&side(now), &side(then), &observed)
}

/// Returns the open connections of this node that would end because their pods leave the mesh when `defaults` apply. Without a
/// running daemon, there are none.
fn leaving(defaults: &MeshDefault) -> Vec<String> {
    let Ok((inventory, observed)) = running() else {
        return Vec::new();
    };
    let now = Side {
        policies: Arc::default(),
        pods: inventory.pods,
        memberships: inventory.memberships,
    };
    let mut then = now.clone();
    then.memberships.defaults = defaults.clone();
    ends(&now, &then, &observed)
}

fn ends(now: &Side, then: &Side, observed: &[Observed]) -> Vec<String> {
    let ending = compare(now, then, Some(observed)).ending;
    let ending = ending.iter().map(|change| {
        format!(
            "open connections that would end: {} from {} to {}, port {}: {}",
            change.count, change.client, change.server, change.ports, change.after
        )
    });
    ending.collect()
}

/// Returns what this node's daemon knows, and its open connections. Fails if none runs.
fn running() -> anyhow::Result<(Inventory, Vec<Observed>)> {
    let daemons = Daemons::find(&Selection::of_this_node())?;
    let inventory = policy_diff::inventory(&daemons)?;
    Ok((inventory, policy_diff::open_connections(&daemons)?))
}
