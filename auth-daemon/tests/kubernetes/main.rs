//! What the CA does in a cluster, and what daemons learn there, against a real API server, with no other rights than
//! the chart gives them.

mod attestation;
mod discovery;
mod istiod;
mod istiod_objects;
mod istiod_on_demand;
mod istiod_roots;
mod leader;
mod state;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use mesh_tests::{Kubernetes, chart};

const NAMESPACE: &str = "auth-system";
const ACCOUNT: &str = "auth-ca";
const PATIENCE: Duration = Duration::from_secs(60);

/// The shared API server with the CA's role, and a client that has it; none where there is no API server.
async fn cluster(test: &str) -> Option<(Arc<Kubernetes>, Client)> {
    let cluster = Kubernetes::shared(test)?;
    let client = as_ca(&cluster).await;
    Some((cluster, client))
}

/// A client with the CA's role.
async fn as_ca(cluster: &Kubernetes) -> Client {
    with_rights_of(cluster, ACCOUNT).await
}

/// A client with the rights that the chart gives to `account`.
async fn with_rights_of(cluster: &Kubernetes, account: &str) -> Client {
    cluster.apply(&chart::rendered_file()).unwrap();
    let kubeconfig = cluster.kubeconfig_of(NAMESPACE, account).unwrap();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
    auth_kubernetes::client(config.unwrap()).unwrap()
}

/// Asks until there is an answer.
async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "timed out waiting for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
