//! What the policies mean for one pod: which of them select it, and which Services it may reach.

use std::net::SocketAddr;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::{Connection, api::Object, question::Known, reading::Policy};
use crate::{ObjectName, Service, Workload};

/// The most ports of Services in an answer.
const MAX_PORTS: usize = 512;
/// The most pods that are judged for an answer. A port is judged with all pods of its Service or not at all.
const MAX_JUDGED: usize = 8192;

/// What the policies mean for one pod.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Selecting {
    /// The mutual TLS mode of the pod, and where it is set.
    pub mode: String,
    /// The policies that select the pod, in the words of `policy check`.
    pub policies: Vec<String>,
    /// The Services that the pod may reach or not, by namespace, name and port.
    pub reach: Vec<Reach>,
    /// Ports of Services that are not in the answer, because there are too many.
    pub left_out: usize,
}

/// Whether a pod may reach a port of a Service, by the policies.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Reach {
    /// The Service and the port, as `namespace/name:port`.
    pub service: String,
    /// Whether all of its pods allow it.
    pub allowed: bool,
    /// Why: the decision for the first pod that denies it, else for the first.
    pub why: String,
}

impl Known {
    /// Says which policies select the pod `name`, and which Services it may reach. Fails if the pod is not known.
    pub fn selecting(&self, name: &ObjectName) -> anyhow::Result<Selecting> {
        let pod = (self.pod(name)).with_context(|| self.missing("pod", name))?;
        let view = self.policies.workload(&name.namespace, &pod.labels);
        // Port 0 is nobody's, so it has the mode of the ports that no policy names.
        let mut mode = view.mode(0).to_string();
        for (port, other) in &view.ports {
            mode.push_str(&format!("; port {port}: {other}"));
        }
        let policies = self.policies.policies().iter();
        let policies = policies.filter(|policy| policy.applies_to(pod)).map(words);
        let mut answer = Selecting {
            mode,
            policies: policies.collect(),
            reach: Vec::new(),
            left_out: 0,
        };
        let mut judged = 0;
        for service in &self.services {
            for port in &service.ports {
                if answer.reach.len() == MAX_PORTS || judged >= MAX_JUDGED {
                    answer.left_out += 1;
                    continue;
                }
                // A Service without pods cannot be reached, whatever the policies are.
                let Ok(servers) = self.endpoints(service, Some(port.port)) else {
                    continue;
                };
                judged += servers.len();
                answer
                    .reach
                    .extend(self.reach(pod, service, port.port, &servers));
            }
        }
        Ok(answer)
    }

    /// Returns `None` if none of the servers has an address.
    fn reach(
        &self,
        pod: &Workload,
        service: &Service,
        port: u16,
        servers: &[(&Workload, u16)],
    ) -> Option<Reach> {
        let mut first = None;
        for (server, target) in servers {
            let Some(address) = server.addresses.first() else {
                continue;
            };
            let source = pod.address_like(*address);
            let connection = Connection {
                client: Some(&pod.identity),
                source: source.or(pod.addresses.first().copied())?,
                destination: SocketAddr::new(*address, *target),
            };
            let view = self
                .policies
                .workload(&server.name.namespace, &server.labels);
            let verdict = view.evaluate(&connection);
            let reach = Reach {
                service: format!("{}:{port}", service.name),
                allowed: verdict.allowed(),
                why: verdict.decision.to_string(),
            };
            if !reach.allowed {
                return Some(reach);
            }
            first.get_or_insert(reach);
        }
        first
    }
}

/// Describes a policy that selects a pod, as `policy check` does.
fn words(policy: &Policy) -> String {
    let object = &*policy.object;
    let does = super::explain::does(object);
    let selector = object.selector();
    let selects = match selector.is_empty() {
        true => "selects all pods of its namespaces".to_owned(),
        false => format!("selects {selector}"),
    };
    let trouble = match object {
        Object::Unreadable(unreadable) => format!(
            "; {}: {}; {} instead",
            unreadable.field, unreadable.reason, unreadable.instead
        ),
        _ => String::new(),
    };
    let (kind, name) = (object.kind(), &policy.name);
    format!("{kind} {name} ({does}): {selects}{trouble}")
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use serde_json::json;

    use super::*;
    use crate::{
        Memberships, Port, TargetPort,
        policy::{Policies, Settings},
    };

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    fn known() -> Known {
        let pods = ["cart", "web", "db"].map(|app| {
            let account = format!("spiffe://cluster.local/ns/shop/sa/{app}");
            let mut pod = Workload::new(name(app), account.parse().unwrap());
            pod.addresses = vec![[10, 0, 0, app.len() as u8].into()];
            pod.labels.insert("app".into(), app.into());
            Arc::new(pod)
        });
        let services = ["web", "db", "empty"].map(|app| {
            let mut service = Service::new(name(app));
            service.selector.insert("app".into(), app.into());
            service.ports.push(Port {
                name: String::new(),
                port: 80,
                target: TargetPort::Number(8080),
            });
            Arc::new(service)
        });
        let objects = [
            json!({
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "db", "namespace": "shop"},
                "spec": {
                    "selector": {"matchLabels": {"app": "db"}},
                    "rules": [{"from": [{"source": {"serviceAccounts": ["web"]}}]}],
                },
            }),
            json!({
                "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
                "metadata": {"name": "db", "namespace": "shop"},
                "spec": {
                    "selector": {"matchLabels": {"app": "db"}},
                    "portLevelMtls": {"9090": {"mode": "PERMISSIVE"}},
                },
            }),
        ];
        let objects = objects.map(|object| Arc::new(Object::read(&object).unwrap()));
        Known {
            source: "a test".into(),
            pods: pods.into(),
            services: services.into(),
            policies: Arc::new(Policies::compile(Settings::default(), objects)),
            memberships: Memberships::default(),
            enabled_namespaces: Vec::new(),
            system_namespaces: Vec::new(),
            files: HashMap::new(),
        }
    }

    #[test]
    fn names_the_policies_of_a_pod_and_the_services_that_it_reaches() {
        let known = known();
        let db = known.selecting(&name("db")).unwrap();
        let policy = "AuthorizationPolicy shop/db (ALLOW): selects app=db";
        assert_eq!(db.policies[0], policy);
        assert!(db.mode.starts_with("STRICT by "), "{}", db.mode);
        assert!(db.mode.contains("; port 9090: PERMISSIVE"), "{}", db.mode);

        let cart = known.selecting(&name("cart")).unwrap();
        assert!(cart.policies.is_empty(), "{:?}", cart.policies);
        let reach: Vec<_> = (cart.reach.iter())
            .map(|reach| (reach.service.as_str(), reach.allowed))
            .collect();
        assert_eq!(reach, [("shop/web:80", true), ("shop/db:80", false)]);
        assert!(cart.reach[1].why.contains("shop/db"), "{:?}", cart.reach);
        let web = known.selecting(&name("web")).unwrap();
        assert!(web.reach.iter().all(|reach| reach.allowed));

        let error = known.selecting(&name("none")).unwrap_err().to_string();
        assert!(error.contains("shop/none"), "{error}");
    }
}
