use prost_types::Any;

use super::*;
use crate::{
    read::tests::mesh,
    security_api::{Authorization, Scope},
    service::tests::web,
    workload::tests::pod,
    workload_api::address::Type,
};

fn session() -> Session {
    let caller = Caller {
        pod: "auth-daemon-x".into(),
        namespace: "auth-system".into(),
        node: "a".into(),
    };
    Session::new(mesh(), caller)
}

fn resource(name: &str, type_url: &str, value: Vec<u8>) -> Resource {
    Resource {
        name: name.into(),
        version: "v1".into(),
        aliases: Vec::new(),
        resource: Some(Any {
            type_url: type_url.into(),
            value,
        }),
    }
}

fn address(name: &str, found: Type) -> Resource {
    let found = Address {
        r#type: Some(found),
    };
    resource(name, ADDRESS_TYPE, found.encode_to_vec())
}

fn policy(name: &str, action: i32) -> Resource {
    let found = Authorization {
        scope: Scope::Namespace as i32,
        action,
        ..Default::default()
    };
    resource(name, AUTHORIZATION_TYPE, found.encode_to_vec())
}

fn response(type_url: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        resources,
        type_url: type_url.into(),
        nonce: "n1".into(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
    }
}

const WEB: &str = "shop/web.shop.svc.cluster.local";
const POD: &str = "Kubernetes//Pod/shop/web-1";

#[test]
fn subscribes_to_everything_and_names_itself() {
    let [policies, addresses] = session().open();
    assert_eq!(policies.type_url, AUTHORIZATION_TYPE);
    assert_eq!(addresses.type_url, ADDRESS_TYPE);
    assert_eq!(addresses.resource_names_subscribe, ["*"]);
    let node = policies.node.unwrap();
    assert!(
        node.id
            .starts_with("ztunnel~127.0.0.1~auth-daemon-x.auth-system~")
    );
    assert!(addresses.node.is_none(), "once in a stream");
}

#[test]
fn the_next_stream_resumes_with_what_is_known() {
    let mut session = session();
    let workload = address(POD, Type::Workload(pod("web-1", 1)));
    let service = address(WEB, Type::Service(web()));
    let taken = session.take(response(ADDRESS_TYPE, vec![workload, service], &[]));
    assert_eq!(taken.changes.len(), 2);
    assert_eq!(taken.answer.response_nonce, "n1");
    assert_eq!((taken.answer.error_detail, taken.rejected.len()), (None, 0));
    assert!(!session.is_complete(), "policies are missing");
    session.take(response(AUTHORIZATION_TYPE, vec![], &[]));
    assert!(session.is_complete() && session.count() == 2);
    let [_, addresses] = session.open();
    let known: Vec<_> = addresses.initial_resource_versions.into_iter().collect();
    let expected = [POD, WEB].map(|name| (name.to_owned(), "v1".to_owned()));
    assert_eq!(known, expected);

    let taken = session.take(response(ADDRESS_TYPE, vec![], &[POD, "never/seen"]));
    assert_eq!(taken.changes, [Change::NoAddress(POD.into())]);
    assert_eq!(session.count(), 1);
}

#[test]
fn a_resource_that_cannot_be_read_is_rejected_and_the_others_count() {
    let mut session = session();
    let good = address(WEB, Type::Service(web()));
    let elsewhere = crate::workload_api::Workload {
        network: "other".into(),
        ..pod("web-1", 1)
    };
    let taken = session.take(response(
        ADDRESS_TYPE,
        vec![
            resource("a", ADDRESS_TYPE, vec![0xff]),
            resource("b", "type.googleapis.com/x", vec![]),
            address(POD, Type::Workload(elsewhere)),
            good,
        ],
        &[],
    ));
    assert!(matches!(&taken.changes[..], [Change::Service(name, _)] if name == WEB));
    assert_eq!(taken.rejected.len(), 3);
    let nack = taken.answer.error_detail.unwrap();
    assert!(nack.message.starts_with("3 rejected: \"a\": "), "{nack:?}");
    assert!(nack.message.contains("network gateways are not supported"));
}

#[test]
fn a_policy_keeps_its_last_good_version_and_denies_without_one() {
    let mut session = session();
    let mut take = |resource| session.take(response(AUTHORIZATION_TYPE, vec![resource], &[]));
    let taken = take(policy("shop/a", 7));
    assert!(taken.answer.error_detail.is_some());
    assert!(
        matches!(&taken.changes[..], [Change::Policy(_, object)] if matches!(**object, Object::Unreadable(_)))
    );
    let taken = take(policy("shop/a", 1));
    assert_eq!((taken.changes.len(), taken.rejected.len()), (1, 0));
    let taken = take(policy("shop/a", 7));
    assert_eq!((taken.changes.len(), taken.rejected.len()), (0, 1));
}

#[test]
fn a_service_whose_waypoint_cannot_be_used_counts_and_is_reported() {
    let mut session = session();
    let behind = crate::workload_api::Service {
        waypoint: Some(crate::workload_api::GatewayAddress::default()),
        ..web()
    };
    for found in [web(), behind] {
        let taken = session.take(response(
            ADDRESS_TYPE,
            vec![address(WEB, Type::Service(found))],
            &[],
        ));
        let [Change::Service(_, service)] = taken.changes.as_slice() else {
            panic!("{:?}", taken.changes);
        };
        let is_behind = service.waypoint.is_some();
        assert_eq!(taken.answer.error_detail.is_some(), is_behind);
        assert_eq!(taken.rejected.len(), usize::from(is_behind));
    }
}

#[test]
fn a_type_that_was_not_subscribed_to_is_rejected() {
    let taken = session().take(response("type.googleapis.com/x", vec![], &[]));
    assert!(taken.changes.is_empty() && taken.answer.error_detail.is_some());
}
