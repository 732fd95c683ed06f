//! What a client sees of the server's side.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use mesh_tests::{DaemonOptions, TIMEOUT, eventually_ok, slowdown};
use nix::sys::signal::Signal;
use rcgen::date_time_ymd;
use serde_json::json;

use crate::common::hostile::spiffe;
use crate::common::stage::{ECHO, Stage, WITNESS};
use crate::http2::{
    CANCEL, Client, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, error_code,
};

#[test]
fn answers_by_what_became_of_a_request() -> Result<()> {
    let stage = Stage::set()?;
    let web = stage.web();
    let echo = web.at(ECHO).to_string();
    let mut client = Client::connect(&stage, &[])?;
    ensure!(client.ask(1, &echo)? == 200);
    client.echo(1, b"hello")?;
    for (stream, authority, expected) in [
        // Nothing listens there.
        (5, web.at(9).to_string(), 503),
        (7, stage.mesh.pod("other").at(ECHO).to_string(), 400),
        (9, format!("127.0.0.1:{ECHO}"), 400),
        (11, web.at(15008).to_string(), 400),
        (13, "web.default.svc.cluster.local:80".into(), 400),
        (15, web.ipv4().to_string(), 400),
        // The connection is over IPv4, and the app is to see the client's address.
        (17, web.at6(ECHO).to_string(), 400),
    ] {
        let mut client = Client::connect(&stage, &[])?;
        let answered = client.ask(stream, &authority)?;
        ensure!(answered == expected, "{authority}: {answered}");
    }
    let mut get = Client::connect(&stage, &[])?;
    // GET https://…/
    let request = [0x82, 0x87, 0x84, 0x01, 1, b'a'];
    get.send(HEADERS, END_HEADERS | END_STREAM, 1, &request)?;
    ensure!(get.answer(1)? == 400);
    Ok(())
}

#[test]
fn judges_logs_and_cuts_each_stream_separately() -> Result<()> {
    let stage = Stage::set()?;
    let web = stage.web();
    let outside = stage.mesh.outside_ipv4().to_string();
    let mut client = Client::connect(&stage, &[])?;
    ensure!(client.ask(1, &web.at(ECHO).to_string())? == 200);
    ensure!(client.ask(3, &web.at(WITNESS).to_string())? == 200);
    // The stage's own traffic may still be ending.
    let mut open = stage.daemon.status()?.connections;
    open.retain(|one| one.client.ip() == stage.mesh.outside_ipv4());
    ensure!(open.len() == 2, "{open:?}");
    // Another stream is not concerned by a policy for one port.
    stage.mesh.manifests().apply(&json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "no-witness", "namespace": "default"},
        "spec": {"action": "DENY", "rules": [{"to": [{"operation": {"ports": [WITNESS.to_string()]}}]}]},
    }))?;
    let reset = client.frame_of(3)?;
    ensure!(reset.kind == RST_STREAM, "{reset:?}");
    client.echo(1, b"still here")?;
    let mut late = Client::connect(&stage, &[])?;
    ensure!(late.ask(1, &web.at(WITNESS).to_string())? == 401);
    client.send(DATA, END_STREAM, 1, b"")?;
    let end = client.frame_of(1)?;
    ensure!(end.kind == DATA && end.flags & END_STREAM != 0, "{end:?}");
    for (result, port) in [("reset", WITNESS), ("refused", WITNESS), ("ok", ECHO)] {
        let destination = web.at(port).to_string();
        let line = stage.daemon.wait_for_access(result, TIMEOUT, |line| {
            line["result"] == result && line["destination"] == destination.as_str()
        })?;
        ensure!(line["path"] == "hbone", "{line}");
        ensure!(
            line["client_identity"] == "spiffe://cluster.local/ns/default/sa/outsider",
            "{line}"
        );
        let client = line["client"].as_str().unwrap_or_default();
        ensure!(client.starts_with(&outside), "{line}");
    }
    Ok(())
}

#[test]
fn a_stream_that_nobody_reads_does_not_delay_another() -> Result<()> {
    let stage = Stage::set()?;
    let web = stage.web();
    let _source = web
        .app("source --port 13 --bytes 200000000 --quiet")?
        .listening()?;
    let mut client = Client::connect(&stage, &[])?;
    ensure!(client.ask(1, &web.at(13).to_string())? == 200);
    // The stream's window of 64 KiB is never opened again; the connection's is.
    let mut got = 0;
    while got < 65_535 {
        let data = client.frame_of(1)?;
        ensure!(data.kind == DATA, "{data:?}");
        got += data.payload.len();
    }
    client.send(8, 0, 0, &(1_u32 << 20).to_be_bytes())?;
    ensure!(client.ask(3, &web.at(ECHO).to_string())? == 200);
    for _ in 0..100 {
        client.echo(3, &[b'x'; 512])?;
    }
    Ok(())
}

#[test]
fn each_direction_ends_separately() -> Result<()> {
    let stage = Stage::set()?;
    let web = stage.web();
    let _late = web
        .app("half-close --port 15 --after-end --message late --quiet")?
        .listening()?;
    let mut client = Client::connect(&stage, &[])?;
    ensure!(client.ask(1, &web.at(15).to_string())? == 200);
    client.send(DATA, END_STREAM, 1, b"first")?;
    let (mut text, mut ended) = (Vec::new(), false);
    while !ended {
        let data = client.frame_of(1)?;
        ensure!(data.kind == DATA, "{data:?}");
        text.extend_from_slice(&data.payload);
        ended = data.flags & END_STREAM != 0;
    }
    ensure!(text == b"late", "{text:?}");
    Ok(())
}

#[test]
fn a_reset_travels_both_ways() -> Result<()> {
    let stage = Stage::set()?;
    let web = stage.web();
    let _reset = web.app("reset --port 10 --after 5 --quiet")?.listening()?;
    let mut client = Client::connect(&stage, &[])?;
    ensure!(client.ask(1, &web.at(10).to_string())? == 200);
    client.send(DATA, 0, 1, b"12345")?;
    let reset = client.frame_of(1)?;
    ensure!(
        reset.kind == RST_STREAM && error_code(&reset.payload) == Some(CANCEL),
        "{reset:?}"
    );
    ensure!(client.ask(3, &web.at(WITNESS).to_string())? == 200);
    client.send(DATA, 0, 3, b"some bytes")?;
    client.send(RST_STREAM, 0, 3, &CANCEL.to_be_bytes())?;
    let line = stage.daemon.wait_for_access("the reset", TIMEOUT, |line| {
        line["destination"] == web.at(WITNESS).to_string().as_str()
    })?;
    ensure!(line["result"] == "reset", "{line}");
    let app = line["client"].as_str().context("no client")?.parse()?;
    let seen = stage.witnessed(app)?;
    ensure!(seen.contains("ConnectionReset"), "{seen}");
    Ok(())
}

#[test]
fn a_drain_ends_no_stream() -> Result<()> {
    let options = DaemonOptions::default().drain(Duration::from_secs(30));
    let mut stage = Stage::set_with(&options)?;
    let echo = stage.web().at(ECHO).to_string();
    let mut client = Client::connect(&stage, &[])?;
    ensure!(client.ask(1, &echo)? == 200);
    stage.daemon.process().signal(Signal::SIGTERM)?;
    client.wait(|frame| frame.kind == GOAWAY)?;
    client.echo(1, b"while it drains")?;
    client.send(DATA, END_STREAM, 1, b"")?;
    client.frame_of(1)?;
    eventually_ok(TIMEOUT, "the daemon to end", || {
        ensure!(!stage.daemon.is_running());
        Ok(())
    })
}

#[test]
fn a_client_must_reconnect_before_its_certificate_expires() -> Result<()> {
    let stage = Stage::set()?;
    let echo = stage.web().at(ECHO).to_string();
    let expiry = SystemTime::now().duration_since(UNIX_EPOCH)? + Duration::from_secs(15);
    let certificate = stage
        .authority
        .mint_with(&[&spiffe("outsider")], |params| {
            params.not_after = date_time_ymd(1970, 1, 1) + expiry;
        })?;
    let outside = stage.mesh.outside();
    let mut client = Client::connect_with(&stage, &certificate, outside, &[])?;
    ensure!(client.ask(1, &echo)? == 200);
    client.wait(|frame| frame.kind == GOAWAY)?;
    // It gets the GOAWAY two seconds before, and later when other tests run beside this one.
    let late = Duration::from_secs(2) * (slowdown() - 1);
    ensure!(SystemTime::now() < UNIX_EPOCH + expiry + late, "too late");
    // What is open stays open.
    client.echo(1, b"before")?;
    eventually_ok(TIMEOUT, "the certificate to expire", || {
        ensure!(SystemTime::now() > UNIX_EPOCH + expiry);
        Ok(())
    })?;
    client.echo(1, b"after")
}
