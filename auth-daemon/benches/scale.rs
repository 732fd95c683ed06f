//! What a large cluster costs a node daemon: `cargo xtask bench scale` runs this and shows what it prints, one JSON object.
//!
//! The registry is filled with as many pods and services as Kubernetes says a cluster may have; then come a connection's
//! lookup and one pod's change. Where there is an API server, it is given the pods too, and the daemon's discovery reads
//! them all, page by page, as it does when it starts.

use std::{
    fs, io,
    sync::Arc,
    time::{Duration, Instant},
};

use auth_daemon::{discovery::Sink, discovery::kubernetes, discovery::kubernetes::Settings};
use auth_kubernetes::{Objects, client};
use auth_mesh::{
    Edit, MeshDefault, ObjectName, Port, Registry, Service, Snapshot, TargetPort, Workload,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1;
use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use mesh_tests::Kubernetes;
use serde_json::{Value, json};
use tokio::{runtime, sync::watch};

const PODS: u32 = 50_000;
const SERVICES: u32 = 5_000;
const NAMESPACES: u32 = 50;
const NODES: u32 = 500;
const LOOKUPS: u32 = 1_000_000;
const CHANGES: u32 = 20_000;
/// Objects that are made at the same time.
const AT_ONCE: usize = 64;

fn main() {
    let synced = sync();
    let before = resident_bytes();
    let start = Instant::now();
    let mut edit = Edit::from(Snapshot::default());
    for number in 0..SERVICES {
        edit.service(service(number));
    }
    for number in 0..PODS {
        edit.pod(pod(number));
    }
    let snapshot = edit.finish();
    let filled = start.elapsed();
    let bytes = resident_bytes() - before;
    let registry = Registry::new();
    registry.publish(snapshot);
    println!(
        "{}",
        json!({
            "pods": PODS, "services": SERVICES, "fillSeconds": filled.as_secs_f64(),
            "bytesPerThousandPods": bytes * 1000 / u64::from(PODS),
            "serviceLookupNs": lookups(&registry, |number| ([10, 96, high(number % SERVICES), low(number % SERVICES)], 80)),
            "podLookupNs": lookups(&registry, |number| (pod_address(number % PODS), 8080)),
            "changeMicros": changes(&registry), "sync": synced,
        })
    );
}

/// Nanoseconds of a connection's lookup: the snapshot in force, and where the address leads.
fn lookups(registry: &Registry, dialled: impl Fn(u32) -> ([u8; 4], u16)) -> f64 {
    let start = Instant::now();
    let mut endpoints = 0;
    for number in 0..LOOKUPS {
        // All over the place, as connections are.
        let address = dialled(number.wrapping_mul(2_654_435_761)).into();
        let found = registry.snapshot().resolve(address);
        endpoints += found.expect("it leads somewhere").endpoints.len();
    }
    assert!(endpoints >= LOOKUPS as usize);
    start.elapsed().as_secs_f64() * 1e9 / f64::from(LOOKUPS)
}

/// Microseconds of one pod's change: the next snapshot, in force, and what the kernel's side is told of it.
fn changes(registry: &Registry) -> f64 {
    let start = Instant::now();
    let mut written = 0;
    for number in 0..CHANGES {
        let mut changed = pod(number.wrapping_mul(2_654_435_761) % PODS);
        changed.ready = number % 2 == 0;
        let before = registry.snapshot();
        let mut edit = Edit::from((*before).clone());
        edit.pod(changed);
        registry.publish(edit.finish());
        written += registry.snapshot().addresses_since(&before).count();
    }
    assert_eq!(written, 0, "no address has come or gone");
    start.elapsed().as_secs_f64() * 1e6 / f64::from(CHANGES)
}

/// Fills a real API server, and reads it as a daemon does that starts.
fn sync() -> Value {
    if let Some(why) = Kubernetes::missing() {
        return json!({"skipped": why});
    }
    let runtime = runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let cluster = Kubernetes::start().expect("an API server");
        for number in 0..NAMESPACES {
            cluster.namespace(&namespace(number)).expect("a namespace");
        }
        let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig()).expect("a kubeconfig");
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig, &options);
        let client = client(config.await.expect("a configuration")).expect("a client");
        stream::iter(0..PODS)
            .map(|number| {
                let objects: Objects<v1::Pod> = Objects::of(client.clone(), &namespace(number % NAMESPACES));
                async move { objects.create(&object(number)).await.map(drop) }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await
            .expect("pods");
        let before = resident_bytes();
        let registry = Arc::new(Registry::new());
        let (synced, mut is_synced) = watch::channel(false);
        let settings = Settings {
            trust_domain: "cluster.local".parse().expect("a trust domain"),
            defaults: MeshDefault::default(),
            services: true,
            daemons: Some("auth-system".into()),
            remote: None,
        };
        let sink = Sink {
            registry: registry.clone(),
            ..Sink::default()
            };
        let start = Instant::now();
        let follows = tokio::spawn(kubernetes::run(client, settings, sink, synced));
        tokio::time::timeout(Duration::from_secs(120), is_synced.wait_for(|synced| *synced))
            .await
            .expect("in two minutes")
            .expect("it goes on");
        let seconds = start.elapsed().as_secs_f64();
        let pods = registry.snapshot().workloads().count();
        assert_eq!(pods, PODS as usize);
        let bytes = resident_bytes() - before;
        follows.abort();
        json!({"pods": pods, "seconds": seconds, "bytesPerThousandPods": bytes * 1000 / u64::from(PODS)})
    })
}

fn namespace(number: u32) -> String {
    format!("ns-{number}")
}

/// As a Deployment would have made it.
fn object(number: u32) -> v1::Pod {
    let (name, app) = (
        format!("app-{number}"),
        format!("app-{}", number % SERVICES),
    );
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": app, "pod-template-hash": "5d9c7b8f6"}},
        "spec": {
            "nodeName": format!("node-{}", number % NODES), "serviceAccountName": "default",
            "containers": [{
                "name": "app", "image": "registry.example/app:1", "ports": [{"name": "http", "containerPort": 8080}],
                "env": [{"name": "MODE", "value": "production"}], "resources": {"requests": {"cpu": "100m"}},
            }],
        },
    }))
    .expect("a pod")
}

fn pod(number: u32) -> Workload {
    let namespace = namespace(number % NAMESPACES);
    let app = format!("app-{}", number % SERVICES);
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{app}");
    let name = ObjectName {
        namespace,
        name: format!("app-{number}"),
    };
    Workload {
        uid: format!("00000000-0000-4000-8000-{number:012}"),
        addresses: vec![pod_address(number).into()],
        node: format!("node-{}", number % NODES),
        labels: [
            ("app".to_owned(), app),
            ("pod-template-hash".to_owned(), "5d9c7b8f6".to_owned()),
        ]
        .into(),
        named_ports: [("http".to_owned(), 8080)].into(),
        ..Workload::new(name, identity.parse().expect("an identity"))
    }
}

/// Those of its namespace with its label: ten.
fn service(number: u32) -> Service {
    let app = format!("app-{number}");
    Service {
        addresses: vec![[10, 96, high(number), low(number)].into()],
        ports: vec![Port {
            name: String::new(),
            port: 80,
            target: TargetPort::Name("http".into()),
        }],
        selector: [("app".to_owned(), app.clone())].into(),
        ..Service::new(ObjectName {
            namespace: namespace(number % NAMESPACES),
            name: app,
        })
    }
}

fn pod_address(number: u32) -> [u8; 4] {
    [10, 1, high(number), low(number)]
}

fn high(number: u32) -> u8 {
    number.to_be_bytes()[2]
}

fn low(number: u32) -> u8 {
    number.to_be_bytes()[3]
}

fn resident_bytes() -> u64 {
    let pages = || -> io::Result<u64> {
        let text = fs::read_to_string("/proc/self/statm")?;
        let pages = text.split(' ').nth(1).and_then(|pages| pages.parse().ok());
        pages.ok_or_else(|| io::Error::other("statm has no second field"))
    };
    pages().expect("/proc is mounted") * 4096
}
