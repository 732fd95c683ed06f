//! Pods from the API into the registry.

use std::sync::Arc;

use auth_daemon::{discovery::Sink, discovery::kubernetes};
use auth_mesh::{MeshDefault, Registry};
use mesh_tests::Kubernetes;
use serde_json::json;
use tokio::sync::watch;

use crate::{as_ca, eventually, with_rights_of};

/// The pods that have not finished.
fn pods(registry: &Registry) -> Vec<String> {
    let snapshot = registry.snapshot();
    let pods = snapshot.workloads().filter(|pod| !pod.finished);
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

/// Starts discovery, of Services too or of pods alone. The receiver turns true once everything has been read.
fn discover(client: kube::Client, services: bool, sink: Sink) -> watch::Receiver<bool> {
    let (synced, is_synced) = watch::channel(false);
    let settings = kubernetes::Settings {
        trust_domain: "cluster.local".parse().unwrap(),
        defaults: MeshDefault::default(),
        services,
        daemons: None,
        remote: None,
    };
    tokio::spawn(kubernetes::run(client, settings, sink, synced));
    is_synced
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
    let sink = Sink::default();
    let registry = sink.registry.clone();
    let client = as_ca(&cluster).await;
    let mut is_synced = discover(client, false, sink);
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

/// Where the service `web` leads.
fn endpoints(registry: &Registry) -> Vec<String> {
    let Ok(found) = registry.snapshot().resolve("10.96.7.7:80".parse().unwrap()) else {
        return Vec::new();
    };
    let endpoints = found.endpoints.iter().map(|endpoint| {
        let pod = endpoint.workload.as_ref();
        let account = pod.map_or("nobody", |pod| pod.identity.service_account());
        format!("{} {account}", endpoint.address)
    });
    endpoints.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_a_selector_has_the_endpoints_of_its_slices() {
    let test = "a_service_without_a_selector_has_the_endpoints_of_its_slices";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return;
    }
    let cluster = Kubernetes::start().unwrap();
    cluster
        .pod("default", "one", "web", "node-a", "10.1.0.1")
        .unwrap();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"clusterIP": "10.96.7.7", "ports": [{"name": "http", "port": 80}]},
    });
    cluster
        .create("/api/v1/namespaces/default/services", &service)
        .unwrap();
    let sink = Sink::default();
    let registry = sink.registry.clone();
    let client = with_rights_of(&cluster, "auth-daemon").await;
    let mut is_synced = discover(client, true, sink);
    is_synced.wait_for(|synced| *synced).await.unwrap();
    assert_eq!(endpoints(&registry), [""; 0]);

    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
    let slice = |name: &str, manager: &str, address: &str| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {
                "kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": manager,
            }},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{"addresses": [address]}],
        })
    };
    let own = "endpointslice-controller.k8s.io";
    for (name, manager, address) in [
        ("of-the-selector-it-had", own, "10.1.0.9"),
        ("one", "somebody", "10.1.0.1"),
        ("two", "", "192.0.2.1"),
    ] {
        cluster
            .create(slices, &slice(name, manager, address))
            .unwrap();
    }
    let both = ["10.1.0.1:8080 web", "192.0.2.1:8080 nobody"];
    eventually("the endpoints of two slices", async || {
        (endpoints(&registry) == both).then_some(())
    })
    .await;

    let unready =
        json!({"endpoints": [{"addresses": ["192.0.2.1"], "conditions": {"ready": false}}]});
    cluster.merge(&format!("{slices}/two"), &unready).unwrap();
    eventually("the end of one that is not ready", async || {
        (endpoints(&registry) == both[..1]).then_some(())
    })
    .await;
    let moved = json!({"metadata": {"labels": {"kubernetes.io/service-name": "other"}}});
    cluster.merge(&format!("{slices}/one"), &moved).unwrap();
    let ready = json!({"endpoints": [{"addresses": ["10.1.0.1"]}]});
    cluster.merge(&format!("{slices}/two"), &ready).unwrap();
    eventually("the other slice alone", async || {
        (endpoints(&registry) == both[..1]).then_some(())
    })
    .await;
    cluster.delete(&format!("{slices}/two")).unwrap();
    eventually("a service of others", async || {
        endpoints(&registry).is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_and_networks_are_known() {
    let test = "nodes_and_networks_are_known";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return;
    }
    let cluster = Kubernetes::start().unwrap();
    let node = |name: &str, network: &str| {
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "spec": {"podCIDR": network, "podCIDRs": [network]},
        })
    };
    cluster
        .create("/api/v1/nodes", &node("a", "10.1.0.0/24"))
        .unwrap();
    let sink = Sink::default();
    let registry = sink.registry.clone();
    let client = with_rights_of(&cluster, "auth-daemon").await;
    let mut is_synced = discover(client, true, sink);
    is_synced.wait_for(|synced| *synced).await.unwrap();
    let contains = |address: &str| {
        let snapshot = registry.snapshot();
        snapshot.networks().contain(address.parse().unwrap())
    };
    assert!(contains("10.1.0.9"), "the pods of node a");
    eventually("the API server's own network of services", async || {
        contains("10.96.3.4").then_some(())
    })
    .await;

    cluster
        .create("/api/v1/nodes", &node("b", "10.1.1.0/24"))
        .unwrap();
    let addresses =
        json!({"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.2"}]}});
    cluster.merge("/api/v1/nodes/b/status", &addresses).unwrap();
    let more = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": "more"}, "spec": {"cidrs": ["10.97.0.0/24"]},
    });
    cluster
        .create("/apis/networking.k8s.io/v1/servicecidrs", &more)
        .unwrap();
    eventually("a new node and a new network", async || {
        let snapshot = registry.snapshot();
        let node = snapshot.node_at("192.0.2.2".parse().unwrap())?;
        (node.name == "b" && contains("10.1.1.9") && contains("10.97.0.1")).then_some(())
    })
    .await;
    let disabled = json!({"metadata": {"annotations": {"auth-daemon.io/tunnel": "disabled"}}});
    cluster.merge("/api/v1/nodes/b", &disabled).unwrap();
    eventually("a disabled tunnel", async || {
        registry.snapshot().node("b")?.tunnel_disabled.then_some(())
    })
    .await;
    cluster.delete("/api/v1/nodes/b").unwrap();
    eventually("the end of a node", async || {
        (!contains("10.1.1.9")).then_some(())
    })
    .await;
}

/// A definition of one of Istio's kinds whose only version is served, or not.
fn definition(plural: &str, kind: &str, is_served: bool) -> serde_json::Value {
    let schema = json!({"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.security.istio.io")},
        "spec": {
            "group": "security.istio.io", "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [{"name": "v1", "served": is_served, "storage": true, "schema": schema}],
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_that_are_defined_but_not_served_yet_are_waited_for() {
    let test = "policies_that_are_defined_but_not_served_yet_are_waited_for";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return;
    }
    let cluster = Kubernetes::start().unwrap();
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    cluster
        .create(
            definitions,
            &definition("authorizationpolicies", "AuthorizationPolicy", false),
        )
        .unwrap();
    let sink = Sink {
        policies: Some(Arc::default()),
        ..Sink::default()
    };
    let policies = sink.policies.clone().unwrap();
    let client = with_rights_of(&cluster, "auth-daemon").await;
    let mut is_synced = discover(client, true, sink);
    // Everything else has been read long before this.
    let early = tokio::time::timeout(
        std::time::Duration::from_secs(3),
        is_synced.wait_for(|synced| *synced),
    );
    assert!(
        early.await.is_err(),
        "an API server without its custom resources counts as a cluster without policies"
    );
    cluster
        .merge(
            &format!("{definitions}/authorizationpolicies.security.istio.io"),
            &json!({"spec": definition("authorizationpolicies", "AuthorizationPolicy", true)["spec"]}),
        )
        .unwrap();
    let path = "/apis/security.istio.io/v1/namespaces/default/authorizationpolicies";
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "nobody"}, "spec": {},
    });
    eventually("a served kind", async || {
        cluster.create(path, &policy).ok().map(|_| ())
    })
    .await;
    // PeerAuthentication is not defined at all, which is a cluster without such policies.
    is_synced.wait_for(|synced| *synced).await.unwrap();
    eventually("the policy", async || {
        (policies.current().objects().len() == 1).then_some(())
    })
    .await;
}
