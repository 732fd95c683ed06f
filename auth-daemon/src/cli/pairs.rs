//! Reads which workloads call each other, from all daemons that a command asks.

use anyhow::bail;

use super::daemons::{Daemons, Unanswered};
use crate::observe::pairs::{Answer, Party};

/// Returns the daemons' answers, and the nodes that cannot be reached. Fails if no daemon answers.
pub(super) fn read(daemons: &Daemons) -> anyhow::Result<(Vec<Answer>, Vec<Unanswered>)> {
    let (answers, missing) = daemons.ask_all::<Answer>("/pairs");
    if answers.is_empty() {
        let reasons: Vec<_> = missing.iter().map(ToString::to_string).collect();
        bail!("{}", reasons.join("; "));
    }
    Ok((
        answers.into_iter().map(|(_, answer)| answer).collect(),
        missing,
    ))
}

/// Names a party: its workload, else its service account, else its address.
pub(super) fn name(party: &Party) -> String {
    match (
        &party.namespace,
        &party.workload,
        &party.identity,
        &party.address,
    ) {
        (Some(namespace), Some(workload), _, _) => plain(&format!("{namespace}/{workload}")),
        (_, _, Some(identity), _) => match identity.split_once("/ns/") {
            Some((_, account)) => plain(&account.replacen("/sa/", "/", 1)),
            None => plain(identity),
        },
        (_, _, _, Some(address)) => address.to_string(),
        _ => "?".to_owned(),
    }
}

/// Replaces what a terminal would take for a command: peers write parts of some texts.
pub(super) fn plain(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// Formats a number of seconds as hours, or minutes if it is less than two hours.
pub(super) fn span(seconds: u64) -> String {
    match seconds {
        0..7200 => format!("{} min", seconds / 60),
        _ => format!("{:.1} h", seconds as f64 / 3600.0),
    }
}
