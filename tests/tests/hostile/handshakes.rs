//! Callers that never complete a handshake: other protocols and versions, noise, silence, and floods.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::hostile::{
    self, ALPN, CONNECTED, Faults, PATIENCE, Presented, client_config, connect_frame, dial,
    dial_many, frame_of_length, lines_of,
};
use crate::common::stage::{HTTP, Stage};
use mesh_tests::{Context, Result, TcpState, eventually_ok, slowdown};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::ClientConnection;
use rustls::pki_types::ServerName;
use socket2::SockRef;

/// The daemon's deadline for a handshake.
const DEADLINE: Duration = Duration::from_secs(10);

/// Returns the ClientHello of a valid client.
fn client_hello(stage: &Stage) -> Result<Vec<u8>> {
    hello_offering(stage, &[ALPN])
}

fn hello_offering(stage: &Stage, alpn: &[&[u8]]) -> Result<Vec<u8>> {
    let certificate = stage.authority.mint("outsider")?;
    let config = client_config(Some(&certificate), alpn)?;
    let name = ServerName::IpAddress(stage.web().at(HTTP).ip().into());
    let mut tls = ClientConnection::new(config.into(), name)?;
    let mut hello = Vec::new();
    tls.write_tls(&mut hello)?;
    Ok(hello)
}

/// Reads until the connection ends in any way. Returns the bytes.
fn drain(mut tcp: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = tcp.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..count]);
    }
    bytes
}

#[test]
fn refuses_bytes_that_are_not_a_tunnel() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    let hello = client_hello(&stage)?;
    // A record header with TLS 1.3's version, and a ClientHello in two records.
    let (first, second) = hello[5..].split_at(50);
    let split = [
        &hello[..3],
        &[0, 50],
        first,
        &hello[..3],
        &u16::try_from(second.len())?.to_be_bytes(),
        second,
    ]
    .concat();
    let mut bad_versions = hello.clone();
    // Replace TLS 1.3 in supported_versions.
    let versions = position(&bad_versions, &[0, 43, 0, 3, 2, 3, 4])?;
    bad_versions[versions + 6] = 9;
    let noise: Vec<u8> = (0..4096_u32)
        .map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let cases: [(&str, &[u8], &str); 13] = [
        ("HTTP", b"GET / HTTP/1.1\r\nHost: web\r\n\r\n", "plaintext"),
        (
            "the preface of HTTP/2",
            b"PRI * HTTP/2.0\r\n\r\n",
            "plaintext",
        ),
        ("noise", &noise, "plaintext"),
        ("zeros", &[0; 4096], "plaintext"),
        ("one byte, then the end", &[22], "closed"),
        (
            "SSLv2",
            &[0x80, 0x2e, 1, 0, 2, 0, 0x15, 0, 0, 0, 0x10],
            "plaintext",
        ),
        (
            "an endless record",
            &[22, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff],
            "plaintext",
        ),
        ("an alert", &[21, 3, 3, 0, 2, 2, 40], "plaintext"),
        (
            "application data",
            &[23, 3, 3, 0, 17, 1, 2, 3, 4, 5],
            "plaintext",
        ),
        ("a ClientHello in two records", &split, "plaintext"),
        (
            "half a ClientHello, then the end",
            &hello[..hello.len() / 2],
            "closed",
        ),
        ("no TLS 1.3 in supported_versions", &bad_versions, "TLS 1.3"),
        ("nothing, then the end", b"", "closed"),
    ];
    for (what, bytes, reason) in cases {
        let mut tcp = dial(stage.mesh.outside(), stage.web().at(HTTP))?;
        let client = tcp.local_addr()?;
        let start = Instant::now();
        // The daemon may refuse before the end.
        let _ = tcp.write_all(bytes);
        let _ = tcp.shutdown(Shutdown::Write);
        let answer = drain(tcp);
        faults.check(answer.len() < 100, || {
            format!("{what}: answered {answer:?}")
        });
        faults.expect_line(what, &stage.daemon, client, ("refused", reason));
        faults.check(start.elapsed() < DEADLINE / 2 * slowdown(), || {
            format!("{what}: refused after {:?} only", start.elapsed())
        });
    }
    for (what, alpn) in [
        ("no ALPN", &[][..]),
        ("another ALPN", &[&b"h2"[..], b"http/1.1"]),
    ] {
        let mut tcp = dial(stage.mesh.outside(), stage.web().at(HTTP))?;
        let client = tcp.local_addr()?;
        tcp.write_all(&hello_offering(&stage, alpn)?)?;
        assert!(drain(tcp).is_empty(), "{what}");
        faults.expect_line(what, &stage.daemon, client, ("refused", "plaintext"));
    }
    // Closed before the daemon reads it.
    let tcp = dial(stage.mesh.outside(), stage.web().at(HTTP))?;
    let client = tcp.local_addr()?;
    SockRef::from(&tcp).set_linger(Some(Duration::ZERO))?;
    drop(tcp);
    faults.expect_line("a reset", &stage.daemon, client, ("refused", ""));
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

fn position(bytes: &[u8], of: &[u8]) -> Result<usize> {
    let mut windows = bytes.windows(of.len());
    windows.position(|window| window == of).context("not found")
}

#[test]
fn refuses_tls_1_2() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    let (web, outside) = (stage.web().at(HTTP).to_string(), stage.mesh.outside_ipv4());
    for (number, version, alpn) in [(0, "-tls1_2", "auth-daemon/1"), (1, "-tls1_2", "h2")] {
        let client = SocketAddr::from((outside, 30_000 + number));
        let bind = client.to_string();
        let arguments = [
            "s_client", "-bind", &bind, "-connect", &web, version, "-alpn", alpn,
        ];
        let openssl = stage.mesh.outside().run("openssl", arguments)?;
        assert_ne!(openssl.code(), Some(0), "{openssl:?}");
        assert!(!openssl.stdout.contains("BEGIN CERTIFICATE"), "{openssl:?}");
        let reason = if alpn == "h2" { "plaintext" } else { "TLS 1.3" };
        let what = format!("openssl {version} {alpn}");
        faults.expect_line(&what, &stage.daemon, client, ("refused", reason));
    }
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

#[test]
fn refuses_oversized_certificate_chain() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let leaf = stage.authority.mint("outsider")?;
    let padding = stage.authority.mint("padding")?.chain.remove(0);
    let mut faults = Faults::default();
    for certificates in [100, 1000, 10_000] {
        let chain = [leaf.chain.clone(), vec![padding.clone(); certificates]].concat();
        let chain = Presented {
            chain,
            ..leaf.clone()
        };
        // It is refused while it still sends, or right after.
        let tcp = dial(stage.mesh.outside(), stage.web().at(HTTP))?;
        let client = tcp.local_addr()?;
        let config = client_config(Some(&chain), &[ALPN])?;
        if let Ok(mut peer) = hostile::Peer::client(tcp, config) {
            let _ = peer.send(&connect_frame(stage.web().at(HTTP), client));
            match peer.frame() {
                // It fits into a handshake message of 64 KiB, and the leaf is valid, so the daemon may accept it.
                Ok(Some((CONNECTED, _))) if certificates == 100 => continue,
                Ok(frame) => panic!("a chain of {certificates} is answered: {frame:?}"),
                Err(_) => {}
            }
        }
        let what = format!("a chain of {certificates}");
        faults.expect_line(&what, &stage.daemon, client, ("refused", "too large"));
    }
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

/// What a caller sends that never completes the handshake.
type Stalling = Box<dyn FnOnce() -> Result<SocketAddr> + Send>;

#[test]
fn stalled_handshake_ends_at_the_deadline() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let (web, outside) = (stage.web().at(HTTP), stage.mesh.outside().clone());
    let hello = client_hello(&stage)?;
    let stall = |bytes: Vec<u8>| -> Result<Stalling> {
        let mut tcp = dial(&outside, web)?;
        Ok(Box::new(move || {
            tcp.write_all(&bytes)?;
            let client = tcp.local_addr()?;
            drain(tcp);
            Ok(client)
        }))
    };
    let tunnel = |plain: Vec<u8>| -> Result<Stalling> {
        let mut peer = stage.outsider(HTTP)?;
        Ok(Box::new(move || {
            let client = peer.local();
            peer.send(&plain)?;
            peer.end();
            Ok(client)
        }))
    };
    let slow: Stalling = {
        let mut tcp = dial(&outside, web)?;
        let hello = hello.clone();
        Box::new(move || {
            let client = tcp.local_addr()?;
            for byte in hello {
                if tcp.write_all(&[byte]).is_err() {
                    break;
                }
                // The pace is the attack; a write fails when the daemon ends the connection.
                thread::sleep(Duration::from_secs(1));
            }
            Ok(client)
        })
    };
    let cases: Vec<(&str, Stalling)> = vec![
        ("silence", stall(vec![])?),
        (
            "half a ClientHello",
            stall(hello[..hello.len() / 2].to_vec())?,
        ),
        ("the first byte", stall(vec![22])?),
        ("a ClientHello and no more", stall(hello.clone())?),
        (
            "half a record behind the ClientHello",
            stall([&hello[..], &[20, 3, 3]].concat())?,
        ),
        ("one byte a second", slow),
        ("no CONNECT", tunnel(vec![])?),
        (
            "half a CONNECT",
            tunnel(frame_of_length(hostile::CONNECT, 15, &[1, 4, 10]))?,
        ),
        (
            "a CONNECT that says it is longer",
            tunnel({
                let connect = connect_frame(web, web);
                [&[hostile::CONNECT, 0, 0, 1, 0], &connect[5..]].concat()
            })?,
        ),
    ];
    let ended: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = cases
            .into_iter()
            .map(|(what, stalling)| (what, scope.spawn(stalling)))
            .collect();
        let join = |(what, thread): (_, thread::ScopedJoinHandle<'_, _>)| (what, thread.join());
        running.into_iter().map(join).collect()
    });
    let mut faults = Faults::default();
    let latest = 10_000 + 3_000 * u64::from(slowdown());
    for (what, client) in ended {
        let client = client.expect("no stalling panics").context(what)?;
        faults.expect_line(what, &stage.daemon, client, ("refused", "within 10s"));
        let took = lines_of(&stage.daemon, client)?[0]["duration_ms"].as_u64();
        faults.check(
            took.is_some_and(|took| (9_500..latest).contains(&took)),
            || format!("{what}: took {took:?} ms"),
        );
    }
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

#[test]
fn truncated_hello_uses_no_cpu_time() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let hello = client_hello(&stage)?;
    let start = (Instant::now(), processor_time(stage.daemon.pid())?);
    let callers: Vec<TcpStream> = (0..20)
        .map(|_| {
            let mut tcp = dial(stage.mesh.outside(), stage.web().at(HTTP))?;
            tcp.write_all(&hello[..hello.len() / 2])?;
            tcp.shutdown(Shutdown::Write)?;
            Ok(tcp)
        })
        .collect::<Result<_>>()?;
    for caller in callers {
        let client = caller.local_addr()?;
        drain(caller);
        let lines = lines_of(&stage.daemon, client)?;
        assert_eq!(lines.len(), 1, "{lines:#?}");
        assert_eq!(lines[0]["result"], "refused", "{lines:#?}");
    }
    let used = processor_time(stage.daemon.pid())? - start.1;
    assert!(
        used < Duration::from_secs(1),
        "20 callers that have left cost {used:?} of processor time within {:?}",
        start.0.elapsed()
    );
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

/// User and system time of a process.
fn processor_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name in parentheses: state is field 3, utime and stime are 14 and 15, in hundredths of a second.
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10))
}

#[test]
fn serves_callers_beside_a_thousand_stalled_handshakes() -> Result<()> {
    const CALLERS: usize = 1000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let web = stage.web();
    let hello = client_hello(&stage)?;
    let quiet = latencies(&stage, 100)?;
    let mut callers = dial_many(stage.mesh.outside(), web.at(HTTP), CALLERS)?;
    for (number, tcp) in callers.iter_mut().enumerate() {
        // In turn: silent, in the middle of a ClientHello, and waiting for an answer.
        tcp.write_all(&hello[..[0, hello.len() / 2, hello.len()][number % 3]])?;
    }
    let held = || -> Result<usize> { Ok(web.sockets()?.of(TcpState::Established)) };
    eventually_ok(PATIENCE, "all callers to be held", || {
        let held = held()?;
        anyhow::ensure!(held >= CALLERS, "{held} are held");
        Ok(())
    })?;
    // Until the first caller is refused at the deadline, which a busy machine may reach before all requests are answered.
    let mut times = Vec::new();
    while times.len() < 100 {
        let answered = latencies(&stage, 10)?;
        if held()? < CALLERS {
            break;
        }
        times.extend(answered);
    }
    assert!(
        !times.is_empty(),
        "traffic does not continue while all are held"
    );
    times.sort();
    let slow = |times: &[Duration]| times[times.len() - 2];
    println!("{} with {CALLERS} callers held: {times:?}", times.len());
    // Or as slow as without them, on a busy machine.
    let most = (Duration::from_millis(500) * slowdown()).max(5 * slow(&quiet));
    assert!(
        slow(&times) < most,
        "real traffic is slow: {times:?}, and before {quiet:?}"
    );
    for caller in callers {
        drain(caller);
    }
    let refused = eventually_ok(PATIENCE, "a line forevery caller", || {
        let lines = stage.daemon.access_log();
        let refused = lines.iter().filter(|line| {
            line["client"]
                .as_str()
                .is_some_and(|client| client.starts_with("192.0.2.10:"))
        });
        let refused: Vec<_> = refused.cloned().collect();
        anyhow::ensure!(refused.len() >= CALLERS, "{}", refused.len());
        Ok(refused)
    })?;
    assert_eq!(refused.len(), CALLERS);
    for line in refused {
        assert_eq!(line["result"], "refused", "{line}");
        assert_eq!(line["reason"], "no handshake within 10s", "{line}");
    }
    stage.assert_unharmed(&before, 64 * 1024);
    Ok(())
}

/// The daemon stands still until all ClientHellos are there, that of the other address last.
#[test]
fn a_flood_of_handshakes_does_not_come_before_those_of_other_addresses() -> Result<()> {
    const FLOOD: usize = 900;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let (web, other) = (stage.web().at(HTTP), stage.mesh.pod("other"));
    let hello = client_hello(&stage)?;
    let daemon = stage.daemon.pid();
    // Descriptors of the daemon: one for each caller that it has accepted.
    let held = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{daemon}/fd"))?.count()) };
    let idle = held()?;
    let wait_for = |what: &str, is_so: &dyn Fn(usize) -> bool| {
        eventually_ok(PATIENCE, what, || {
            let held = held()?;
            anyhow::ensure!(is_so(held), "{held} descriptors, {idle} before");
            Ok(())
        })
    };
    // Again if the machine runs the daemon's threads, but not this one, for a while after the answer.
    eventually_ok(PATIENCE, "a caller to be answered before a flood", || {
        wait_for("none to be left", &|held| held < idle + FLOOD / 10)?;
        let caller = dial(other.place(), web)?;
        let flood = dial_many(stage.mesh.outside(), web, FLOOD)?;
        wait_for("most to be accepted", &|held| held > idle + FLOOD * 9 / 10)?;
        stage.daemon.suspend()?;
        let mut callers = flood.iter().chain([&caller]);
        let written = callers.try_for_each(|mut tcp| tcp.write_all(&hello));
        stage.daemon.resume()?;
        written?;
        let count = caller.peek(&mut [0])?;
        let answered: Vec<bool> = flood.iter().map(is_answered).collect::<Result<_>>()?;
        let answered = answered.into_iter().filter(|answered| *answered).count();
        println!("{answered} of {FLOOD} were answered before the caller");
        anyhow::ensure!(count == 1, "the caller is refused");
        // Each of the daemon's threads would reach the caller's handshake only after its part of the flood's.
        anyhow::ensure!(answered < FLOOD / 10, "{answered} of {FLOOD} came before");
        Ok(())
    })?;
    stage.assert_unharmed(&before, 64 * 1024);
    Ok(())
}

/// Whether bytes, or the end, have arrived.
fn is_answered(tcp: &TcpStream) -> Result<bool> {
    tcp.set_nonblocking(true)?;
    match tcp.peek(&mut [0]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        _ => Ok(true),
    }
}

/// Returns the durations of this number of requests, each on its own connection, in ascending order.
fn latencies(stage: &Stage, requests: usize) -> Result<Vec<Duration>> {
    let url = format!("http://{}/[1-{requests}]", stage.web().at(HTTP));
    let arguments = [
        "-sS",
        "-m",
        "30",
        "-o",
        "/dev/null",
        "-H",
        "Connection: close",
        "-w",
        "%{http_code} %{time_total}\\n",
        &url,
    ];
    let answers = stage
        .mesh
        .pod("client")
        .run("curl", arguments)?
        .ok()?
        .stdout;
    let mut times = Vec::new();
    for line in answers.lines() {
        let time = line.strip_prefix("200 ").with_context(|| answers.clone())?;
        times.push(Duration::from_secs_f64(time.parse()?));
    }
    assert_eq!(times.len(), requests, "{answers}");
    times.sort();
    Ok(times)
}
