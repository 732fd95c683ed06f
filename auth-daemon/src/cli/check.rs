//! `auth-daemon check`: checks the daemon's requirements, and reports what is missing and how to provide it.

use std::path::PathBuf;

use anyhow::bail;

use crate::config::{Config, DEFAULT_PINS, NonTcp};
use auth_datapath::features;

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
    let warnings: Vec<_> = config.iter().flat_map(warnings).collect();
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

/// Consequences of the configuration that a security team should know.
fn warnings(config: &Config) -> Vec<&'static str> {
    match config.non_tcp {
        NonTcp::Allow => vec![
            "nonTcp: allow: UDP, SCTP and everything else that is not TCP is neither encrypted nor authenticated, also \
             between pods of the mesh; `nonTcp: deny` refuses it",
        ],
        NonTcp::Deny => vec![
            "nonTcp: deny: pods cannot ask a DNS server in the mesh over UDP; keep the cluster's DNS outside of the mesh",
        ],
    }
}
