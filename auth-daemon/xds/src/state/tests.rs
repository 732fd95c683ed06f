use std::net::SocketAddr;

use auth_mesh::{
    Hbone, Identity, Membership, Node, Waypoint, WaypointAt,
    policy::{Connection, Policies, Settings},
};

use super::*;
use crate::{
    authorization::policy,
    discovery::DeltaDiscoveryResponse,
    read::tests::mesh,
    security_api::{Action, Authorization, Scope},
    service::{service, tests::web},
    session::{Caller, Session},
    workload::{tests::pod, workload},
    workload_api as api,
};

use proptest::prelude::*;
use prost::Message;

fn state() -> State {
    let defaults = MeshDefault {
        membership: Membership::Disabled,
        ..MeshDefault::default()
    };
    State::new(mesh(), "a".into(), defaults)
}

fn remote(state: &mut State, found: api::Workload) {
    let uid = found.uid.clone();
    let found = workload(found, &mesh()).unwrap();
    state.take(Change::Workload(uid, Box::new(found)));
}

/// A pod as the API server reports it.
fn local(name: &str, node: &str) -> Arc<Workload> {
    let name = ObjectName {
        namespace: "shop".into(),
        name: name.into(),
    };
    let identity = format!("spiffe://cluster.local/ns/shop/sa/{}", name.name);
    Arc::new(Workload {
        uid: "u1".into(),
        addresses: vec!["10.1.0.1".parse().unwrap()],
        node: node.into(),
        membership: Some(Membership::Enabled),
        ..Workload::new(name, identity.parse().unwrap())
    })
}

fn endpoints(state: &mut State) -> Vec<String> {
    let address: SocketAddr = "10.96.0.7:80".parse().unwrap();
    match state.snapshot().resolve(address) {
        Ok(found) => found
            .endpoints
            .iter()
            .map(|endpoint| endpoint.address.to_string())
            .collect(),
        Err(_) => Vec::new(),
    }
}

#[test]
fn a_service_leads_to_the_healthy_workloads_that_name_it() {
    let mut state = state();
    let service = service(web(), &mesh()).unwrap();
    state.take(Change::Service("shop/web".into(), Box::new(service)));
    for (name, address) in [("web-1", 1), ("web-2", 2)] {
        remote(&mut state, pod(name, address));
    }
    assert_eq!(endpoints(&mut state), ["10.1.0.1:8080", "10.1.0.2:8080"]);
    let identities = state
        .snapshot()
        .resolve("10.96.0.7:80".parse().unwrap())
        .unwrap()
        .identities;
    assert_eq!(identities.len(), 2, "who may answer");
    remote(
        &mut state,
        api::Workload {
            status: api::WorkloadStatus::Unhealthy as i32,
            ..pod("web-1", 1)
        },
    );
    assert_eq!(endpoints(&mut state), ["10.1.0.2:8080"]);
    let left = api::Workload {
        services: Default::default(),
        ..pod("web-2", 2)
    };
    remote(&mut state, left);
    assert!(endpoints(&mut state).is_empty());
    state.take(Change::NoAddress("Kubernetes//Pod/shop/web-2".into()));
    assert!(state.snapshot().pod("10.1.0.2".parse().unwrap()).is_none());
    state.take(Change::NoAddress("shop/web".into()));
    assert_eq!(state.snapshot().services().count(), 0);
}

#[test]
fn a_service_is_exposed_where_the_api_server_says_and_behind_its_waypoint_there() {
    let mut state = state();
    let mut found = service(web(), &mesh()).unwrap();
    let waypoint = Waypoint {
        at: WaypointAt::Address("10.1.0.9".parse().unwrap()),
        port: 15008,
    };
    found.waypoint = Some(Arc::new(waypoint.clone()));
    let name = found.name.clone();
    let exposed = |node_ports| {
        Arc::new(Service {
            node_ports,
            external_addresses: vec!["198.51.100.1".parse().unwrap()],
            ..Service::new(name.clone())
        })
    };
    // In either order.
    state.exposed_service(exposed(vec![]));
    assert_eq!(
        state.snapshot().services().count(),
        0,
        "istiod has not said"
    );
    state.take(Change::Service("shop/web".into(), Box::new(found.clone())));
    state.exposed_service(exposed(vec![(30080, 80)]));
    state.edit().node(Node {
        name: "b".into(),
        addresses: vec!["192.0.2.1".parse().unwrap()],
        ..Node::default()
    });
    let at = |state: &mut State, dialled: &str| {
        let found = state.snapshot().resolve(dialled.parse().unwrap()).ok()?;
        Some((
            found.own_address?.to_string(),
            found.waypoint.as_deref()?.clone(),
        ))
    };
    let expected = Some(("10.96.0.7:80".to_owned(), waypoint));
    for dialled in ["192.0.2.1:30080", "198.51.100.1:80"] {
        assert_eq!(at(&mut state, dialled), expected, "{dialled}");
    }
    state.take(Change::Service("shop/web".into(), Box::new(found)));
    assert_eq!(
        at(&mut state, "198.51.100.1:80"),
        expected,
        "after a change"
    );
    state.remove_exposed_service(&name);
    assert_eq!(at(&mut state, "198.51.100.1:80"), None);
    state.exposed_service(exposed(vec![]));
    state.take(Change::NoAddress("shop/web".into()));
    assert_eq!(state.snapshot().exposed().count(), 0);
}

#[test]
fn pods_of_this_node_come_from_the_api_server() {
    let mut state = state();
    remote(
        &mut state,
        api::Workload {
            node: "a".into(),
            ..pod("web-1", 1)
        },
    );
    assert_eq!(state.snapshot().on_node("a").count(), 0);
    state.local_pod(local("web-1", "a"));
    state.local_pod(local("other", "b"));
    let snapshot = state.snapshot();
    let found: Vec<_> = snapshot.on_node("a").collect();
    assert_eq!(
        (found.len(), found[0].uid.as_str(), found[0].hbone),
        (1, "u1", Hbone::Offered)
    );
    assert_eq!(snapshot.on_node("b").count(), 0);
    state.remove_local_pod(&found[0].name.clone());
    assert_eq!(state.snapshot().on_node("a").count(), 0);
}

/// Whether a pod with an identity may connect to the pod web-1 of this node.
fn admits(state: &mut State) -> bool {
    let policies = state.policies.values().cloned();
    let all = policies.chain([pending_policy(&mesh())]);
    let policies = Policies::compile(Settings::default(), all);
    let snapshot = state.snapshot();
    let pod = snapshot.on_node("a").next().unwrap();
    let client: Identity = "spiffe://cluster.local/ns/shop/sa/api".parse().unwrap();
    let view = policies.workload("shop", &pod.labels);
    view.evaluate(&Connection {
        client: Some(&client),
        source: "10.1.0.9".parse().unwrap(),
        destination: "10.1.0.1:80".parse().unwrap(),
    })
    .allowed()
}

/// What is missing: pods, and policies that they wait for.
fn missing(state: &State) -> Vec<String> {
    let missing = state.missing_policies();
    let mut missing: Vec<_> = missing
        .map(|(pod, policy)| format!("{pod} {policy}"))
        .collect();
    missing.sort();
    missing
}

#[test]
fn a_pod_admits_nothing_until_all_its_policies_are_known() {
    let mut state = state();
    state.local_pod(local("web-1", "a"));
    assert!(!admits(&mut state), "istiod has not sent the pod");
    assert_eq!(missing(&state), [""; 0], "nor named a policy of it");
    let found = |policies: &[&str]| api::Workload {
        node: "a".into(),
        authorization_policies: policies.iter().map(|name| (*name).to_owned()).collect(),
        ..pod("web-1", 1)
    };
    remote(&mut state, found(&[]));
    assert!(admits(&mut state));
    remote(&mut state, found(&["shop/some"]));
    assert!(!admits(&mut state), "the policy has not arrived");
    assert_eq!(missing(&state), ["shop/web-1 shop/some"]);
    let put = |state: &mut State, resource: &str, groups| {
        let found = Authorization {
            scope: Scope::WorkloadSelector as i32,
            action: Action::Deny as i32,
            groups,
            ..Default::default()
        };
        let read = policy(resource, Ok(&found.encode_to_vec()), &mesh()).unwrap();
        state.take(Change::Policy(resource.into(), read.object));
    };
    put(&mut state, "shop/some", vec![]);
    assert!(admits(&mut state), "a policy that denies nothing");
    assert_eq!(missing(&state), [""; 0]);
    put(&mut state, "shop/other", vec![Default::default()]);
    assert!(admits(&mut state), "a policy that does not select the pod");
    put(&mut state, "shop/some", vec![Default::default()]);
    assert!(!admits(&mut state), "a policy that denies everything");
    state.take(Change::NoPolicy("shop/some".into()));
    assert!(!admits(&mut state), "the workload names it still");
    remote(
        &mut state,
        found(&["shop/other", "shop/some", "shop/third"]),
    );
    let expected = ["shop/web-1 shop/some", "shop/web-1 shop/third"];
    assert_eq!(missing(&state), expected, "each by itself");
    remote(&mut state, found(&["third/some"]));
    put(&mut state, "third/some", vec![]);
    assert!(!admits(&mut state), "the model cannot apply it");
}

#[test]
fn policies_are_published_once_for_each_change() {
    let mut state = state();
    assert_eq!(
        state.policies().unwrap().len(),
        1,
        "the one for pods that are pending"
    );
    assert!(state.policies().is_none());
    state.take(Change::NoPolicy("shop/never".into()));
    assert!(state.policies().is_some());
}

/// Responses of istiod, which the fuzz target begins with, too.
const RESPONSES: [&[u8]; 2] = [
    include_bytes!("../../../fuzz/seeds/istiod/addresses"),
    include_bytes!("../../../fuzz/seeds/istiod/policies"),
];

/// Takes a response twice. Returns why resources were rejected.
fn take(bytes: &[u8]) -> Option<Vec<String>> {
    let response = DeltaDiscoveryResponse::decode(bytes).ok()?;
    let caller = Caller {
        pod: "daemon".into(),
        namespace: "auth-system".into(),
        node: "a".into(),
    };
    let (mut session, mut state) = (Session::new(mesh(), caller), state());
    let mut rejected = Vec::new();
    for response in [response.clone(), response] {
        let taken = session.take(response);
        rejected.extend(taken.rejected);
        taken
            .changes
            .into_iter()
            .for_each(|change| state.take(change));
    }
    let _ = state
        .snapshot()
        .resolve(SocketAddr::new([10, 96, 0, 7].into(), 80));
    Policies::compile(Settings::default(), state.policies()?);
    Some(rejected)
}

#[test]
fn the_seeds_of_the_fuzz_target_are_good() {
    for response in RESPONSES {
        assert_eq!(take(response), Some(vec![]));
    }
}

proptest! {
    #[test]
    fn damaged_responses_are_taken_in_part(
        response in 0..RESPONSES.len(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = RESPONSES[response].to_vec();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        take(&bytes);
    }
}
