use std::net::SocketAddr;

use auth_mesh::{
    Identity,
    policy::{Connection, Policies, Settings, api::Mode},
};
use proptest::prelude::*;

use super::*;
use crate::read::tests::mesh;

fn exact(text: &str) -> api::StringMatch {
    api::StringMatch {
        match_type: Some(MatchType::Exact(text.into())),
    }
}

fn present() -> api::StringMatch {
    api::StringMatch {
        match_type: Some(MatchType::Presence(())),
    }
}

fn of(namespace: &str) -> api::Match {
    api::Match {
        namespaces: vec![exact(namespace)],
        ..Default::default()
    }
}

fn to(port: u32) -> api::Match {
    api::Match {
        destination_ports: vec![port],
        ..Default::default()
    }
}

/// A group whose rules have these matches.
fn group<const N: usize>(rules: [Vec<api::Match>; N]) -> api::Group {
    let rules = rules.into_iter().map(|matches| api::Rules { matches });
    api::Group {
        rules: rules.collect(),
    }
}

fn authorization(action: api::Action, groups: Vec<api::Group>) -> api::Authorization {
    api::Authorization {
        name: "web".into(),
        namespace: "shop".into(),
        scope: api::Scope::Namespace as i32,
        action: action as i32,
        groups,
        ..Default::default()
    }
}

fn read(found: &api::Authorization) -> Read {
    policy("shop/web", Ok(&found.encode_to_vec()), &mesh()).unwrap()
}

/// Whether a connection of a pod of `namespace`, or a plaintext one, to `port` is allowed.
fn allows(found: &api::Authorization, namespace: Option<&str>, port: u16) -> bool {
    let settings = Settings {
        mode: Mode::Permissive,
        ..Settings::default()
    };
    let policies = Policies::compile(settings, [read(found).object]);
    let client: Option<Identity> = namespace.map(|namespace| {
        let text = format!("spiffe://cluster.local/ns/{namespace}/sa/a");
        text.parse().unwrap()
    });
    let view = policies.workload("shop", &BTreeMap::new());
    view.evaluate(&Connection {
        client: client.as_ref(),
        source: "10.1.0.1".parse().unwrap(),
        destination: SocketAddr::new("10.1.0.2".parse().unwrap(), port),
    })
    .allowed()
}

#[test]
fn rules_of_a_group_must_all_match_and_any_match_of_a_rule_does() {
    let both = group([vec![to(80), to(81)], vec![of("a"), of("b")]]);
    let found = authorization(api::Action::Allow, vec![both, group([vec![of("c")]])]);
    for (namespace, port, expected) in [
        ("a", 80, true),
        ("b", 81, true),
        ("a", 82, false),
        ("d", 80, false),
        ("c", 9, true),
    ] {
        assert_eq!(
            allows(&found, Some(namespace), port),
            expected,
            "{namespace} {port}"
        );
    }
    assert!(!allows(&found, None, 80), "plaintext");
}

#[test]
fn an_empty_match_or_group_matches_everything_and_no_group_nothing() {
    let everything = [
        group([]),
        group([vec![api::Match::default()]]),
        group([vec![api::Match::default(), to(80)]]),
    ];
    for group in everything {
        let deny = authorization(api::Action::Deny, vec![group]);
        assert!(!allows(&deny, Some("a"), 81));
    }
    assert!(!allows(
        &authorization(api::Action::Allow, vec![]),
        Some("a"),
        80
    ));
    assert!(allows(
        &authorization(api::Action::Deny, vec![]),
        Some("a"),
        80
    ));
}

#[test]
fn a_converted_peer_authentication_refuses_plaintext_alone() {
    let plaintext = api::Match {
        not_principals: vec![present()],
        ..Default::default()
    };
    let not_9 = api::Match {
        not_destination_ports: vec![9],
        ..Default::default()
    };
    let found = authorization(
        api::Action::Deny,
        vec![group([vec![not_9], vec![plaintext]])],
    );
    assert!(allows(&found, Some("a"), 80));
    assert!(!allows(&found, None, 80));
    assert!(allows(&found, None, 9), "the exempt port");
}

#[test]
fn alternatives_of_any_shape_keep_their_meaning() {
    let mixed = || {
        vec![
            api::Match {
                destination_ports: vec![80],
                ..of("a")
            },
            of("b"),
        ]
    };
    let third = vec![of("a"), of("b"), of("c")];
    let found = authorization(
        api::Action::Allow,
        vec![group([mixed(), mixed(), vec![of("a"), of("c")], third])],
    );
    assert!(allows(&found, Some("a"), 80));
    for (namespace, port) in [("a", 81), ("b", 80), ("c", 80)] {
        assert!(!allows(&found, Some(namespace), port), "{namespace} {port}");
    }
}

#[test]
fn what_cannot_be_read_allows_nothing() {
    let broken = |change: &dyn Fn(&mut api::Authorization)| {
        let mut found = authorization(api::Action::Allow, vec![group([vec![of("a")]])]);
        change(&mut found);
        found
    };
    let many = group([
        vec![of("a"), to(1)],
        vec![of("a"), to(1)],
        vec![of("a"), to(1)],
    ]);
    let huge = api::Group {
        rules: many.rules.iter().cycle().take(40).cloned().collect(),
    };
    for (expected, found) in [
        ("unknown", broken(&|found| found.action = 7)),
        (
            "no match",
            broken(&|found| found.groups = vec![group([vec![]])]),
        ),
        (
            "not a port",
            broken(&|found| found.groups = vec![group([vec![to(70_000)]])]),
        ),
        (
            "unknown type",
            broken(&|found| {
                found.groups = vec![group([vec![api::Match {
                    principals: vec![api::StringMatch::default()],
                    ..Default::default()
                }]])];
            }),
        ),
        (
            "not a network",
            broken(&|found| {
                let block = api::Address {
                    address: vec![10, 0, 0, 0],
                    length: 33,
                };
                found.groups = vec![group([vec![api::Match {
                    source_ips: vec![block],
                    ..Default::default()
                }]])];
            }),
        ),
        (
            "not supported",
            broken(&|found| {
                found.groups[0].rules[0].matches[0].extensions = vec![Default::default()];
            }),
        ),
        (
            "more than 4096 rules",
            broken(&|found| found.groups = vec![huge.clone()]),
        ),
    ] {
        let error = read(&found).error.unwrap_or_default();
        assert!(error.contains(expected), "{expected}: {error}");
        assert!(!allows(&found, Some("a"), 80), "{expected}");
    }
}

#[test]
fn fields_of_a_later_version_are_not_ignored() {
    let mut bytes = authorization(api::Action::Allow, vec![group([vec![of("a")]])]).encode_to_vec();
    // Field 15, a varint.
    bytes.extend([0x78, 1]);
    let read = policy("shop/web", Ok(&bytes), &mesh()).unwrap();
    assert!(read.error.unwrap().contains("does not know"));
}

#[test]
fn the_scope_is_the_model_namespace_and_selector() {
    let scoped = |scope: api::Scope, resource: &str| {
        let found = api::Authorization {
            scope: scope as i32,
            ..authorization(api::Action::Deny, vec![])
        };
        let read = policy(resource, Ok(&found.encode_to_vec()), &mesh()).unwrap();
        (
            read.object.name().to_string(),
            read.object.selector().is_empty(),
        )
    };
    assert_eq!(
        scoped(api::Scope::Namespace, "shop/web"),
        ("shop/web".into(), true)
    );
    let selected = scoped(api::Scope::WorkloadSelector, "shop/web");
    assert_eq!(selected, ("shop/web".into(), false));
    let root = scoped(api::Scope::Global, "istio-system/all");
    assert_eq!(root, ("istio-system/all".into(), true));
    // The mesh of istiod has another root namespace than the configuration says.
    let other = scoped(api::Scope::Global, "root/all");
    assert_eq!(other, ("istio-system/root/all".into(), true));
}

proptest! {
    #[test]
    fn any_bytes_are_a_policy_that_is_enforced_or_refused(bytes: Vec<u8>, name in ".{0,16}") {
        if let Ok(read) = policy(&name, Ok(&bytes), &mesh()) {
            let refused = matches!(*read.object, Object::Unreadable(_));
            prop_assert_eq!(refused, read.error.is_some());
        }
    }
}
