//! How connections through two daemons end: orderly, one direction at a time, by a reset, or before they begin.
//! What one app does, the other app sees.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use mesh_tests::{Context, Firewall, InProcess, PodSpec, Result, TIMEOUT, eventually, slowdown};
use serde_json::Value;
use socket2::SockRef;

use crate::common::pair::Pair;

#[test]
fn server_may_send_first() -> Result<()> {
    let pair = Pair::start()?;
    let mut greeter = pair
        .web
        .app("greeter --port 25 --greeting 220-welcome")?
        .listening()?;
    for to in [pair.web.at(25), pair.web.at6(25)] {
        let seen = pair
            .client
            .app(&format!("connect --to {to} --read-line --send thanks"))?
            .success(TIMEOUT)?;
        assert_eq!(seen["line"], "220-welcome", "{seen}");
        let served = greeter.event("closed", TIMEOUT)?;
        assert_eq!(served["text"], "thanks", "{served}");
    }
    Ok(())
}

#[test]
fn each_direction_closes_independently() -> Result<()> {
    let pair = Pair::start()?;
    let mut late = pair
        .web
        .app("half-close --port 15 --after-end --message late")?
        .listening()?;
    let mut early = pair
        .web
        .app("half-close --port 16 --message early")?
        .listening()?;
    for (to_late, to_early) in [
        (pair.web.at(15), pair.web.at(16)),
        (pair.web.at6(15), pair.web.at6(16)),
    ] {
        let client = pair
            .client
            .app(&format!("half-close --to {to_late} --message first"))?;
        assert_eq!(client.success(TIMEOUT)?["received"], "late".len());
        let served = late.event("closed", TIMEOUT)?;
        assert_eq!(served["text"], "first", "{served}");

        let client = pair.client.app(&format!(
            "half-close --to {to_early} --after-end --message answer"
        ))?;
        assert_eq!(client.success(TIMEOUT)?["received"], "early".len());
        let served = early.event("closed", TIMEOUT)?;
        assert_eq!(served["text"], "answer", "{served}");
    }
    Ok(())
}

#[test]
fn one_direction_continues_long_after_the_other_closed() -> Result<()> {
    let pair = Pair::start()?;
    let _server = InProcess::start(&pair.web, any(20), |mut stream, _| {
        let _ = stream.read_to_end(&mut Vec::new());
        for _ in 0..64 {
            let _ = stream.write_all(&[b'd'; 64 * 1024]);
        }
    })?;
    let seen = pair
        .client
        .app(&format!(
            "connect --to {} --send ask --shutdown --read",
            pair.web.at(20)
        ))?
        .success(TIMEOUT)?;
    assert_eq!(seen["received"], 64 * 64 * 1024);
    Ok(())
}

#[test]
fn client_reset_reaches_the_server() -> Result<()> {
    let pair = Pair::start()?;
    let mut echo = pair.web.app("echo-server --port 7")?.listening()?;
    for to in [pair.web.at(7), pair.web.at6(7)] {
        pair.client
            .app(&format!("reset --to {to} --after 5"))?
            .success(TIMEOUT)?;
        let closed = echo.event("closed", TIMEOUT)?;
        assert_eq!(
            (&closed["stage"], &closed["errno"]),
            (&"read".into(), &"ECONNRESET".into()),
            "{closed}"
        );
    }
    let line = pair
        .near
        .wait_for_access("the reset", TIMEOUT, |line| line["result"] == "reset")?;
    assert!(
        line["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("client's app")),
        "{line}"
    );
    Ok(())
}

#[test]
fn server_reset_reaches_the_client() -> Result<()> {
    let pair = Pair::start()?;
    let _reset = pair.web.app("reset --port 10 --after 3")?.listening()?;
    for to in [pair.web.at(10), pair.web.at6(10)] {
        let failed = pair
            .client
            .app(&format!("connect --to {to} --send abc --read"))?
            .failure(TIMEOUT)?;
        assert_reset(&failed);
    }
    Ok(())
}

#[test]
fn client_may_reset_after_its_own_shutdown() -> Result<()> {
    let pair = Pair::start()?;
    let (_server, ends) = server(&pair, |mut stream| {
        let mut byte = [0; 1];
        stream.read_exact(&mut byte).map_err(|error| error.kind())?;
        stream.write_all(&byte).map_err(|error| error.kind())?;
        let _ = stream.read_to_end(&mut Vec::new());
        // After the end, this is the only sign of a reset that the kernel gives.
        let error = eventually(TIMEOUT, "an error of the socket", || {
            stream.take_error().ok().flatten()
        });
        match error {
            Ok(error) => Err(error.kind()),
            Err(_) => Ok(()),
        }
    })?;
    pair.client
        .app(&format!(
            "reset --to {} --after 1 --shutdown",
            pair.web.at(20)
        ))?
        .success(TIMEOUT)?;
    let end = ends.recv_timeout(TIMEOUT)?;
    assert!(
        matches!(
            end,
            Err(std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset)
        ),
        "the server's socket ended with {end:?}"
    );
    Ok(())
}

#[test]
fn server_may_reset_after_the_client_shutdown() -> Result<()> {
    let pair = Pair::start()?;
    let _server = InProcess::start(&pair.web, any(20), |mut stream, _| {
        let _ = stream.read_to_end(&mut Vec::new());
        reset(stream);
    })?;
    let failed = pair
        .client
        .app(&format!(
            "connect --to {} --send all --shutdown --read",
            pair.web.at(20)
        ))?
        .failure(TIMEOUT)?;
    assert_reset(&failed);
    Ok(())
}

#[test]
fn server_may_reset_after_its_own_shutdown() -> Result<()> {
    let pair = Pair::start()?;
    let _server = InProcess::start(&pair.web, any(20), |mut stream, _| {
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_exact(&mut [0; 100_000]);
        reset(stream);
    })?;
    let failed = pair
        .client
        .app(&format!(
            "source --to {} --bytes 1000000000",
            pair.web.at(20)
        ))?
        .failure(TIMEOUT)?;
    assert_eq!(failed["stage"], "write", "{failed}");
    assert!(
        ["ECONNRESET", "EPIPE"].contains(&failed["errno"].as_str().unwrap_or("")),
        "{failed}"
    );
    Ok(())
}

#[test]
fn client_may_reset_after_the_server_shutdown() -> Result<()> {
    let pair = Pair::start()?;
    let (_server, ends) = server(&pair, |mut stream| {
        let mut byte = [0; 1];
        stream.read_exact(&mut byte).map_err(|error| error.kind())?;
        stream.write_all(&byte).map_err(|error| error.kind())?;
        let _ = stream.shutdown(Shutdown::Write);
        stream.read_exact(&mut byte).map_err(|error| error.kind())
    })?;
    pair.client
        .app(&format!("reset --to {} --after 1", pair.web.at(20)))?
        .success(TIMEOUT)?;
    assert_eq!(
        ends.recv_timeout(TIMEOUT)?,
        Err(std::io::ErrorKind::ConnectionReset)
    );
    Ok(())
}

#[test]
fn refused_port_is_an_error() -> Result<()> {
    let pair = Pair::start()?;
    for to in [pair.web.at(9), pair.web.at6(9)] {
        for how in ["", "--non-blocking"] {
            let start = Instant::now();
            let failed = pair
                .client
                .app(&format!("connect --to {to} --send hello --read {how}"))?
                .failure(TIMEOUT)?;
            assert_reset(&failed);
            assert!(
                start.elapsed() < Duration::from_secs(5) * slowdown(),
                "{failed}"
            );
        }
        let line = pair.near.wait_for_access("the refusal", TIMEOUT, |line| {
            line["destination"] == to.to_string()
        })?;
        assert_eq!(line["result"], "refused", "{line}");
        assert!(
            line["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("refuse")),
            "{line}"
        );
    }
    let curl = pair.client.run(
        "curl",
        ["-sS", "-m", "30", &format!("http://{}/", pair.web.at(9))],
    )?;
    assert_ne!(curl.code(), Some(0), "{}", curl.stdout);
    assert_ne!(curl.code(), Some(52), "an empty answer: {}", curl.stderr);
    Ok(())
}

#[test]
fn unreachable_server_is_an_error() -> Result<()> {
    let pair = Pair::start_with(&Default::default(), |builder| {
        builder
            .pod(PodSpec::new("deaf").on("b").service_account("web"))
            .pod(PodSpec::new("silent").on("b").service_account("web"))
    })?;
    let (deaf, silent) = (pair.mesh.pod("deaf"), pair.mesh.pod("silent"));
    deaf.run("ip", ["link", "set", "eth0", "down"])?.ok()?;
    let rule = format!(
        "chain forward {{ type filter hook forward priority 0; ip daddr {} drop; }}",
        silent.ipv4()
    );
    let _firewall = Firewall::install(pair.mesh.node("b"), &rule)?;
    let mut clients = Vec::new();
    for to in [deaf.at(80), silent.at(80)] {
        let command = format!("connect --to {to} --send hello --read");
        clients.push((to, pair.client.app(&command)?));
    }
    for (to, client) in clients {
        let failed = client.failure(Duration::from_secs(15))?;
        assert_reset(&failed);
        let line = pair.near.wait_for_access("the failure", TIMEOUT, |line| {
            line["destination"] == to.to_string()
        })?;
        assert_eq!(line["result"], "refused", "{line}");
        assert_ne!(line["reason"], "", "{line}");
    }
    Ok(())
}

#[test]
fn bytes_sent_before_close_arrive() -> Result<()> {
    let pair = Pair::start()?;
    let (received, all) = channel();
    let _server = InProcess::start(&pair.web, any(20), move |mut stream, _| {
        let mut text = String::new();
        let end = stream
            .read_to_string(&mut text)
            .map_err(|error| error.kind());
        let _ = received.send(end.map(|_| text));
    })?;
    let long = "x".repeat(100_000);
    let sent: Vec<String> = (0..20)
        .map(|number| format!("{number}-{}", if number % 2 == 0 { &long } else { "" }))
        .collect();
    for (number, text) in sent.iter().enumerate() {
        let to = if number % 3 == 0 {
            pair.web.at6(20)
        } else {
            pair.web.at(20)
        };
        // The app exits right after its write, which closes the socket.
        pair.client
            .app(&format!("connect --to {to} --send {text}"))?
            .success(TIMEOUT)?;
        let arrived = all.recv_timeout(TIMEOUT)?;
        assert!(
            arrived.as_ref() == Ok(text),
            "connection {number} of {} bytes arrived as {:?}",
            text.len(),
            arrived.map(|text| text.len())
        );
    }
    Ok(())
}

/// A server on the pod's port 20 that reports how its connections end.
fn server<T: Send + 'static>(
    pair: &Pair,
    serve: impl Fn(TcpStream) -> T + Send + Sync + 'static,
) -> Result<(InProcess, Receiver<T>)> {
    let (sender, ends) = channel();
    let server = InProcess::start(&pair.web, any(20), move |stream, _| {
        let _ = sender.send(serve(stream));
    })
    .context("a server in the pod")?;
    Ok((server, ends))
}

fn reset(stream: TcpStream) {
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}

/// Checks that the app gets this error, and not an end that looks like an empty answer.
fn assert_reset(failed: &Value) {
    assert_eq!(failed["event"], "failed", "{failed}");
    assert_eq!(failed["errno"], "ECONNRESET", "{failed}");
}

fn any(port: u16) -> SocketAddr {
    (std::net::Ipv6Addr::UNSPECIFIED, port).into()
}
