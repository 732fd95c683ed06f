//! What the systemd unit allows the daemon.

use std::process::Command;

use mesh_tests::chart;
use xtask_support::step::{which, workspace};

use crate::source;

const UNIT: &str = "deploy/debian/auth-daemon.service";

#[test]
fn unit_grants_the_capabilities_of_the_chart() {
    let unit = source(UNIT);
    let granted = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .unwrap();
    let mut granted: Vec<_> = granted.split(' ').map(str::to_owned).collect();
    let mut expected = chart::capabilities().unwrap();
    granted.sort();
    expected.sort();
    assert_eq!(granted, expected);
}

#[test]
fn unit_is_no_more_exposed_than_documented() {
    let name = "unit_is_no_more_exposed_than_documented";
    let Some(analyze) = which("systemd-analyze") else {
        println!("SKIPPED {name}: no systemd-analyze (Debian's systemd)");
        return;
    };
    let mut security = Command::new(analyze);
    security.args(["security", "--offline=true", "--no-pager"]);
    let said = security.arg(workspace().join(UNIT)).output().unwrap();
    let text = String::from_utf8_lossy(&said.stdout);
    let errors = String::from_utf8_lossy(&said.stderr);
    let exposure = number_after(&text, "exposure level for auth-daemon.service: ");
    let exposure = exposure.unwrap_or_else(|| panic!("{text}{errors}"));
    println!("exposure level {exposure}\n{text}");
    let documented = number_after(&source("docs/DEBIAN.md"), "exposure level of ").unwrap();
    assert!(exposure <= documented, "{exposure} > {documented}: {text}");
}

fn number_after(text: &str, words: &str) -> Option<f64> {
    let (_, rest) = text.split_once(words)?;
    rest.split_whitespace().next()?.parse().ok()
}
