//! Connections that the kernel carries between two pods of one node end in every order that TCP knows, and both ends'
//! access log lines have each app's exact byte counts.

use std::fs;

use mesh_tests::{DaemonOptions, Result, TIMEOUT};
use serde_json::Value;

use crate::common::neighbours::Neighbours;

/// A connection: what both apps do, and what the two access log lines must contain.
struct Case {
    client: &'static str,
    server: &'static str,
    /// To the server, to the client, result.
    outbound: (u64, u64, &'static str),
    inbound: (u64, u64, &'static str),
}

const fn case(
    client: &'static str,
    server: &'static str,
    outbound: (u64, u64, &'static str),
    inbound: (u64, u64, &'static str),
) -> Case {
    Case {
        client,
        server,
        outbound,
        inbound,
    }
}

/// A case in which both sides see the same.
const fn both(client: &'static str, server: &'static str, seen: (u64, u64, &'static str)) -> Case {
    case(client, server, seen, seen)
}

const CASES: &[Case] = &[
    // The client ends first, then the server.
    both(
        "send:10,read:20,end,drain",
        "read:10,send:20,drain",
        (10, 20, "ok"),
    ),
    both("send:10,read:20", "read:10,send:20,drain", (10, 20, "ok")),
    // The server ends first.
    both("send:10,drain", "read:10,send:20", (10, 20, "ok")),
    both("send:10,drain", "read:10,send:20,end,drain", (10, 20, "ok")),
    // Both at about the same time, each before it sees the other's end.
    both(
        "send:10,read:20,wait:100,end,drain",
        "read:10,send:20,wait:100,end,drain",
        (10, 20, "ok"),
    ),
    // The server sends first.
    both("read:20,send:10,end", "send:20,drain", (10, 20, "ok")),
    // No bytes at all.
    both("end,drain", "drain", (0, 0, "ok")),
    both("drain", "end,drain", (0, 0, "ok")),
    // One direction only, long after the other has ended.
    both(
        "send:10,end,drain",
        "drain,wait:200,send:70000",
        (10, 70_000, "ok"),
    ),
    both(
        "drain,wait:200,send:70000",
        "send:10,end,drain",
        (70_000, 10, "ok"),
    ),
    // The client shuts down, reads a part and closes: the client ended in order, and the server gets a reset.
    case(
        "send:10,end,read:20",
        "drain,send:20,file:client-has-closed,send:5,wait:100,send:5",
        (10, 20, "ok"),
        (10, 20, "reset"),
    ),
    // Resets of an open connection.
    both(
        "send:10,read:20,abort",
        "read:10,send:20,drain",
        (10, 20, "reset"),
    ),
    both("send:10,drain", "read:10,send:20,abort", (10, 20, "reset")),
    both("abort", "drain", (0, 0, "reset")),
    // Resets of one that has ended in one direction.
    both(
        "send:10,end,drain",
        "drain,send:20,wait:200,abort",
        (10, 20, "reset"),
    ),
    both(
        "drain,send:20,wait:200,abort",
        "send:10,end,drain",
        (20, 10, "reset"),
    ),
    // The app closes with unread bytes.
    both(
        "send:10,peek:20",
        "read:10,send:20,drain",
        (10, 20, "reset"),
    ),
    both("send:10,drain", "peek:10", (10, 0, "reset")),
];

#[test]
fn both_access_log_lines_count_bytes_however_the_connection_ends() -> Result<()> {
    let stage = Neighbours::start()?;
    for (number, case) in CASES.iter().enumerate() {
        let port = 9000 + number as u16;
        let _server = stage
            .web
            .app(&format!("steps --port {port} --steps {}", case.server))?
            .listening()?;
        let to = if number % 2 == 0 {
            stage.web.at(port)
        } else {
            stage.web.at6(port)
        };
        let script = format!("steps --to {to} --steps {}", case.client);
        let has_closed = stage.web.folder().join("client-has-closed");
        let talk = || -> Result<_> {
            let start = stage.daemon.log_position();
            let finished = stage.client.app(&script)?.finish(TIMEOUT)?;
            fs::write(&has_closed, "")?;
            let lines = stage.lines(start, to, 2)?;
            fs::remove_file(&has_closed)?;
            Ok((finished, lines))
        };
        // The daemon carries the first; other tests check its lines.
        talk()?;
        for _ in 0..2 {
            let (finished, lines) = talk()?;
            let of = |line: &Value| {
                (
                    line["bytes_to_server"].as_u64().unwrap_or(u64::MAX),
                    line["bytes_to_client"].as_u64().unwrap_or(u64::MAX),
                    line["result"].as_str().unwrap_or_default().to_owned(),
                )
            };
            let expected = |seen: (u64, u64, &str)| (seen.0, seen.1, seen.2.to_owned());
            let evidence = format!(
                "client {:?}, server {:?}: {lines:?}, {}",
                case.client, case.server, finished.stdout
            );
            assert_eq!(lines[0]["direction"], "inbound", "{evidence}");
            assert_eq!(of(&lines[0]), expected(case.inbound), "inbound: {evidence}");
            assert_eq!(
                of(&lines[1]),
                expected(case.outbound),
                "outbound: {evidence}"
            );
            assert!(lines.iter().all(|line| line["path"] == "same-node"));
        }
    }
    assert_eq!(stage.verdicts()?, CASES.len() as u64);
    Ok(())
}

#[test]
fn kernel_carries_a_hundred_megabytes_both_ways() -> Result<()> {
    const BYTES: u64 = 100_000_000;
    let stage = Neighbours::start()?;
    let _server = stage.web.app("bidi --port 9")?.listening()?;
    let to = stage.web.at6(9);
    let start = stage.daemon.log_position();
    stage
        .client
        .app(&format!("bidi --to {to} --bytes 1"))?
        .success(TIMEOUT)?;
    stage.lines(start, to, 2)?;
    let start = stage.daemon.log_position();
    stage
        .client
        .app(&format!("bidi --to {to} --bytes {BYTES} --streams 2"))?
        .success(TIMEOUT)?;
    for line in stage.lines(start, to, 4)? {
        // The stream has a header and a trailer.
        assert_eq!(line["bytes_to_server"], BYTES + 16, "{line}");
        assert_eq!(line["bytes_to_client"], BYTES + 1, "{line}");
        assert_eq!(line["result"], "ok", "{line}");
        assert!(line["duration_ms"].as_u64() > Some(0), "{line}");
    }
    Ok(())
}

#[test]
fn closed_port_is_refused() -> Result<()> {
    let stage = Neighbours::start()?;
    let to = stage.web.at(8080);
    // Without a verdict, as between nodes, the daemon has accepted by then.
    let start = stage.daemon.log_position();
    stage
        .client
        .app(&format!("connect --to {to} --read"))?
        .failure(TIMEOUT)?;
    for line in stage.lines(start, to, 2)? {
        assert_eq!(line["result"], "refused", "{line}");
        let reason = line["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("its app refuses the connection"), "{line}");
    }
    assert_eq!(stage.verdicts()?, 0);

    let server = stage.web.app("echo-server --port 8080")?.listening()?;
    stage.decide(to)?;
    drop(server);
    let start = stage.daemon.log_position();
    let answer = stage
        .client
        .app(&format!("connect --to {to}"))?
        .failure(TIMEOUT)?;
    assert_eq!(
        (&answer["stage"], &answer["errno"]),
        (&"connect".into(), &"ECONNREFUSED".into())
    );
    let line = &stage.lines(start, to, 1)?[0];
    for (field, value) in [
        ("direction", "outbound"),
        ("path", "same-node"),
        ("result", "refused"),
        ("reason", "its app refuses the connection"),
    ] {
        assert_eq!(line[field], value, "{line}");
    }
    // The socket is usable again, for the mesh and for other destinations.
    let _server = stage.web.app("echo-server --port 8081")?.listening()?;
    let _outside = stage
        .mesh
        .outside()
        .app("echo-server --port 8081")?
        .listening()?;
    for next in [
        stage.web.at(8081),
        stage.web.at(8081),
        (stage.mesh.outside_ipv4(), 8081).into(),
    ] {
        let dial = format!("dial --first {to} --to {next} --send again");
        let answer = stage.client.app(&dial)?.success(TIMEOUT)?;
        assert_eq!(
            (&answer["first"], &answer["text"], &answer["peer"]),
            (
                &"ECONNREFUSED".into(),
                &"again".into(),
                &next.to_string().into()
            ),
            "{answer}"
        );
    }
    Ok(())
}

#[test]
fn thousands_of_connections_are_all_logged() -> Result<()> {
    let options = DaemonOptions::default();
    let stage = Neighbours::start_with(&options, |builder| builder)?;
    let _server = stage
        .web
        .app("echo-server --port 8080 --quiet")?
        .listening()?;
    let to = stage.web.at(8080);
    // Concurrently, before there is a verdict.
    let start = stage.daemon.log_position();
    stage
        .client
        .app(&format!("many --to {to} --connections 500"))?
        .success(TIMEOUT)?;
    stage.lines(start, to, 1000)?;
    // Concurrently, with a verdict.
    let start = stage.daemon.log_position();
    stage
        .client
        .app(&format!("many --to {to} --connections 2000"))?
        .success(TIMEOUT)?;
    stage.lines(start, to, 4000)?;
    // Sequentially. The kernel keeps the ends of so many connections, even if the daemon reads none of them meanwhile.
    for _ in 0..3 {
        let start = stage.daemon.log_position();
        let churn = stage
            .client
            .app(&format!(
                "churn --to {to} --connections 2000 --concurrency 64"
            ))?
            .success(TIMEOUT)?;
        println!("{churn}");
        for line in stage.lines(start, to, 4000)? {
            assert_eq!(
                (
                    &line["bytes_to_server"],
                    &line["bytes_to_client"],
                    &line["result"]
                ),
                (&8.into(), &8.into(), &"ok".into()),
                "{line}"
            );
        }
    }
    assert_eq!(stage.daemon.status_json()?["sameNode"]["unlogged"], 0);
    Ok(())
}
