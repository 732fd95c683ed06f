//! Many pods that are known only by their UIDs: how soon each is enrolled, and which identity it has when process IDs
//! and addresses are reused many times.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::{App, Daemon, Mesh, Pod, PodSpec, Result, TIMEOUT};
use serde_json::Value;

use crate::common::by_uid::pause;

/// The sandbox and the app begin at the same moment here, which no runtime does: so this measures how soon the kernel's
/// report of the first socket leads to the enrolment, when the daemon has long been waiting for the pod.
#[test]
fn pods_are_enrolled_soon_after_their_first_socket() {
    const PODS: usize = 200;
    let mesh = Mesh::builder().node("a").start().unwrap();
    let daemon = mesh.node("a").start_daemon().unwrap();
    let spec = |number| PodSpec::new(&format!("p{number}")).ipv4_only().by_uid();
    let pods: Vec<Pod> = (0..PODS).map(|n| mesh.add_pod(spec(n)).unwrap()).collect();
    let names: Vec<String> = pods.iter().map(Pod::full_name).collect();
    mesh_tests::eventually(TIMEOUT, "the daemon to know all pods", || {
        (daemon.status().unwrap().pods.len() == PODS).then_some(())
    })
    .unwrap();
    let start = |pod: &Pod| -> Result<App> {
        let app = pod.container("c1")?.app("echo-server --port 8080 --quiet");
        // No faster than a node starts pods, or the machine's two cores are what is measured.
        thread::sleep(Duration::from_millis(50));
        app
    };
    let _apps: Vec<App> = pods.iter().map(|pod| start(pod).unwrap()).collect();
    daemon.wait_enrolled(&names).unwrap();

    let enrolled: Vec<Value> = daemon
        .logs()
        .into_iter()
        .filter(|line| line["message"] == "pod enrolled")
        .collect();
    let of: BTreeSet<_> = enrolled.iter().map(|line| line["pod"].as_str()).collect();
    assert_eq!((enrolled.len(), of.len()), (PODS, PODS), "each once");
    let mut waits: Vec<u64> = enrolled
        .iter()
        .map(|line| line["unserved_microseconds"].as_u64().unwrap_or(0))
        .collect();
    waits.sort_unstable();
    let late = waits.iter().filter(|wait| **wait > 0).count();
    let at = |share: usize| waits[(PODS - 1) * share / 100] as f64 / 1e3;
    eprintln!(
        "from a pod's first socket to its enrolment, over {PODS} pods: p50 {:.1} ms, p99 {:.1} ms, most {:.1} ms; {} were enrolled before",
        at(50),
        at(99),
        at(100),
        PODS - late
    );
    assert!(late > 0, "the kernel has reported none");
}

/// Each address is used by one pod after another, each of another account, and so are their process IDs.
#[test]
fn nobody_gets_anothers_identity() {
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("web").on("b").service_account("web"))
        .start()
        .unwrap();
    let daemons = mesh.start_daemons().unwrap();
    let [near, far] = daemons.as_slice() else {
        unreachable!("each node has one")
    };
    let web = mesh.pod("web");
    let echo = web.app("echo-server --port 8080 --quiet").unwrap();
    let _echo = echo.listening().unwrap();
    let churn = Churn {
        mesh: &mesh,
        to: web.at(8080),
        next: AtomicU32::new(0),
        dials: Mutex::default(),
        numbers: Mutex::default(),
    };
    let start = Instant::now();
    thread::scope(|scope| {
        for slot in 0..SLOTS {
            let churn = &churn;
            scope.spawn(move || churn.fill(slot));
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let dials = churn.dials.into_inner().unwrap();
    let numbers = churn.numbers.into_inner().unwrap();
    let again = numbers.values().filter(|uses| **uses > 1).count();
    let accounts: BTreeSet<_> = dials.values().flatten().collect();
    assert_eq!(accounts.len(), ACCOUNTS as usize);
    // What both ends say about the caller: the daemon of the calling pod, and the certificate that was presented to the
    // other one.
    let seen: usize = [(near, "outbound"), (far, "inbound")]
        .into_iter()
        .map(|(daemon, direction)| check(daemon, direction, &dials))
        .sum();
    assert!(
        seen >= 2 * dials.len(),
        "{seen} lines of {} dials",
        dials.len()
    );
    eprintln!(
        "{PODS} pods in {seconds:.1} s, {:.1} a second, on {SLOTS} addresses; {again} process IDs had more than one pod; {} dials were answered, each under its own name",
        f64::from(PODS) / seconds,
        dials.len()
    );
    assert!(again > 0, "no process ID was used again");
}

const PODS: u32 = 240;
/// Addresses, and pods at a time.
const SLOTS: u32 = 6;
/// No divisor of it is one of the slots': each address has all of them in turn.
const ACCOUNTS: u32 = 7;

struct Churn<'a> {
    mesh: &'a Mesh,
    to: SocketAddr,
    next: AtomicU32,
    /// Whose the answered connections from each address and port were.
    dials: Mutex<BTreeMap<SocketAddr, BTreeSet<String>>>,
    /// How many pods have had a process with each ID.
    numbers: Mutex<BTreeMap<u32, u32>>,
}

impl Churn<'_> {
    /// One pod after another on the slot's address, until there were enough.
    fn fill(&self, slot: u32) {
        let address = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 200 + slot as u8));
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= PODS {
                return;
            }
            self.live(number, address);
        }
    }

    /// A pod's whole life: it starts, dials until it is answered, and is removed.
    fn live(&self, number: u32, address: IpAddr) {
        let account = format!("a{}", number % ACCOUNTS);
        let spec = PodSpec::new(&format!("p{number}"))
            .on("a")
            .service_account(&account)
            .address(address)
            .ipv4_only()
            .by_uid();
        let pod = self.mesh.add_pod(spec).unwrap();
        // The next processes get the IDs of the previous pods' processes.
        let _ = fs::write("/proc/sys/kernel/ns_last_pid", FIRST_NUMBER.to_string());
        let sandbox = pause(&pod);
        *self
            .numbers
            .lock()
            .unwrap()
            .entry(sandbox.pid())
            .or_insert(0) += 1;
        let app = pod.container("app").unwrap();
        let dial = format!(
            "connect --to {} --send {account} --shutdown --read",
            self.to
        );
        let deadline = Instant::now() + TIMEOUT;
        // Until it is enrolled, and both nodes know whose the address is now, it is refused.
        let answer = loop {
            let finished = app.app(&dial).unwrap().finish(TIMEOUT).unwrap();
            let answer = finished.json_lines().pop().unwrap();
            if answer["event"] == "finished" {
                break answer;
            }
            assert!(Instant::now() < deadline, "pod {number}: {answer}");
        };
        assert_eq!(answer["text"], account.as_str(), "{answer}");
        let local = answer["local"].as_str().unwrap().parse().unwrap();
        self.dials
            .lock()
            .unwrap()
            .entry(local)
            .or_default()
            .insert(account);
        self.mesh.remove_pod(&pod.full_name()).unwrap();
    }
}

/// Far above the IDs of other processes.
const FIRST_NUMBER: u32 = 29_000;

/// Asserts that a daemon names the right caller of each answered connection. Returns how many it has logged.
fn check(
    daemon: &Daemon,
    direction: &str,
    dials: &BTreeMap<SocketAddr, BTreeSet<String>>,
) -> usize {
    let lines = mesh_tests::eventually_ok(TIMEOUT, "all lines of the access log", || {
        let lines: Vec<Value> = daemon
            .access_log()
            .into_iter()
            .filter(|line| line["direction"] == direction && line["result"] == "ok")
            .collect();
        anyhow::ensure!(lines.len() >= dials.len(), "there are {}", lines.len());
        Ok(lines)
    })
    .unwrap();
    for line in &lines {
        let client: SocketAddr = line["client"].as_str().unwrap().parse().unwrap();
        let whose = &dials[&client];
        let identity = line["client_identity"].as_str().unwrap();
        let account = identity.rsplit('/').next().unwrap();
        assert!(whose.contains(account), "{whose:?} called: {line}");
    }
    lines.len()
}
