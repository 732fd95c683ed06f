//! How fast the CA issues, on one core: `cargo xtask bench ca` runs this and shows what it prints, one JSON object.
//!
//! The whole CA (TLS, HTTP/2, attestation by token, placement, the check of the CSR, signing) has a core of its own, and so
//! have its callers. The reference is measured on the CA's core: one signature and one verification on P-256, which every
//! certificate needs.

#[path = "../tests/ca/harness.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod harness;

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair,
        UnparsedPublicKey,
    },
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::runtime;
use tonic::transport::Channel;

use harness::{Ask, Ca, connect, csr, identity, token, unlimited};

const LOAD: Duration = Duration::from_secs(5);
const BARE: Duration = Duration::from_secs(1);
/// Callers at once, on so many connections.
const CALLERS: usize = 32;
const CONNECTIONS: usize = 4;
/// Revocations in the large state.
const REVOKED: usize = 10_000;

fn main() {
    let bare = on_core(0, bare_pairs_per_second);
    let empty = measure(0);
    let large = measure(REVOKED);
    println!(
        "{}",
        json!({"barePerSecond": bare, "seconds": LOAD.as_secs(), "callers": CALLERS, "rows": [empty, large]})
    );
}

/// Runs `work` on a thread that stays on one core, as all threads do that it starts.
fn on_core<T: Send>(core: usize, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let pinned = scope.spawn(move || {
            let mut set = CpuSet::new();
            set.set(core).unwrap();
            sched_setaffinity(Pid::from_raw(0), &set).unwrap();
            work()
        });
        pinned.join().unwrap()
    })
}

/// Signatures with as many verifications.
fn bare_pairs_per_second() -> f64 {
    let random = SystemRandom::new();
    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
    let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.public_key().as_ref());
    let message = [7; 500];
    let start = Instant::now();
    let mut count = 0_u32;
    while start.elapsed() < BARE {
        let signature = key.sign(&random, &message).unwrap();
        public.verify(&message, signature.as_ref()).unwrap();
        count += 1;
    }
    f64::from(count) / start.elapsed().as_secs_f64()
}

/// Measures a CA on core 0, with callers on core 1.
fn measure(revoked: usize) -> Value {
    let (ready, started) = mpsc::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            on_core(0, move || {
                current_thread().block_on(async move {
                    let ca = prepared(revoked).await;
                    ready.send((ca.address, ca.roots())).unwrap();
                    let _ = stopped.await;
                    ca.stop().await;
                })
            })
        });
        let (address, roots) = started.recv().unwrap();
        let row = on_core(1, move || {
            current_thread().block_on(async move {
                let mut channels = Vec::new();
                for _ in 0..CONNECTIONS {
                    channels.push(connect(address, roots.clone(), None).await.unwrap());
                }
                let alone = load(&channels, 1).await;
                let together = load(&channels, CALLERS).await;
                json!({
                    "revoked": revoked,
                    "perSecond": together.len() as f64 / LOAD.as_secs_f64(),
                    "p50": percentile(&together, 0.50), "p99": percentile(&together, 0.99),
                    "aloneP50": percentile(&alone, 0.50), "aloneP99": percentile(&alone, 0.99),
                })
            })
        });
        stop.send(()).unwrap();
        row
    })
}

fn current_thread() -> runtime::Runtime {
    let mut builder = runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

/// A running CA with `revoked` serial numbers on its list.
async fn prepared(revoked: usize) -> Ca {
    let ca = Ca::start_with(unlimited()).await;
    if revoked == 0 {
        return ca;
    }
    let (folder, issuer, _) = ca.stop().await;
    revoke(&folder.path().join("state"), revoked);
    Ca::start_in(folder, issuer, "127.0.0.1:0", unlimited()).await
}

/// Ten thousand requests of the operator would take minutes, so this writes into the stopped CA's state.
fn revoke(state: &Path, count: usize) {
    let path = state.join("ca.json");
    let mut core: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let serials = core["revoked"]["serials"].as_object_mut().unwrap();
    for number in 0..count {
        let serial = format!("{:032x}", (0x41_u128 << 120) + number as u128);
        serials.insert(serial, json!({"reason": "superseded", "at": u32::MAX}));
    }
    fs::write(&path, serde_json::to_vec(&core).unwrap()).unwrap();
}

/// How long each request took, of callers that ask again and again.
async fn load(channels: &[Channel], callers: usize) -> Vec<Duration> {
    let stop = Arc::new(AtomicBool::new(false));
    let requests: Vec<String> = (0..callers).map(|_| csr(|_| {}).1).collect();
    let tasks: Vec<_> = requests
        .into_iter()
        .enumerate()
        .map(|(number, request)| {
            let (channel, stop) = (channels[number % channels.len()].clone(), stop.clone());
            tokio::spawn(async move {
                let mut took = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let ask = Ask {
                        csr: request.clone(),
                        bearer: Some(token("a")),
                        identity: Some(identity("web").to_string()),
                        seconds: 3600,
                    };
                    let start = Instant::now();
                    ask.send(&channel).await.unwrap();
                    took.push(start.elapsed());
                }
                took
            })
        })
        .collect();
    tokio::time::sleep(LOAD).await;
    stop.store(true, Ordering::Relaxed);
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    all.sort();
    all
}

/// Milliseconds.
fn percentile(sorted: &[Duration], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted[(last as f64 * part) as usize].as_secs_f64() * 1000.0
}
