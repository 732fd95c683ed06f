//! What a load is, and what it measures.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use crate::bench::counters::Moved;
use crate::bench::stage::Stage;
use crate::bench::system::Way;

/// Something that is done to a system and gives the values of one or more rows.
pub(in crate::bench) struct Load {
    pub(in crate::bench) group: Group,
    pub(in crate::bench) way: Way,
    pub(in crate::bench) when: When,
    pub(in crate::bench) rows: &'static [Row],
    /// It lasts for about the given time.
    pub(in crate::bench) run: fn(&Stage, Way, Duration) -> Result<Measured>,
}

/// A line of the table.
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

/// When a load is put on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum When {
    /// In each round.
    EachRound,
    /// In each round, on proxies that were started for it.
    OnFreshProxies,
    /// Once, after all rounds.
    AtTheEnd,
}

/// What a load has shown.
#[derive(Clone, Debug)]
pub(in crate::bench) struct Measured {
    /// In the order of the load's rows; none where the system has no such thing.
    pub(in crate::bench) values: Vec<Option<f64>>,
    pub(in crate::bench) moved: Moved,
    /// Where its connections led.
    pub(in crate::bench) server: SocketAddr,
    /// What its program says went wrong.
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

/// How much longer than its time a load may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
