//! Two pods of one node: the daemon decides on the first connection of each kind and carries it; the kernel carries the
//! others, and apps and log see no difference.

use std::collections::BTreeSet;

use mesh_tests::{DaemonOptions, PodSpec, Result, ServiceSpec, TIMEOUT, vm::skipped_when_emulated};
use serde_json::Value;

use crate::common::neighbours::{Neighbours, echo, is_direct};

#[test]
fn kernel_carries_all_connections_after_the_first() -> Result<()> {
    let stage = Neighbours::start()?;
    let mut server = stage.web.app("echo-server --port 8080")?.listening()?;
    for (number, to) in (1..).zip(stage.ways()) {
        for attempt in 0..3 {
            let start = stage.daemon.log_position();
            let mut chat = stage
                .client
                .app(&format!("chat --to {to} --rounds 2 --interval 300"))?;
            let ends = chat.event("connected", TIMEOUT)?;
            let direct = is_direct(&stage.client, &ends["local"])?;
            assert_eq!(direct, attempt > 0, "attempt {attempt} at {to}: {ends}");
            assert_eq!(ends["peer"], to.to_string(), "{ends}");
            let own = if to.is_ipv4() { 0 } else { 1 };
            let local: std::net::SocketAddr = ends["local"].as_str().unwrap_or_default().parse()?;
            assert_eq!(local.ip(), stage.client.addresses()[own]);
            // What the server's app sees of the client.
            let accepted = server.event("accepted", TIMEOUT)?;
            assert_eq!(accepted["peer"], ends["local"], "{accepted}");
            let server_at = if to.is_ipv4() {
                stage.web.at(8080)
            } else {
                stage.web.at6(8080)
            };
            assert_eq!(accepted["local"], server_at.to_string());
            chat.success(TIMEOUT)?;

            let lines = stage.lines(start, to, 2)?;
            for (line, direction) in lines.iter().zip(["inbound", "outbound"]) {
                let of_service = direction == "outbound" && to.port() == 80;
                for (field, value) in [
                    ("direction", Value::from(direction)),
                    ("path", "same-node".into()),
                    ("client", ends["local"].clone()),
                    ("client_identity", spiffe("client")),
                    ("server_identity", spiffe("web")),
                    ("endpoint", server_at.to_string().into()),
                    (
                        "service",
                        if of_service { "default/web" } else { "" }.into(),
                    ),
                    ("bytes_to_server", 16.into()),
                    ("bytes_to_client", 16.into()),
                    ("result", "ok".into()),
                    ("reason", "".into()),
                ] {
                    assert_eq!(line[field], value, "{field} of {line}");
                }
            }
            assert_eq!(stage.verdicts()?, number);
        }
    }
    Ok(())
}

#[test]
fn verdicts_apply_to_one_client_pod_only() -> Result<()> {
    let stage = Neighbours::start()?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    let start = stage.daemon.log_position();
    let mut chat = stage
        .other
        .app(&format!("chat --to {to} --rounds 2 --interval 300"))?;
    let ends = chat.event("connected", TIMEOUT)?;
    assert!(!is_direct(&stage.other, &ends["local"])?);
    chat.success(TIMEOUT)?;
    for line in stage.lines(start, to, 2)? {
        assert_eq!(line["client_identity"], spiffe("other"), "{line}");
    }
    assert_eq!(stage.verdicts()?, 2);
    Ok(())
}

#[test]
fn a_service_with_two_endpoints_stays_with_the_daemon_and_without_tls() -> Result<()> {
    let stage = Neighbours::start_with(&DaemonOptions::default(), |builder| {
        builder
            .pod(PodSpec::new("one").on("a").label("app", "both"))
            .pod(PodSpec::new("two").on("a").label("app", "both"))
            .service(
                ServiceSpec::new("both")
                    .selector("app", "both")
                    .address("10.96.0.8")
                    .port(80, 8080),
            )
    })?;
    let _servers = ["one", "two"]
        .map(|pod| {
            stage
                .mesh
                .pod(pod)
                .app("echo-server --port 8080")?
                .listening()
        })
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let to = "10.96.0.8:80".parse()?;
    let start = stage.daemon.log_position();
    for _ in 0..16 {
        echo(&stage.client, to)?;
    }
    let lines = stage.lines(start, to, 32)?;
    assert!(lines.iter().all(|line| line["path"] == "same-node"));
    let endpoints: BTreeSet<_> = lines.iter().map(|line| line["endpoint"].as_str()).collect();
    assert_eq!(endpoints.len(), 2, "{endpoints:?}");
    assert_eq!(stage.verdicts()?, 0);
    Ok(())
}

#[test]
fn verdicts_apply_to_permissive_pods() -> Result<()> {
    let stage = Neighbours::start_with(&DaemonOptions::default().permissive(), |builder| builder)?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    let mut chat = stage
        .client
        .app(&format!("chat --to {to} --rounds 2 --interval 300"))?;
    let ends = chat.event("connected", TIMEOUT)?;
    assert!(is_direct(&stage.client, &ends["local"])?);
    chat.success(TIMEOUT)?;
    Ok(())
}

#[test]
fn same_node_tunnel_mode_uses_tls() -> Result<()> {
    let options = DaemonOptions::default().same_node_tunnel();
    let stage = Neighbours::start_with(&options, |builder| builder)?;
    let _server = stage.web.app("echo-server --port 8080")?.listening()?;
    for to in stage.ways() {
        for _ in 0..2 {
            let start = stage.daemon.log_position();
            let mut chat = stage
                .client
                .app(&format!("chat --to {to} --rounds 2 --interval 300"))?;
            let ends = chat.event("connected", TIMEOUT)?;
            assert!(!is_direct(&stage.client, &ends["local"])?);
            chat.success(TIMEOUT)?;
            for line in stage.lines(start, to, 2)? {
                assert_eq!(line["path"], "tunnel", "{line}");
            }
        }
    }
    assert_eq!(stage.verdicts()?, 0);
    Ok(())
}

#[test]
fn the_kernel_carries_a_gigabyte_that_the_daemon_does_not_see() -> Result<()> {
    const BYTES: u64 = 1 << 30;
    if skipped_when_emulated("the_kernel_carries_a_gigabyte_that_the_daemon_does_not_see") {
        return Ok(());
    }
    let stage = Neighbours::start()?;
    let _sink = stage.web.app("sink --port 9")?.listening()?;
    let to = stage.web.at(9);
    let start = stage.daemon.log_position();
    stage
        .client
        .app(&format!("source --to {to} --bytes 1"))?
        .success(TIMEOUT)?;
    stage.lines(start, to, 2)?;
    let (start, before) = (stage.daemon.log_position(), cpu_ticks(stage.daemon.pid())?);
    stage
        .client
        .app(&format!("source --to {to} --bytes {BYTES}"))?
        .success(TIMEOUT)?;
    let spent = cpu_ticks(stage.daemon.pid())? - before;
    for line in stage.lines(start, to, 2)? {
        // The pattern's header goes before the bytes.
        assert_eq!(line["bytes_to_server"], BYTES + 16, "{line}");
    }
    println!("the daemon spent {spent} ticks");
    assert!(spent < 20, "the daemon spent {spent} ticks of its CPUs");
    Ok(())
}

/// User and system time of a process, in ticks of 10 ms.
fn cpu_ticks(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    let fields: Vec<&str> = fields.split(' ').collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

fn spiffe(account: &str) -> Value {
    format!("spiffe://cluster.local/ns/default/sa/{account}").into()
}
