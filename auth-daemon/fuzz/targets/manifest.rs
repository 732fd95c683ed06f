//! Kubernetes manifests: never a panic, whatever the file holds, down to the registry that is made of it.
#![no_main]

use auth_daemon::{
    discovery::{files::parse, manifest::Object},
    mesh::{Inventory, Snapshot},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let trust_domain = "cluster.local".parse().expect("a trust domain");
    let Ok(objects) = parse(bytes, &trust_domain) else {
        return;
    };
    let mut inventory = Inventory::default();
    for object in objects {
        match object {
            Object::Pod(pod) => inventory.workloads.push(*pod),
            Object::Service(service) => inventory.services.push(*service),
        }
    }
    let snapshot = Snapshot::new(inventory);
    let addresses: Vec<_> = snapshot
        .pod_addresses()
        .chain(snapshot.service_addresses())
        .collect();
    for address in addresses {
        for port in [0, 80, 8080, 65535] {
            let _ = snapshot.resolve((address, port).into());
        }
    }
});
