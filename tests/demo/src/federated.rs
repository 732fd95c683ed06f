//! Two trust domains, each with a CA of its own.

use std::time::Instant;

use anyhow::{Result, ensure};
use mesh_tests::TIMEOUT;
use mesh_tests::two_domains::{FAR, FAR_SERVICE, NEAR, NEAR_SERVICE, TwoDomains};
use serde_json::json;

use super::evidence::Evidence;
use super::stage::Stage;

pub(super) fn federated(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let marker = &stage.marker;
    let domains = TwoDomains::start()?;
    let recording = domains.mesh.wire().capture()?;
    let before = domains.both_echo(marker)?;
    ensure!(before == [false, false], "without entries: {before:?}");
    evidence.saw(format!(
        "pods of {NEAR} and {FAR}, without a federation entry: refused in both directions"
    ));
    domains.federate()?;
    domains.wait_both_echo(marker, [true, true])?;
    let line = domains.far.wait_for_access("the call", TIMEOUT, |line| {
        // It calls, too, and may have been answered first.
        line["direction"] == "inbound" && line["result"] == "ok"
    })?;
    evidence.saw(format!(
        "with it: {} reaches {} (path {}), and back",
        line["client_identity"], line["server_identity"], line["path"]
    ));
    let client = format!("spiffe://{NEAR}/ns/default/sa/near");
    ensure!(line["client_identity"] == client, "{line}");
    for (from, to) in [("near", FAR_SERVICE), ("far", NEAR_SERVICE)] {
        ensure!(domains.echoes(from, to, marker)?, "{from} to {to}");
    }
    let recorded = recording.stop()?;
    ensure!(
        !recorded.contains(marker.as_bytes()),
        "readable on the wire"
    );

    let open = domains.chat("near", FAR_SERVICE)?;
    let since = Instant::now();
    let near = &domains.near;
    near.edit_config(|config| config["federation"] = json!([]))?;
    let ended = open.failure(TIMEOUT)?;
    evidence.saw(format!(
        "the entry of {FAR} removed: an open connection ended with {} after {:.1} s",
        ended["errno"],
        since.elapsed().as_secs_f64()
    ));
    let after = domains.both_echo(marker)?;
    ensure!(after == [false, false], "without the entry: {after:?}");
    Ok(())
}
