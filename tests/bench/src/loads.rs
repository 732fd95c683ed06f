//! The loads and the rows of the table that each fills.

mod beside;
mod iperf3;
mod list;
mod load;
mod memory;
mod pod_app;
mod wrk;

pub(super) use list::LOADS;
pub(super) use load::{Better, Load, Measured, Row, When};

/// A row's name with its group's; a row that continues another one has that one's name, too.
pub(super) fn title(load: &Load, row: &Row) -> String {
    let Some(more) = row.name.strip_prefix("  ") else {
        return format!("{}: {}", load.group, row.name);
    };
    let before = load.rows.iter().take_while(|other| other.key != row.key);
    let continued = before.filter(|other| !other.name.starts_with(' ')).last();
    let continued = continued.map_or("", |continued| continued.name);
    format!("{}: {continued}: {more}", load.group)
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
    fn a_row_that_continues_another_has_its_name() {
        assert_eq!(
            title_of("node-keep-alive-1-p99"),
            "on one node: HTTP keep-alive, 1 connection, p50: p99"
        );
        assert_eq!(title_of("node-stream"), "on one node: iperf3, 1 stream");
        assert_eq!(
            title_of("memory-server-peak"),
            "what the proxies take: memory after all loads, server's proxy: at most"
        );
    }
}
