//! Tables in the documentation that commands write from their measurements.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::step::workspace;

/// Writes `text` into the page `name` of docs, in place of what `command` wrote there before.
///
/// # Errors
/// If the page cannot be read or written, or has no place for the text.
pub fn write(name: &str, command: &str, text: &str) -> Result<()> {
    let path = workspace().join("docs").join(name);
    let page = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let page = with(&page, command, text).with_context(|| format!("{}", path.display()))?;
    fs::write(&path, page).with_context(|| format!("writing {}", path.display()))
}

fn with(page: &str, command: &str, text: &str) -> Result<String> {
    let begin = format!("<!-- Written by `cargo xtask {command}`. -->");
    let (before, rest) = page
        .split_once(&begin)
        .context("it has no place for the table")?;
    let (_, after) = rest.split_once(END).context("it has no end of the table")?;
    ensure!(!rest.contains(&begin), "it has two places for the table");
    Ok(format!("{before}{begin}\n\n{text}\n\n{END}{after}"))
}

const END: &str = "<!-- Up to here. -->";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_keeps_what_is_around_its_table() {
        let begin = "<!-- Written by `cargo xtask test --save`. -->";
        let page = format!("a\n{begin}\nold\n{END}\nb\n");
        let page = with(&page, "test --save", "new").unwrap();
        assert_eq!(page, format!("a\n{begin}\n\nnew\n\n{END}\nb\n"));
        assert!(with("a", "test --save", "new").is_err());
        assert!(with(&page, "other --save", "new").is_err());
        assert!(with(&page.repeat(2), "test --save", "new").is_err());
    }
}
