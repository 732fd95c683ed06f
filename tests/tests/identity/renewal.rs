//! Certificates are renewed under load: no request fails, and open connections stay open.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::hostile::{ALPN, Authority, DATA, END, Peer, client_config, dial, frame};
use crate::common::with_ca::short_lifetime;
use mesh_tests::{
    Context, Daemon, DaemonOptions, Mesh, Nginx, PodSpec, Result, TIMEOUT, eventually_ok,
};
use rustls::Connection;

/// Number of certificates of one identity to wait for.
const GENERATIONS: usize = 4;

#[test]
fn certificates_are_renewed_under_load() -> Result<()> {
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(PodSpec::new("web").on("b").service_account("web"))
        .start()?;
    let daemons =
        mesh.start_daemons_with(&DaemonOptions::default().certificate_lifetime(short_lifetime()))?;
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _nginx = Nginx::start(&web, 8080, "web")?;
    let _echo = web.app("echo-server --port 7000 --quiet")?.listening()?;
    let mut old = client.app(&format!("chat --to {} --interval 100", web.at(7000)))?;
    old.event("connected", TIMEOUT)
        .or_else(|_| old.event("round", TIMEOUT))
        .context("the old connection")?;
    let authority = Authority::stolen(&mesh.node("a").ca_folder())?;

    let stop = AtomicBool::new(false);
    let requests = AtomicUsize::new(0);
    let serials = thread::scope(|scope| {
        // Apps, through pooled and new tunnels.
        let apps = scope.spawn(|| -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                let url = format!("http://{}/[1-50]", web.at(8080));
                let arguments = [
                    "-sS",
                    "-m",
                    "30",
                    "--parallel",
                    "--parallel-max",
                    "8",
                    "-H",
                    "Connection: close",
                    "-w",
                    " ",
                    &url,
                ];
                let answers = client.run("curl", arguments)?.ok()?.stdout;
                let right = answers
                    .split_whitespace()
                    .filter(|answer| *answer == "web")
                    .count();
                anyhow::ensure!(right == 50, "{right} of 50: {answers}");
                requests.fetch_add(50, Ordering::Relaxed);
            }
            Ok(())
        });
        // Sequential handshakes.
        let handshakes = scope.spawn(|| -> Result<BTreeSet<Vec<u8>>> {
            let own = authority.mint("outsider")?;
            let mut seen = BTreeSet::new();
            while !stop.load(Ordering::Relaxed) {
                let tcp = dial(mesh.outside(), web.at(7000))?;
                let mut peer = Peer::client(tcp, client_config(Some(&own), &[ALPN])?)?;
                peer.open()?;
                peer.send(&[frame(DATA, b"x"), frame(END, b"")].concat())?;
                anyhow::ensure!(peer.read_data(1)? == b"x", "no echo");
                // Closing the tunnel earlier would reset the connection.
                anyhow::ensure!(matches!(peer.frame()?, Some((END, _))), "no end");
                let Connection::Client(tls) = &peer.tls else {
                    unreachable!("it called");
                };
                let chain = tls.peer_certificates().context("no certificate")?;
                seen.insert(chain[0].to_vec());
                thread::sleep(Duration::from_millis(50));
            }
            Ok(seen)
        });
        let serials = generations(&daemons);
        stop.store(true, Ordering::Relaxed);
        apps.join().expect("no panic").context("requests of apps")?;
        let seen = handshakes.join().expect("no panic").context("handshakes")?;
        // No handshake may have used the last one.
        anyhow::ensure!(
            seen.len() >= GENERATIONS - 1,
            "{} certificates on the wire",
            seen.len()
        );
        serials
    })
    .unwrap_or_else(|error: anyhow::Error| panic!("{error:#}: {:#?}", not_ok(&daemons)));
    println!(
        "{} requests, serials {serials:#?}",
        requests.load(Ordering::Relaxed)
    );
    assert!(requests.load(Ordering::Relaxed) >= 100);

    // The connection whose certificates have long been replaced, and have expired.
    let oldest = short_lifetime().as_secs_f64();
    eventually_ok(short_lifetime(), "a connection older than that", || {
        let connections = daemons[0].status()?.connections;
        let is_old = connections.iter().any(|open| open.seconds > oldest);
        anyhow::ensure!(is_old, "{connections:#?}");
        Ok(())
    })?;
    let before = old.events().len();
    eventually_ok(TIMEOUT, "more rounds on the old connection", || {
        let now = old.events().len();
        anyhow::ensure!(now > before + 3, "{now} events");
        Ok(())
    })?;
    assert!(not_ok(&daemons).is_empty(), "{:#?}", not_ok(&daemons));
    for daemon in &daemons {
        let failed = daemon
            .logs()
            .into_iter()
            .find(|line| line["level"] == "ERROR");
        assert!(failed.is_none(), "{failed:#?}");
    }
    Ok(())
}

/// Returns the lines of connections that ended with an error.
fn not_ok(daemons: &[Daemon]) -> Vec<serde_json::Value> {
    let lines = daemons.iter().flat_map(Daemon::access_log);
    lines.filter(|line| line["result"] != "ok").collect()
}

/// Waits until each identity has had this number of certificates. Returns their serial numbers.
fn generations(daemons: &[Daemon]) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let mut serials: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let patience = short_lifetime() * GENERATIONS as u32;
    eventually_ok(patience, "renewals", || {
        for daemon in daemons {
            for certificate in daemon.status()?.certificates {
                serials
                    .entry(certificate.identity)
                    .or_default()
                    .insert(certificate.serial);
            }
        }
        let least = serials.values().map(BTreeSet::len).min().unwrap_or(0);
        anyhow::ensure!(serials.len() == 2 && least >= GENERATIONS, "{serials:#?}");
        Ok(())
    })?;
    Ok(serials)
}
