//! The kernel carries connections between pods of a node only where the node routes between them. On a bridge, a pod can take
//! another's address, so TLS proves who answers.

use std::net::{Ipv4Addr, SocketAddr};

use mesh_tests::{Daemon, DaemonOptions, Pod, PodSpec, Result, TIMEOUT, eventually, eventually_ok};
use nix::sys::signal::Signal;

use crate::common::frames::{hardware_address, send_frame};
use crate::common::neighbours::{
    self, MESSAGE, Neighbours, bridged, echo, is_direct, refused, wait_for_verdicts,
};

#[test]
fn pods_on_a_bridge_use_tls() -> Result<()> {
    for options in [
        DaemonOptions::default(),
        DaemonOptions::default().permissive(),
    ] {
        let stage = Neighbours::on(bridged().start()?, &options)?;
        let _server = stage.web.app("echo-server --port 8080")?.listening()?;
        let capture = stage.mesh.node("a").capture_pods()?;
        for to in stage.ways() {
            for _ in 0..3 {
                let start = stage.daemon.log_position();
                echo(&stage.client, to)?;
                for line in stage.lines(start, to, 2)? {
                    assert_eq!(line["path"], "tunnel", "{line}");
                    assert_eq!(line["result"], "ok", "{line}");
                    let identity = &line["server_identity"];
                    assert_eq!(
                        *identity, "spiffe://cluster.local/ns/default/sa/web",
                        "{line}"
                    );
                }
            }
        }
        assert_eq!(stage.verdicts()?, 0);
        assert!(!capture.stop()?.contains(MESSAGE.as_bytes()));
        // A pod that reaches itself needs no link.
        for service in neighbours::SERVICES {
            let to: SocketAddr = service.parse()?;
            let start = stage.daemon.log_position();
            echo(&stage.web, to)?;
            let line = &stage.lines(start, to, 1)?[0];
            assert_eq!(line["path"], "self", "{line}");
        }
        let why = shared_link(&stage.daemon, &stage.web)?;
        assert!(why.contains("is attached to another device"), "{why}");
    }
    Ok(())
}

#[test]
fn a_pod_that_takes_the_servers_address_on_a_bridge_receives_no_plaintext() -> Result<()> {
    // Once it is in the mesh itself.
    for is_member in [false, true] {
        let attacker = PodSpec::new("attacker").on("a").service_account("attacker");
        let attacker = match is_member {
            true => attacker,
            false => attacker.annotation("auth-daemon.io/mesh", "disabled"),
        };
        let mesh = bridged().pod(attacker).start()?;
        let stage = Neighbours::on(mesh, &DaemonOptions::default())?;
        let attacker = stage.mesh.pod("attacker");
        let _server = stage.web.app("echo-server --port 8080")?.listening()?;
        let mut theirs = attacker.app("echo-server --port 8080")?.listening()?;
        let to = stage.web.at(8080);
        let capture = stage.mesh.node("a").capture_pods()?;
        // Two, so that the kernel would carry the second, and all that follow.
        echo(&stage.client, to)?;
        echo(&stage.client, to)?;

        take_address(&attacker, stage.web.ipv4(), &stage.client)?;
        let start = stage.daemon.log_position();
        refused(&stage.client, to)?;
        let outbound = |line: &serde_json::Value| {
            line["target"] == "access"
                && line["direction"] == "outbound"
                && line["destination"] == to.to_string()
        };
        let line = stage
            .daemon
            .wait_for_log_after(start, "the refusal", TIMEOUT, outbound)?;
        assert_eq!(line["path"], "tunnel", "{line}");
        assert_eq!(line["result"], "refused", "{line}");
        if is_member {
            let reason = line["reason"].as_str().unwrap_or_default();
            assert!(reason.contains("secure naming"), "{line}");
        } else {
            // The connection did lead to the attacker.
            theirs.event("accepted", TIMEOUT)?;
        }
        assert!(!capture.stop()?.contains(MESSAGE.as_bytes()));
    }
    Ok(())
}

#[test]
fn connections_end_when_a_link_is_attached_to_a_bridge() -> Result<()> {
    let stage = Neighbours::start()?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    assert_eq!(shared_link(&stage.daemon, &stage.web)?, "");
    let chat = |client: &Pod, direct| -> Result<_> {
        let mut chat = client.app(&format!("chat --to {to} --interval 10"))?;
        let ends = chat.event("connected", TIMEOUT)?;
        assert_eq!(is_direct(client, &ends["local"])?, direct, "{ends}");
        chat.event("round", TIMEOUT)?;
        Ok((chat, ends["local"].clone()))
    };
    // One that the daemon carries, and one that the kernel carries.
    let chats = [chat(&stage.client, false)?, chat(&stage.client, true)?];
    wait_for_verdicts(&stage.daemon, 1)?;

    let start = stage.daemon.log_position();
    let node = stage.mesh.node("a");
    let ip = |arguments: String| -> Result<()> {
        node.run("ip", arguments.split(' '))?.ok()?;
        Ok(())
    };
    let link = stage.web.link();
    ip(format!("link set {link} master cni0"))?;
    // From now on the bridge leads to it.
    for address in stage.web.addresses() {
        ip(format!("route del {address} dev {link}"))?;
    }
    wait_for_verdicts(&stage.daemon, 0)?;
    for (mut chat, local) in chats {
        assert!(!chat.process().wait(TIMEOUT)?.success());
        let ended = |line: &serde_json::Value| {
            line["target"] == "access" && line["direction"] == "outbound" && line["client"] == local
        };
        let line = stage
            .daemon
            .wait_for_log_after(start, "the end", TIMEOUT, ended)?;
        assert_eq!(line["result"], "reset", "{line}");
        let reason = line["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("is not private any more"), "{line}");
    }
    let wait_for_path = |path: &str| {
        eventually_ok(TIMEOUT, path, || {
            let start = stage.daemon.log_position();
            echo(&stage.client, to)?;
            let lines = stage.lines(start, to, 2)?;
            anyhow::ensure!(lines.iter().all(|line| line["path"] == path), "{lines:?}");
            Ok(())
        })
    };
    wait_for_path("tunnel")?;
    assert_eq!(stage.verdicts()?, 0);

    ip(format!("link set {link} nomaster"))?;
    for address in stage.web.addresses() {
        stage.mesh.route_to_pod(&stage.web, *address)?;
    }
    wait_for_path("same-node")?;
    wait_for_verdicts(&stage.daemon, 1)
}

#[test]
fn connections_end_when_a_link_is_attached_to_a_bridge_while_the_daemon_drains() -> Result<()> {
    let options = DaemonOptions::default().drain(TIMEOUT);
    let mut stage = Neighbours::start_with(&options, |builder| builder)?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    let mut chat = stage.client.app(&format!("chat --to {to} --interval 10"))?;
    let ends = chat.event("connected", TIMEOUT)?;
    assert!(!is_direct(&stage.client, &ends["local"])?, "{ends}");
    let start = stage.daemon.log_position();
    stage.daemon.process().signal(Signal::SIGTERM)?;
    let drains = |line: &serde_json::Value| line["message"] == "draining";
    stage
        .daemon
        .wait_for_log_after(start, "the drain", TIMEOUT, drains)?;
    chat.event("round", TIMEOUT)?;
    let attach = format!("link set {} master cni0", stage.web.link());
    stage.mesh.node("a").run("ip", attach.split(' '))?.ok()?;
    let ended =
        |line: &serde_json::Value| line["target"] == "access" && line["client"] == ends["local"];
    let line = stage
        .daemon
        .wait_for_log_after(start, "the end", TIMEOUT, ended)?;
    let reason = line["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("is not private any more"), "{line}");
    Ok(())
}

/// Why the daemon says that a pod's link is shared.
fn shared_link(daemon: &Daemon, pod: &Pod) -> Result<String> {
    let status = daemon.status_json()?;
    let pods = status["pods"].as_array().into_iter().flatten();
    let mut own = pods.filter(|own| own["pod"] == pod.full_name());
    let why = own.next().and_then(|own| own["sharedLink"].as_str());
    Ok(why.unwrap_or_default().to_owned())
}

/// Makes `victim` send to `attacker` what is for `address`.
fn take_address(attacker: &Pod, address: Ipv4Addr, victim: &Pod) -> Result<()> {
    let added = format!("addr add {address}/32 dev eth0");
    attacker.run("ip", added.split(' '))?.ok()?;
    let own = hardware_address(attacker.place(), "eth0")?;
    let reply = arp_reply(own, address);
    let text = own.map(|byte| format!("{byte:02x}")).join(":");
    // The kernel ignores a change within a second after the one before.
    eventually(TIMEOUT, "the attacker to have the address", || {
        attacker.enter(|| send_frame("eth0", &reply)).ok()?.ok()?;
        let shown = victim.run("ip", ["neigh", "show", &address.to_string()]);
        shown.ok()?.stdout.contains(&text).then_some(())
    })
}

/// An ARP reply to all (RFC 826): `own` has `address`.
fn arp_reply(own: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    const ALL: [u8; 6] = [0xff; 6];
    let [sender, target] = [own, ALL].map(|hardware| [&hardware[..], &address.octets()].concat());
    [
        &ALL[..],
        &own,
        // EtherType; Ethernet and IPv4, with the lengths of their addresses; a reply.
        &[0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 2],
        &sender,
        &target,
    ]
    .concat()
}
