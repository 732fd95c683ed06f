//! What loads are, and the rows of the table that each fills; [`list`] has them all.

mod iperf3;
mod list;
mod memory;
mod pod_app;
mod wrk;

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use super::counters::Moved;
use super::stage::Stage;
use super::system::Way;

pub(super) use list::LOADS;

/// Something that is done to a system and gives the values of one or more rows.
pub(super) struct Load {
    pub(super) group: Group,
    pub(super) way: Way,
    pub(super) when: When,
    pub(super) rows: &'static [Row],
    /// It lasts for about the given time.
    pub(super) run: fn(&Stage, Way, Duration) -> Result<Measured>,
}

/// A line of the table.
#[derive(Debug, PartialEq)]
pub(super) struct Row {
    /// Its name in JSON and for `--only`.
    pub(super) key: &'static str,
    pub(super) name: &'static str,
    pub(super) unit: &'static str,
    pub(super) better: Better,
}

/// Which of two values is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Better {
    More,
    Less,
}

/// A heading of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Across,
    OneNode,
    Outside,
    Cost,
}

/// When a load is put on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// In each round.
    EachRound,
    /// In each round, on proxies that were started for it.
    OnFreshProxies,
    /// Once, after all rounds.
    AtTheEnd,
}

/// What a load has shown.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    /// In the order of the load's rows; none where the system has no such thing.
    pub(super) values: Vec<Option<f64>>,
    pub(super) moved: Moved,
    /// Where its connections led.
    pub(super) server: SocketAddr,
    /// What its program says went wrong.
    pub(super) complaints: Vec<String>,
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

/// A row's name with its group's; a row that continues the first one of its load has that one's name, too.
pub(super) fn title(load: &Load, row: &Row) -> String {
    match row.name.strip_prefix("  ") {
        Some(more) => format!("{}: {}: {more}", load.group, load.rows[0].name),
        None => format!("{}: {}", load.group, row.name),
    }
}

/// Likewise, by the row's key.
pub(super) fn title_of(key: &str) -> String {
    let load = LOADS.iter().find_map(|load| {
        let row = load.rows.iter().find(|row| row.key == key)?;
        Some(title(load, row))
    });
    load.unwrap_or_else(|| key.to_owned())
}

/// The row with a key.
pub(super) fn row(key: &str) -> Option<&'static Row> {
    LOADS
        .iter()
        .flat_map(|load| load.rows)
        .find(|row| row.key == key)
}

/// How much longer than its time a load may take.
const PATIENCE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_rows_have_one_key() {
        let rows: Vec<_> = LOADS.iter().flat_map(|load| load.rows).collect();
        let keys: BTreeSet<_> = rows.iter().map(|row| row.key).collect();
        assert_eq!(keys.len(), rows.len());
        assert_eq!(row("stream").map(|row| row.unit), Some("Gbit/s"));
        assert_eq!(row("streams"), None);
    }

    #[test]
    fn a_row_that_continues_has_the_first_ones_name() {
        assert_eq!(
            title_of("node-keep-alive-1-p99"),
            "on one node: HTTP keep-alive, 1 connection, p50: p99"
        );
        assert_eq!(title_of("node-stream"), "on one node: iperf3, 1 stream");
    }
}
