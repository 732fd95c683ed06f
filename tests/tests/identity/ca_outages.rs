//! Outages of the CA: valid certificates keep serving, pods without one are refused, and the CA keeps its state.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use mesh_tests::{
    CaOptions, Context, DaemonOptions, Mesh, PodSpec, Result, TIMEOUT, eventually, eventually_ok,
};

use crate::common::with_ca::{WithCa, serial, short_lifetime, spiffe, wait_certified};

#[test]
fn nodes_get_certificates_from_the_ca_that_openssl_verifies() -> Result<()> {
    let stage = WithCa::start()?;
    let _echo = stage.web.app("echo-server --port 7")?.listening()?;
    assert!(stage.reaches(&stage.client, stage.web.at(7))?);
    let mut used = BTreeSet::new();
    for (daemon, account) in [
        (&stage.near, "client"),
        (&stage.near, "other"),
        (&stage.far, "web"),
    ] {
        used.insert(serial(daemon, account)?);
    }
    // A thread of its own writes the log.
    let issued = eventually_ok(TIMEOUT, "each in the CA's log", || {
        let lines = stage.ca.logs();
        let serials = lines
            .iter()
            .filter_map(|line| Some(line["serial"].as_str()?.to_owned()));
        let issued: BTreeSet<_> = serials.collect();
        anyhow::ensure!(used.is_subset(&issued), "{used:?} are not in {issued:?}");
        Ok(issued)
    })?;
    let roots = stage.ca.roots();
    let text = Command::new("openssl")
        .args(["x509", "-noout", "-text", "-in"])
        .arg(&roots)
        .output()?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("URI:spiffe://cluster.local"), "{text}");
    let status = stage.ca.status()?;
    assert_eq!(status["trustDomain"], "cluster.local", "{status:#}");
    assert_eq!(status["server"]["issued"], issued.len(), "{status:#}");
    Ok(())
}

#[test]
fn valid_certificates_serve_and_new_pods_wait_while_the_ca_is_down() -> Result<()> {
    let stage = WithCa::start()?;
    let _echo = stage.web.app("echo-server --port 7")?.listening()?;
    let to = stage.web.at(7);
    let WithCa {
        near,
        far,
        ca,
        client,
        mesh,
        web,
        ..
    } = stage;
    ca.kill()?;
    let talk = |from: &mesh_tests::Pod| {
        let command = format!("connect --to {to} --send hi --shutdown --read");
        let events = from
            .app(&command)?
            .finish(Duration::from_secs(30))?
            .json_lines();
        Ok::<_, anyhow::Error>(events.last().is_some_and(|last| last["text"] == "hi"))
    };
    assert!(talk(&client)?);
    let late = mesh.add_pod(PodSpec::new("late").on("a").service_account("late"))?;
    near.wait_enrolled(&[late.full_name()])?;
    let start = near.log_position();
    assert!(!talk(&late)?, "a pod without a certificate");
    near.wait_for_log_after(start, "why the late pod is refused", TIMEOUT, |line| {
        line["target"] == "access"
            && line["client_identity"] == spiffe("late")
            && line["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("no valid certificate"))
    })?;
    let why = near.wait_for_log("why there is no certificate", TIMEOUT, |line| {
        line["identity"] == spiffe("late") && line["level"] == "ERROR"
    })?;
    assert!(
        why["error"]
            .as_str()
            .is_some_and(|error| error.contains("192.0.2.10:15012")),
        "it says which CA: {why}"
    );
    let _ca = mesh.start_ca(&CaOptions::default())?;
    eventually_ok(TIMEOUT * 2, "the late pod to be served", || {
        anyhow::ensure!(talk(&late)?);
        Ok(())
    })?;
    drop((far, web));
    Ok(())
}

#[test]
fn ca_keeps_its_root_when_killed_repeatedly_while_issuing() -> Result<()> {
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(PodSpec::new("web").on("b").service_account("web"))
        .start()?;
    let options = CaOptions::default();
    let mut ca = mesh.start_ca(&options)?;
    let root = fs::read(ca.roots())?;
    let daemons = mesh.start_daemons_with(
        &DaemonOptions::default()
            .ca(&ca)
            .certificate_lifetime(short_lifetime()),
    )?;
    for daemon in &daemons {
        wait_certified(daemon)?;
    }
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web.app("echo-server --port 7 --quiet")?.listening()?;
    let to = web.at(7);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let load = scope.spawn(|| -> Result<u32> {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let command = format!("connect --to {to} --send hi --shutdown --read");
                let last = client.app(&command)?.success(TIMEOUT)?;
                anyhow::ensure!(last["text"] == "hi", "{last}");
                count += 1;
            }
            Ok(count)
        });
        let killed = (|| -> Result<()> {
            for _ in 0..6 {
                let serials = || {
                    let found = daemons
                        .iter()
                        .zip(["client", "web"])
                        .map(|(daemon, account)| serial(daemon, account));
                    found.collect::<Result<Vec<_>>>()
                };
                let before = serials()?;
                eventually(TIMEOUT, "a renewal", || {
                    (serials().ok()? != before).then_some(())
                })?;
                ca.kill()?;
                ca = mesh.start_ca(&options)?;
                anyhow::ensure!(fs::read(ca.roots())? == root, "another root");
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let count = load.join().expect("no panic").context("requests")?;
        killed?;
        println!("{count} requests while the CA was killed 6 times");
        Ok(())
    })?;
    Ok(())
}
