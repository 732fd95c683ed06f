//! What the daemon's records of a connection cost, without its access log line: nanoseconds from its start to its
//! end. Prints one JSON object a line.

use std::{
    hint::black_box,
    net::Ipv4Addr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use auth_daemon::{
    config::{AccessLog, Observe},
    observe::{
        access_log::{Direction, Outcome},
        connections::OpenConnections,
    },
};
use auth_mesh::{Edit, Identity, ObjectName, Registry, Snapshot, Workload};
use futures_util::future::AbortHandle;
use serde_json::json;

const PODS: u32 = 1_000;
const RUN: Duration = Duration::from_secs(1);
/// What is read between two connections, in bytes, so that their records are in the caches no more than they would be.
const OTHER: usize = 1024 * 1024;

fn main() {
    let registry = Arc::new(Registry::new());
    registry.publish(mesh());
    let identities: Vec<_> = (0..11).map(identity).collect();
    let ends = &(identities, Arc::new(name("pay")));
    for threads in [1, 2] {
        for other in [0, OTHER] {
            for (name, observe) in [
                ("nothing", Observe::Nothing),
                ("connections", Observe::Connections),
            ] {
                let open = OpenConnections::new(registry.clone(), AccessLog::default(), observe);
                let open = &open;
                let each = thread::scope(|scope| {
                    let runs: Vec<_> = (0..threads)
                        .map(|thread| scope.spawn(move || run(open, ends, thread, other)))
                        .collect();
                    runs.into_iter().map(|run| run.join().unwrap()).max()
                });
                println!(
                    "{}",
                    json!({
                        "observe": name,
                        "threads": threads,
                        "bytes_read_between": other,
                        "ns": each.unwrap(),
                    })
                );
            }
        }
    }
}

/// The identities of pods, and a Service.
type Ends = (Vec<Identity>, Arc<ObjectName>);

/// Records connections. Returns the median of what one takes, in nanoseconds.
fn run(open: &OpenConnections, ends: &Ends, thread: u32, other: usize) -> u128 {
    let other = vec![1_u64; other / 8];
    let batch = if other.is_empty() { 100 } else { 1 };
    let (mut times, mut number) = (Vec::new(), thread);
    let start = Instant::now();
    while start.elapsed() < RUN {
        black_box(other.iter().step_by(8).sum::<u64>());
        let began = Instant::now();
        for _ in 0..batch {
            record(open, ends, number);
            number += 2;
        }
        times.push(began.elapsed().as_nanos() / batch);
    }
    times.sort_unstable();
    times[times.len() / 2]
}

/// A connection from one pod to one of ten others.
fn record(open: &OpenConnections, (identities, service): &Ends, number: u32) {
    let (cut, _) = AbortHandle::new_pair();
    let port = 30_000 + (number % 30_000) as u16;
    let server = 1 + number % 10;
    // The access log, and with it `auth-daemon observe`, takes 100,000 of a pod in ten seconds.
    let pod = u64::from(number / 100_000);
    let client = (address(0), port).into();
    let access = open.open(Direction::Outbound, pod, client, cut);
    access.learn(|details| {
        details.client_identity = Some(identities[0].clone());
        details.destination = Some((Ipv4Addr::new(10, 96, 0, 1), 80).into());
        details.service = Some(service.clone());
        details.endpoint = Some((address(server), 8080).into());
        details.server_identity = Some(identities[server as usize].clone());
    });
    access.established();
    access.finish(Outcome::Ok, "");
}

fn mesh() -> Snapshot {
    let mut edit = Edit::from(Snapshot::default());
    for number in 0..PODS {
        let mut pod = Workload::new(
            name(&format!("web-{}-6d4cf56db6-x{number:04}", number % 100)),
            identity(number),
        );
        pod.addresses = vec![address(number).into()];
        pod.labels = [
            ("app", "web"),
            ("app.kubernetes.io/name", "web"),
            ("pod-template-hash", "6d4cf56db6"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        edit.pod(pod);
    }
    edit.finish()
}

fn name(name: &str) -> ObjectName {
    ObjectName {
        namespace: "shop".into(),
        name: name.into(),
    }
}

fn identity(number: u32) -> Identity {
    format!("spiffe://cluster.local/ns/shop/sa/web-{}", number % 100)
        .parse()
        .unwrap()
}

fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a00_0000 + number)
}
