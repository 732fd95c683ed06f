//! `auth-daemon check`: checks the daemon's requirements, and reports what is missing and how to provide it.

use std::path::{Path, PathBuf};

use anyhow::bail;

use super::{
    daemons::{Daemons, Selection},
    manifests, policy_diff,
};
use crate::config::{Config, DEFAULT_PINS, Discovery, NonTcp};
use auth_datapath::features;
use auth_mesh::{
    Membership,
    policy::{
        Settings,
        diff::{Observed, Side, compare},
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
        Discovery::Kubernetes { defaults, .. } => {
            if defaults.of(KUBE_SYSTEM) == Membership::Enabled {
                warnings.push(
                    "discovery.kubernetes.excludedNamespaces: lacks kube-system, so pods that the cluster itself depends \
                     on are in the mesh, and under STRICT refuse plaintext from outside the mesh; add kube-system"
                        .to_owned(),
                );
            }
        }
    }
    warnings
}

/// Returns the open connections of this node that would end with this configuration, where `then` is what it makes of the
/// manifests in `folder`. Without a running daemon, there are none.
fn ending(folder: &Path, then: Known) -> Vec<String> {
    let Ok((settings, observed)) = running() else {
        return Vec::new();
    };
    let Ok(now) = manifests::read(folder, settings) else {
        return Vec::new();
    };
    let side = |known: Known| Side {
        pods: known.pods.iter().map(|pod| (&**pod).into()).collect(),
        policies: known.policies,
    };
    let ending = compare(&side(now), &side(then), Some(&observed)).ending;
    let ending = ending.iter().map(|change| {
        format!(
            "open connections that would end: {} from {} to {}, port {}: {}",
            change.count, change.client, change.server, change.ports, change.after
        )
    });
    ending.collect()
}

/// Returns the settings of this node's daemon, and its open connections. Fails if none runs.
fn running() -> anyhow::Result<(Settings, Vec<Observed>)> {
    let daemons = Daemons::find(&Selection::of_this_node())?;
    let settings = policy_diff::inventory(&daemons)?.settings()?;
    Ok((settings, policy_diff::open_connections(&daemons)?))
}
