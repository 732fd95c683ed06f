//! The definition of a load, and what it measures.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use crate::counters::Moved;
use crate::stage::Stage;
use crate::system::Way;

/// A load that is put on a system and measures the values of one or more rows.
pub(crate) struct Load {
    pub(crate) group: Group,
    pub(crate) way: Way,
    pub(crate) when: When,
    pub(crate) rows: &'static [Row],
    /// Runs for about the given time.
    pub(crate) run: fn(&Stage, Way, Duration) -> Result<Measured>,
}

/// A row of the table.
#[derive(Debug, PartialEq)]
pub(crate) struct Row {
    /// Its name in JSON and for `--only`.
    pub(crate) key: &'static str,
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
}

/// Which of two values is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

/// A heading of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Across,
    OneNode,
    Outside,
    Cost,
}

/// When a load runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// In each round.
    EachRound,
    /// In each round, on proxies that are started for it.
    OnFreshProxies,
    /// Once, after all rounds.
    AtTheEnd,
}

/// The results of a load.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    /// Values in the order of the load's rows; `None` where a row does not apply to the system.
    pub(crate) values: Vec<Option<f64>>,
    pub(crate) moved: Moved,
    /// The destination of its connections.
    pub(crate) server: SocketAddr,
    /// Errors that its program reported.
    pub(crate) complaints: Vec<String>,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Across => "between nodes",
            Self::OneNode => "on one node",
            Self::Outside => "to an address outside of the mesh",
            Self::Cost => "what the proxies take",
        })
    }
}

/// The CPU seconds per 1,000 connections or requests. `None` without proxies.
pub(super) fn per_thousand(
    before: Option<Duration>,
    after: Option<Duration>,
    count: u64,
) -> Option<f64> {
    let (before, after) = before.zip(after)?;
    Some((after - before).as_secs_f64() * 1e3 / count as f64)
}

/// How much longer than its duration a load may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
