//! The CA: it issues to both nodes, certificates and roots rotate under load, and revoked identities are cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::{CertificateStatus, Pod, TIMEOUT, eventually, eventually_ok, slowdown};
use serde_json::Value;

use super::evidence::Evidence;
use super::stage::{CLIENT, LOGGED, NODE_A, NODE_B, PORT, Stage, soon};

pub(super) fn ca_issued(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    for node in [NODE_A, NODE_B] {
        // Its pods are enrolled, but their certificates may not have arrived yet.
        let held = eventually_ok(LOGGED, "certificates that the CA logged", || {
            let held = stage.daemon(node)?.status()?.certificates;
            ensure!(!held.is_empty(), "{node} asks for none");
            // Read this after the status, so that it includes every certificate that a node holds, even one that was
            // just renewed.
            let issued = stage.ca()?.logs();
            { held.into_iter() }
                .map(|certificate| Ok((logged(&certificate, &issued)?, certificate)))
                .collect::<Result<Vec<_>>>()
        })?;
        for (line, certificate) in held {
            evidence.saw(format!(
                "{node} holds {} of {}; the CA at {} logged it for node {}",
                certificate.serial,
                certificate.identity,
                stage.ca()?.address(),
                line["node"]
            ));
            ensure!(line["node"] == node, "it was given to another node");
            ensure!(line["identity"] == certificate.identity, "for another one");
        }
    }
    let roots = stage.ca()?.roots();
    let command = ["x509", "-noout", "-subject", "-enddate", "-in"];
    let roots = roots.to_str().context("the roots' path")?;
    let root = stage
        .mesh
        .outside()
        .run("openssl", command.iter().copied().chain([roots]))?
        .ok()?
        .stdout;
    evidence.saw(format!("its root: {}", root.trim().replace('\n', ", ")));
    Ok(())
}

/// The CA's log line about issuing `certificate`.
fn logged(certificate: &CertificateStatus, issued: &[Value]) -> Result<Value> {
    let CertificateStatus {
        identity, serial, ..
    } = certificate;
    ensure!(!serial.is_empty(), "{identity} has no certificate yet");
    let line = issued.iter().find(|line| line["serial"] == **serial);
    line.cloned()
        .with_context(|| format!("the CA knows nothing of {serial}, of {identity}"))
}

pub(super) fn rotation_live(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let before = serials(stage)?;
    let requests = under_load(stage, || {
        let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        eventually_ok(RENEWALS, "renewals", || {
            for (identity, serial) in serials(stage)? {
                seen.entry(identity).or_default().insert(serial);
            }
            let fewest = seen.values().map(BTreeSet::len).min().unwrap_or(0);
            ensure!(
                fewest >= GENERATIONS,
                "{fewest} certificates of an identity"
            );
            Ok(())
        })?;
        for (identity, serials) in &seen {
            evidence.saw(format!("{identity}: {} certificates", serials.len()));
        }
        Ok(())
    })?;
    evidence.saw(format!(
        "{requests} requests meanwhile, each on a connection of its own, none failed; {} identities",
        before.len()
    ));
    Ok(())
}

pub(super) fn root_rotation(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let old = signing_root(&stage.ca()?.status()?)?;
    let start = Instant::now();
    let requests = under_load(stage, || {
        let stdout = stage.ca()?.operate(&["rotate-root"])?.ok()?.stdout;
        evidence.saw(format!("auth-daemon ca rotate-root: {}", stdout.trim()));
        let mut phase = String::new();
        eventually_ok(ROTATION, "the new root to be the only one", || {
            let status = stage.ca()?.status()?;
            let now = status["phase"].as_str().unwrap_or_default();
            if now != phase {
                phase = now.to_owned();
                evidence.saw(format!("after {} s: {phase}", start.elapsed().as_secs()));
            }
            let roots = status["roots"].as_array().map_or(0, Vec::len);
            ensure!(roots == 1 && signing_root(&status)? != old, "{phase}");
            for node in [NODE_A, NODE_B] {
                let trust = stage.daemon(node)?.status_json()?["trust"].clone();
                ensure!(trust["roots"] == 1, "{node}: {trust}");
            }
            Ok(())
        })
    })?;
    evidence.saw(format!(
        "{requests} requests during the rotation, none failed; the root was {}, and is {}",
        &old[..16],
        &signing_root(&stage.ca()?.status()?)?[..16]
    ));
    Ok(())
}

pub(super) fn revoked(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    let _echo = web.app("echo-server --port 7007 --quiet")?.listening()?;
    let to = web.at(7007);
    let mut chat = client.app(&format!("chat --to {to} --interval 50"))?;
    chat.event("connected", TIMEOUT)?;
    soon("a few rounds", || {
        (chat.events_of("round").len() > 3).then_some(())
    })?;
    let identity = "spiffe://cluster.local/ns/default/sa/client";
    let starts = [
        stage.daemon(NODE_A)?.log_position(),
        stage.daemon(NODE_B)?.log_position(),
    ];
    let since = Instant::now();
    let command = [
        "revoke",
        "--identity",
        identity,
        "--reason",
        "keyCompromise",
    ];
    stage.ca()?.operate(&command)?.ok()?;
    let ended = chat.failure(TIMEOUT)?;
    let took = since.elapsed();
    evidence.saw(format!(
        "auth-daemon ca {}: the open connection ended with {} after {} ms",
        command.join(" "),
        ended["errno"],
        took.as_millis()
    ));
    ensure!(took < LEARNT * slowdown(), "it took too long");
    // The node that learns of it first cuts the connection, and the other one sees it broken.
    let ending = eventually(LOGGED, "a line that says why it ended", || {
        let nodes = [NODE_A, NODE_B].into_iter().zip(starts);
        nodes.into_iter().find_map(|(node, start)| {
            let lines = stage.daemon(node).ok()?.access_log_after(start);
            let reasons = lines.iter().filter_map(|line| line["reason"].as_str());
            let reason = { reasons }.find(|reason| reason.contains("is revoked"))?;
            Some(format!("{node} logged: {reason}"))
        })
    })?;
    evidence.saw(ending);
    let why = stage.ask_in_vain(&client, web.at(PORT), &stage.path("revoked"))?;
    evidence.saw(format!("curl http://{}: {why}", web.at(PORT)));
    stage
        .ca()?
        .operate(&["unrevoke", "--identity", identity])?
        .ok()?;
    eventually_ok(TIMEOUT, "the client to be served again", || {
        stage.ask(web.at(PORT), &stage.path("unrevoked")).map(drop)
    })?;
    evidence.saw("unrevoked, the same curl is answered");
    Ok(())
}

/// The serial number of each identity's certificate, on each node.
fn serials(stage: &Stage) -> Result<BTreeMap<String, String>> {
    let mut serials = BTreeMap::new();
    for node in [NODE_A, NODE_B] {
        for certificate in stage.daemon(node)?.status()?.certificates {
            let of = format!("{node}: {}", certificate.identity);
            serials.insert(of, certificate.serial);
        }
    }
    Ok(serials)
}

fn signing_root(status: &Value) -> Result<String> {
    let roots = status["roots"].as_array().context("no roots")?;
    let signs = roots.iter().find(|root| root["signs"] == true);
    let fingerprint = signs.and_then(|root| root["sha256"].as_str());
    fingerprint.map(str::to_owned).context("no root signs")
}

/// Runs `work` while the client sends requests to web-1 repeatedly, and returns the number of successful requests. A
/// single failed request is an error.
fn under_load(stage: &Stage, work: impl FnOnce() -> Result<()>) -> Result<usize> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                count += ask_many(stage, &client, &web)?;
            }
            anyhow::Ok(count)
        });
        let done = work();
        stop.store(true, Ordering::Relaxed);
        let count = load.join().ok().context("the load panicked")?;
        done?;
        count.context("under load")
    })
}

fn ask_many(stage: &Stage, client: &Pod, web: &Pod) -> Result<usize> {
    let url = format!("http://{}/load-[1-{AT_ONCE}]", web.at(PORT));
    // Longer than a daemon takes to refuse a connection.
    let seconds = (20 * slowdown()).to_string();
    let arguments = ["-sS", "-m", &seconds, "-H", "Connection: close", &url];
    let answers = client.run("curl", arguments)?.ok()?.stdout;
    let right = answers.matches(&stage.marker).count();
    ensure!(right == AT_ONCE, "{right} of {AT_ONCE} were answered");
    Ok(right)
}

/// Number of requests per curl process, which has [`TIMEOUT`] for all of them.
const AT_ONCE: usize = 20;
/// Number of certificates of one identity to wait for.
const GENERATIONS: usize = 3;
/// Time limit for them.
const RENEWALS: Duration = Duration::from_secs(30);
/// Time limit for a rotation of the root.
const ROTATION: Duration = Duration::from_secs(50);
/// Time limit for daemons to learn of a revocation.
const LEARNT: Duration = Duration::from_secs(2);
