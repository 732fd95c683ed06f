//! `auth-daemon policy suggest`: least-privilege policies from the connections that were seen.

use std::fmt::Write;

use super::{
    daemons::{Daemons, Selection},
    pairs, policy_diff,
};
use crate::observe::{access_log::Direction, flows::Verdict, pairs::Answer as Seen, pairs::Pair};
use auth_mesh::policy::{
    question::Answer,
    suggest::{Call, Caller, suggest},
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only policies for servers in this namespace.
    #[arg(long)]
    namespace: Option<String>,
    #[command(flatten)]
    daemons: Selection,
}

/// Suggests policies. The answer is good if all daemons were asked and had counted everything.
pub(super) fn answer(arguments: &Arguments) -> anyhow::Result<Answer> {
    let daemons = Daemons::find(&arguments.daemons)?;
    let inventory = policy_diff::inventory(&daemons)?;
    let (seen, missing) = pairs::read(&daemons)?;
    let wanted = |call: &Call| {
        let namespace = arguments.namespace.as_ref();
        namespace.is_none_or(|namespace| *namespace == call.namespace)
    };
    let calls: Vec<_> = seen.iter().flat_map(calls).filter(wanted).collect();
    let suggestions = suggest(&calls, &inventory.pods, &inventory.root_namespace);
    let mut warnings: Vec<_> = missing.iter().map(ToString::to_string).collect();
    for node in &seen {
        let lost = node.uncounted + node.dropped;
        if lost > 0 {
            warnings.push(format!(
                "node {} has not recorded all that it saw ({} connections uncounted, {} pairs dropped): what was called only by \
                 them would be refused",
                node.node, node.uncounted, node.dropped
            ));
        }
        if !node.unseen.is_empty() {
            warnings.push(format!(
                "node {} does not see who calls in plaintext from outside the networks of pods: {}; policies would refuse \
                 them. `auth-daemon strict-readiness` says how to make them visible",
                node.node,
                node.unseen.join(", ")
            ));
        }
    }
    let good = warnings.is_empty();
    warnings.extend(suggestions.left_out.iter().cloned());
    let mut text = heading(&seen, calls.len());
    for policy in &suggestions.policies {
        write!(text, "---\n{policy}")?;
    }
    Ok(Answer {
        text,
        good,
        warnings,
    })
}

fn heading(seen: &[Seen], calls: usize) -> String {
    let nodes: Vec<_> = (seen.iter())
        .map(|node| format!("{} ({})", node.node, pairs::span(node.seconds)))
        .collect();
    format!(
        "# From {calls} callers and ports that were seen on these nodes since their daemons started: {}\n\
         # Compare with what is in force: auth-daemon policy check --diff CURRENT THIS-FILE\n",
        nodes.join(", ").replace(char::is_control, " ")
    )
}

/// The calls that servers on the node accepted.
fn calls(seen: &Seen) -> impl Iterator<Item = Call> {
    seen.pairs.iter().filter_map(call)
}

fn call(pair: &Pair) -> Option<Call> {
    let is_admitted = pair.direction == Direction::Inbound
        && pair.verdict == Verdict::Allowed
        // A pod always reaches itself.
        && pair.path != "self";
    if !is_admitted {
        return None;
    }
    let caller = match (&pair.client.identity, pair.client.address) {
        (Some(identity), _) => Caller::Identity(identity.parse().ok()?),
        (None, Some(address)) => Caller::Address(address),
        (None, None) => return None,
    };
    Some(Call {
        namespace: pair.server.namespace.clone()?,
        labels: pair.server.labels.clone(),
        workload: pair.server.workload.clone().unwrap_or_default(),
        port: pair.port,
        caller,
        connections: pair.seen(),
        last: pair.last.clone(),
    })
}
