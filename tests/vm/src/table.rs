//! Kernel × feature × result, for people and for docs/KERNELS.md.

use std::fmt::{self, Write};

use anyhow::Result;

use super::machine::Accelerator;
use xtask_support::page;

/// The result of a feature's tests on a kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cell {
    /// Tests that passed.
    pub(super) passed: usize,
    /// Tests that failed, each with details.
    pub(super) failures: Vec<String>,
    /// Tests that cannot run there.
    pub(super) skipped: Vec<String>,
}

impl Cell {
    pub(super) fn passed(passed: usize) -> Self {
        Self {
            passed,
            ..Self::default()
        }
    }

    pub(super) fn failed(why: String) -> Self {
        Self {
            failures: vec![why],
            ..Self::default()
        }
    }

    /// With the program's name before each failure.
    pub(super) fn named(mut self, name: &str) -> Self {
        for text in self.failures.iter_mut().chain(&mut self.skipped) {
            *text = format!("{name}: {text}");
        }
        self
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.passed, self.failures.len(), self.skipped.len()) {
            (0, 0, 0) => f.write_str("–"),
            (passed, 0, 0) => write!(f, "{passed} passed"),
            (passed, 0, skipped) => write!(f, "{passed} passed, {skipped} skipped"),
            (passed, failed, _) => write!(f, "{failed} FAILED, {passed} passed"),
        }
    }
}

/// A kernel's results.
#[derive(Debug)]
pub(super) struct Column {
    kernel: &'static str,
    release: String,
    accelerator: Accelerator,
    cells: Vec<(&'static str, Cell)>,
}

impl Column {
    pub(super) fn new(kernel: &'static str, release: &str, accelerator: Accelerator) -> Self {
        Self {
            kernel,
            release: release.to_owned(),
            accelerator,
            cells: Vec::new(),
        }
    }

    /// Returns the row of this title, adding it without results if necessary.
    pub(super) fn row(&mut self, title: &'static str) -> &mut Cell {
        let at = self.cells.iter().position(|(known, _)| *known == title);
        let at = at.unwrap_or_else(|| {
            self.cells.push((title, Cell::default()));
            self.cells.len() - 1
        });
        &mut self.cells[at].1
    }

    pub(super) fn add(&mut self, title: &'static str, more: Cell) {
        let cell = self.row(title);
        cell.passed += more.passed;
        cell.failures.extend(more.failures);
        cell.skipped.extend(more.skipped);
    }

    /// Whether no test was run.
    pub(super) fn is_empty(&self) -> bool {
        self.cells.iter().all(|(_, cell)| *cell == Cell::default())
    }

    /// All failures.
    pub(super) fn failures(&self) -> Vec<String> {
        let failures = self.cells.iter().flat_map(|(_, cell)| &cell.failures);
        failures
            .map(|failure| format!("{}: {failure}", self.kernel))
            .collect()
    }

    fn cell(&self, title: &str) -> String {
        self.cells
            .iter()
            .find(|(known, _)| *known == title)
            .map_or_else(|| Cell::default().to_string(), |(_, cell)| cell.to_string())
    }
}

/// The table, in Markdown.
pub(super) fn text(columns: &[Column]) -> String {
    let mut titles: Vec<&str> = Vec::new();
    for (title, _) in columns.iter().flat_map(|column| &column.cells) {
        if !titles.contains(title) {
            titles.push(title);
        }
    }
    let mut text = String::from("| |");
    for column in columns {
        let _ = write!(text, " {} |", column.release);
    }
    text += "\n|---|";
    text += &"---|".repeat(columns.len());
    for title in titles {
        let _ = write!(text, "\n| {title} |");
        for column in columns {
            let _ = write!(text, " {} |", column.cell(title));
        }
    }
    text += "\n| Run by |";
    for column in columns {
        let _ = write!(text, " {} |", column.accelerator);
    }
    for column in columns {
        for (_, cell) in &column.cells {
            for skipped in &cell.skipped {
                let _ = write!(text, "\n\nSkipped on {}: {skipped}", column.release);
            }
        }
    }
    text
}

/// Writes the table into docs/KERNELS.md, in place of the existing one.
pub(super) fn save(columns: &[Column]) -> Result<()> {
    page::write("KERNELS.md", "vm-test --save", &text(columns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_row_for_all_that_any_kernel_ran() {
        let mut old = Column::new("5.10", "5.10.0-32-amd64", Accelerator::Tcg);
        old.add("refused", Cell::passed(2));
        let mut new = Column::new("6.1", "6.1.0-50-amd64", Accelerator::Tcg);
        new.add("demo", Cell::passed(21));
        new.add("demo", Cell::failed("no".into()).named("x"));
        let text = text(&[old, new]);
        assert!(text.starts_with("| | 5.10.0-32-amd64 | 6.1.0-50-amd64 |\n|---|---|---|\n"));
        assert!(text.contains("\n| refused | 2 passed | – |\n| demo | – | 1 FAILED, 21 passed |"));
    }

    #[test]
    fn what_failed_is_named_with_its_kernel() {
        let mut column = Column::new("6.1", "6.1.0-50-amd64", Accelerator::Tcg);
        column.add("demo", Cell::failed("no".into()).named("demo"));
        assert_eq!(column.failures(), ["6.1: demo: no"]);
    }
}
