//! Names on demand at a real istiod: what nobody has asked for is not known, and what nobody uses is forgotten.

use std::{collections::HashSet, net::IpAddr, sync::Arc, time::Duration};

use auth_daemon::proxy::lookups::{Found, Lookups, NotFound};
use mesh_tests::IstiodOptions;
use serde_json::json;

use crate::{
    eventually,
    istiod::{Learned, NODE, Stage, admits, endpoints},
};

/// Long enough for what the test does with an answer.
const IDLE: Duration = Duration::from_secs(10);
/// Of the pods of the node: `web`, and the daemon's own.
const LOCAL: [&str; 2] = ["10.1.0.1", "192.0.2.1"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// What istiod says of an address. Asks again if it is slow.
pub(crate) async fn answer(lookups: &Lookups, address: &str) -> Found {
    eventually(address, async || lookups.look_up(ip(address)).await.ok()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_asked_for_is_known_while_it_is_used() {
    let test = "only_what_is_asked_for_is_known_while_it_is_used";
    let Some(mut stage) = Stage::set_with(test, |_| IstiodOptions::default()) else {
        return;
    };
    let ambient = json!({"istio.io/dataplane-mode": "ambient"});
    let shop = json!({"metadata": {"name": "shop", "labels": ambient}});
    stage.create("/api/v1/namespaces", shop).await;
    stage.pod("web", NODE, "10.1.0.1");
    stage.pod("api", "node-b", "10.1.0.2");
    stage.pod("alone", "node-b", "10.1.0.3");
    let service = json!({"metadata": {"name": "api"}, "spec": {
        "clusterIP": "10.96.7.7", "selector": {"app": "api"},
        "ports": [{"port": 80, "targetPort": 8080}],
    }});
    let services = "/api/v1/namespaces/shop/services";
    stage.create(services, service).await;

    let lookups = Arc::new(Lookups::new(IDLE));
    let learned = stage.follow_with(Some(lookups.clone())).await;
    let Learned { registry, policies } = learned;
    eventually("the node's own pod", async || {
        admits(&registry, &policies, Some("anyone")).then_some(())
    })
    .await;
    let remote = || {
        let snapshot = registry.snapshot();
        let all = snapshot.addresses().map(|(address, _)| address);
        let local = LOCAL.map(ip);
        all.filter(|address| !local.contains(address))
            .collect::<HashSet<_>>()
    };
    assert!(remote().is_empty(), "{:?}", remote());

    // A service with its endpoints, and later one more.
    eventually("a service that istiod has read", async || {
        let known = answer(&lookups, "10.96.7.7").await == Found::Known;
        let found = endpoints(&registry, "10.96.7.7:80");
        (known && found == ["10.1.0.2:8080 api"]).then_some(())
    })
    .await;
    assert_eq!(remote(), [ip("10.96.7.7"), ip("10.1.0.2")].into());
    assert_eq!(answer(&lookups, "10.9.9.9").await, Found::Absent);
    stage.pod("api-2", "node-b", "10.1.0.4");
    let label = json!({"metadata": {"labels": {"app": "api"}}});
    let path = "/api/v1/namespaces/shop/pods/api-2";
    stage.cluster.merge(path, &label).unwrap();
    eventually("a new endpoint", async || {
        answer(&lookups, "10.96.7.7").await;
        (endpoints(&registry, "10.96.7.7:80").len() == 2).then_some(())
    })
    .await;
    eventually("a pod that is gone", async || {
        stage
            .cluster
            .delete("/api/v1/namespaces/shop/pods/api")
            .ok();
        answer(&lookups, "10.96.7.7").await;
        (endpoints(&registry, "10.96.7.7:80") == ["10.1.0.4:8080 api-2"]).then_some(())
    })
    .await;
    eventually("what is not used is forgotten", async || {
        remote().is_empty().then_some(())
    })
    .await;
    assert!(admits(&registry, &policies, Some("anyone")));

    // Without istiod, what is known stays, and what is not known is refused.
    assert_eq!(answer(&lookups, "10.1.0.3").await, Found::Known);
    stage.istiod.stop().unwrap();
    let late = lookups.look_up(ip("10.96.7.7")).await;
    assert_eq!(late, Err(NotFound::Late(ip("10.96.7.7"))));
    assert_eq!(lookups.look_up(ip("10.1.0.3")).await, Ok(Found::Known));
    assert_eq!(remote(), [ip("10.1.0.3")].into());
    stage.istiod.run(&stage.cluster).unwrap();
    eventually("an answer", async || {
        (lookups.look_up(ip("10.96.7.7")).await == Ok(Found::Known)).then_some(())
    })
    .await;
    assert_eq!(endpoints(&registry, "10.96.7.7:80").len(), 1);
}
