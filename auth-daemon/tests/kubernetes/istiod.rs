//! A real istiod as CA and as control plane.

use std::{fs, path::Path, sync::Arc, time::Duration};

use auth_daemon::{
    config::{CaServer, Proof},
    discovery::{Sink, istiod},
    issuer::{CaClient, Issuer as _, Link},
    proxy::lookups::Lookups,
};
use auth_mesh::{
    AddressKind, Hbone, Identity, Published, Registry, TrustDomain,
    policy::{Connection, Policies, Settings, api::Mode},
};
use auth_tunnel::tls::svid::Svid;
use auth_xds::{Caller, Mesh};
use mesh_tests::{Istiod, IstiodOptions, Kubernetes, TokenOptions, chart};
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{eventually, with_rights_of};

const DAEMON: &str = "auth-daemon";
pub(crate) const OWN: &str = "auth-system";
pub(crate) const NODE: &str = "node-a";

/// An API server with istiod, and this daemon's pod on `NODE`.
pub(crate) struct Stage {
    pub(crate) istiod: Istiod,
    pub(crate) cluster: Kubernetes,
    pub(crate) server: CaServer,
}

/// What the daemon has learned.
pub(crate) struct Learned {
    pub(crate) registry: Arc<Registry>,
    pub(crate) policies: Arc<Published<Policies>>,
}

impl Stage {
    /// `None` where there is no API server or no istiod.
    fn set(test: &str) -> Option<Self> {
        Self::set_with(test, |_| IstiodOptions::default())
    }

    /// Like the above, with options of istiod, which may have files in the folder.
    pub(crate) fn set_with(
        test: &str,
        options: impl FnOnce(&Path) -> IstiodOptions,
    ) -> Option<Self> {
        if let Some(why) = Istiod::missing() {
            println!("SKIPPED {test}: {why}");
            return None;
        }
        let cluster = Kubernetes::start().unwrap();
        for objects in [chart::rendered_file(), chart::folder().join("crds")] {
            cluster.apply(&objects).unwrap();
        }
        let own = cluster.pod(OWN, "daemon-a", DAEMON, NODE, "192.0.2.1");
        let own = own.unwrap();
        let kubeconfig = cluster.kubeconfig();
        let of_istiod = options(kubeconfig.parent().unwrap());
        let trusted = format!("{OWN}/{DAEMON}");
        let istiod = Istiod::start_with(&cluster, &trusted, of_istiod).unwrap();
        let options = TokenOptions {
            audience: Some(Istiod::AUDIENCE),
            pod: Some(&own),
            seconds: None,
        };
        let token = cluster.token(OWN, DAEMON, &options).unwrap();
        let root_file = istiod.root_file(&cluster, OWN).unwrap();
        let token_file = root_file.with_file_name("istio-token");
        fs::write(&token_file, token).unwrap();
        let server = CaServer {
            section: "ca",
            address: istiod.address().to_string(),
            server_name: Istiod::SERVER_NAME.into(),
            root_file,
            proof: Proof::Token(token_file),
            cluster_id: "Kubernetes".into(),
        };
        Some(Self {
            cluster,
            istiod,
            server,
        })
    }

    /// Creates an object. The API server serves a kind a moment after it was defined.
    pub(crate) async fn create(&self, path: &str, object: Value) {
        eventually(path, async || self.cluster.create(path, &object).ok()).await;
    }

    /// Follows istiod and the API server as the daemon of `NODE`, in PERMISSIVE mode, until everything is read once.
    pub(crate) async fn follow(&self) -> Learned {
        self.follow_with(None).await
    }

    /// Like the above. With `lookups`, subscribes only to what is asked for there.
    pub(crate) async fn follow_with(&self, lookups: Option<Arc<Lookups>>) -> Learned {
        let settings = istiod::Settings {
            mesh: Mesh {
                trust_domain: "cluster.local".parse().unwrap(),
                cluster: "Kubernetes".into(),
                network: String::new(),
                root_namespace: "istio-system".into(),
            },
            caller: Caller {
                pod: "daemon-a".into(),
                namespace: OWN.into(),
                node: NODE.into(),
            },
        };
        let in_force = Arc::new(Published::holding(Policies::compile(
            Settings {
                mode: Mode::Permissive,
                ..Settings::default()
            },
            [],
        )));
        let sink = Sink {
            policies: Some(in_force.clone()),
            lookups,
            ..Sink::default()
        };
        let registry = sink.registry.clone();
        let client = with_rights_of(&self.cluster, DAEMON).await;
        let link = Link::to_istiod(self.server.clone()).unwrap();
        let (synced, mut is_synced) = watch::channel(false);
        tokio::spawn(istiod::run(client, link, settings, sink, synced));
        is_synced.wait_for(|synced| *synced).await.unwrap();
        Learned {
            registry,
            policies: in_force,
        }
    }

    /// Creates a pod, its account, and says that its node accepts HBONE for it.
    pub(crate) fn pod(&self, name: &str, node: &str, address: &str) {
        let pod = self.cluster.pod("shop", name, name, node, address);
        pod.unwrap();
        let announced = json!({"metadata": {"annotations": {
            "ambient.istio.io/redirection": "enabled",
        }}});
        let path = format!("/api/v1/namespaces/shop/pods/{name}/status");
        self.cluster.merge(&path, &announced).unwrap();
    }
}

pub(crate) fn identity(account: &str) -> Identity {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
        .parse()
        .unwrap()
}

/// DER of a CSR.
pub(crate) fn request() -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key);
    csr.unwrap().der().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn istiod_issues_certificates_for_the_pods_of_the_node() {
    let test = "istiod_issues_certificates_for_the_pods_of_the_node";
    let Some(stage) = Stage::set(test) else {
        return;
    };
    stage.cluster.namespace("shop").unwrap();
    for (name, node) in [("web", NODE), ("other", "node-b")] {
        stage.pod(name, node, "10.1.0.1");
    }
    let domain = "cluster.local".parse().unwrap();
    let client = |server| CaClient::start(server, domain, Duration::from_secs(3600)).unwrap();
    let daemon = client(stage.server.clone());
    let csr = request();
    let issued = eventually("a certificate", async || {
        daemon.issue(&identity("web"), &csr).await.ok()
    })
    .await;
    let svid = Svid::parse(&issued.chain[0], &TrustDomain::default()).unwrap();
    assert_eq!(svid.identity, identity("web"));
    assert_eq!(daemon.trust().current().bundle.roots.len(), 1);
    // What runs on another node is not this node's to ask for.
    let refused = daemon.issue(&identity("other"), &csr).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("Unauthenticated"), "{refused}");

    let elsewhere = CaServer {
        cluster_id: "another".into(),
        ..stage.server.clone()
    };
    let domain = "cluster.local".parse().unwrap();
    let lost = CaClient::start(elsewhere, domain, Duration::from_secs(3600)).unwrap();
    let refused = lost.issue(&identity("web"), &csr).await.unwrap_err();
    assert!(refused.to_string().contains("Unauthenticated"), "{refused}");
}

/// Where the service at `address` leads, sorted.
pub(crate) fn endpoints(registry: &Registry, address: &str) -> Vec<String> {
    let Ok(found) = registry.snapshot().resolve(address.parse().unwrap()) else {
        return Vec::new();
    };
    let endpoints = found.endpoints.iter().map(|endpoint| {
        let pod = endpoint.workload.as_ref().unwrap();
        format!("{} {}", endpoint.address, pod.identity.service_account())
    });
    let mut endpoints: Vec<_> = endpoints.collect();
    endpoints.sort();
    endpoints
}

/// Whether pod `web` of this node admits `client`, or plaintext.
pub(crate) fn admits(
    registry: &Registry,
    policies: &Published<Policies>,
    client: Option<&str>,
) -> bool {
    let snapshot = registry.snapshot();
    let Some(web) = snapshot.on_node(NODE).find(|pod| pod.name.name == "web") else {
        return false;
    };
    let client = client.map(identity);
    let view = policies.current().workload("shop", &web.labels);
    view.evaluate(&Connection {
        client: client.as_ref(),
        source: "10.1.0.9".parse().unwrap(),
        destination: "10.1.0.1:8080".parse().unwrap(),
    })
    .allowed()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_follows_istiod_through_an_outage() {
    let test = "the_registry_follows_istiod_through_an_outage";
    let Some(mut stage) = Stage::set(test) else {
        return;
    };
    let ambient = json!({"istio.io/dataplane-mode": "ambient"});
    stage
        .create(
            "/api/v1/namespaces",
            json!({"metadata": {"name": "shop", "labels": ambient}}),
        )
        .await;
    stage.pod("web", NODE, "10.1.0.1");
    stage.pod("api", "node-b", "10.1.0.2");
    stage
        .create(
            "/api/v1/namespaces/shop/services",
            json!({"metadata": {"name": "api"}, "spec": {
                "clusterIP": "10.96.7.7", "selector": {"app": "api"},
                "ports": [{"port": 80, "targetPort": 8080}],
            }}),
        )
        .await;
    stage
        .create(
            "/apis/networking.istio.io/v1/namespaces/shop/workloadentries",
            json!({
                "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
                "metadata": {"name": "vm", "labels": {"app": "api"}},
                "spec": {"address": "10.1.0.7", "serviceAccount": "vm", "labels": {"app": "api"}},
            }),
        )
        .await;
    let deny = |name: &str, client: &str, selector: Value| {
        let principal = format!("cluster.local/ns/shop/sa/{client}");
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name}, "spec": {
                "action": "DENY", "selector": selector,
                "rules": [{"from": [{"source": {"principals": [principal]}}]}],
            },
        })
    };
    let policies_path = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies";
    let web = json!({"matchLabels": {"app": "web"}});
    let api = json!({"matchLabels": {"app": "api"}});
    stage
        .create(policies_path, deny("of-web", "mallory", web.clone()))
        .await;
    stage
        .create(policies_path, deny("of-api", "friend", api))
        .await;

    let Learned {
        registry,
        policies: in_force,
    } = stage.follow().await;
    // Each part arrives when istiod has read it.
    eventually(
        "the endpoints of a service, and who speaks HBONE",
        async || {
            let found = endpoints(&registry, "10.96.7.7:80");
            let snapshot = registry.snapshot();
            let kind = |address: &str| snapshot.kind(address.parse().unwrap());
            let speaks = kind("10.1.0.2") == Some(AddressKind::Pod);
            let does_not = kind("10.1.0.7") == Some(AddressKind::Outside);
            let is_offered = snapshot
                .on_node(NODE)
                .all(|pod| pod.hbone == Hbone::Offered);
            let both = ["10.1.0.2:8080 api", "10.1.0.7:8080 vm"];
            (found == both && speaks && does_not && is_offered).then_some(())
        },
    )
    .await;
    let snapshot = registry.snapshot();
    let own: Vec<_> = snapshot.on_node(NODE).collect();
    assert_eq!((own.len(), own[0].name.name.as_str()), (1, "web"));
    assert!(!own[0].uid.is_empty());
    eventually("a pod's policies", async || {
        let friend = admits(&registry, &in_force, Some("friend"));
        let mallory = admits(&registry, &in_force, Some("mallory"));
        (friend && !mallory).then_some(())
    })
    .await;
    assert!(admits(&registry, &in_force, None), "PERMISSIVE");

    let strict = json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "default"}, "spec": {"mtls": {"mode": "STRICT"}},
    });
    let peers = "/apis/security.istio.io/v1/namespaces/shop/peerauthentications";
    stage.create(peers, strict).await;
    eventually("STRICT, which istiod converts", async || {
        let refused = !admits(&registry, &in_force, None);
        let friend = admits(&registry, &in_force, Some("friend"));
        assert!(friend, "istiod names the new policy before it sends it");
        refused.then_some(())
    })
    .await;

    stage.istiod.stop().unwrap();
    stage.pod("late", "node-b", "10.1.0.3");
    let policy = format!("{policies_path}/of-web");
    stage.cluster.delete(&policy).unwrap();
    stage
        .create(policies_path, deny("of-web-too", "friend", web))
        .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(
        admits(&registry, &in_force, Some("friend")),
        "the state is kept"
    );
    assert!(!admits(&registry, &in_force, Some("mallory")));
    assert_eq!(endpoints(&registry, "10.96.7.7:80").len(), 2);

    stage.istiod.run(&stage.cluster).unwrap();
    eventually("what happened meanwhile", async || {
        let denied = !admits(&registry, &in_force, Some("friend"));
        let deleted = admits(&registry, &in_force, Some("mallory"));
        let new = registry
            .snapshot()
            .pod("10.1.0.3".parse().unwrap())
            .is_some();
        (denied && deleted && new).then_some(())
    })
    .await;
}
