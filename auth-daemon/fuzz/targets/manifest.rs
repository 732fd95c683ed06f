//! Kubernetes manifests: never a panic, whatever the file holds, down to the registry that is made of it.

use auth_daemon::{discovery::files::parse, discovery::manifest::Object};
use auth_mesh::{Edit, Snapshot};

pub(super) fn run(bytes: &[u8]) {
    let trust_domain = "cluster.local".parse().expect("a trust domain");
    let Ok(objects) = parse(bytes, &trust_domain) else {
        return;
    };
    let mut edit = Edit::from(Snapshot::default());
    for (name, object) in objects {
        match object {
            Object::Pod(pod) => edit.pod(pod),
            Object::Service(service) => edit.service(service),
            Object::Slice(slice) => edit.slice(slice),
            Object::Namespace(membership) => edit.namespace(&name.name, membership),
            Object::Node(node) => edit.node(node),
            Object::ServiceNetworks(networks) => edit.service_networks(&name.name, networks),
            // Has no place in a snapshot.
            Object::Policy(_) => {}
        }
    }
    let snapshot = edit.finish();
    let addresses: Vec<_> = snapshot.addresses().map(|(address, _)| address).collect();
    for address in addresses {
        for port in [0, 80, 8080, 65535] {
            let _ = snapshot.resolve((address, port).into());
        }
    }
}
