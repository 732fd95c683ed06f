//! Floods of connections.

use anyhow::ensure;
use mesh_tests::{Result, TIMEOUT};

use crate::stage::Stage;

#[test]
fn a_pod_that_floods_with_connects_does_not_make_its_neighbours_fail() -> Result<()> {
    let mut stage = Stage::set()?;
    stage.attack(
        "flood of connects",
        |stage| {
            let to = stage.echo(&stage.target);
            stage.attacker.app(&format!("flood --to {to}"))
        },
        |_, flood| {
            let flooding = flood.event("flooding", TIMEOUT)?;
            ensure!(flooding["connected"].as_u64() > Some(0), "{flooding}");
            Ok(())
        },
    )
}
