//! Root rotation under load, without a failed request, and with a CA that is killed at each step.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use mesh_tests::{
    CaOptions, Context, DaemonOptions, Result, TIMEOUT, eventually, eventually_ok, slowdown,
};
use serde_json::Value;

use crate::common::with_ca::{WithCa, short_lifetime};

const PATIENCE: Duration = Duration::from_secs(60);

/// Short lifetimes, so that a rotation takes well below a minute on a machine of its own.
fn options() -> (CaOptions, DaemonOptions) {
    let lifetime = short_lifetime();
    // Long enough for each phase to be seen.
    let spread = Duration::from_secs(3) * slowdown();
    let seconds = |time: Duration| format!("{}s", time.as_secs());
    let ca = CaOptions::default()
        .setting("certificateLifetime", seconds(lifetime).into())
        .setting("rotationSpread", seconds(spread).into());
    let daemons = DaemonOptions::default().certificate_lifetime(lifetime);
    (ca, daemons)
}

/// Returns fingerprints of the CA's roots, and of the root that signs.
fn roots(status: &Value) -> (Vec<String>, String) {
    let fingerprint = |root: &Value| root["sha256"].as_str().unwrap_or_default().to_owned();
    let all = status["roots"].as_array().cloned().unwrap_or_default();
    let signs = all.iter().find(|root| root["signs"] == true);
    (
        all.iter().map(fingerprint).collect(),
        signs.map(fingerprint).unwrap_or_default(),
    )
}

fn count_of_roots(status: &Value) -> Result<u64> {
    status["trust"]["roots"].as_u64().context("no roots")
}

#[test]
fn root_is_replaced_under_load() -> Result<()> {
    let (ca, daemons) = options();
    let stage = WithCa::start_with(&ca, &daemons)?;
    let _echo = stage.web.app("echo-server --port 7 --quiet")?.listening()?;
    let to = stage.web.at(7);
    let old_chat = stage.chat(&stage.client, to)?;
    let before = fs::read_to_string(stage.ca.roots())?;
    let (first, signs) = roots(&stage.ca.status()?);
    assert_eq!(first, std::slice::from_ref(&signs));
    let stop = AtomicBool::new(false);
    let count = thread::scope(|scope| -> Result<u32> {
        let load = scope.spawn(|| -> Result<u32> {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                anyhow::ensure!(stage.reaches(&stage.client, to)?, "request {count} failed");
                count += 1;
            }
            Ok(count)
        });
        let rotated = (|| -> Result<()> {
            stage.ca.operate(&["rotate-root"])?.ok()?;
            eventually_ok(TIMEOUT, "both daemons to learn of the new root", || {
                for daemon in [&stage.near, &stage.far] {
                    let status = daemon.status_json()?;
                    anyhow::ensure!(count_of_roots(&status)? == 2, "{}", status["trust"]);
                    anyhow::ensure!(status["trust"]["phase"] != "", "{}", status["trust"]);
                }
                Ok(())
            })?;
            let refused = stage.ca.operate(&["rotate-root"])?;
            anyhow::ensure!(!refused.status.success(), "twice at once");
            eventually_ok(PATIENCE, "the new root to be the only one", || {
                let (all, signing) = roots(&stage.ca.status()?);
                anyhow::ensure!(all.len() == 1 && signing != signs, "{all:?}");
                Ok(())
            })?;
            eventually_ok(TIMEOUT, "both daemons to forget the old root", || {
                for daemon in [&stage.near, &stage.far] {
                    let status = daemon.status_json()?;
                    anyhow::ensure!(count_of_roots(&status)? == 1, "{}", status["trust"]);
                }
                Ok(())
            })
        })();
        stop.store(true, Ordering::Relaxed);
        let count = load.join().expect("no panic").context("under load")?;
        rotated?;
        Ok(count)
    })?;
    println!("{count} requests during the rotation");
    // A connection opened under the old root stays open.
    let rounds = old_chat.events_of("round").len();
    eventually(TIMEOUT, "the old conversation to continue", || {
        (old_chat.events_of("round").len() > rounds + 2).then_some(())
    })?;
    // The CA writes the file after it has notified the daemons.
    eventually_ok(TIMEOUT, "the file with the new root alone", || {
        let after = fs::read_to_string(stage.ca.roots())?;
        anyhow::ensure!(after != before && after.matches("BEGIN CERTIFICATE").count() == 1);
        Ok(())
    })
}

#[test]
fn rotation_resumes_after_the_ca_is_killed_at_each_step() -> Result<()> {
    let (options, daemons) = options();
    let stage = WithCa::start_with(&options, &daemons)?;
    let _echo = stage.web.app("echo-server --port 7 --quiet")?.listening()?;
    let to = stage.web.at(7);
    let WithCa {
        near,
        far,
        mut ca,
        client,
        mesh,
        web,
        ..
    } = stage;
    let (_, old) = roots(&ca.status()?);
    ca.operate(&["rotate-root"])?.ok()?;
    let talks = || -> Result<bool> {
        let command = format!("connect --to {to} --send hi --shutdown --read");
        let events = client.app(&command)?.finish(TIMEOUT)?.json_lines();
        Ok(events.last().is_some_and(|last| last["text"] == "hi"))
    };
    let mut phases = Vec::new();
    let mut steps = 0;
    loop {
        let status = ca.status()?;
        let (all, signs) = roots(&status);
        let phase = (all.len(), signs != old);
        if phases.last() != Some(&phase) {
            phases.push(phase);
            // Kill the CA in each phase, as soon as the phase is seen.
            ca.kill()?;
            ca = mesh.start_ca(&options)?;
            let again = roots(&ca.status()?);
            anyhow::ensure!(!again.0.is_empty() && !again.1.is_empty(), "{again:?}");
            steps += 1;
        }
        anyhow::ensure!(talks()?, "a request failed in {phase:?}");
        if phase == (1, true) {
            break;
        }
        anyhow::ensure!(steps < 10, "{phases:?}");
    }
    assert_eq!(phases, [(2, false), (2, true), (1, true)]);
    drop((near, far, web));
    Ok(())
}
