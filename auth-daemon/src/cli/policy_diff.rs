//! `auth-daemon policy check --diff`: says in advance which connections a change of policies would end, refuse or allow.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::Value;

use super::{
    daemons::{Daemons, Selection},
    manifests::{self, Manifests},
};
use auth_mesh::{
    Membership, Memberships,
    policy::{
        Policies, Settings,
        diff::{Change, Differences, Inventory, Observed, Pod, Side, compare},
        question::{Answer, Known, table},
    },
};

#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Arguments {
    /// Compare two sets of policies, each a folder of manifests or a file: which open connections would end, and which
    /// calls between pods would be refused or newly allowed. Without pods among the manifests, the pods that this
    /// node's daemon knows are compared.
    #[arg(long, num_args = 2, value_names = ["OLD", "NEW"], conflicts_with_all = ["from", "to", "source_ip", "files"])]
    diff: Vec<PathBuf>,
    /// The open connections: a file with the output of `auth-daemon status --json`. Without it, this node's daemon is
    /// queried if the manifests contain no pods.
    #[arg(long, requires = "diff")]
    connections: Option<PathBuf>,
    /// How to print the differences.
    #[arg(short, long, requires = "diff", value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
}

impl Arguments {
    /// Returns the two sets of policies, if there are any.
    pub(super) fn sides(&self) -> Option<[&Path; 2]> {
        match self.diff.as_slice() {
            [old, new] => Some([old, new]),
            _ => None,
        }
    }

    /// Compares two sets of policies. The answer is good if everything that is allowed stays allowed.
    pub(super) fn compare(
        &self,
        [old, new]: [&Path; 2],
        settings: &Manifests,
        daemons: &Selection,
    ) -> anyhow::Result<Answer> {
        let settings = settings.settings()?;
        let (mut old, mut new) = (
            manifests::read(old, settings.clone())?,
            manifests::read(new, settings)?,
        );
        let is_of_daemon = old.pods.is_empty() && new.pods.is_empty();
        let pods = if is_of_daemon {
            let inventory = inventory(&Daemons::find(daemons)?)?;
            let settings = inventory.settings()?;
            let given = [&old, &new].map(|known| known.memberships.namespaces.clone());
            old = recompiled(old, &settings);
            new = recompiled(new, &settings);
            old.memberships = inventory.memberships.clone();
            new.memberships = changed(inventory.memberships, given);
            let pods = [inventory.pods, inventory.outside].concat();
            [pods.clone(), pods]
        } else {
            [pods(&old, &new), pods(&new, &old)]
        };
        let observed = match &self.connections {
            Some(file) => Some(read_connections(file)?),
            None if is_of_daemon => Some(open_connections(&Daemons::find(daemons)?)?),
            None => None,
        };
        let [old_pods, new_pods] = pods;
        let warnings = new.warnings();
        let side = |known: Known, pods| Side {
            policies: known.policies,
            pods,
            memberships: known.memberships,
        };
        let differences = compare(
            &side(old, old_pods),
            &side(new, new_pods),
            observed.as_deref(),
        );
        Ok(Answer {
            text: match self.output {
                Output::Table => text(&differences),
                Output::Json => format!("{}\n", serde_json::to_string(&differences)?),
            },
            good: !differences.breaks_something(),
            warnings,
        })
    }
}

/// Returns which pods are in the mesh after the labels of namespaces change from the first of `given` to the second.
fn changed(
    mut memberships: Memberships,
    [old, new]: [BTreeMap<String, Membership>; 2],
) -> Memberships {
    let namespaces = &mut memberships.namespaces;
    namespaces.retain(|name, _| !old.contains_key(name));
    namespaces.extend(new);
    memberships
}

/// Returns the pods of a side, or, if it consists of policies alone, those of the other.
fn pods(side: &Known, other: &Known) -> Vec<Pod> {
    let pods = match side.pods.is_empty() {
        true => &other.pods,
        false => &side.pods,
    };
    pods.iter().map(|pod| Pod::from(&**pod)).collect()
}

/// Returns the pods that the daemons know, and the settings of their mesh.
pub(super) fn inventory(daemons: &Daemons) -> anyhow::Result<Inventory> {
    daemons.ask_any("/policy/pods", None::<&()>).context(
        "the manifests contain no pods, and no daemon answers; add the pods' manifests, or run this where `auth-daemon \
         status` works",
    )
}

/// Returns the connections that are open now. Fails if a daemon does not answer.
pub(super) fn open_connections(daemons: &Daemons) -> anyhow::Result<Vec<Observed>> {
    let (answers, missing) = daemons.ask_all::<Value>("/status");
    if let Some(missing) = missing.first() {
        bail!("{missing}; with --connections, a file is used instead of the daemons");
    }
    let mut all = Vec::new();
    for (_, status) in answers {
        all.extend(connections(&status)?);
    }
    Ok(all)
}

/// Returns the same policies, with the settings of a daemon's mesh.
fn recompiled(known: Known, settings: &Settings) -> Known {
    let objects: Vec<_> = known.policies.objects().cloned().collect();
    Known {
        policies: Arc::new(Policies::compile(settings.clone(), objects)),
        ..known
    }
}

fn read_connections(file: &Path) -> anyhow::Result<Vec<Observed>> {
    let read = || -> anyhow::Result<_> { connections(&serde_json::from_slice(&fs::read(file)?)?) };
    read().with_context(|| format!("--connections {}", file.display()))
}

/// Returns the open connections in a daemon's status.
fn connections(status: &Value) -> anyhow::Result<Vec<Observed>> {
    let connections = match status.get("connections") {
        Some(connections) => connections,
        None if status.is_array() => status,
        None => bail!("is not the output of `auth-daemon status --json`: it has no connections"),
    };
    Ok(serde::Deserialize::deserialize(connections)?)
}

fn text(differences: &Differences) -> String {
    let mut text = String::new();
    let sections = [
        ("OPEN CONNECTIONS THAT WOULD END", &differences.ending),
        ("CALLS THAT WOULD BE REFUSED", &differences.refused),
        ("CALLS THAT WOULD NEWLY BE ALLOWED", &differences.allowed),
    ];
    for (title, changes) in sections {
        let count: usize = changes.iter().map(|change| change.count).sum();
        text.push_str(&format!("{title} ({count})\n"));
        if !changes.is_empty() {
            let head = ["CLIENT", "SERVER", "PORTS", "COUNT", "NOW", "THEN"].map(str::to_owned);
            let mut rows = vec![head];
            rows.extend(changes.iter().map(row));
            for line in table(&rows).lines() {
                text.push_str(&format!("  {line}\n"));
            }
        }
    }
    text.push_str(&match differences.observed {
        Some(observed) => format!("{observed} open connections observed\n"),
        None => "no open connections observed; all pairs of pods are compared\n".to_owned(),
    });
    for unknown in &differences.unknown {
        text.push_str(&format!(
            "not judged, because the server is no known pod: {unknown}\n"
        ));
    }
    text
}

fn row(change: &Change) -> [String; 6] {
    [
        change.client.clone(),
        change.server.clone(),
        change.ports.clone(),
        change.count.to_string(),
        change.before.clone(),
        change.after.clone(),
    ]
}
