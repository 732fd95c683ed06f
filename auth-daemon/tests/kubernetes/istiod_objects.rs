//! Istio's own objects, and what keeps pods out of the mesh, as a real istiod reports them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use auth_daemon::proxy::lookups::{Found, Lookups};
use mesh_tests::IstiodOptions;
use serde_json::{Value, json};

use crate::{
    eventually,
    istiod::{NODE, Stage, endpoints, identity},
    istiod_on_demand::answer,
};

/// Excludes the namespaces with that label. istiod publishes its roots in the others alone, so the daemon's must be one of
/// them.
const SELECTORS: &str = "discoverySelectors: [{matchExpressions: [{key: mesh, operator: NotIn, values: [elsewhere]}]}]\n";
const NETWORKING: &str = "/apis/networking.istio.io/v1/namespaces";

fn namespace(name: &str, labels: &Value) -> Value {
    json!({"metadata": {"name": name, "labels": labels}})
}

fn entry(kind: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": kind,
        "metadata": {"name": name}, "spec": spec,
    })
}

fn service(name: &str, address: &str, labels: &Value) -> Value {
    json!({"metadata": {"name": name, "labels": labels}, "spec": {
        "clusterIP": address, "selector": {"app": name},
        "ports": [{"port": 80, "targetPort": 8080}],
    }})
}

/// Defines kinds of the Gateway API, with any fields. istiod reads those of known versions alone.
async fn define_gateways(stage: &Stage) {
    for (kind, plural, scope) in [
        ("Gateway", "gateways", "Namespaced"),
        ("GatewayClass", "gatewayclasses", "Cluster"),
    ] {
        let open = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let schema = json!({"type": "object", "properties": {"spec": open, "status": open}});
        let group = "gateway.networking.k8s.io";
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.{group}"), "annotations": {
                "api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api/pull/2997",
                "gateway.networking.k8s.io/bundle-version": "v1.4.0",
            }},
            "spec": {
                "group": group, "scope": scope,
                "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
                "versions": [{
                    "name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": schema},
                }],
            },
        });
        let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        stage.create(path, definition).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn istios_own_objects_and_opt_outs_are_followed() {
    let test = "istios_own_objects_and_opt_outs_are_followed";
    let options = |_: &_| IstiodOptions {
        mesh_config: SELECTORS.to_owned(),
        ..IstiodOptions::default()
    };
    let Some(stage) = Stage::set_with(test, options) else {
        return;
    };
    define_gateways(&stage).await;
    let ambient = json!({"istio.io/dataplane-mode": "ambient"});
    let elsewhere = json!({"istio.io/dataplane-mode": "ambient", "mesh": "elsewhere"});
    for new in [
        namespace("shop", &ambient),
        namespace("ignored", &elsewhere),
    ] {
        stage.create("/api/v1/namespaces", new).await;
    }
    stage.pod("web", NODE, "10.1.0.1");
    stage.pod("opted-out", NODE, "10.1.0.2");
    let label = json!({"metadata": {"labels": {"istio.io/dataplane-mode": "none"}}});
    let path = "/api/v1/namespaces/shop/pods/opted-out";
    stage.cluster.merge(path, &label).unwrap();
    stage.pod("api", "node-b", "10.1.0.3");
    stage.pod("proxy", "node-b", "10.1.0.4");
    let services = "/api/v1/namespaces/shop/services";
    let behind = json!({"istio.io/use-waypoint": "proxy"});
    let mut api = service("api", "10.96.7.7", &behind);
    api["spec"]["type"] = "NodePort".into();
    api["spec"]["ports"][0]["nodePort"] = 30080.into();
    api["spec"]["externalIPs"] = json!(["198.51.100.1"]);
    stage.create(services, api).await;
    let node = json!({"metadata": {"name": "node-b"}});
    stage.create("/api/v1/nodes", node).await;
    let address = json!({"type": "InternalIP", "address": "192.0.2.9"});
    let status = json!({"status": {"addresses": [address]}});
    let path = "/api/v1/nodes/node-b/status";
    stage.cluster.merge(path, &status).unwrap();
    let mut proxy = service("proxy", "10.96.7.8", &json!({}));
    proxy["spec"]["ports"] = json!([{"port": 15008, "targetPort": 15008}]);
    stage.create(services, proxy).await;
    let ignored = "/api/v1/namespaces/ignored/services";
    stage
        .create(ignored, service("web", "10.96.7.9", &json!({})))
        .await;

    // The gateway controller says where a waypoint is, once its pods are ready.
    let gateways = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways";
    let gateway = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": "proxy", "labels": {"istio.io/waypoint-for": "all"}},
        "spec": {
            "gatewayClassName": "waypoint",
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    });
    stage.create(gateways, gateway).await;
    let address = json!({"type": "Hostname", "value": "proxy.shop.svc.cluster.local"});
    let status = json!({"status": {"addresses": [address]}});
    let path = format!("{gateways}/proxy/status");
    stage.cluster.merge(&path, &status).unwrap();

    let vm = json!({"app": "vm"});
    let spec = json!({"address": "10.1.0.7", "serviceAccount": "vm", "labels": vm});
    let path = format!("{NETWORKING}/shop/workloadentries");
    stage
        .create(&path, entry("WorkloadEntry", "vm", &spec))
        .await;
    let spec = json!({
        "hosts": ["db.example.com"], "addresses": ["10.200.0.1"], "location": "MESH_INTERNAL",
        "resolution": "STATIC", "ports": [{"number": 5432, "name": "tcp", "protocol": "TCP"}],
        "workloadSelector": {"labels": vm},
    });
    let path = format!("{NETWORKING}/shop/serviceentries");
    stage
        .create(&path, entry("ServiceEntry", "db", &spec))
        .await;
    let spec = json!({
        "hosts": ["queue.example.com"], "addresses": ["10.200.0.2"], "location": "MESH_EXTERNAL",
        "resolution": "STATIC", "ports": [{"number": 80, "name": "tcp", "protocol": "TCP", "targetPort": 8080}],
        "endpoints": [{"address": "10.1.0.8", "serviceAccount": "queue"}],
    });
    stage
        .create(&path, entry("ServiceEntry", "queue", &spec))
        .await;

    let registry = stage.follow().await.registry;
    eventually("a ServiceEntry that selects a WorkloadEntry", async || {
        (endpoints(&registry, "10.200.0.1:5432") == ["10.1.0.7:5432 vm"]).then_some(())
    })
    .await;
    eventually("a ServiceEntry with an endpoint", async || {
        (endpoints(&registry, "10.200.0.2:80") == ["10.1.0.8:8080 queue"]).then_some(())
    })
    .await;
    let waypoint = eventually("the waypoint of a service", async || {
        let api: SocketAddr = "10.96.7.7:80".parse().unwrap();
        let snapshot = registry.snapshot();
        let waypoint = snapshot.resolve(api).ok()?.waypoint?;
        snapshot.waypoint(&waypoint, api.ip()).ok()
    })
    .await;
    assert_eq!(waypoint.endpoints[0].address.to_string(), "10.1.0.4:15008");
    assert_eq!(*waypoint.identities, [identity("proxy")].into());

    // The same, if only what is asked for is known.
    let lookups = Arc::new(Lookups::new(Duration::from_secs(600)));
    let asked = stage.follow_with(Some(lookups.clone())).await.registry;
    for address in ["10.200.0.1", "10.96.7.7", "10.96.7.9"] {
        let found = answer(&lookups, address).await;
        let expected = match address {
            "10.96.7.9" => Found::Absent,
            _ => Found::Known,
        };
        assert_eq!(found, expected, "{address}");
    }
    assert_eq!(endpoints(&asked, "10.200.0.1:5432"), ["10.1.0.7:5432 vm"]);
    assert_eq!(asked.snapshot().kind("10.200.0.2".parse().unwrap()), None);
    let api: SocketAddr = "10.96.7.7:80".parse().unwrap();
    let snapshot = asked.snapshot();
    let behind = snapshot.resolve(api).unwrap().waypoint.unwrap();
    let found = snapshot.waypoint(&behind, api.ip()).unwrap();
    assert_eq!(*found.identities, *waypoint.identities);

    // Where the service is exposed, it is behind its waypoint all the same.
    for exposed in ["192.0.2.9:30080", "198.51.100.1:80"] {
        for registry in [&registry, &asked] {
            eventually(exposed, async || {
                let exposed = registry.snapshot().resolve(exposed.parse().unwrap()).ok()?;
                let own = exposed.own_address?.to_string();
                (exposed.waypoint.is_some() && own == "10.96.7.7:80").then_some(())
            })
            .await;
        }
    }

    let snapshot = registry.snapshot();
    let own: Vec<_> = snapshot.on_node(NODE).map(|pod| &pod.name.name).collect();
    assert_eq!(own, ["web"]);
    let ignored = endpoints(&registry, "10.96.7.9:80");
    assert!(ignored.is_empty(), "{ignored:?}");
}
