use std::collections::BTreeSet;

use super::*;
use crate::{Port, TargetPort, Waypoint, WaypointAt};

fn in_default(name: &str) -> ObjectName {
    ObjectName {
        namespace: "default".into(),
        name: name.into(),
    }
}

fn pod(name: &str, account: &str, address: &str, ready: bool) -> Workload {
    let identity = format!("spiffe://cluster.local/ns/default/sa/{account}");
    Workload {
        addresses: vec![address.parse().unwrap()],
        node: "a".into(),
        ready,
        labels: [("app".to_owned(), "web".to_owned())].into(),
        named_ports: [("http".to_owned(), 8080)].into(),
        ..Workload::new(in_default(name), identity.parse().unwrap())
    }
}

fn service(target: TargetPort) -> Service {
    Service {
        addresses: vec!["10.96.0.7".parse().unwrap()],
        ports: vec![Port {
            name: String::new(),
            port: 80,
            target,
        }],
        selector: [("app".to_owned(), "web".to_owned())].into(),
        ..Service::new(in_default("web"))
    }
}

fn resolve(workloads: Vec<Workload>, service: Service) -> Result<Destination, Unreachable> {
    Snapshot::new(Inventory {
        workloads,
        services: vec![service],
    })
    .resolve("10.96.0.7:80".parse().unwrap())
}

#[test]
fn connections_to_a_service_or_pod_with_a_waypoint_go_through_it() {
    let waypoint = |address: &str| {
        let at = WaypointAt::Address(address.parse().unwrap());
        Some(Arc::new(Waypoint { at, port: 15008 }))
    };
    let outside = Workload {
        membership: Some(Membership::Disabled),
        ..pod("one", "web", "10.1.0.1", true)
    };
    let behind = Service {
        waypoint: waypoint("10.1.0.8"),
        ..service(TargetPort::Number(80))
    };
    let found = resolve(vec![outside], behind).unwrap();
    assert_eq!(
        found.waypoint,
        waypoint("10.1.0.8"),
        "whatever its pods are"
    );
    let pod = Workload {
        waypoint: waypoint("10.1.0.9"),
        ..pod("one", "web", "10.1.0.1", true)
    };
    let snapshot = Snapshot::new(Inventory {
        workloads: vec![pod],
        services: vec![service(TargetPort::Number(80))],
    });
    let through = |dialled: &str| snapshot.resolve(dialled.parse().unwrap()).unwrap().waypoint;
    assert_eq!(through("10.1.0.1:80"), waypoint("10.1.0.9"));
    assert_eq!(through("10.96.0.7:80"), None, "the service has none");
}

#[test]
fn service_resolves_to_its_ready_pods() {
    let found = resolve(
        vec![
            pod("one", "web", "10.1.0.1", true),
            pod("two", "web", "10.1.0.2", false),
            pod("three", "api", "10.1.0.3", true),
        ],
        service(TargetPort::Name("http".into())),
    )
    .unwrap();
    let addresses: Vec<_> = found
        .endpoints
        .iter()
        .map(|e| e.address.to_string())
        .collect();
    assert_eq!(addresses, ["10.1.0.1:8080", "10.1.0.3:8080"]);
    let names: Vec<_> = found
        .identities
        .iter()
        .map(Identity::service_account)
        .collect();
    assert_eq!(names, ["api", "web"]);
}

#[test]
fn a_pinned_service_never_uses_another_account() {
    let mut pinned = service(TargetPort::Number(80));
    pinned.pinned_identities =
        Some(["spiffe://cluster.local/ns/default/sa/web".parse().unwrap()].into());
    let found = resolve(
        vec![
            pod("one", "web", "10.1.0.1", true),
            pod("three", "api", "10.1.0.3", true),
        ],
        pinned.clone(),
    )
    .unwrap();
    assert_eq!(found.endpoints.len(), 1);
    assert_eq!(found.identities.len(), 1);
    let none = resolve(vec![pod("three", "api", "10.1.0.3", true)], pinned).unwrap_err();
    assert!(matches!(none, Unreachable::NoEndpoint(_, 80)), "{none}");
}

#[test]
fn an_address_with_two_owners_is_refused() {
    let snapshot = Snapshot::new(Inventory {
        workloads: vec![
            pod("one", "web", "10.1.0.1", true),
            pod("two", "api", "10.1.0.1", true),
        ],
        services: vec![],
    });
    let address = "10.1.0.1:80".parse().unwrap();
    assert!(matches!(
        snapshot.resolve(address),
        Err(Unreachable::Disputed(_))
    ));
    assert!(snapshot.pod(address.ip()).is_none());
    assert_eq!(snapshot.addresses().count(), 1);
    assert!(
        snapshot
            .errors()
            .next()
            .unwrap()
            .contains("by pod default/one and by pod")
    );
}

#[test]
fn an_address_goes_to_the_pod_that_stays() {
    let going = Workload {
        terminating: true,
        ..pod("one", "web", "10.1.0.1", true)
    };
    let snapshot = Snapshot::new(Inventory {
        workloads: vec![going.clone(), pod("two", "api", "10.1.0.1", true)],
        services: vec![],
    });
    let address = "10.1.0.1".parse().unwrap();
    assert_eq!(snapshot.pod(address).unwrap().name.name, "two");
    assert_eq!(snapshot.errors().count(), 0);
    let both = Workload {
        name: in_default("two"),
        ..going.clone()
    };
    let snapshot = Snapshot::new(Inventory {
        workloads: vec![going, both],
        services: vec![],
    });
    assert!(snapshot.is_disputed(address));
}

#[test]
fn terminating_pods_serve_only_without_others() {
    let going = Workload {
        terminating: true,
        ..pod("one", "web", "10.1.0.1", true)
    };
    let http = || service(TargetPort::Number(80));
    let found = resolve(vec![going.clone()], http()).unwrap();
    assert_eq!(found.endpoints.len(), 1);
    let two = pod("two", "web", "10.1.0.2", true);
    let found = resolve(vec![going.clone(), two], http()).unwrap();
    assert_eq!(
        found.endpoints[0].workload.as_ref().unwrap().name.name,
        "two"
    );
    assert_eq!(found.endpoints.len(), 1);
    let failing = Workload {
        ready: false,
        ..going
    };
    assert!(resolve(vec![failing], http()).is_err());
}

#[test]
fn pod_label_precedes_namespace_label_and_default() {
    use Membership::{Disabled, Enabled};
    let default = |membership| MeshDefault {
        membership,
        excluded: ["default".to_owned()].into(),
    };
    for (own, namespace, defaults, meshed) in [
        (None, None, MeshDefault::default(), true),
        (None, None, default(Enabled), false),
        (None, Some(Enabled), default(Disabled), true),
        (None, Some(Disabled), MeshDefault::default(), false),
        (Some(Enabled), Some(Disabled), default(Disabled), true),
        (Some(Disabled), Some(Enabled), MeshDefault::default(), false),
    ] {
        let mut edit = Edit::from(Snapshot::with_defaults(defaults.clone()));
        edit.pod(Workload {
            membership: own,
            ..pod("one", "web", "10.1.0.1", true)
        });
        edit.service(service(TargetPort::Number(80)));
        edit.namespace("default", namespace);
        let snapshot = edit.finish();
        let case = format!("{own:?} {namespace:?} {defaults:?}");
        assert_eq!(snapshot.workloads().count(), usize::from(meshed), "{case}");
        assert_eq!(snapshot.on_node("a").count(), usize::from(meshed), "{case}");
        let expected = match meshed {
            true => [AddressKind::Pod, AddressKind::Service],
            // A service whose pods are all outside the mesh is not a mesh service.
            false => [AddressKind::Outside; 2],
        };
        let kinds: Vec<_> = snapshot.addresses().map(|(_, kind)| kind).collect();
        assert_eq!(kinds, expected, "{case}");
    }
}

#[test]
fn a_service_has_pods_outside_the_mesh_too_unless_it_is_pinned() {
    let outside = Workload {
        host_network: true,
        ..pod("two", "api", "10.1.0.2", true)
    };
    let pods = vec![pod("one", "web", "10.1.0.1", true), outside];
    let found = resolve(pods.clone(), service(TargetPort::Number(80))).unwrap();
    let meshed: Vec<_> = found.endpoints.iter().map(|e| e.meshed).collect();
    assert_eq!(meshed, [true, false]);
    assert_eq!(found.identities.len(), 1, "who may answer a tunnel");
    let mut pinned = service(TargetPort::Number(80));
    pinned.pinned_identities =
        Some(["spiffe://cluster.local/ns/default/sa/api".parse().unwrap()].into());
    let error = resolve(pods, pinned).unwrap_err();
    assert!(matches!(error, Unreachable::NoEndpoint(..)), "{error}");
}

#[test]
fn what_a_kubelet_alone_has_written_takes_no_connections_from_pods_of_the_mesh() {
    let written = Workload {
        without_identity: true,
        membership: Some(Membership::Disabled),
        ..pod("two", "api", "10.1.0.2", true)
    };
    let endpoints = |pods: &[&Workload]| -> Vec<_> {
        let pods = pods.iter().copied().cloned().collect();
        let found = resolve(pods, service(TargetPort::Number(80)));
        let found = found.iter().flat_map(|found| found.endpoints.iter());
        found.map(|one| one.address.ip().to_string()).collect()
    };
    let [ready, unready] = [true, false].map(|ready| pod("one", "web", "10.1.0.1", ready));
    assert_eq!(endpoints(&[&ready, &written]), ["10.1.0.1"]);
    assert!(!endpoints(&[&unready, &written]).contains(&"10.1.0.2".into()));
    // A service without pods of the mesh is left to the node, which chooses a pod.
    assert_eq!(endpoints(&[&written]), ["10.96.0.7"]);
}

#[test]
fn assumes_a_daemon_on_each_node_until_daemons_are_known() {
    let snapshot = Snapshot::default();
    assert!(snapshot.has_daemon("a"));
    let mut edit = Edit::from(snapshot);
    edit.know_daemons();
    for daemon in ["old", "new"] {
        edit.daemon(&in_default(daemon), Some("a"));
    }
    let snapshot = edit.finish();
    assert!(snapshot.has_daemon("a") && !snapshot.has_daemon("b"));
    let mut edit = Edit::from(snapshot);
    edit.daemon(&in_default("old"), None);
    let snapshot = edit.finish();
    assert!(snapshot.has_daemon("a"), "its successor is there");
    let mut edit = Edit::from(snapshot);
    edit.daemon(&in_default("new"), None);
    assert!(!edit.finish().has_daemon("a"));
}

#[test]
fn lists_identities_by_node() {
    let on = |node: &str, pod: Workload| Workload {
        node: node.into(),
        ..pod
    };
    let snapshot = Snapshot::new(Inventory {
        workloads: vec![
            on("a", pod("one", "web", "10.1.0.1", true)),
            on("a", pod("two", "web", "10.1.0.2", false)),
            on("b", pod("three", "api", "10.1.0.3", true)),
            // The address is disputed, but the pod is alive.
            on("b", pod("four", "db", "10.1.0.3", true)),
            on("", pod("five", "cron", "10.1.0.5", true)),
        ],
        services: vec![],
    });
    let runs = |node: &str, account: &str| {
        let identity = format!("spiffe://cluster.local/ns/default/sa/{account}");
        let identity = identity.parse().unwrap();
        snapshot.running(node, &identity).count() > 0
    };
    assert!(runs("a", "web") && runs("b", "api") && runs("b", "db"));
    for (node, account) in [
        ("b", "web"),
        ("a", "api"),
        ("", "cron"),
        ("c", "web"),
        ("a", "x"),
    ] {
        assert!(!runs(node, account), "{account} on {node:?}");
    }
}

#[test]
fn unknown_addresses_and_ports_are_errors() {
    let starting = vec![pod("one", "web", "10.1.0.1", false)];
    let error = resolve(starting.clone(), service(TargetPort::Number(80))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "service default/web has no ready endpoint for port 80 that may run it"
    );
    let snapshot = Snapshot::new(Inventory {
        workloads: starting,
        services: vec![service(TargetPort::Number(80))],
    });
    assert!(matches!(
        snapshot.resolve("10.96.0.7:81".parse().unwrap()),
        Err(Unreachable::NoPort(_, 81))
    ));
    assert!(matches!(
        snapshot.resolve("10.96.0.8:80".parse().unwrap()),
        Err(Unreachable::Unknown(_))
    ));
}

#[test]
fn a_service_that_has_lost_its_last_pod_is_the_meshs_if_the_next_one_would_be() {
    let default = |membership| MeshDefault {
        membership,
        ..MeshDefault::default()
    };
    let outside = Workload {
        membership: Some(Membership::Disabled),
        ..pod("one", "web", "10.1.0.1", true)
    };
    let kind = |service: &Service, pod: Option<&Workload>, membership| {
        let mut edit = Edit::from(Snapshot::with_defaults(default(membership)));
        edit.service(service.clone());
        if let Some(pod) = pod {
            edit.pod(pod.clone());
        }
        edit.finish().kind("10.96.0.7".parse().unwrap()).unwrap()
    };
    let web = service(TargetPort::Number(80));
    let pinned = Service {
        pinned_identities: Some(BTreeSet::new()),
        ..web.clone()
    };
    use AddressKind::{Outside, Service as Meshed};
    use Membership::{Disabled, Enabled};
    assert_eq!(kind(&web, None, Enabled), Meshed);
    assert_eq!(kind(&web, None, Disabled), Outside);
    assert_eq!(kind(&web, Some(&outside), Enabled), Outside);
    assert_eq!(kind(&pinned, Some(&outside), Disabled), Meshed);
    let empty = Snapshot::new(Inventory {
        workloads: vec![],
        services: vec![web],
    });
    let refused = empty.resolve("10.96.0.7:80".parse().unwrap());
    assert!(
        matches!(refused, Err(Unreachable::NoEndpoint(..))),
        "{refused:?}"
    );
}

#[test]
fn mesh_pods_take_addresses_from_outside_pods() {
    let host = Workload {
        host_network: true,
        ..pod("host", "host", "192.0.2.1", true)
    };
    let outside = Workload {
        membership: Some(Membership::Disabled),
        ..pod("out", "out", "10.1.0.9", true)
    };
    let mut edit = Edit::from(Snapshot::default());
    for pod in [&host, &outside] {
        edit.pod(pod.clone());
    }
    let before = edit.finish();
    for address in ["192.0.2.1", "10.1.0.9"] {
        let address: IpAddr = address.parse().unwrap();
        assert_eq!(before.kind(address), Some(AddressKind::Outside));
        let found = before.resolve((address, 80).into()).unwrap();
        assert_eq!(found.endpoints.len(), 1);
        assert_eq!(found.endpoints[0].address, (address, 80).into());
        assert!(!found.endpoints[0].meshed && found.identities.is_empty());
    }
    let address: IpAddr = "10.1.0.9".parse().unwrap();
    assert_eq!(before.describe(address).unwrap(), "pod default/out");
    let mut edit = Edit::from(before.clone());
    edit.pod(Workload {
        terminating: true,
        ..pod("in", "in", "10.1.0.9", true)
    });
    let after = edit.finish();
    assert_eq!(after.kind(address), Some(AddressKind::Pod));
    assert!(!after.is_disputed(address));
    let changes: Vec<_> = after.addresses_since(&before).collect();
    assert_eq!(changes, [(address, Some(AddressKind::Pod))]);
    let mut edit = Edit::from(after);
    edit.remove_pod(&in_default("in"));
    assert_eq!(edit.finish().kind(address), Some(AddressKind::Outside));
}

#[test]
fn a_node_that_had_a_daemon_once_stays_proven_until_its_tunnel_is_disabled() {
    let daemon = in_default("daemon");
    let next = |snapshot: &Snapshot, change: &dyn Fn(&mut Edit)| {
        let mut edit = Edit::from(snapshot.clone());
        change(&mut edit);
        edit.finish()
    };
    let first = next(&Snapshot::default(), &|edit| edit.know_daemons());
    assert!(!first.had_daemon("a"));
    // Ready for less time than passes between two snapshots.
    let flapped = next(&first, &|edit| {
        edit.daemon(&daemon, Some("a"));
        edit.daemon(&daemon, None);
    });
    assert!(flapped.had_daemon("a") && !flapped.has_daemon("a"));
    assert_eq!(flapped.proven_since(&first).collect::<Vec<_>>(), ["a"]);
    let disabled = next(&flapped, &|edit| {
        edit.disable_tunnel("a", true);
        edit.daemon(&daemon, Some("a"));
    });
    assert!(disabled.has_daemon("a") && !disabled.had_daemon("a"));
    assert_eq!(disabled.disabled_nodes().collect::<Vec<_>>(), ["a"]);
    let enabled = next(&disabled, &|edit| edit.disable_tunnel("a", false));
    assert!(enabled.had_daemon("a"));
    let off = next(&disabled, &|edit| {
        edit.daemon(&daemon, None);
        edit.disable_tunnel("a", false);
    });
    assert!(!off.had_daemon("a"));
}
