//! How connections end: what both peers and both directions have in common.

use std::fmt::Display;

use anyhow::{Result, ensure};
use mesh_tests::{Place, TIMEOUT};

/// Fails unless the client's end arrives at the server while the server's answer, which follows it, arrives at the client.
/// `to` is where the client reaches the server's `port`.
pub(crate) fn half_close(
    client: &Place,
    server: &Place,
    port: u16,
    to: impl Display,
) -> Result<()> {
    let late = format!("half-close --port {port} --after-end --message late");
    let mut late = server.app(&late)?.listening()?;
    let first = format!("half-close --to {to} --message first");
    let done = client.app(&first)?.success(TIMEOUT)?;
    ensure!(done["received"] == "late".len(), "{done}");
    let served = late.event("closed", TIMEOUT)?;
    ensure!(served["text"] == "first", "{served}");
    Ok(())
}

/// Fails unless the client sees it as a reset that the server resets the connection. `to` is where the client reaches the
/// server's `port`.
pub(crate) fn server_resets(
    client: &Place,
    server: &Place,
    port: u16,
    to: impl Display,
) -> Result<()> {
    let reset = format!("reset --port {port} --after 5 --quiet");
    let _reset = server.app(&reset)?.listening()?;
    let connect = format!("connect --to {to} --send 12345 --read");
    let failed = client.app(&connect)?.failure(TIMEOUT)?;
    ensure!(failed["errno"] == "ECONNRESET", "{failed}");
    Ok(())
}
