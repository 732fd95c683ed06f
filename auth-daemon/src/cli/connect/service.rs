//! Where a service's endpoints are, and who may answer for it: as the daemons know it, but for one service only.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::{Context, anyhow, bail};
use kube::Client;

use super::access::refused;
use crate::{
    cli::manifests,
    discovery::{
        kubernetes,
        manifest::{self, Object},
    },
};
use auth_kubernetes::{Objects, objects};
use auth_mesh::{
    Destination, Inventory, ObjectName, Service, Snapshot, TrustDomain, Workload, policy::Settings,
};

/// Where services are looked up.
#[derive(Clone)]
pub(super) enum Services {
    Files(PathBuf, TrustDomain),
    Cluster(Client, TrustDomain),
}

impl Services {
    /// Returns the endpoints of `service` that are ready and in the mesh, and the identities that may answer.
    pub(super) async fn find(
        &self,
        service: &ObjectName,
        port: u16,
    ) -> anyhow::Result<Destination> {
        let (found, pods) = match self {
            Self::Files(path, trust_domain) => {
                let settings = Settings {
                    trust_domain: trust_domain.clone(),
                    ..Settings::default()
                };
                let known = manifests::read(path, settings)?;
                let found = known
                    .services
                    .into_iter()
                    .find(|known| known.name == *service);
                (found, known.pods)
            }
            Self::Cluster(client, trust_domain) => {
                in_cluster(client, trust_domain, service).await?
            }
        };
        let found =
            found.with_context(|| format!("there is no service {service} with a cluster IP"))?;
        resolve(&found, &pods, port)
    }
}

fn resolve(service: &Service, pods: &[Arc<Workload>], port: u16) -> anyhow::Result<Destination> {
    let name = &service.name;
    let Some(address) = service.addresses.first() else {
        bail!("service {name} has no cluster IP");
    };
    if service.selector.is_empty() {
        bail!("service {name} selects no pods: its endpoints are not in the mesh");
    }
    if let Some(waypoint) = &service.waypoint {
        bail!(
            "service {name} is reached through a waypoint, {waypoint:?}, which this command cannot"
        );
    }
    let snapshot = Snapshot::new(Inventory {
        workloads: pods.iter().map(|pod| Workload::clone(pod)).collect(),
        services: vec![service.clone()],
    });
    let found = snapshot.resolve(SocketAddr::new(*address, port))?;
    let meshed = found.endpoints.iter().filter(|endpoint| endpoint.meshed);
    Ok(Destination {
        endpoints: meshed.cloned().collect(),
        ..found
    })
}

/// Asks the API server for the service and the pods that it selects.
async fn in_cluster(
    client: &Client,
    trust_domain: &TrustDomain,
    name: &ObjectName,
) -> anyhow::Result<(Option<Arc<Service>>, Vec<Arc<Workload>>)> {
    let namespace = &name.namespace;
    let services = Objects::<objects::Service>::of(client.clone(), namespace);
    let found = services
        .get(&name.name)
        .await
        .map_err(|error| anyhow!(refused(error, "get on services", namespace)))?;
    let read = found.map(|found| manifest::service(found, trust_domain));
    let Some(Object::Service(service)) =
        read.transpose().map_err(|error| anyhow!(error))?.flatten()
    else {
        return Ok((None, Vec::new()));
    };
    let selector = service.selector.iter();
    let selector: Vec<_> = selector
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    if selector.is_empty() {
        return Ok((Some(service), Vec::new()));
    }
    let selected = Objects::<objects::Pod>::of(client.clone(), namespace)
        .list(&selector.join(","))
        .await
        .map_err(|error| anyhow!(refused(error, "list on pods", namespace)))?;
    let mut pods = Vec::new();
    for pod in selected {
        if let Some(Object::Pod(pod)) =
            kubernetes::pod(pod, trust_domain).map_err(|error| anyhow!(error))?
        {
            pods.push(pod);
        }
    }
    Ok((Some(service), pods))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::discovery::files;

    const MESH: &str = "
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: web-1, namespace: shop, labels: {app: web}},
   spec: {serviceAccountName: web, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]},
   status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: 'True'}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: web-2, namespace: shop, labels: {app: web}},
   spec: {serviceAccountName: web, containers: []}, status: {podIP: 10.0.0.2, conditions: [{type: Ready, status: 'False'}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: out, namespace: shop, labels: {app: web, auth-daemon.io/mesh: disabled}},
   spec: {serviceAccountName: out, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]},
   status: {podIP: 10.0.0.3, conditions: [{type: Ready, status: 'True'}]}}
- {apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
   spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: http}]}}
- {apiVersion: v1, kind: Service, metadata: {name: bare, namespace: shop},
   spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}}
- {apiVersion: v1, kind: Service, metadata: {name: headless, namespace: shop},
   spec: {clusterIP: None, selector: {app: web}, ports: [{port: 80}]}}
";

    async fn find(name: &str, port: u16) -> Result<(Vec<String>, String), String> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("mesh.yaml"), MESH).unwrap();
        assert_eq!(files::manifests(folder.path()).unwrap().len(), 1);
        let services = Services::Files(folder.path().to_owned(), TrustDomain::default());
        let name = ObjectName {
            namespace: "shop".into(),
            name: name.into(),
        };
        let found = services.find(&name, port).await;
        let found = found.map_err(|error| error.to_string())?;
        let endpoints = found.endpoints.iter();
        let endpoints = endpoints.map(|endpoint| endpoint.address.to_string());
        Ok((endpoints.collect(), found.allowed()))
    }

    #[tokio::test]
    async fn finds_ready_endpoints_in_the_mesh() {
        let expected = (
            vec!["10.0.0.1:8080".to_owned()],
            "spiffe://cluster.local/ns/shop/sa/web".to_owned(),
        );
        assert_eq!(find("web", 80).await, Ok(expected));
        for (name, port, why) in [
            ("web", 81, "no TCP port 81"),
            ("wep", 80, "no service shop/wep"),
            ("headless", 80, "with a cluster IP"),
            ("bare", 80, "selects no pods"),
        ] {
            let error = find(name, port).await.unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
