//! PERMISSIVE: callers outside the mesh are served, whatever their protocol; pods of the mesh still use TLS.

use mesh_tests::{
    Context, DaemonOptions, Firewall, Nginx, OpensslServer, Place, PodSpec, Result, TIMEOUT,
    vm::skipped_when_emulated,
};
use serde_json::Value;

use crate::common::pair::Pair;

const MARKER: &str = "marker-of-permissive";

fn permissive() -> Result<Pair> {
    Pair::start_with(&DaemonOptions::default().permissive(), |builder| builder)
}

/// A caller in the pods' network on the client's node that no manifest lists.
fn stranger(pair: &Pair) -> Result<mesh_tests::Pod> {
    pair.mesh.add_pod_quietly(PodSpec::new("stranger").on("a"))
}

#[test]
fn mesh_pods_still_use_tls() -> Result<()> {
    let pair = permissive()?;
    let _nginx = Nginx::start(&pair.web, 8080, MARKER)?;
    let capture = pair.mesh.wire().capture()?;
    for to in [pair.web.at(8080), pair.web.at6(8080)] {
        let curl = get(&pair.client, &format!("http://{to}/"))?;
        assert_eq!(curl, MARKER);
    }
    let crossed = capture.stop()?;
    assert!(!crossed.contains(MARKER.as_bytes()));
    for stream in crossed.streams() {
        stream.tls_records()?;
    }
    Ok(())
}

#[test]
fn permissive_passes_outside_callers_in_the_kernel() -> Result<()> {
    let pair = permissive()?;
    let nginx = Nginx::start(&pair.web, 8080, MARKER)?;
    let capture = pair.mesh.wire().capture()?;
    for to in [pair.web.at(8080), pair.web.at6(8080)] {
        let path = format!("/{}", to.is_ipv4());
        let curl = get(pair.mesh.outside(), &format!("http://{to}{path}"))?;
        assert_eq!(curl, MARKER);
        let request = nginx.wait_for_request(&path, TIMEOUT)?;
        let outside = [
            pair.mesh.outside_ipv4().into(),
            pair.mesh.outside_ipv6().into(),
        ];
        assert!(outside.contains(&request.remote_address), "{request:?}");
    }
    assert!(capture.stop()?.contains(MARKER.as_bytes()));
    assert_eq!(pair.far.access_log(), Vec::<Value>::new());
    Ok(())
}

#[test]
fn plaintext_of_an_unknown_pod_is_passed_on() -> Result<()> {
    let pair = permissive()?;
    let nginx = Nginx::start(&pair.web, 8080, MARKER)?;
    let stranger = stranger(&pair)?;
    for (to, from) in [
        (pair.web.at(8080), stranger.addresses()[0]),
        (pair.web.at6(8080), stranger.addresses()[1]),
    ] {
        let path = format!("/{}", to.is_ipv4());
        assert_eq!(get(&stranger, &format!("http://{to}{path}"))?, MARKER);
        let request = nginx.wait_for_request(&path, TIMEOUT)?;
        assert_eq!(request.remote_address, from);
        assert_eq!(request.server_port, 8080);
        let line = pair.far.wait_for_access("the caller", TIMEOUT, |line| {
            line["destination"] == to.to_string()
        })?;
        assert_eq!(
            (&line["path"], &line["result"]),
            (&"plaintext".into(), &"ok".into()),
            "{line}"
        );
        assert!(line["bytes_to_client"].as_u64() > Some(0), "{line}");
    }
    Ok(())
}

#[test]
fn unknown_pod_may_wait_for_the_server_to_send_first() -> Result<()> {
    let pair = permissive()?;
    let mut greeter = pair
        .web
        .app("greeter --port 25 --greeting 220-welcome")?
        .listening()?;
    let stranger = stranger(&pair)?;
    for to in [pair.web.at(25), pair.web.at6(25)] {
        let seen = stranger
            .app(&format!("connect --to {to} --read-line --send thanks"))?
            .success(TIMEOUT)?;
        assert_eq!(seen["line"], "220-welcome", "{seen}");
        assert_eq!(greeter.event("closed", TIMEOUT)?["text"], "thanks");
    }
    Ok(())
}

#[test]
fn tls_of_the_app_itself_is_passed_on() -> Result<()> {
    let pair = permissive()?;
    let server = OpensslServer::start(&pair.web, 8443, &["-www"])?;
    let stranger = stranger(&pair)?;
    let certificate = server.certificate().display().to_string();
    // Tunnels between pods of the mesh, among plaintext callers from outside.
    for caller in [stranger.place(), pair.mesh.outside(), pair.client.place()] {
        for to in [pair.web.at(8443), pair.web.at6(8443)] {
            let to = to.to_string();
            let arguments = [
                "s_client",
                "-connect",
                &to,
                "-CAfile",
                &certificate,
                "-verify_return_error",
                "-brief",
            ];
            let finished = caller.run("openssl", arguments)?.ok()?;
            assert!(
                finished.stderr.contains("Verification: OK"),
                "{} to {to}: {}",
                caller.name(),
                finished.stderr
            );
        }
    }
    Ok(())
}

#[test]
fn half_closes_and_resets_of_an_unknown_pod_are_passed_on() -> Result<()> {
    let pair = permissive()?;
    let stranger = stranger(&pair)?;
    let mut late = pair
        .web
        .app("half-close --port 15 --after-end --message late")?
        .listening()?;
    let answer = stranger
        .app(&format!(
            "half-close --to {} --message first",
            pair.web.at(15)
        ))?
        .success(TIMEOUT)?;
    assert_eq!(answer["received"], "late".len());
    assert_eq!(late.event("closed", TIMEOUT)?["text"], "first");

    let mut echo = pair.web.app("echo-server --port 7")?.listening()?;
    stranger
        .app(&format!("reset --to {} --after 5", pair.web.at(7)))?
        .success(TIMEOUT)?;
    let closed = echo.event("closed", TIMEOUT)?;
    assert_eq!(closed["errno"], "ECONNRESET", "{closed}");

    let _reset = pair.web.app("reset --port 10 --after 3")?.listening()?;
    for port in [10, 9] {
        let failed = stranger
            .app(&format!(
                "connect --to {} --send abc --read",
                pair.web.at(port)
            ))?
            .failure(TIMEOUT)?;
        assert_eq!(failed["errno"], "ECONNRESET", "port {port}: {failed}");
    }
    Ok(())
}

#[test]
fn late_client_hello_still_opens_a_tunnel() -> Result<()> {
    let pair = permissive()?;
    let _echo = pair.web.app("echo-server --port 7")?.listening()?;
    // TCP's handshake passes, and TLS's first message is lost four times: it is retransmitted with backoff.
    let rules = "counter dropped {}\nchain forward { type filter hook forward priority 0; \
        tcp dport 7 meta length > 200 limit rate 1/day burst 4 packets counter name dropped drop; }";
    let firewall = Firewall::install(pair.mesh.node("b"), rules)?;
    let to = pair.web.at(7);
    let command = format!("connect --to {to} --send {MARKER} --shutdown --read");
    let answer = pair.client.app(&command)?.success(TIMEOUT)?;
    assert_eq!(answer["text"], MARKER, "{answer}");
    assert_eq!(firewall.packets("dropped")?, 4);
    let served = pair
        .far
        .wait_for_access("the connection", TIMEOUT, |_| true)?;
    assert_eq!(served["path"], "tunnel", "{served}");
    assert!(
        served["duration_ms"].as_u64() > Some(1000),
        "not late enough: {served}"
    );
    Ok(())
}

#[test]
fn concurrent_tunnels_are_not_mistaken_for_plaintext() -> Result<()> {
    if skipped_when_emulated("concurrent_tunnels_are_not_mistaken_for_plaintext") {
        return Ok(());
    }
    let pair = permissive()?;
    let _echo = pair.web.app("echo-server --port 7 --quiet")?.listening()?;
    // This many handshakes take longer than the second for which a caller may be silent.
    let many = pair
        .client
        .app(&format!("many --to {} --connections 1000", pair.web.at(7)))?
        .finish(TIMEOUT * 2)?;
    let trouble = |line: &&Value| line["path"] == "plaintext" || line["result"] != "ok";
    for daemon in [&pair.near, &pair.far] {
        assert_eq!(daemon.access_log().iter().find(trouble), None);
    }
    many.ok()?;
    Ok(())
}

fn get(place: &Place, url: &str) -> Result<String> {
    let curl = place.run("curl", ["-sS", "-m", "30", url])?.ok();
    Ok(curl
        .with_context(|| format!("from {}", place.name()))?
        .stdout)
}
