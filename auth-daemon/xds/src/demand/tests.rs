use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use prost_types::Any;

use crate::{
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
    read::tests::mesh,
    service::tests::web,
    session::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Caller, Change, Session},
    workload::tests::pod,
    workload_api::{
        Address, GatewayAddress, NamespacedHostname, Service, Workload, address::Type,
        gateway_address::Destination,
    },
};

use super::*;

const WEB: &str = "shop/web.shop.svc.cluster.local";
const PROXY: &str = "shop/proxy.shop.svc.cluster.local";

/// What the istiod of the Kubernetes tests does with the requests of a stream.
#[derive(Default)]
struct Istiod {
    workloads: BTreeMap<String, Workload>,
    services: BTreeMap<String, Service>,
    subscribed: BTreeSet<String>,
}

impl Istiod {
    fn pod(&mut self, name: &str, number: u8, change: impl FnOnce(&mut Workload)) {
        let mut found = pod(name, number);
        change(&mut found);
        self.workloads.insert(found.uid.clone(), found);
    }

    fn resource(&self, name: &str) -> Resource {
        let address = |ip: &[u8]| match <[u8; 4]>::try_from(ip) {
            Ok(four) => format!("/{}", IpAddr::from(four)),
            Err(_) => String::new(),
        };
        let (found, aliases) = match self.services.get(name) {
            Some(service) => {
                let aliases = service.addresses.iter();
                let aliases = aliases.map(|found| address(&found.address)).collect();
                (Type::Service(service.clone()), aliases)
            }
            None => {
                let found = &self.workloads[name];
                let aliases = found.addresses.iter().map(|found| address(found));
                (Type::Workload(found.clone()), aliases.collect())
            }
        };
        let found = Address {
            r#type: Some(found),
        };
        Resource {
            name: name.into(),
            version: "v1".into(),
            aliases,
            resource: Some(Any {
                type_url: ADDRESS_TYPE.into(),
                value: found.encode_to_vec(),
            }),
        }
    }

    /// Names of what has a name: a service comes with its endpoints.
    fn look_up(&self, name: &str) -> Vec<String> {
        let all = self.workloads.keys().chain(self.services.keys());
        let mut has =
            all.filter(|own| *own == name || self.resource(own).aliases.contains(&name.to_owned()));
        let Some(found) = has.next() else {
            return Vec::new();
        };
        let workloads = self.workloads.iter();
        let endpoints = workloads.filter(|(_, it)| it.services.contains_key(found));
        [found.clone()]
            .into_iter()
            .chain(endpoints.map(|(name, _)| name.clone()))
            .collect()
    }

    fn answer(&mut self, request: DeltaDiscoveryRequest) -> Option<DeltaDiscoveryResponse> {
        let mut changed = false;
        let mut asked: BTreeSet<String> = request.resource_names_subscribe.into_iter().collect();
        asked.extend(request.initial_resource_versions.keys().cloned());
        for name in &asked {
            changed |= self.subscribed.insert(name.clone());
        }
        for name in &request.resource_names_unsubscribe {
            changed |= self.subscribed.remove(name);
            asked.remove(name);
        }
        if !changed {
            return None;
        }
        let removes_all = asked.is_empty();
        let mut removed: Vec<String> = Vec::new();
        let mut names = BTreeSet::new();
        for name in &asked {
            let found = self.look_up(name);
            if found.is_empty() {
                removed.push(name.clone());
            }
            names.extend(found);
        }
        if removes_all {
            removed.extend(self.subscribed.iter().cloned());
        }
        self.subscribed.extend(names.iter().cloned());
        let retained = &request.initial_resource_versions;
        let sent = names.iter().filter(|name| !retained.contains_key(*name));
        Some(response(
            sent.map(|name| self.resource(name)).collect(),
            removed,
        ))
    }
}

fn response(resources: Vec<Resource>, removed_resources: Vec<String>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        resources,
        type_url: ADDRESS_TYPE.into(),
        nonce: "n".into(),
        removed_resources,
    }
}

/// A session and its istiod, on an open stream.
struct Stage {
    session: Session,
    istiod: Istiod,
    /// Names of the resources that the session has reported and not removed.
    known: BTreeSet<String>,
}

impl Stage {
    fn new() -> Self {
        let caller = Caller {
            pod: "daemon".into(),
            namespace: "auth-system".into(),
            node: "a".into(),
        };
        let mut istiod = Istiod::default();
        istiod.services.insert(WEB.into(), web());
        let mut proxy = web();
        proxy.name = "proxy".into();
        proxy.hostname = "proxy.shop.svc.cluster.local".into();
        proxy.addresses[0].address = vec![10, 96, 0, 9];
        istiod.services.insert(PROXY.into(), proxy);
        istiod.pod("web-1", 1, |_| ());
        istiod.pod("web-2", 2, |_| ());
        istiod.pod("alone", 3, |pod| pod.services.clear());
        istiod.pod("proxy-1", 9, |pod| {
            let ports = pod.services.remove(WEB).unwrap();
            pod.services.insert(PROXY.into(), ports);
        });
        let mut stage = Self {
            session: Session::on_demand(mesh(), caller),
            istiod,
            known: BTreeSet::new(),
        };
        assert!(stage.open().is_empty());
        stage
    }

    fn open(&mut self) -> Vec<(IpAddr, Answer)> {
        self.istiod.subscribed.clear();
        let [_, addresses] = self.session.open();
        self.exchange(vec![addresses])
    }

    fn ask(&mut self, addresses: &[&str]) -> Vec<(IpAddr, Answer)> {
        self.session
            .ask(addresses.iter().map(|ip| ip.parse().unwrap()));
        let requests = self.session.requests();
        self.exchange(requests)
    }

    fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Workload(name, _) | Change::Service(name, _) => self.known.insert(name),
                Change::NoAddress(name) => self.known.remove(&name),
                other => panic!("{other:?}"),
            };
        }
    }

    /// Exchanges requests and responses until neither side has more to say.
    fn exchange(&mut self, mut requests: Vec<DeltaDiscoveryRequest>) -> Vec<(IpAddr, Answer)> {
        let mut answered = Vec::new();
        while !requests.is_empty() {
            let mut next = Vec::new();
            for request in requests {
                assert!(request.response_nonce.is_empty(), "an ACK changes no names");
                if let Some(response) = self.istiod.answer(request) {
                    let taken = self.session.take(response);
                    self.apply(taken.changes);
                    answered.extend(taken.answered);
                    next.extend(self.session.requests());
                }
            }
            requests = next;
        }
        answered
    }

    fn release(&mut self, used: &[&str]) {
        let used = used.iter().map(|ip| ip.parse().unwrap()).collect();
        let (changes, request) = self.session.release(&used);
        self.apply(changes);
        let answered = self.exchange(request.into_iter().collect());
        assert!(answered.is_empty(), "{answered:?}");
    }

    fn names(&self) -> Vec<&str> {
        let names = self
            .known
            .iter()
            .map(|name| name.rsplit('/').next().unwrap());
        names.map(|name| name.split('.').next().unwrap()).collect()
    }
}

fn is(address: &str, answer: Answer) -> (IpAddr, Answer) {
    (address.parse().unwrap(), answer)
}

fn behind(hostname: &str) -> Option<GatewayAddress> {
    Some(GatewayAddress {
        destination: Some(Destination::Hostname(NamespacedHostname {
            namespace: "shop".into(),
            hostname: hostname.into(),
        })),
        hbone_mtls_port: 15008,
    })
}

#[test]
fn nothing_is_subscribed_to_until_it_is_asked_for() {
    let mut stage = Stage::new();
    assert!(stage.names().is_empty() && stage.istiod.subscribed.is_empty());
    let answered = stage.ask(&["10.1.0.3", "10.1.0.7"]);
    let expected = [
        is("10.1.0.3", Answer::Known),
        is("10.1.0.7", Answer::Absent),
    ];
    assert_eq!(answered.len(), 2);
    assert!(
        expected.iter().all(|it| answered.contains(it)),
        "{answered:?}"
    );
    assert_eq!(stage.names(), ["alone"]);
    assert!(!stage.session.is_waiting());
}

#[test]
fn a_service_comes_with_its_endpoints_and_later_ones_when_it_is_asked_for_again() {
    let mut stage = Stage::new();
    assert_eq!(stage.ask(&["10.96.0.7"]), [is("10.96.0.7", Answer::Known)]);
    assert_eq!(stage.names(), ["web-1", "web-2", "web"]);
    stage.istiod.pod("web-3", 5, |_| ());
    for _ in 0..3 {
        assert_eq!(stage.ask(&["10.96.0.7"]), [is("10.96.0.7", Answer::Known)]);
        assert_eq!(stage.names(), ["web-1", "web-2", "web-3", "web"]);
    }
}

#[test]
fn what_nothing_had_is_found_when_it_is_asked_for_again() {
    let mut stage = Stage::new();
    assert_eq!(stage.ask(&["10.1.0.5"]), [is("10.1.0.5", Answer::Absent)]);
    stage.istiod.pod("late", 5, |_| ());
    assert_eq!(stage.ask(&["10.1.0.5"]), [is("10.1.0.5", Answer::Known)]);
}

#[test]
fn an_answer_counts_once_the_waypoint_is_known_too() {
    let mut stage = Stage::new();
    let web = stage.istiod.services.get_mut(WEB).unwrap();
    web.waypoint = behind("proxy.shop.svc.cluster.local");
    // The waypoint is already known: it is still requested.
    stage.ask(&["10.96.0.9"]);
    for _ in 0..2 {
        assert_eq!(stage.ask(&["10.96.0.7"]), [is("10.96.0.7", Answer::Known)]);
        assert_eq!(stage.names(), ["proxy-1", "web-1", "web-2", "proxy", "web"]);
        stage.release(&["10.96.0.7"]);
        assert_eq!(stage.names(), ["proxy-1", "web-1", "web-2", "proxy", "web"]);
        stage.release(&[]);
        assert!(stage.names().is_empty());
    }
    let web = stage.istiod.services.get_mut(WEB).unwrap();
    web.waypoint = behind("missing.shop.svc.cluster.local");
    assert_eq!(stage.ask(&["10.96.0.7"]), [is("10.96.0.7", Answer::Known)]);
    assert!(!stage.session.is_waiting(), "there is none");
}

#[test]
fn what_cannot_be_used_is_rejected_with_the_reason() {
    let mut stage = Stage::new();
    stage
        .istiod
        .pod("far", 6, |pod| pod.network = "other".into());
    let answered = stage.ask(&["10.1.0.6"]);
    let [(_, Answer::Rejected(why))] = answered.as_slice() else {
        panic!("{answered:?}");
    };
    assert!(why.contains("network gateways are not supported"), "{why}");
}

#[test]
fn what_is_not_used_is_released_and_nothing_else_is_lost() {
    let mut stage = Stage::new();
    stage.istiod.pod("own", 4, |pod| pod.node = "a".into());
    stage.ask(&["10.96.0.7", "10.1.0.3", "10.1.0.4", "10.1.0.7"]);
    assert_eq!(stage.names(), ["alone", "own", "web-1", "web-2", "web"]);
    stage.release(&["10.1.0.3", "10.1.0.2"]);
    let left = ["alone", "own", "web-2"];
    assert_eq!(
        stage.names(),
        left,
        "istiod sends its own node's in any case"
    );
    let forgotten = ["/10.96.0.7", "/10.1.0.7", WEB].map(str::to_owned);
    let subscribed = &stage.istiod.subscribed;
    assert!(
        forgotten.iter().all(|it| !subscribed.contains(it)),
        "{subscribed:?}"
    );
    stage.release(&["10.1.0.3", "10.1.0.2"]);
    assert_eq!(stage.names(), left);
    assert_eq!(stage.ask(&["10.96.0.7"]), [is("10.96.0.7", Answer::Known)]);
    assert_eq!(stage.names(), ["alone", "own", "web-1", "web-2", "web"]);
}

#[test]
fn the_next_stream_asks_for_what_was_not_answered() {
    let mut stage = Stage::new();
    stage.ask(&["10.1.0.3", "10.96.0.7"]);
    stage.istiod.pod("web-3", 5, |_| ());
    for gone in ["web-1", "alone"] {
        let uid = format!("Kubernetes//Pod/shop/{gone}");
        stage.istiod.workloads.remove(&uid);
    }
    // Two are known already, and one of them through another name.
    let again = ["10.96.0.7", "10.1.0.2", "10.1.0.3"];
    stage.session.ask(again.map(|ip| ip.parse().unwrap()));
    assert_eq!(stage.session.requests().len(), 2, "they are lost");
    let mut answered = stage.open();
    answered.sort_by_key(|(address, _)| *address);
    let expected = [
        is("10.1.0.2", Answer::Known),
        is("10.1.0.3", Answer::Absent),
        is("10.96.0.7", Answer::Known),
    ];
    assert_eq!(answered, expected);
    assert_eq!(stage.names(), ["web-2", "web-3", "web"]);
}

#[test]
fn more_addresses_than_a_batch_holds_follow_in_the_next() {
    let mut stage = Stage::new();
    let many = (0..600_u32).map(|number| IpAddr::from((0x0a02_0000 + number).to_be_bytes()));
    stage.session.ask(many);
    let requests = stage.session.requests();
    assert_eq!(requests[0].resource_names_subscribe.len(), MAX_BATCH);
    assert!(stage.session.requests().is_empty(), "one batch at a time");
    assert_eq!(stage.exchange(requests).len(), 600);
}

#[test]
fn policies_are_subscribed_to_as_a_whole() {
    let [policies, addresses] = Stage::new().session.open();
    assert_eq!(policies.type_url, AUTHORIZATION_TYPE);
    assert_eq!(policies.resource_names_subscribe, ["*"]);
    assert!(policies.resource_names_unsubscribe.is_empty());
    assert_eq!(addresses.resource_names_unsubscribe, ["*"]);
}
