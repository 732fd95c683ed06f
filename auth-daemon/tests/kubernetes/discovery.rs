//! Pods from the API into the registry.

use std::sync::Arc;

use auth_daemon::{
    discovery::{Sink, kubernetes},
    mesh::{MeshDefault, Registry},
};
use mesh_tests::Kubernetes;
use serde_json::json;
use tokio::sync::watch;

use crate::{as_ca, eventually};

fn pods(registry: &Registry) -> Vec<String> {
    let snapshot = registry.snapshot();
    let pods = snapshot.workloads();
    pods.map(|pod| {
        format!(
            "{} {} {}",
            pod.name.name,
            pod.node,
            pod.identity.service_account()
        )
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_follows_the_cluster_through_an_outage() {
    let test = "the_registry_follows_the_cluster_through_an_outage";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return;
    }
    let cluster = Kubernetes::start().unwrap();
    cluster
        .pod("default", "one", "web", "node-a", "10.1.0.1")
        .unwrap();
    cluster.namespace("shop").unwrap();
    cluster
        .pod("shop", "two", "api", "node-b", "10.1.0.2")
        .unwrap();
    let registry = Arc::new(Registry::new());
    let (synced, mut is_synced) = watch::channel(false);
    let client = as_ca(&cluster).await;
    tokio::spawn(kubernetes::run(
        client,
        kubernetes::Settings {
            trust_domain: "cluster.local".parse().unwrap(),
            defaults: MeshDefault::default(),
            services: false,
            daemons: None,
        },
        Sink {
            registry: registry.clone(),
            policies: None,
        },
        synced,
    ));
    is_synced.wait_for(|synced| *synced).await.unwrap();
    assert_eq!(
        pods(&registry),
        ["one node-a web", "two node-b api"],
        "all at once"
    );

    cluster
        .pod("default", "three", "web", "node-b", "10.1.0.3")
        .unwrap();
    eventually("a new pod", async || {
        (pods(&registry).len() == 3).then_some(())
    })
    .await;
    cluster
        .delete("/api/v1/namespaces/shop/pods/two?gracePeriodSeconds=0")
        .unwrap();
    eventually("a deleted pod's end", async || {
        (pods(&registry).len() == 2).then_some(())
    })
    .await;
    let finished = json!({"status": {"phase": "Succeeded"}});
    cluster
        .merge("/api/v1/namespaces/default/pods/three/status", &finished)
        .unwrap();
    eventually("a finished pod's end", async || {
        (pods(&registry).len() == 1).then_some(())
    })
    .await;

    cluster.stop_server().unwrap();
    let version = *registry.changes().borrow();
    cluster.start_server().unwrap();
    cluster
        .delete("/api/v1/namespaces/default/pods/one?gracePeriodSeconds=0")
        .unwrap();
    cluster
        .pod("default", "four", "web", "node-a", "10.1.0.4")
        .unwrap();
    eventually("what happened since", async || {
        (pods(&registry) == ["four node-a web"]).then_some(())
    })
    .await;
    assert!(*registry.changes().borrow() > version);
}
