//! Asserts how much memory is taken at most by what is kept of connections.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use auth_mesh::{Identity, Inventory, ObjectName, Port, Service, Snapshot, TargetPort, Workload};

use super::{
    access_log::{Direction, Finished, Outcome, Path},
    flows::Flows,
    istio::IstioMetrics,
    judgement::Judgement,
    pairs::{Pairs, Progress},
};

/// The most that a daemon may keep, in bytes: what docs/OBSERVING.md promises.
const PROMISED: usize = 8 * 1024 * 1024;

/// Counts what each thread has allocated and not freed.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static MOST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all calls are passed on to the system's allocator as they are. The counters are thread-local cells without a
// destructor, which allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.get().wrapping_add(layout.size());
        HELD.set(held);
        // What another thread has allocated may be freed here, so it may be below zero.
        if (held as isize) > MOST.get() as isize {
            MOST.set(held);
        }
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.set(HELD.get().wrapping_sub(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Bytes that this thread has allocated and not freed. The libraries in C are not counted.
pub(crate) fn held() -> usize {
    HELD.get()
}

/// A name of `length` characters that `number` makes unique.
fn name(number: usize, length: usize) -> String {
    format!("{number:a<length$}")
}

/// The identity of a caller, with the longest names that Kubernetes allows.
fn identity(number: usize) -> Identity {
    let domain = "d".repeat(255);
    let (namespace, account) = (name(number, 63), name(number, 253));
    format!("spiffe://{domain}/ns/{namespace}/sa/{account}")
        .parse()
        .unwrap()
}

/// Pods with the longest names and with many long labels, each behind a Service.
fn mesh(pods: usize) -> Snapshot {
    let mut inventory = Inventory::default();
    for number in 0..pods {
        let object = |length| ObjectName {
            namespace: name(number, 63),
            name: name(number, length),
        };
        let mut pod = Workload::new(object(253), identity(number));
        pod.addresses = vec![address(number).ip()];
        let label = |at: usize| (name(at, 63), name(number, 63));
        pod.labels = (0..8).map(label).collect();
        for key in ["app", "version"] {
            pod.labels.insert(key.to_owned(), name(number, 63));
        }
        // It is the pod's, whatever is kept of connections.
        pod.full_name();
        let mut service = Service::new(object(63));
        service.selector = [("app".to_owned(), name(number, 63))].into();
        service.ports = vec![Port {
            name: String::new(),
            port: 80,
            target: TargetPort::Number(8080),
        }];
        inventory.workloads.push(pod);
        inventory.services.push(service);
    }
    Snapshot::new(inventory)
}

fn address(number: usize) -> SocketAddr {
    let ip = Ipv4Addr::from_bits(0x0a00_0000 + number as u32);
    (ip, 8080).into()
}

/// A connection that has nothing in common with others, and the longest of everything.
fn worst(number: usize, pods: usize) -> Finished {
    let other = (number + pods / 2) % pods;
    Finished {
        direction: Direction::Outbound,
        path: Path::Tunnel,
        client: address(number % pods),
        destination: Some(address(number)),
        endpoint: Some(address(other)),
        service: Some(Arc::new(ObjectName {
            namespace: name(number, 63),
            name: name(number, 63),
        })),
        client_identity: Some(identity(number)),
        server_identity: Some(identity(other)),
        outcome: Outcome::Reset,
        reason: name(number, 300),
        judgement: Judgement {
            policies: Some(name(number, 1500)),
            ..Judgement::default()
        },
        client_person: Some(name(number, 256).into()),
        ..Finished::example()
    }
}

#[test]
fn what_is_kept_of_the_worst_connections_is_within_the_promise() {
    const PODS: usize = 2000;
    let snapshot = mesh(PODS);
    // The ring, the pairs and Istio's sets hold fewer than that.
    let (seconds, per_second) = (20, 400);
    let before = held();
    MOST.set(before);
    let (flows, pairs, istio) = (
        Flows::default(),
        Pairs::default(),
        IstioMetrics::new(&name(0, 253)),
    );
    for second in 0..seconds {
        for number in 0..per_second {
            let number = second * per_second + number;
            // The second of the same kind adds a time to it.
            for micros in [100, 1_000_000] {
                let finished = worst(number, PODS);
                let mut progress = Progress::default();
                progress.establish(Duration::from_micros(micros), None);
                pairs.count(&finished, &mut progress);
                flows.add(finished, &snapshot);
            }
        }
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(second as u64);
        pairs.settle(&snapshot, now, Some(&istio));
    }
    let (kept, most) = (held() - before, MOST.get() - before);
    println!("kept {kept} bytes, at most {most}");
    assert!(most <= PROMISED, "{most} bytes at most, {kept} in the end");
    // Each of them is full.
    assert!(kept > PROMISED / 2, "{kept} bytes");
    let answer = pairs.answer("n", Vec::new());
    assert!(answer.dropped > 0 && answer.uncounted > 0 && istio.dropped() > 0);
    assert!(flows.after(0, "n").lost > 0);
}
