//! Callers that are no pods of the mesh, and addresses that no object lists: every connection that reaches a pod is judged,
//! whatever address it is for and whatever address it comes from.

use std::net::{IpAddr, SocketAddr};

use mesh_tests::{
    App, Context, DaemonOptions, Firewall, Place, Pod, PodSpec, Result, TIMEOUT, eventually_ok,
};
use serde_json::{Value, json};

use crate::common::pair::Pair;

/// Addresses in the network of node b that no object lists.
const SECOND: [&str; 2] = ["10.77.2.200", "fd77:2::200"];
/// Loopback addresses of two pods at once. Node b routes to one of them.
const SHARED: &str = "203.0.113.5";
const PORT: u16 = 8080;
const NODE_PORT: u16 = 30080;

fn stage(options: &DaemonOptions) -> Result<(Pair, App)> {
    let pair = Pair::start_with(options, |builder| builder)?;
    let echo = pair.web.app("echo-server --port 8080")?.listening()?;
    Ok((pair, echo))
}

fn permissive() -> DaemonOptions {
    DaemonOptions::default().permissive()
}

fn strict_by_policy(app: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "callers", "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": app}}, "mtls": {"mode": "STRICT"}},
    })
}

/// Denies all callers of the pods with the label `app=web`.
fn deny_all() -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "callers", "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}, "action": "DENY", "rules": [{}]},
    })
}

fn is_answered(from: &Place, to: SocketAddr) -> Result<bool> {
    let command = format!("connect --to {to} --timeout 5000 --send hi --shutdown --read");
    let events = from.app(&command)?.finish(TIMEOUT)?.json_lines();
    Ok(events.last().context("no event")?["text"] == "hi")
}

/// Waits until `from` is refused at `to`: discovery may still be reading a policy. Then asserts that the daemon of `web` has
/// logged a refusal of a caller at `client`, with `reason` in its reason.
fn becomes_refused(
    pair: &Pair,
    from: &Place,
    to: SocketAddr,
    client: IpAddr,
    reason: &str,
) -> Result<()> {
    eventually_ok(TIMEOUT, &format!("a refusal at {to}"), || {
        (!is_answered(from, to)?).then_some(()).context("answered")
    })?;
    // Once more: one that was open when the policy came into force was reset, and not refused.
    assert!(!is_answered(from, to)?, "{to}");
    pair.far.wait_for_access("the refusal", TIMEOUT, |line| {
        let caller = line["client"].as_str().and_then(|text| text.parse().ok());
        line["result"] == "refused"
            && caller.is_some_and(|caller: SocketAddr| caller.ip() == client)
            && line["reason"]
                .as_str()
                .is_some_and(|text| text.contains(reason))
    })?;
    Ok(())
}

fn becomes_answered(from: &Place, to: SocketAddr) -> Result<()> {
    eventually_ok(TIMEOUT, &format!("an answer at {to}"), || {
        is_answered(from, to)?.then_some(()).context("refused")
    })
}

fn outside(pair: &Pair, v4: bool) -> IpAddr {
    match v4 {
        true => pair.mesh.outside_ipv4().into(),
        false => pair.mesh.outside_ipv6().into(),
    }
}

/// The address of node b by which its pods know it.
fn gateway(v4: bool) -> IpAddr {
    let address = if v4 { "10.77.2.1" } else { "fd77:2::1" };
    address.parse().expect("an IP address")
}

fn add_second_addresses(pod: &Pod) -> Result<[SocketAddr; 2]> {
    for (address, more) in SECOND.into_iter().zip(["/24", "/64"]) {
        let address = format!("{address}{more}");
        let mut command = vec!["address", "add", &address, "dev", "eth0"];
        if more == "/64" {
            command.push("nodad");
        }
        pod.run("ip", command)?.ok()?;
    }
    let addresses = SECOND.map(|address| address.parse().expect("an IP address"));
    Ok(addresses.map(|address: IpAddr| (address, PORT).into()))
}

#[test]
fn unlisted_address_has_the_mode_of_its_pod() -> Result<()> {
    let (pair, echo) = stage(&DaemonOptions::default())?;
    for to in add_second_addresses(&pair.web)? {
        let client = outside(&pair, to.is_ipv4());
        becomes_refused(&pair, pair.mesh.outside(), to, client, "STRICT")?;
    }
    assert!(is_answered(&pair.client, pair.web.at(PORT))?);
    assert_eq!(echo.events_of("accepted").len(), 1, "only the mesh's pod");
    // Without a daemon as well.
    let Pair { far, web, mesh, .. } = pair;
    far.kill()?;
    for to in SECOND {
        let to: SocketAddr = (to.parse::<IpAddr>()?, PORT).into();
        assert!(!is_answered(mesh.outside(), to)?, "{to}");
    }
    assert_eq!(echo.events_of("accepted").len(), 1);
    drop(web);
    Ok(())
}

#[test]
fn policies_apply_to_unlisted_addresses() -> Result<()> {
    let (pair, _echo) = stage(&permissive())?;
    let second = add_second_addresses(&pair.web)?;
    let from = pair.mesh.outside();
    let manifests = pair.mesh.manifests();
    for (policy, kind, reason) in [
        (
            strict_by_policy("web"),
            "PeerAuthentication",
            "STRICT by PeerAuthentication default/callers",
        ),
        (
            deny_all(),
            "AuthorizationPolicy",
            "denied by AuthorizationPolicy default/callers",
        ),
    ] {
        for to in second {
            becomes_answered(from, to)?;
        }
        manifests.apply(&policy)?;
        for to in second {
            let client = outside(&pair, to.is_ipv4());
            becomes_refused(&pair, from, to, client, reason)?;
        }
        manifests.remove(kind, "default", "callers")?;
    }
    Ok(())
}

#[test]
fn two_pods_with_the_same_second_address_keep_their_own_modes() -> Result<()> {
    let open = PodSpec::new("open")
        .on("b")
        .service_account("open")
        .label("app", "open");
    let pair = Pair::start_with(&permissive(), |builder| builder.pod(open))?;
    pair.mesh.manifests().apply(&strict_by_policy("web"))?;
    let open = pair.mesh.pod("open");
    let start = |pod: &Pod| pod.app("echo-server --port 8080")?.listening();
    let _echoes = [start(&pair.web)?, start(&open)?];
    let from = pair.mesh.outside();
    let to: SocketAddr = (SHARED.parse::<IpAddr>()?, PORT).into();
    let node = pair.mesh.node("b");
    from.run(
        "ip",
        ["route", "add", SHARED, "via", &node.ipv4().to_string()],
    )?
    .ok()?;
    for pod in [&pair.web, &open] {
        pod.run("ip", ["address", "add", SHARED, "dev", "lo"])?
            .ok()?;
    }
    for _ in 0..2 {
        for pod in [&pair.web, &open] {
            let via = pod.ipv4().to_string();
            node.run("ip", ["route", "replace", SHARED, "via", &via])?
                .ok()?;
            if pod.name() == "open" {
                becomes_answered(from, to)?;
            } else {
                becomes_refused(&pair, from, to, outside(&pair, true), "STRICT")?;
            }
        }
    }
    Ok(())
}

#[test]
fn caller_translated_to_the_node_address_is_not_exempt() -> Result<()> {
    let (pair, echo) = stage(&DaemonOptions::default())?;
    let node = pair.mesh.node("b");
    let _translation = Firewall::node_port(node, NODE_PORT, &pair.web, PORT)?;
    let ports: [SocketAddr; 2] = [
        (node.ipv4(), NODE_PORT).into(),
        (node.ipv6(), NODE_PORT).into(),
    ];
    for to in ports {
        let client = gateway(to.is_ipv4());
        becomes_refused(&pair, pair.mesh.outside(), to, client, "STRICT")?;
    }
    assert_eq!(echo.events_of("accepted"), Vec::<Value>::new());
    // The node's own processes, such as the kubelet's probes, come from the same address.
    for to in [pair.web.at(PORT), pair.web.at6(PORT)] {
        assert!(is_answered(node, to)?, "{to} from the node");
    }
    Ok(())
}

#[test]
fn policies_apply_to_callers_translated_to_the_node_address() -> Result<()> {
    let (pair, _echo) = stage(&permissive())?;
    let node = pair.mesh.node("b");
    let _translation = Firewall::node_port(node, NODE_PORT, &pair.web, PORT)?;
    let from = pair.mesh.outside();
    for to in [
        SocketAddr::from((node.ipv4(), NODE_PORT)),
        (node.ipv6(), NODE_PORT).into(),
    ] {
        becomes_answered(from, to)?;
        pair.mesh.manifests().apply(&deny_all())?;
        let reason = "denied by AuthorizationPolicy default/callers";
        becomes_refused(&pair, from, to, gateway(to.is_ipv4()), reason)?;
        for to in [pair.web.at(PORT), pair.web.at6(PORT)] {
            assert!(is_answered(node, to)?, "{to} from the node");
        }
        pair.mesh
            .manifests()
            .remove("AuthorizationPolicy", "default", "callers")?;
    }
    Ok(())
}

#[test]
fn host_network_pod_is_not_exempt() -> Result<()> {
    let mesh = crate::common::pair::builder().start()?;
    // The kubelet's cgroups are there before the daemon.
    let agent = mesh
        .node("b")
        .host_network_pod("5f0c0fd5-0000-4000-8000-000000000001")?;
    let pair = Pair::on(mesh, &DaemonOptions::default())?;
    let mut echo = pair.web.app("echo-server --port 8080")?.listening()?;
    for to in [pair.web.at(PORT), pair.web.at6(PORT)] {
        becomes_refused(&pair, &agent, to, gateway(to.is_ipv4()), "STRICT")?;
    }
    assert_eq!(echo.events_of("accepted"), Vec::<Value>::new());
    for to in [pair.web.at(PORT), pair.web.at6(PORT)] {
        assert!(is_answered(pair.mesh.node("b"), to)?, "{to} from the node");
        echo.event("closed", TIMEOUT)?;
    }
    // PERMISSIVE takes plaintext from anyone.
    let mode = json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "callers", "namespace": "default"}, "spec": {"mtls": {"mode": "PERMISSIVE"}},
    });
    pair.mesh.manifests().apply(&mode)?;
    becomes_answered(&agent, pair.web.at(PORT))?;
    // Nor is it the node while no daemon runs.
    pair.mesh
        .manifests()
        .remove("PeerAuthentication", "default", "callers")?;
    becomes_refused(&pair, &agent, pair.web.at(PORT), gateway(true), "STRICT")?;
    let Pair { far, web, mesh, .. } = pair;
    far.kill()?;
    assert!(!is_answered(&agent, web.at(PORT))?);
    assert!(is_answered(mesh.node("b"), web.at(PORT))?);
    Ok(())
}
