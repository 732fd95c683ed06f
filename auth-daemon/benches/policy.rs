//! What a verdict costs, with 1,000 policies that all select the workload and 10,000 identities: nanoseconds of one
//! core's time. Prints one JSON object a line.

use std::{
    collections::BTreeMap,
    hint::black_box,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use auth_mesh::{
    Identity,
    policy::{
        Connection, Policies, Settings,
        api::{Mode, Object},
    },
};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

const POLICIES: usize = 1_000;
const IDENTITIES: usize = 10_000;
const RUN: Duration = Duration::from_millis(500);

fn main() {
    let identities: Vec<Identity> = (0..IDENTITIES)
        .map(|number| format!("spiffe://{}", principal(number)).parse().unwrap())
        .collect();
    let each = IDENTITIES / POLICIES;
    let named = |policy: usize| -> Value {
        (policy * each..(policy + 1) * each)
            .map(principal)
            .collect()
    };

    measure("no policy", &identities, 0, |_| unreachable!());
    measure(
        "each allows ten identities by name",
        &identities,
        POLICIES,
        |policy| json!([{"from": [{"source": {"principals": named(policy)}}]}]),
    );
    measure(
        "each allows a namespace",
        &identities,
        POLICIES,
        |policy| json!([{"from": [{"source": {"namespaces": [format!("team-{}", policy % 100)]}}]}]),
    );
    measure(
        "each allows ten identities on its port alone: all denied",
        &identities,
        POLICIES,
        |policy| {
            let port = (20_000 + policy).to_string();
            json!([{"from": [{"source": {"principals": named(policy)}}], "to": [{"operation": {"ports": [port]}}]}])
        },
    );
    measure(
        "each allows one namespace to each of 1,000 ports",
        &identities,
        POLICIES,
        |policy| {
            let port = (7_500 + policy).to_string();
            json!([{"from": [{"source": {"namespaces": ["team-1"]}}], "to": [{"operation": {"ports": [port]}}]}])
        },
    );
    measure(
        "each allows by a prefix and a block of addresses",
        &identities,
        POLICIES,
        |policy| {
            let prefix = format!("cluster.local/ns/team-{}/sa/app-{policy}*", policy % 100);
            let block = format!("10.{}.{}.0/24", policy / 256, policy % 256);
            json!([{"from": [{"source": {"principals": [prefix], "ipBlocks": [block]}}]}])
        },
    );
    measure(
        "each allows by prefix, suffix, negations and conditions",
        &identities,
        POLICIES,
        |policy| {
            json!([{
                "from": [
                    {"source": {"principals": [format!("*/sa/app-{policy}")], "notIpBlocks": ["192.168.0.0/16"]}},
                    {"source": {"namespaces": ["team-*"], "notPrincipals": named(policy)}},
                ],
                "to": [{"operation": {"notPorts": ["22", "8080"]}}],
                "when": [{"key": "source.namespace", "notValues": ["team-7"]}, {"key": "source.ip", "values": ["10.0.0.0/8"]}],
            }])
        },
    );
    measure(
        "one allows 10,000 identities by name",
        &identities,
        1,
        |_| {
            let all: Value = (0..IDENTITIES).map(principal).collect();
            json!([{"from": [{"source": {"principals": all}}]}])
        },
    );
}

fn principal(number: usize) -> String {
    format!("cluster.local/ns/team-{}/sa/app-{number}", number % 100)
}

/// `count` policies with these rules, every tenth a DENY policy that matches nobody, and connections by all identities.
fn measure(name: &str, identities: &[Identity], count: usize, rules: impl Fn(usize) -> Value) {
    let documents: Vec<_> = (0..count)
        .map(|number| {
            let (action, rules) = match number % 10 {
                9 => {
                    let nobody = format!("cluster.local/ns/nobody/sa/{number}");
                    ("DENY", json!([{"from": [{"source": {"principals": [nobody]}}]}]))
                }
                _ => ("ALLOW", rules(number)),
            };
            json!({
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"namespace": "shop", "name": format!("p{number}")},
                "spec": {"action": action, "selector": {"matchLabels": {"app": "web"}}, "rules": rules},
            })
        })
        .collect();
    let settings = Settings {
        root_namespace: "istio-system".into(),
        mode: Mode::Strict,
        ..Settings::default()
    };
    let start = Instant::now();
    let objects = documents
        .iter()
        .map(|document| match Object::read(document) {
            Some(Object::Unreadable(refused)) => panic!("{refused}"),
            object => Arc::new(object.unwrap()),
        });
    let policies = Policies::compile(settings, objects);
    let compiled = start.elapsed();
    let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
    let start = Instant::now();
    let view = policies.workload("shop", &labels);
    let viewed = start.elapsed();
    let destination = SocketAddr::from((Ipv4Addr::new(10, 200, 0, 1), 8080));

    // In an order in which one caller's memory is not yet in the caches by the last one's.
    let connections: Vec<_> = (0..identities.len())
        .map(|number| {
            let number = number * 7919 % identities.len();
            let [.., high, low] = (number as u32).to_be_bytes();
            Connection {
                client: Some(&identities[number]),
                source: Ipv4Addr::new(10, high, low, 1).into(),
                destination,
            }
        })
        .collect();
    let allowed = connections
        .iter()
        .filter(|connection| view.evaluate(connection).allowed())
        .count();
    let (start, mut evaluated) = (cpu_time(), 0_u32);
    while cpu_time() - start < RUN {
        for connection in &connections {
            black_box(view.evaluate(black_box(connection)));
        }
        evaluated += connections.len() as u32;
    }
    let each = (cpu_time() - start).as_nanos() / u128::from(evaluated);
    println!(
        "{}",
        json!({
            "policies": count, "rules": name, "nanosecondsEach": each as u64, "allowed": allowed,
            "of": connections.len(), "compileMilliseconds": compiled.as_millis() as u64,
            "viewMicroseconds": viewed.as_micros() as u64,
        })
    );
}

/// What this thread has run for.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}
