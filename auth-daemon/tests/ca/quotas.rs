//! What one node, or one address, can take from the CA.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use auth_ca::quotas::{Limits, Rate};
use auth_daemon::issuer::{CaClient, Certificates, Issuer};
use auth_mesh::{Inventory, Snapshot};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use tokio::runtime;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::harness::*;

/// Service accounts with a pod on each node.
const ACCOUNTS: usize = 100;
/// Requests of the neighbour that are measured, and the pause between two of them.
const MEASURED: usize = 200;
const PAUSE: Duration = Duration::from_millis(10);
/// The attacker's connections, and its requests on each of them at once.
const CONNECTIONS: usize = 4;
const AT_ONCE: usize = 32;

fn account(number: usize) -> String {
    format!("account-{}", number % ACCOUNTS)
}

fn pods_on_both_nodes() -> Snapshot {
    let on = |node| (0..ACCOUNTS).map(move |number| pod(&account(number), node));
    Snapshot::new(Inventory {
        workloads: on("a").chain(on("b")).collect(),
        services: vec![],
    })
}

async fn ask(channel: &Channel, node: &str, number: usize, csr: &str) -> Result<(), Status> {
    let ask = Ask {
        csr: csr.to_owned(),
        bearer: Some(token(node)),
        identity: Some(identity(&account(number)).to_string()),
        seconds: 3600,
    };
    ask.send(channel).await.map(drop)
}

/// Runs `work` on a thread and a runtime of its own, on one core.
fn on_core<T: Send + 'static, F: Future<Output = T>>(
    core: usize,
    work: impl FnOnce() -> F + Send + 'static,
) -> thread::JoinHandle<T> {
    thread::spawn(move || {
        let mut set = CpuSet::new();
        set.set(core).unwrap();
        // A machine with one core has them all on that one.
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
        let mut builder = runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap().block_on(work())
    })
}

/// The outcomes of an attacker that asks as fast as it can until `stop`.
async fn flood(channels: Vec<Channel>, stop: Arc<AtomicBool>) -> BTreeMap<String, usize> {
    let csr = csr(|_| {}).1;
    let tasks: Vec<_> = (0..CONNECTIONS * AT_ONCE)
        .map(|task| {
            let (channel, stop, csr) = (
                channels[task % CONNECTIONS].clone(),
                stop.clone(),
                csr.clone(),
            );
            tokio::spawn(async move {
                let mut outcomes = BTreeMap::new();
                let mut number = task;
                while !stop.load(Ordering::Relaxed) {
                    let outcome = match ask(&channel, "a", number, &csr).await {
                        Ok(()) => "issued".to_owned(),
                        Err(status) if status.code() == Code::ResourceExhausted => {
                            let retry = status.get_details_retry_info().unwrap().retry_delay;
                            assert!(retry >= Some(Duration::from_secs(1)), "{status:?}");
                            "refused".to_owned()
                        }
                        Err(status) => status.to_string(),
                    };
                    *outcomes.entry(outcome).or_insert(0) += 1;
                    number += 1;
                }
                outcomes
            })
        })
        .collect();
    let mut all = BTreeMap::new();
    for task in tasks {
        for (outcome, count) in task.await.unwrap() {
            *all.entry(outcome).or_insert(0) += count;
        }
    }
    all
}

/// Milliseconds of node b's requests, sorted.
async fn neighbour(channel: &Channel, csr: &str) -> Vec<f64> {
    let mut took = Vec::new();
    for number in 0..MEASURED {
        let start = Instant::now();
        ask(channel, "b", number, csr).await.unwrap();
        took.push(start.elapsed().as_secs_f64() * 1000.0);
        tokio::time::sleep(PAUSE).await;
    }
    took.sort_by(f64::total_cmp);
    took
}

/// Measures node b while node a is quiet, then while it floods. Returns the attacker's outcomes and how long it had.
fn measure(what: &str, limits: Limits) -> (BTreeMap<String, usize>, Duration) {
    let (ready, started) = mpsc::channel();
    let (stop_ca, ca_stops) = tokio::sync::oneshot::channel::<()>();
    let ca = on_core(0, move || async move {
        let ca = Ca::start_with(limits).await;
        ca.registry.publish(pods_on_both_nodes());
        ready.send((ca.address, ca.roots())).unwrap();
        let _ = ca_stops.await;
        ca.stop().await;
    });
    let (address, roots) = started.recv().unwrap();
    let (quiet, begin) = tokio::sync::oneshot::channel();
    let (flooding, is_flooding) = tokio::sync::oneshot::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let (other_roots, stopped) = (roots.clone(), stop.clone());
    let attacker = on_core(1, move || async move {
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            channels.push(connect(address, other_roots.clone(), None).await.unwrap());
        }
        begin.await.unwrap();
        flooding.send(()).unwrap();
        flood(channels, stopped).await
    });
    let measured = on_core(0, move || async move {
        let channel = connect(address, roots, None).await.unwrap();
        let csr = csr(|_| {}).1;
        let before = neighbour(&channel, &csr).await;
        quiet.send(()).unwrap();
        is_flooding.await.unwrap();
        let start = Instant::now();
        let during = neighbour(&channel, &csr).await;
        (before, during, start.elapsed())
    });
    let (before, during, attacked) = measured.join().unwrap();
    stop.store(true, Ordering::Relaxed);
    let outcomes = attacker.join().unwrap();
    drop(stop_ca);
    ca.join().unwrap();
    let at = |sorted: &[f64], part: f64| sorted[((sorted.len() - 1) as f64 * part) as usize];
    for (name, part) in [("p50", 0.5), ("p99", 0.99)] {
        let (quiet, attack) = (at(&before, part), at(&during, part));
        println!(
            "{what}: neighbour's {name} {quiet:.2} ms quiet, {attack:.2} ms attacked: ratio {:.2}",
            attack / quiet
        );
    }
    println!("{what}: attacker {outcomes:?} in {attacked:.1?}");
    (outcomes, attacked)
}

#[test]
fn a_node_that_floods_is_refused_and_its_neighbour_is_served() {
    let (outcomes, _) = measure("with quotas", Limits::default());
    let count = |outcome: &str| outcomes.get(outcome).copied().unwrap_or_default();
    assert!(count("refused") > 0, "{outcomes:?}");
    assert_eq!(outcomes.len(), 2, "{outcomes:?}");
    assert!(
        count("issued") >= 1000,
        "its quota is its own: {outcomes:?}"
    );
}

#[test]
fn a_node_below_its_quota_at_full_speed_leaves_its_neighbour_its_turn() {
    let (outcomes, _) = measure("without quotas", unlimited());
    assert_eq!(outcomes.keys().collect::<Vec<_>>(), ["issued"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_floods_takes_nothing_from_its_node() {
    let ca = Ca::start_with(Limits {
        node: Rate::new(20, 1),
        identity: Rate::new(5, 1),
        ..Limits::default()
    })
    .await;
    ca.registry.publish(pods_on_both_nodes());
    let caller = ca.caller().await;
    let own = ca.issuer.token("account-0", "a", |_| {});
    let mut refused = None;
    for _ in 0..50 {
        let ask = Ask::but(|ask| {
            ask.bearer = Some(own.clone());
            ask.identity = None;
        });
        if let Err(status) = ask.send(&caller).await {
            refused = Some(status);
            break;
        }
    }
    let refused = refused.expect("it is never refused");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("one identity"), "{refused}");
    let csr = csr(|_| {}).1;
    for number in 1..10 {
        ask(&caller, "a", number, &csr).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_attestations_are_slowed_and_good_ones_are_not() {
    let ca = Ca::start_with(Limits {
        failures: Rate::new(3, 1),
        ..Limits::default()
    })
    .await;
    let caller = ca.caller().await;
    let bad = || Ask::but(|ask| ask.bearer = Some("z".repeat(40)));
    let start = Instant::now();
    let answers: Vec<_> = (0..20)
        .map(|_| {
            let caller = caller.clone();
            tokio::spawn(async move { bad().send(&caller).await.unwrap_err() })
        })
        .collect();
    Ask::good().send(&caller).await.unwrap();
    let good = start.elapsed();
    for answer in answers {
        assert_eq!(answer.await.unwrap().code(), Code::Unauthenticated);
    }
    assert!(start.elapsed() >= Duration::from_secs(1), "none was slowed");
    assert!(good < start.elapsed(), "{good:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_waits_as_the_ca_asks_and_gets_its_certificates() {
    let ca = Ca::start_with(Limits {
        node: Rate::new(3, 2),
        ..Limits::default()
    })
    .await;
    ca.registry.publish(pods_on_both_nodes());
    let lifetime = Duration::from_secs(3600);
    let client = Arc::new(CaClient::start(ca.server("a"), domain(), lifetime).unwrap());
    let certificates = Certificates::new(client.clone());
    let held: Vec<_> = (0..8)
        .map(|number| certificates.acquire(&identity(&account(number))))
        .collect();
    let (_, request) = csr(|_| {});
    let request = der(&request);
    let refused = loop {
        match client.issue(&identity(&account(9)), &request).await {
            Ok(_) => {}
            Err(refused) => break refused,
        }
    };
    assert!(
        refused.retry_after >= Some(Duration::from_secs(1)),
        "{refused:?}"
    );
    for certificate in held {
        let current = certificate.obtain(Duration::from_secs(30)).await;
        assert!(current.is_some(), "{} has none", certificate.identity);
    }
}

/// The DER of a CSR.
fn der(pem: &str) -> Vec<u8> {
    use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject};
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap();
    der.to_vec()
}
