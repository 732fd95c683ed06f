//! Responses of istiod: never a panic, down to the registry and the policies that are made of them.

use std::collections::HashSet;

use auth_mesh::{
    MeshDefault,
    policy::{Policies, Settings},
};
use auth_xds::{Caller, Mesh, Session, State, discovery::DeltaDiscoveryResponse};
use prost::Message;

pub(super) fn run(bytes: &[u8]) {
    let Ok(response) = DeltaDiscoveryResponse::decode(bytes) else {
        return;
    };
    let mesh = Mesh {
        trust_domain: "cluster.local".parse().expect("a trust domain"),
        cluster: "Kubernetes".into(),
        network: String::new(),
        root_namespace: "istio-system".into(),
    };
    let caller = Caller {
        pod: "daemon".into(),
        namespace: "auth-system".into(),
        node: "a".into(),
    };
    let mut on_demand = Session::on_demand(mesh.clone(), caller.clone());
    on_demand.ask([[10, 96, 0, 7].into(), [10, 1, 0, 1].into()]);
    on_demand.requests();
    for response in [response.clone(), response.clone()] {
        on_demand.take(response);
        on_demand.requests();
    }
    on_demand.open();
    on_demand.release(&HashSet::from([[10, 96, 0, 7].into()]));
    let mut session = Session::new(mesh.clone(), caller);
    let mut state = State::new(mesh, "a".into(), MeshDefault::default());
    // The second time, everything is known.
    for response in [response.clone(), response] {
        for change in session.take(response).changes {
            state.take(change);
        }
    }
    let policies = Policies::compile(Settings::default(), state.policies().unwrap_or_default());
    let snapshot = state.snapshot();
    for pod in snapshot.workloads() {
        policies.workload(&pod.name.namespace, &pod.labels);
    }
    let addresses: Vec<_> = snapshot.addresses().map(|(address, _)| address).collect();
    for address in addresses {
        for port in [0, 80, 8080, 65535] {
            let found = snapshot.resolve((address, port).into());
            if let Some(waypoint) = found.ok().and_then(|found| found.waypoint) {
                // Without identities, secure naming would refuse every proxy.
                if let Ok(proxies) = snapshot.waypoint(&waypoint, address) {
                    assert!(!proxies.identities.is_empty());
                }
            }
        }
    }
}
