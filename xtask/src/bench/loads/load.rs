//! The definition of a load, and what it measures.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use crate::bench::counters::Moved;
use crate::bench::stage::Stage;
use crate::bench::system::Way;

/// A load that is put on a system and measures the values of one or more rows.
pub(in crate::bench) struct Load {
    pub(in crate::bench) group: Group,
    pub(in crate::bench) way: Way,
    pub(in crate::bench) when: When,
    pub(in crate::bench) rows: &'static [Row],
    /// Runs for about the given time.
    pub(in crate::bench) run: fn(&Stage, Way, Duration) -> Result<Measured>,
}

/// A row of the table.
#[derive(Debug, PartialEq)]
pub(in crate::bench) struct Row {
    /// Its name in JSON and for `--only`.
    pub(in crate::bench) key: &'static str,
    pub(in crate::bench) name: &'static str,
    pub(in crate::bench) unit: &'static str,
    pub(in crate::bench) better: Better,
}

/// Which of two values is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum Better {
    More,
    Less,
}

/// A heading of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum Group {
    Across,
    OneNode,
    Outside,
    Cost,
}

/// When a load runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum When {
    /// In each round.
    EachRound,
    /// In each round, on proxies that are started for it.
    OnFreshProxies,
    /// Once, after all rounds.
    AtTheEnd,
}

/// The results of a load.
#[derive(Clone, Debug)]
pub(in crate::bench) struct Measured {
    /// Values in the order of the load's rows; `None` where a row does not apply to the system.
    pub(in crate::bench) values: Vec<Option<f64>>,
    pub(in crate::bench) moved: Moved,
    /// The destination of its connections.
    pub(in crate::bench) server: SocketAddr,
    /// Errors that its program reported.
    pub(in crate::bench) complaints: Vec<String>,
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

/// How much longer than its duration a load may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
