//! Connections to addresses of the mesh that no object claims, or that the node has, too.

use std::net::{IpAddr, SocketAddr};

use mesh_tests::{
    Daemon, DaemonOptions, Nginx, Place, PodSpec, Result, ServiceSpec, TIMEOUT, eventually_ok,
};
use serde_json::Value;

use crate::common::pair::Pair;

const MARKER: &str = "answer-that-nobody-may-read";
const SERVICE: &str = "10.96.0.7";

/// Asks for a page. Returns its text, or curl's error.
fn ask(from: &Place, to: SocketAddr) -> Result<String, String> {
    let url = format!("http://{to}/{MARKER}");
    let curl = ["-gsS", "-m", "30", "--noproxy", "*", &url];
    let finished = from.run("curl", curl).map_err(|error| error.to_string())?;
    match finished.code() {
        Some(0) => Ok(finished.stdout),
        _ => Err(finished.stderr),
    }
}

/// Waits until a request from the client is refused for this reason. Another reason may come first: the other node, or a part
/// of this one's daemon, may know of a change before the rest.
fn refused(pair: &Pair, to: SocketAddr, reason: &str) -> Result<()> {
    eventually_ok(TIMEOUT, &format!("a refusal, {reason:?}"), || {
        let position = pair.near.log_position();
        match ask(&pair.client, to) {
            Ok(answer) => anyhow::bail!("{to} answered {answer}"),
            // A timeout would not tell the app anything.
            Err(error) => anyhow::ensure!(error.contains("reset"), "{to}: {error}"),
        }
        let of_request =
            |line: &Value| line["destination"] == to.to_string() && line["result"] == "refused";
        let near = &pair.near;
        let line = near.wait_for_log_after(position, "the refusal", TIMEOUT, of_request)?;
        assert_eq!(
            line["client_identity"], "spiffe://cluster.local/ns/default/sa/client",
            "{line}"
        );
        let logged = line["reason"].as_str().unwrap_or_default();
        anyhow::ensure!(logged.contains(reason), "{line}");
        Ok(())
    })
}

fn lines_for(daemon: &Daemon, to: SocketAddr) -> Vec<Value> {
    let mut lines = daemon.access_log();
    lines.retain(|line| line["destination"] == to.to_string());
    lines
}

/// Waits for the line of the only connection to `to`, which may be written after the app has read everything.
fn only_line_for(daemon: &Daemon, to: SocketAddr) -> Result<Value> {
    eventually_ok(
        TIMEOUT,
        "the line of one connection",
        || match <[Value; 1]>::try_from(lines_for(daemon, to)) {
            Ok([line]) => Ok(line),
            Err(lines) => anyhow::bail!("{lines:?}"),
        },
    )
}

#[test]
fn a_removed_pod_is_refused_while_its_server_runs_and_after_a_restart() -> Result<()> {
    let mut pair = Pair::start()?;
    let _nginx = Nginx::start(&pair.web, 8080, MARKER)?;
    let service = SocketAddr::new(SERVICE.parse()?, 80);
    for to in [pair.web.at(8080), pair.web.at6(8080), service] {
        assert_eq!(ask(&pair.client, to).as_deref(), Ok(MARKER), "{to}");
    }
    let capture = pair.mesh.wire().capture()?;
    let manifest = pair.web.manifest();
    pair.mesh.manifests().remove("Pod", "default", "web")?;
    for to in [pair.web.at(8080), pair.web.at6(8080)] {
        let ip = to.ip();
        let reason = format!("{ip} was the address of pod default/web until ");
        refused(&pair, to, &reason)?;
    }
    // The service has lost its last endpoint.
    refused(&pair, service, "no ready endpoint")?;
    pair.mesh.manifests().remove("Service", "default", "web")?;
    refused(&pair, service, "was the address of service")?;
    assert!(
        pair.near
            .metrics()?
            .contains("auth_daemon_gone_addresses 4"),
        "{}",
        pair.near.metrics()?
    );

    pair.near.process().kill()?;
    pair.near = pair.mesh.node("a").start_daemon()?;
    pair.near.wait_enrolled(&["default/client"])?;
    for to in [pair.web.at(8080), pair.web.at6(8080), service] {
        let position = pair.near.log_position();
        assert!(ask(&pair.client, to).is_err(), "{to}");
        let line = pair
            .near
            .wait_for_log_after(position, "the refusal", TIMEOUT, |line| {
                line["destination"] == to.to_string()
            })?;
        assert!(
            line.to_string().contains("before this daemon started"),
            "{line}"
        );
    }
    assert!(!capture.stop()?.contains(MARKER.as_bytes()));

    pair.mesh.manifests().apply(&manifest)?;
    pair.far.wait_enrolled(&["default/web"])?;
    eventually_ok(TIMEOUT, "an answer from the pod", || {
        ask(&pair.client, pair.web.at(8080)).map_err(anyhow::Error::msg)
    })?;
    Ok(())
}

#[test]
fn an_unknown_address_of_a_pod_network_is_refused_until_it_is_known_to_be_outside() -> Result<()> {
    let pair = Pair::start()?;
    let stranger = pair
        .mesh
        .add_pod_quietly(PodSpec::new("stranger").on("b"))?;
    let _nginx = Nginx::start(&stranger, 8080, MARKER)?;
    let capture = pair.mesh.wire().capture()?;
    for to in [stranger.at(8080), stranger.at6(8080)] {
        let reason = format!("no known pod or service has {}, which is in ", to.ip());
        refused(&pair, to, &reason)?;
    }
    assert!(!capture.stop()?.contains(MARKER.as_bytes()));

    let mut manifest = stranger.manifest();
    manifest["metadata"]["labels"]["auth-daemon.io/mesh"] = "disabled".into();
    pair.mesh.manifests().apply(&manifest)?;
    for to in [stranger.at(8080), stranger.at6(8080)] {
        eventually_ok(TIMEOUT, "the kernel's own path", || {
            let before = lines_for(&pair.near, to).len();
            let answer = ask(&pair.client, to).map_err(anyhow::Error::msg)?;
            anyhow::ensure!(answer == MARKER, "{answer}");
            let after = lines_for(&pair.near, to);
            anyhow::ensure!(after.len() == before, "it passed the daemon: {after:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_pod_that_becomes_known_while_it_is_dialled_is_reached() -> Result<()> {
    let pair = Pair::start()?;
    let late = pair.mesh.add_pod_quietly(PodSpec::new("late").on("b"))?;
    let _echo = late.app("echo-server --port 8080")?.listening()?;
    let mut manifest = late.manifest();
    manifest["metadata"]["labels"]["auth-daemon.io/mesh"] = "disabled".into();
    // The kernel accepts the connection, and the daemon serves it when it resumes: it waits only a second for the pod.
    pair.near.suspend()?;
    let mut dialling = pair.client.app(&format!(
        "connect --to {} --send x --shutdown --read",
        late.at(8080)
    ))?;
    let connected = dialling.event("connected", TIMEOUT);
    let applied = pair.mesh.manifests().apply(&manifest);
    pair.near.resume()?;
    connected.and(applied)?;
    assert_eq!(dialling.success(TIMEOUT)?["text"], "x");
    let line = only_line_for(&pair.near, late.at(8080))?;
    assert_eq!(
        (&line["result"], &line["path"]),
        (&"ok".into(), &"plaintext".into()),
        "{line}"
    );
    Ok(())
}

#[test]
fn an_unknown_address_of_a_service_network_is_refused() -> Result<()> {
    let networks = serde_json::json!(["192.0.2.0/24"]);
    let options = DaemonOptions::default().setting("serviceNetworks", networks);
    let pair = Pair::start_with(&options, |builder| builder)?;
    let outside = pair.mesh.outside();
    let _nginx = Nginx::start(outside, 8080, MARKER)?;
    let to: SocketAddr = (pair.mesh.outside_ipv4(), 8080).into();
    refused(&pair, to, "which is in 192.0.2.0/24")?;
    let to: SocketAddr = (pair.mesh.outside_ipv6(), 8080).into();
    assert_eq!(
        ask(&pair.client, to).as_deref(),
        Ok(MARKER),
        "in no network"
    );
    Ok(())
}

#[test]
fn a_service_whose_address_the_node_has_too_is_reached_through_the_tunnel() -> Result<()> {
    let pair = Pair::start()?;
    let _nginx = Nginx::start(&pair.web, 8080, "the pod")?;
    let node = pair.mesh.node("a");
    let known = || {
        pair.near
            .status()
            .map(|status| status.kernel.mesh_addresses)
    };
    let before = known()?;
    // As with kube-proxy in IPVS mode, whose kube-ipvs0 has the addresses of all services.
    for address in ["10.96.0.7/32", "fd96::7/128"] {
        node.run("ip", ["address", "add", address, "dev", "lo"])?
            .ok()?;
    }
    // More of its own than it has links, each of which may get a link-local address meanwhile.
    let add = "for i in $(seq 20); do ip address add 198.51.100.$i/32 dev lo || exit; done";
    node.run("sh", ["-c", add])?.ok()?;
    let _decoy = Nginx::start(node, 80, "the node")?;
    eventually_ok(
        TIMEOUT,
        "the node's addresses that are no service's",
        || {
            anyhow::ensure!(known()? >= before + 20, "{} addresses", known()?);
            Ok(())
        },
    )?;
    let addresses: [IpAddr; 2] = [SERVICE.parse()?, "fd96::7".parse()?];
    for ip in addresses {
        let to = SocketAddr::new(ip, 80);
        assert_eq!(ask(&pair.client, to).as_deref(), Ok("the pod"), "{to}");
    }
    let own: SocketAddr = (node.ipv4(), 80).into();
    assert_eq!(ask(&pair.client, own).as_deref(), Ok("the node"));
    let to = SocketAddr::new(addresses[0], 80);
    let line = only_line_for(&pair.near, to)?;
    assert_eq!(line["path"], "tunnel", "{line}");

    // Without the service, the node might still forward what is sent there.
    pair.mesh.manifests().remove("Service", "default", "web")?;
    refused(&pair, to, "was the address of service default/web")?;
    let other = ServiceSpec::new("again").selector("app", "web");
    let other = other.address(SERVICE).port(80, 8080).manifest();
    pair.mesh.manifests().apply(&other)?;
    eventually_ok(TIMEOUT, "an answer from the new service", || {
        ask(&pair.client, to).map_err(anyhow::Error::msg)
    })?;
    Ok(())
}
