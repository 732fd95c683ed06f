//! Answers to the question of which calls are allowed, based on a folder of manifests or on a daemon's state.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use anyhow::{Context, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{
    Connection, Policies,
    api::{Kind, Mode, Object, Values},
    explain,
    reading::Policy,
};
use crate::{Identity, Memberships, ObjectName, Service, Workload};

/// The known pods, services and policies, and where they come from.
#[derive(Clone, Debug)]
pub struct Known {
    /// Name of the source in errors: a folder, or a node.
    pub source: String,
    /// Pods in the mesh.
    pub pods: Vec<Arc<Workload>>,
    /// Services.
    pub services: Vec<Arc<Service>>,
    /// All policies.
    pub policies: Arc<Policies>,
    /// What decides which pods are in the mesh.
    pub memberships: Memberships,
    /// Namespaces whose label puts their pods into the mesh.
    pub enabled_namespaces: Vec<EnabledNamespace>,
    /// Namespaces that the cluster or the daemon itself runs in.
    pub system_namespaces: Vec<String>,
    /// Files of policies, if they come from files.
    pub files: HashMap<(Kind, ObjectName), String>,
}

/// A namespace whose label puts its pods into the mesh.
#[derive(Clone, Debug)]
pub struct EnabledNamespace {
    /// Name of the namespace.
    pub name: String,
    /// File with the label.
    pub file: Option<String>,
}

/// The cluster's own namespace.
pub const KUBE_SYSTEM: &str = "kube-system";

/// A caller.
struct Client {
    name: String,
    identity: Identity,
    /// Addresses of the pod that calls. Empty if no pod is known.
    addresses: Vec<IpAddr>,
}

/// The question whether a call is allowed.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Question {
    /// The caller: a SPIFFE ID, or a pod as `NAMESPACE/NAME`.
    pub from: String,
    /// The server: a pod or service as `NAMESPACE/NAME[:PORT]`.
    pub to: String,
    /// Source address of the call, instead of the pod's own.
    pub source_ip: Option<IpAddr>,
}

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Answer {
    /// Human-readable text.
    pub text: String,
    /// Whether all calls are allowed (check), or all policies are readable (list).
    pub good: bool,
    /// Warnings for the authors of policies.
    pub warnings: Vec<String>,
}

impl Known {
    /// Explains whether the call is allowed. Fails if that cannot be determined.
    pub fn check(&self, question: &Question) -> anyhow::Result<Answer> {
        let mut clients = self.clients(&question.from)?;
        if let Some(source) = question.source_ip {
            for client in &mut clients {
                client.addresses = vec![source.to_canonical()];
            }
        }
        let servers = self.servers(&question.to)?;
        // Most pods share the same explanation, so each explanation is printed once.
        let mut calls_by_text: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut all_allowed = true;
        for client in &clients {
            for (server, port) in &servers {
                let (address, source) = self.route(client, server)?;
                let connection = Connection {
                    client: Some(&client.identity),
                    source,
                    destination: SocketAddr::new(address, *port),
                };
                let explanation = explain(
                    &self.policies,
                    &server.name.namespace,
                    &server.labels,
                    &connection,
                );
                all_allowed &= explanation.verdict.allowed();
                let from = match source.is_unspecified() {
                    true => client.name.clone(),
                    false => format!("{} at {source}", client.name),
                };
                let call = format!("{from} to {} at {}", server.name, connection.destination);
                calls_by_text
                    .entry(explanation.to_string())
                    .or_default()
                    .push(call);
            }
        }
        let mut text = String::new();
        for (explanation, calls) in calls_by_text {
            if !text.is_empty() {
                text.push('\n');
            }
            let more = match calls.len() - 1 {
                0 => String::new(),
                more => format!(", and {more} more"),
            };
            text.push_str(&format!("{}{more}:\n{explanation}", calls[0]));
        }
        Ok(Answer {
            text,
            good: all_allowed,
            warnings: self.warnings(),
        })
    }

    /// Returns a table of all policies.
    pub fn list(&self) -> Answer {
        let mut rows =
            vec![["KIND", "NAME", "DOES", "SELECTOR", "PODS", "RULES"].map(str::to_owned)];
        let mut readable = true;
        for policy in self.policies.policies() {
            let object = &policy.object;
            let (does, rules) = match &**object {
                Object::Authorization(policy) => {
                    let dry = if policy.dry_run { " (dry run)" } else { "" };
                    let does = format!("{}{dry}", policy.action.as_str());
                    (does, policy.rules.len().to_string())
                }
                Object::Peer(policy) => {
                    let mode = policy.mode.map_or("UNSET", Mode::as_str);
                    let ports = policy
                        .ports
                        .iter()
                        .map(|(port, mode)| format!(" {port}:{}", mode.as_str()));
                    let does = format!("{mode}{}", ports.collect::<String>());
                    (does, "-".to_owned())
                }
                Object::Unreadable(_) => {
                    readable = false;
                    ("REFUSED".to_owned(), "-".to_owned())
                }
            };
            let selector = object.selector();
            rows.push([
                object.kind().to_string(),
                object.name().to_string(),
                does,
                match selector.is_empty() {
                    true => "-".to_owned(),
                    false => selector.to_string(),
                },
                self.selected(policy).count().to_string(),
                rules,
            ]);
        }
        let text = table(&rows);
        Answer {
            text,
            good: readable,
            warnings: self.warnings(),
        }
    }

    /// Returns the pods that `policy` applies to.
    pub(super) fn selected(&self, policy: &Policy) -> impl Iterator<Item = &Arc<Workload>> {
        self.pods.iter().filter(|pod| policy.applies_to(pod))
    }

    fn clients(&self, from: &str) -> anyhow::Result<Vec<Client>> {
        let client = |pod: &Arc<Workload>| Client {
            name: format!("{} ({})", pod.name, pod.identity),
            identity: pod.identity.clone(),
            addresses: pod.addresses.clone(),
        };
        if !from.starts_with("spiffe://") {
            let name = object_name(from).with_context(|| format!("--from {from:?}"))?;
            let pod = self
                .pod(&name)
                .with_context(|| self.missing("pod", &name))?;
            return Ok(vec![client(pod)]);
        }
        let identity: Identity = from.parse().with_context(|| format!("--from {from:?}"))?;
        let mut clients: Vec<_> = self
            .pods
            .iter()
            .filter(|pod| pod.identity == identity)
            .map(client)
            .collect();
        if clients.is_empty() {
            clients.push(Client {
                name: identity.to_string(),
                identity,
                addresses: Vec::new(),
            });
        }
        Ok(clients)
    }

    /// Returns the pods that are called, each with the port of the app.
    fn servers(&self, to: &str) -> anyhow::Result<Vec<(&Workload, u16)>> {
        let bad = || format!("--to {to:?}");
        let (target, port) = match to.rsplit_once(':') {
            Some((target, port)) => {
                let port = port.parse().map_err(|_| anyhow!("{port:?} is not a port"));
                (target, Some(port.with_context(bad)?))
            }
            None => (to, None),
        };
        let (kind, name) = match target.split_once('/') {
            Some((kind @ ("pod" | "service"), name)) if name.contains('/') => (Some(kind), name),
            _ => (None, target),
        };
        let name = object_name(name).with_context(bad)?;
        let pod = self.pod(&name).filter(|_| kind != Some("service"));
        let service = self.services.iter().find(|service| service.name == name);
        match (pod, service.filter(|_| kind != Some("pod"))) {
            (Some(_), Some(_)) => {
                bail!("{name} is a pod and a service; use pod/{name} or service/{name}")
            }
            (Some(pod), None) => {
                let named: Vec<u16> = pod.named_ports.values().copied().collect();
                let port = one_port(port, &named).with_context(bad)?;
                Ok(vec![(pod, port)])
            }
            (None, Some(service)) => self.endpoints(service, port).with_context(bad),
            (None, None) => bail!(self.missing(kind.unwrap_or("pod or service"), &name)),
        }
    }

    pub(super) fn endpoints(
        &self,
        service: &Service,
        port: Option<u16>,
    ) -> anyhow::Result<Vec<(&Workload, u16)>> {
        let ports: Vec<u16> = service.ports.iter().map(|port| port.port).collect();
        let number = one_port(port, &ports)?;
        let port = service.ports.iter().find(|port| port.port == number);
        let port =
            port.with_context(|| format!("service {} has no TCP port {number}", service.name))?;
        let endpoints: Vec<_> = self
            .pods
            .iter()
            .filter(|pod| service.selects(pod))
            .filter(|pod| match &service.pinned_identities {
                Some(pinned) => pinned.contains(&pod.identity),
                None => true,
            })
            .filter_map(|pod| Some((&**pod, port.target.on(pod)?)))
            .collect();
        ensure!(
            !endpoints.is_empty(),
            "service {} has no pod in {} that may run it",
            service.name,
            self.source
        );
        Ok(endpoints)
    }

    /// Returns the server's and the client's address, of the same family if possible.
    fn route(&self, client: &Client, server: &Workload) -> anyhow::Result<(IpAddr, IpAddr)> {
        let address = server.addresses.first();
        let address = *address.with_context(|| format!("pod {} has no address", server.name))?;
        let Some(first) = client.addresses.first() else {
            ensure!(
                !self
                    .policies
                    .compares(|values| matches!(values, Values::Sources(_))),
                "policies compare source addresses, and no pod in {} is {}; set the source address with --source-ip",
                self.source,
                client.identity
            );
            return Ok((address, Ipv4Addr::UNSPECIFIED.into()));
        };
        let mut routes = server.addresses.iter().filter_map(|to| {
            let same = |from: &&IpAddr| from.is_ipv4() == to.is_ipv4();
            Some((*to, *client.addresses.iter().find(same)?))
        });
        Ok(routes.next().unwrap_or((address, *first)))
    }

    pub(super) fn pod(&self, name: &ObjectName) -> Option<&Arc<Workload>> {
        self.pods.iter().find(|pod| pod.name == *name)
    }

    pub(super) fn missing(&self, what: &str, name: &ObjectName) -> String {
        format!(
            "{} has no {what} {name} that is part of the mesh (a pod needs status.podIP, a service a clusterIP)",
            self.source
        )
    }
}

/// Formats rows of cells as a table, with columns as wide as their widest cell.
pub fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let widths = std::array::from_fn::<usize, COLUMNS, _>(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    });
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths);
        let cells: Vec<_> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn one_port(given: Option<u16>, known: &[u16]) -> anyhow::Result<u16> {
    match (given, known) {
        (Some(port), _) => Ok(port),
        (None, [port]) => Ok(*port),
        (None, []) => bail!("add the port, as :80"),
        (None, known) => {
            let known: Vec<_> = known.iter().map(u16::to_string).collect();
            bail!("add one of the ports: {}", known.join(", "))
        }
    }
}

fn object_name(text: &str) -> anyhow::Result<ObjectName> {
    match text.split_once('/') {
        Some((namespace, name))
            if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
        {
            Ok(ObjectName {
                namespace: namespace.into(),
                name: name.into(),
            })
        }
        _ => bail!("is not NAMESPACE/NAME"),
    }
}
