//! No session outlives a certificate of either side: after a renewal, a full handshake presents the new one.

use std::time::{Duration, Instant};

use crate::common::pair::Pair;
use crate::common::resumption::{handshakes, held};
use crate::common::with_ca::short_lifetime;
use mesh_tests::{Context, Daemon, DaemonOptions, Result, TIMEOUT, eventually_ok, slowdown};

/// More than two renewals with the shortest lifetime.
const RUN: Duration = Duration::from_secs(16);
/// Between two connections.
const PAUSE: Duration = Duration::from_millis(150);
const PORT: u16 = 7000;

#[test]
fn renewed_certificate_is_sent_to_each_peer_once() -> Result<()> {
    let options = DaemonOptions::default().certificate_lifetime(short_lifetime());
    let pair = Pair::start_with(&options, |builder| builder)?;
    let _echo = pair
        .web
        .app("echo-server --port 7000 --quiet")?
        .listening()?;
    let to = pair.web.at(PORT);
    let capture = pair.mesh.wire().capture()?;
    let (mut connections, mut epochs) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while start.elapsed() < RUN * slowdown() {
        let before = epoch(&pair)?;
        connections.push(held(&pair.client, to)?);
        // None if a renewal came in between.
        epochs
            .push(Some(before.clone()).filter(|before| epoch(&pair).ok().as_ref() == Some(before)));
        std::thread::sleep(PAUSE * slowdown());
    }
    let seen = handshakes(&capture.stop()?, to);
    assert_eq!(seen.len(), epochs.len(), "a handshake each");
    let (mut renewals, mut resumed) = (0, 0);
    for (number, seen) in seen.iter().enumerate() {
        resumed += usize::from(seen.resumed);
        let (Some(previous), Some(now)) = (number.checked_sub(1), &epochs[number]) else {
            continue;
        };
        match &epochs[previous] {
            Some(before) if before != now => {
                renewals += 1;
                assert!(
                    !seen.resumed,
                    "{number}: resumed across {before:?} and {now:?}"
                );
            }
            Some(_) => assert!(seen.resumed, "{number}: shown again though nothing changed"),
            None => {}
        }
    }
    println!(
        "{} handshakes, {resumed} resumed, {renewals} renewals",
        seen.len()
    );
    assert!(renewals >= 2 && resumed > seen.len() / 2);

    // Old connections stay open, and none was refused.
    drop(connections);
    for daemon in [&pair.near, &pair.far] {
        eventually_ok(TIMEOUT, "the lines", || {
            let lines = daemon.access_log();
            anyhow::ensure!(lines.len() == epochs.len(), "{} lines", lines.len());
            Ok(())
        })?;
        // They were killed while open; none was refused.
        let refused = daemon.access_log();
        let refused = refused.iter().find(|line| line["result"] == "refused");
        assert!(refused.is_none(), "{refused:#?}");
    }
    Ok(())
}

/// Returns the serial numbers in use: the client's and the server's.
fn epoch(pair: &Pair) -> Result<(String, String)> {
    let serial = |daemon: &Daemon| {
        let certificates = daemon.status()?.certificates.into_iter();
        let serial = certificates.map(|certificate| certificate.serial).next();
        serial.context("no certificate")
    };
    Ok((serial(&pair.near)?, serial(&pair.far)?))
}
