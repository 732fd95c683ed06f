//! The results as tables of text.

use std::fmt::Write;

use super::loads::{Better, Load, Row, title_of};
use super::number::number;
use super::results::Results;
use super::system::System;
use super::targets::TARGETS;

/// A line for each row that was measured, under a heading for each group: medians, in brackets minimum and maximum, and
/// the ratio of our values to those of the other systems.
pub(super) fn table(results: &Results, loads: &[&Load], systems: &[System]) -> String {
    let ratios = ratios(systems);
    let mut lines = Vec::new();
    let mut group = None;
    for load in loads {
        for row in load.rows.iter().filter(|row| results.has(row.key)) {
            if group.replace(load.group) != Some(load.group) {
                lines.push(heading(&load.group.to_string(), systems, &ratios));
            }
            lines.push(line(row, results, systems, &ratios));
        }
    }
    align(&lines)
}

/// The same table in Markdown, for the documentation.
pub(super) fn markdown(results: &Results, loads: &[&Load], systems: &[System]) -> String {
    let ratios = ratios(systems);
    let titles = systems.iter().map(|system| system.title().to_owned());
    let compared = ratios.iter().map(|(_, to)| match to {
        System::Envoy => "to Envoy".to_owned(),
        System::Hbone => "to HBONE".to_owned(),
        System::Unobserved => "to unobserved".to_owned(),
        other => format!("to {other}"),
    });
    let cells: Vec<String> = titles.chain(compared).collect();
    let columns = cells.len() + 1;
    let mut text = format!("| | {} |\n|{}", cells.join(" | "), "---|".repeat(columns));
    let mut group = None;
    for load in loads {
        for row in load.rows.iter().filter(|row| results.has(row.key)) {
            if group.replace(load.group) != Some(load.group) {
                let _ = write!(text, "\n| **{}** |{}", load.group, " |".repeat(columns - 1));
            }
            let line = line(row, results, systems, &ratios);
            let (name, values) = line.split_at(2);
            let (values, compared) = values.split_at(2 * systems.len());
            let what = name[0]
                .text
                .replacen("  ", "", 1)
                .replace("  ", "&nbsp;&nbsp;");
            let _ = write!(text, "\n| {what}, {} |", name[1].text);
            for value in values.chunks(2) {
                let value = format!("{} {}", value[0].text, value[1].text);
                let _ = write!(text, " {} |", value.trim());
            }
            for ratio in compared {
                let _ = write!(text, " {} |", ratio.text);
            }
        }
    }
    text
}

/// A line for each target.
pub(super) fn targets(results: &Results) -> String {
    let lines: Vec<_> = TARGETS
        .iter()
        .map(|target| {
            let verdict = target.judge(results);
            let met = match verdict.met {
                Some(true) => "met",
                Some(false) => "missed",
                None => "not measured",
            };
            // With one digit more than the table; otherwise a value that narrowly misses its target looks as if it met
            // it.
            let value = verdict.value.map(|value| format!("{value:.3}"));
            let value = value.unwrap_or_else(|| "–".to_owned());
            vec![
                Cell::left(met),
                Cell::left(&title_of(verdict.key)),
                Cell::left(&verdict.wanted),
                Cell::right(&value),
            ]
        })
        .collect();
    align(&lines)
}

/// The pairs whose ratio is shown: ours to each other system.
pub(super) fn ratios(systems: &[System]) -> Vec<(System, System)> {
    let ours = systems.contains(&System::Ours);
    let others = systems.iter().filter(|system| **system != System::Ours);
    others
        .filter(|_| ours)
        .map(|other| (System::Ours, *other))
        .collect()
}

fn heading(group: &str, systems: &[System], ratios: &[(System, System)]) -> Vec<Cell> {
    let mut cells = vec![Cell::left(group), Cell::left("")];
    for system in systems {
        cells.push(Cell::right(system.name()));
        cells.push(Cell::left(""));
    }
    for (of, to) in ratios {
        cells.push(Cell::right(&format!("{of}/{to}")));
    }
    cells
}

fn line(
    row: &Row,
    results: &Results,
    systems: &[System],
    ratios: &[(System, System)],
) -> Vec<Cell> {
    let better = match row.better {
        Better::More => row.unit.to_owned(),
        Better::Less => format!("{} ↓", row.unit),
    };
    let mut cells = vec![Cell::left(&format!("  {}", row.name)), Cell::left(&better)];
    for system in systems {
        let summary = results.summary(row.key, *system);
        let (median, spread) = match summary {
            None => ("–".to_owned(), String::new()),
            Some(one) if one.rounds == 1 => (number(one.median), String::new()),
            Some(all) => (
                number(all.median),
                format!("({}–{})", number(all.least), number(all.most)),
            ),
        };
        cells.push(Cell::right(&median));
        cells.push(Cell::left(&spread));
    }
    for (of, to) in ratios {
        let ratio = results.ratio(row.key, *of, *to);
        cells.push(Cell::right(
            &ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}")),
        ));
    }
    cells
}

/// A cell of a table and its alignment.
#[derive(Clone, Debug)]
struct Cell {
    text: String,
    right: bool,
}

impl Cell {
    fn left(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            right: false,
        }
    }

    fn right(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            right: true,
        }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

/// Formats lines of cells. Each column is as wide as its widest cell, with two spaces between columns.
fn align(lines: &[Vec<Cell>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = lines.iter().filter_map(|line| line.get(column));
            cells.map(Cell::width).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in lines {
        let mut one = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            // Formatting counts characters, not bytes.
            let _ = if cell.right {
                write!(one, "{:>width$}  ", cell.text)
            } else {
                write!(one, "{:<width$}  ", cell.text)
            };
        }
        text.push_str(one.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loads::LOADS;

    fn measured() -> (Results, Vec<&'static Load>) {
        let mut results = Results::default();
        for (round, value) in [14.0, 13.0, 15.0].into_iter().enumerate() {
            results.add("stream", System::Direct, round, value);
            results.add("stream", System::Ours, round, value / 2.0);
        }
        results.add("stream-cpu", System::Ours, 0, 0.25);
        (results, LOADS.iter().collect())
    }

    #[test]
    fn rows_are_aligned_and_say_what_is_missing() {
        let (results, loads) = measured();
        let text = table(&results, &loads, &[System::Direct, System::Ours]);
        let expected = "\
between nodes                     direct               ours               ours/direct
  iperf3, 1 stream        Gbit/s    14.0  (13.0–15.0)  7.00  (6.50–7.50)         0.50
    proxies' CPU per GiB  s ↓          –               0.25                         –
";
        assert_eq!(text, expected);
    }

    #[test]
    fn markdown_has_the_same_rows() {
        let (results, loads) = measured();
        let text = markdown(&results, &loads, &[System::Direct, System::Ours]);
        let expected = "\
| | direct | auth-daemon | to direct |
|---|---|---|---|
| **between nodes** | | | |
| iperf3, 1 stream, Gbit/s | 14.0 (13.0–15.0) | 7.00 (6.50–7.50) | 0.50 |
| &nbsp;&nbsp;proxies' CPU per GiB, s ↓ | – | 0.25 | – |";
        assert_eq!(text, expected);
    }

    #[test]
    fn targets_have_a_line_each() {
        let text = targets(&Results::default());
        assert_eq!(text.lines().count(), TARGETS.len());
        assert!(text.lines().all(|line| line.starts_with("not measured")));
    }
}
