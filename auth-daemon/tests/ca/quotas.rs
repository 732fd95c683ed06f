//! What one node, or one address, can take from the CA.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use auth_ca::{
    quotas::{Limits, Rate},
    server::EVENT_INTERVAL,
};
use auth_daemon::issuer::{CaClient, Certificates, Issuer};
use auth_mesh::Workload;
use futures_util::future::join_all;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use rustls::pki_types::CertificateDer;
use tokio::{runtime, task::JoinSet};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::harness::*;

/// Service accounts with a pod on each node.
const ACCOUNTS: usize = 100;
/// Requests of the neighbour that are measured, and the pause between two of them.
const MEASURED: usize = 200;
const PAUSE: Duration = Duration::from_millis(10);
/// Until the attacker has used up its quota, which takes a busy machine longer than the neighbour's requests.
const PATIENCE: Duration = Duration::from_secs(120);
/// The attacker's connections, and its requests on each of them at once.
const CONNECTIONS: usize = 4;
const AT_ONCE: usize = 32;

fn account(number: usize) -> String {
    format!("account-{}", number % ACCOUNTS)
}

fn pods_on_both_nodes() -> impl Iterator<Item = Workload> {
    let on = |node| (0..ACCOUNTS).map(move |number| pod(&account(number), node));
    on("a").chain(on("b"))
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

/// Runs `work` on a runtime of its own, made as the program's, on one core.
fn on_core<T: Send + 'static, F: Future<Output = T>>(
    core: usize,
    work: impl FnOnce() -> F + Send + 'static,
) -> thread::JoinHandle<T> {
    thread::spawn(move || {
        let mut set = CpuSet::new();
        set.set(core).unwrap();
        // A machine with one core has them all on that one.
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
        let mut builder = runtime::Builder::new_multi_thread();
        builder.enable_all().event_interval(EVENT_INTERVAL);
        builder.build().unwrap().block_on(work())
    })
}

/// What an attacker does as fast as it can, from an address of its own.
#[derive(Clone, Copy)]
enum Flood {
    /// Asks for certificates, on a few connections.
    Requests,
    /// Connects, finishes the TLS handshake, and begins again.
    Handshakes,
}

/// The attacker's actions so far, by outcome.
type Outcomes = Arc<Mutex<BTreeMap<String, usize>>>;

fn total(outcomes: &Outcomes) -> usize {
    outcomes.lock().unwrap().values().sum()
}

const ATTACKER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// Runs `tasks` tasks that repeat `act`, each with its own numbers, until `stop`.
async fn repeat<F: Future<Output = String> + Send + 'static>(
    tasks: usize,
    act: impl Fn(usize) -> F + Clone + Send + Sync + 'static,
    outcomes: &Outcomes,
    stop: &Arc<AtomicBool>,
) {
    let mut running = JoinSet::new();
    for task in 0..tasks {
        let (act, outcomes, stop) = (act.clone(), outcomes.clone(), stop.clone());
        running.spawn(async move {
            let mut number = task;
            while !stop.load(Ordering::Relaxed) {
                let outcome = act(number).await;
                *outcomes.lock().unwrap().entry(outcome).or_insert(0) += 1;
                number += 1;
            }
        });
    }
    running.join_all().await;
}

fn outcome_of(asked: Result<(), Status>) -> String {
    match asked {
        Ok(()) => "issued".to_owned(),
        Err(status) if status.code() == Code::ResourceExhausted => {
            let retry = status.get_details_retry_info().unwrap().retry_delay;
            assert!(retry >= Some(Duration::from_secs(1)), "{status:?}");
            "refused".to_owned()
        }
        Err(status) => status.to_string(),
    }
}

async fn flood(
    flood: Flood,
    address: SocketAddr,
    roots: Vec<CertificateDer<'static>>,
    outcomes: Outcomes,
    stop: Arc<AtomicBool>,
) {
    match flood {
        Flood::Requests => {
            let csr: Arc<str> = csr(|_| {}).1.into();
            let mut channels = Vec::new();
            for _ in 0..CONNECTIONS {
                let channel = connect_from(ATTACKER, address, roots.clone(), None).await;
                channels.push(channel.unwrap());
            }
            let ask = move |number: usize| {
                let (channel, csr) = (channels[number % CONNECTIONS].clone(), csr.clone());
                async move { outcome_of(ask(&channel, "a", number, &csr).await) }
            };
            repeat(CONNECTIONS * AT_ONCE, ask, &outcomes, &stop).await;
        }
        Flood::Handshakes => {
            let shake = move |_| {
                let roots = roots.clone();
                async move {
                    let channel = connect_from(ATTACKER, address, roots, None).await;
                    channel.map_or_else(|error| error.to_string(), |_| "connected".to_owned())
                }
            };
            repeat(AT_ONCE, shake, &outcomes, &stop).await;
        }
    }
}

/// What node b saw: the milliseconds of its requests, sorted, and the median number of actions that the attacker finished
/// during one of them.
struct Seen {
    took: Vec<f64>,
    attacks: usize,
}

/// Sends node b's requests, each on a connection of its own if `anew`.
async fn neighbour(
    address: SocketAddr,
    roots: &[CertificateDer<'static>],
    anew: bool,
    outcomes: &Outcomes,
) -> Seen {
    let csr = csr(|_| {}).1;
    let mut channel = connect(address, roots.to_vec(), None).await.unwrap();
    let (mut took, mut attacks) = (Vec::new(), Vec::new());
    for number in 0..MEASURED {
        let (start, before) = (Instant::now(), total(outcomes));
        if anew {
            channel = connect(address, roots.to_vec(), None).await.unwrap();
        }
        ask(&channel, "b", number, &csr).await.unwrap();
        took.push(start.elapsed().as_secs_f64() * 1000.0);
        attacks.push(total(outcomes) - before);
        tokio::time::sleep(PAUSE).await;
    }
    took.sort_by(f64::total_cmp);
    attacks.sort_unstable();
    Seen {
        took,
        attacks: attacks[MEASURED / 2],
    }
}

/// Measures node b while node a is quiet, then while it floods, and prints both. The flood also goes on until one of its
/// actions has had the outcome `until`. Returns the outcomes of all its actions, and how many it finished during one request
/// of node b.
fn measure(
    what: &str,
    limits: Limits,
    attack: Flood,
    anew: bool,
    until: &str,
) -> (BTreeMap<String, usize>, usize) {
    let _busy = BUSY.blocking_lock();
    let (ready, started) = mpsc::channel();
    let (stop_ca, ca_stops) = tokio::sync::oneshot::channel::<()>();
    let ca = on_core(0, move || async move {
        let ca = Ca::start_with(limits).await;
        ca.run_pods(pods_on_both_nodes());
        ready.send((ca.address, ca.roots())).unwrap();
        let _ = ca_stops.await;
        ca.stop().await;
    });
    let (address, roots) = started.recv().unwrap();
    let (outcomes, stop) = (Outcomes::default(), Arc::new(AtomicBool::new(false)));
    let (counted, quiet_roots) = (outcomes.clone(), roots.clone());
    let quiet = on_core(0, move || async move {
        neighbour(address, &quiet_roots, anew, &counted).await
    });
    let quiet = quiet.join().unwrap();
    let attacker = {
        let (roots, outcomes, stop) = (roots.clone(), outcomes.clone(), stop.clone());
        on_core(1, move || flood(attack, address, roots, outcomes, stop))
    };
    while total(&outcomes) == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let counted = outcomes.clone();
    let start = Instant::now();
    let attacked = on_core(0, move || async move {
        neighbour(address, &roots, anew, &counted).await
    });
    let attacked = attacked.join().unwrap();
    let lasted = start.elapsed();
    while !outcomes.lock().unwrap().contains_key(until) {
        assert!(start.elapsed() < PATIENCE, "never {until}");
        thread::sleep(Duration::from_millis(1));
    }
    stop.store(true, Ordering::Relaxed);
    attacker.join().unwrap();
    drop(stop_ca);
    ca.join().unwrap();
    let at = |sorted: &[f64], part: f64| sorted[((sorted.len() - 1) as f64 * part) as usize];
    for (name, part) in [("p50", 0.5), ("p99", 0.99)] {
        let (quiet, attack) = (at(&quiet.took, part), at(&attacked.took, part));
        println!(
            "{what}: neighbour's {name} {quiet:.2} ms quiet, {attack:.2} ms attacked: ratio {:.2}",
            attack / quiet
        );
    }
    let outcomes = std::mem::take(&mut *outcomes.lock().unwrap());
    let during = attacked.attacks;
    println!("{what}: attacker {outcomes:?} in {lasted:.1?}, {during} during one request");
    (outcomes, during)
}

/// The most requests that the attacker may finish during one of the neighbour's: a quarter of what it has in flight. In turns
/// it is a few, and up to 20 if the neighbour's own thread waits for a processor; without turns it is all that is in flight.
const MOST_REQUESTS: usize = CONNECTIONS * AT_ONCE / 4;
/// The same for handshakes: half of what it has in flight.
const MOST_HANDSHAKES: usize = AT_ONCE / 2;

#[test]
fn a_node_that_floods_is_refused_and_its_neighbour_is_served() {
    let (limits, until) = (Limits::default(), "refused");
    let (outcomes, _) = measure("over quotas", limits, Flood::Requests, false, until);
    let count = |outcome: &str| outcomes.get(outcome).copied().unwrap_or_default();
    assert_eq!(outcomes.len(), 2, "{outcomes:?}");
    assert!(
        count("issued") >= 1000,
        "its quota is its own: {outcomes:?}"
    );
}

#[test]
fn a_node_below_its_quota_at_full_speed_leaves_its_neighbour_its_turn() {
    let (limits, until) = (unlimited(), "issued");
    let (outcomes, during) = measure("below quotas", limits, Flood::Requests, false, until);
    assert_eq!(outcomes.keys().collect::<Vec<_>>(), ["issued"]);
    assert!(during <= MOST_REQUESTS, "{during}");
}

#[test]
fn an_address_that_connects_at_full_speed_leaves_others_their_turns() {
    for (what, anew) in [("handshakes, open", false), ("handshakes, new", true)] {
        let (limits, until) = (unlimited(), "connected");
        let (outcomes, during) = measure(what, limits, Flood::Handshakes, anew, until);
        assert_eq!(outcomes.keys().collect::<Vec<_>>(), ["connected"]);
        assert!(during <= MOST_HANDSHAKES, "{during}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_floods_takes_nothing_from_its_node() {
    let ca = Ca::start_with(Limits {
        node: Rate::new(20, 1),
        identity: Rate::new(5, 1),
        ..Limits::default()
    })
    .await;
    ca.run_pods(pods_on_both_nodes());
    let caller = ca.caller().await;
    let own = ca.issuer.token("account-0", "a", |_| {});
    let mut refused = None;
    for _ in 0..50 {
        let ask = Ask::for_itself(Some(own.clone()));
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
    ca.run_pods(pods_on_both_nodes());
    let lifetime = Duration::from_secs(3600);
    let client = Arc::new(CaClient::start(ca.server("a"), domain(), lifetime).unwrap());
    let certificates = Certificates::new(client.clone());
    let held: Vec<_> = (0..8)
        .map(|number| certificates.acquire(&identity(&account(number))))
        .collect();
    let (_, request) = csr(|_| {});
    let request = der(&request);
    let another = identity(&account(9));
    let refused = loop {
        // Together, because the quota fills up again meanwhile.
        let asked = join_all((0..8).map(|_| client.issue(&another, &request))).await;
        if let Some(refused) = asked.into_iter().find_map(Result::err) {
            break refused;
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
