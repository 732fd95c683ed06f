//! Early bytes of every size and timing through two daemons: they arrive complete and once, end as the
//! app ended them, and both logs count them.

use std::io::{Read, Write};
use std::time::Duration;

use crate::common::early::{Ledger, Spoke, echo, line_of, piece, script, spoken};
use crate::common::pair::Pair;
use mesh_tests::{App, Context, InProcess, Result};
use socket2::SockRef;

const ECHO: u16 = 7000;
const GREETER: u16 = 7001;
const SINK: u16 = 7002;
const GREETING: &[u8] = b"hello";

struct Scene {
    ledger: Ledger,
    _servers: [InProcess; 3],
    pair: Pair,
}

impl Scene {
    fn set() -> Result<Self> {
        let (pair, ledger) = (Pair::start()?, Ledger::default());
        let web = &pair.web;
        let servers = [
            echo(web, web.at(ECHO), name_of(ECHO), &ledger)?,
            listener(web, GREETER, GREETING, &ledger)?,
            listener(web, SINK, b"", &ledger)?,
        ];
        Ok(Self {
            ledger,
            _servers: servers,
            pair,
        })
    }

    fn script(&self, port: u16, name: &str, steps: &str) -> Result<App> {
        script(&self.pair.client, self.pair.web.at(port), name, steps)
    }

    /// Returns the lines of both nodes.
    fn lines(&self, spoke: &Spoke) -> Result<[serde_json::Value; 2]> {
        Ok([
            line_of(&self.pair.near, spoke)?,
            line_of(&self.pair.far, spoke)?,
        ])
    }

    /// Checks that the server got this number of correct bytes and then the end, and that both logs agree.
    fn check_whole(&self, spoke: &Spoke, sent: usize, received: usize) -> Result<Vec<String>> {
        let (name, mut faults) = (spoke.name(), Vec::new());
        let taken = self
            .ledger
            .ended(name_of(spoke.to().port()), spoke.local())?;
        if taken.bytes != piece(name, 0, sent) {
            faults.push(format!("{name}: {} of {sent} bytes", taken.bytes.len()));
        }
        if taken.end.as_deref() != Some("end") {
            faults.push(format!("{name}: ended with {:?}", taken.end));
        }
        if !spoke.0["errno"].is_null() || spoke.0["received"] != received {
            faults.push(format!("{name}: the app sees {}", spoke.0));
        }
        for line in self.lines(spoke)? {
            if line["result"] != "ok"
                || line["bytes_to_server"] != sent
                || line["bytes_to_client"] != received
            {
                faults.push(format!("{name}, {sent} and {received} bytes: {line}"));
            }
        }
        Ok(faults)
    }
}

#[test]
fn early_bytes_of_every_size_arrive_whole() -> Result<()> {
    let scene = Scene::set()?;
    let mut cases = Vec::new();
    for size in [1, 2, 8191, 8192, 8193, 16_384, 100_000] {
        cases.push((ECHO, format!("send:{size},end,rest"), size, size));
        cases.push((ECHO, format!("pause:80,send:{size},end,rest"), size, size));
        // During the handshake, or before the answer.
        for pause in [2, 4, 8] {
            let steps = format!("pause:{pause},send:{size},end,rest");
            cases.push((ECHO, steps, size, size));
        }
        let (greeted, answer) = (size, GREETING.len());
        let steps = format!("send:{size},read:5,end,rest");
        cases.push((GREETER, steps, greeted, answer));
        let steps = format!("read:5,send:{size},end,rest");
        cases.push((GREETER, steps, greeted, answer));
        cases.push((SINK, format!("send:{size},close"), size, 0));
        cases.push((SINK, format!("pause:5,send:{size},close"), size, 0));
        cases.push((SINK, format!("pause:80,send:{size},close"), size, 0));
        cases.push((SINK, format!("send:{size},end,close"), size, 0));
        cases.push((
            SINK,
            format!("send:1,pause:5,send:{},close", size - 1),
            size,
            0,
        ));
    }
    for (steps, size) in [
        ("drip:200:0,end,rest", 200),
        ("drip:200:500,end,rest", 200),
        ("pause:80,drip:200:500,end,rest", 200),
        ("send:8191,send:1,send:1,end,rest", 8193),
        (
            "send:8000,pause:1,send:8000,pause:1,send:8000,end,rest",
            24_000,
        ),
        ("send:1,read:1,send:1,read:1,send:8193,end,rest", 8195),
        ("end,rest", 0),
        ("pause:80,end,rest", 0),
    ] {
        cases.push((ECHO, steps.to_owned(), size, size));
    }
    cases.push((GREETER, "read:5,close".to_owned(), 0, GREETING.len()));
    cases.push((SINK, "close".to_owned(), 0, 0));
    cases.push((SINK, "pause:80,close".to_owned(), 0, 0));
    let mut faults = Vec::new();
    // A few at a time, because each is a process.
    for cases in cases.chunks(16) {
        let mut apps = Vec::new();
        for (port, steps, sent, received) in cases {
            apps.push((scene.script(*port, "s", steps)?, steps, *sent, *received));
        }
        for (app, steps, sent, received) in apps {
            for spoke in spoken(app)? {
                let mut found = scene.check_whole(&spoke, sent, received)?;
                found
                    .iter_mut()
                    .for_each(|fault| *fault = format!("{steps}: {fault}"));
                faults.append(&mut found);
            }
        }
    }
    assert!(faults.is_empty(), "\n  {}", faults.join("\n  "));
    Ok(())
}

/// The server's app may get fewer bytes than were sent, but never an end that the client's app did not send.
#[test]
fn client_reset_is_never_reported_as_end() -> Result<()> {
    let scene = Scene::set()?;
    let mut steps = vec![
        "reset".to_owned(),
        "pause:3,reset".to_owned(),
        "pause:80,reset".to_owned(),
    ];
    for size in [1, 100, 8192, 8193, 20_000, 100_000] {
        for pause in [0, 1, 3, 5, 8, 80] {
            steps.push(format!("send:{size},pause:{pause},reset"));
        }
        steps.push(format!("send:{size},reset"));
        steps.push(format!("pause:3,send:{size},reset"));
        steps.push(format!("pause:80,send:{size},reset"));
        steps.push(format!("send:1,pause:80,send:{size},reset"));
    }
    let mut faults = Vec::new();
    for steps in steps.chunks(16) {
        let mut apps = Vec::new();
        for steps in steps {
            apps.push((scene.script(SINK, "s", steps)?, steps));
        }
        for (app, steps) in apps {
            for spoke in spoken(app)? {
                let (near, far) = lines_of_a_reset(&scene, &spoke)
                    .with_context(|| format!("{steps}: {}", spoke.0))?;
                if near["result"] == "ok" {
                    faults.push(format!("{steps}: a reset is logged as {near}"));
                }
                let Some(far) = far else {
                    continue;
                };
                if far["result"] == "ok" {
                    faults.push(format!("{steps}: a reset is logged as {far}"));
                }
                let mut taken = scene.ledger.all().into_iter();
                if taken.any(|taken| taken.from == spoke.local()) {
                    let taken = scene.ledger.ended(name_of(SINK), spoke.local())?;
                    let expected = piece("s", 0, taken.bytes.len());
                    if taken.end.as_deref() == Some("end") || taken.bytes != expected {
                        let count = taken.bytes.len();
                        faults.push(format!(
                            "{steps}: the server's app got {count} bytes, then {:?}",
                            taken.end
                        ));
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "\n  {}", faults.join("\n  "));
    Ok(())
}

/// The reverse: the server's app sends its last bytes and resets.
#[test]
fn server_reset_is_never_reported_as_end() -> Result<()> {
    let scene = Scene::set()?;
    let web = &scene.pair.web;
    let sizes = [0, 1, 100, 8192, 20_000, 100_000];
    let mut servers = Vec::new();
    for (port, size) in (7100..).zip(sizes) {
        servers.push(InProcess::start(
            web,
            web.at(port),
            move |mut stream, _| {
                let _ = stream.read_exact(&mut [0; 10]);
                let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                let _ = stream.write_all(&piece("s", 0, size));
            },
        )?);
    }
    let mut faults = Vec::new();
    for steps in [
        "send:10,rest",
        "send:10,end,rest",
        "pause:60,send:10,end,rest",
    ] {
        let mut apps = Vec::new();
        for (port, size) in (7100..).zip(sizes) {
            for _ in 0..4 {
                apps.push((scene.script(port, "s", steps)?, size));
            }
        }
        for (app, size) in apps {
            for spoke in spoken(app)? {
                if !spoke.was_reset() || spoke.0["echoed"] != true {
                    faults.push(format!("{size} bytes, {steps}: the app sees {}", spoke.0));
                }
                for line in scene.lines(&spoke)? {
                    if line["result"] == "ok" {
                        faults.push(format!("{size} bytes, {steps}: {line}"));
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "\n  {}", faults.join("\n  "));
    Ok(())
}

/// Bytes after an out-of-band byte (RFC 6093) are part of the stream.
#[test]
fn out_of_band_byte_truncates_nothing() -> Result<()> {
    let scene = Scene::set()?;
    let mut faults = Vec::new();
    for (steps, before, after) in [
        ("send:50,urgent,send:50,end,rest", 50, 50),
        ("send:50,urgent,send:50,pause:80,end,rest", 50, 50),
        ("pause:80,send:50,urgent,send:50,end,rest", 50, 50),
        ("send:9000,urgent,send:9000,end,rest", 9000, 9000),
        ("pause:3,send:9000,urgent,send:30000,end,rest", 9000, 30_000),
    ] {
        for _ in 0..5 {
            for spoke in spoken(scene.script(ECHO, "s", steps)?)? {
                let taken = scene.ledger.ended(name_of(ECHO), spoke.local())?;
                let all = piece("s", 0, before + 1 + after);
                // The byte itself may be lost, because the relay carries no out-of-band data.
                let without = [&all[..before], &all[before + 1..]].concat();
                if taken.bytes != all && taken.bytes != without {
                    let got = taken.bytes.len();
                    let end = taken.end.unwrap_or_default();
                    faults.push(format!("{steps}: {got} bytes, then {end}"));
                }
            }
        }
    }
    assert!(faults.is_empty(), "\n  {}", faults.join("\n  "));
    Ok(())
}

/// Returns the line of the client's node, and the other node's if the connection reached it.
fn lines_of_a_reset(
    scene: &Scene,
    spoke: &Spoke,
) -> Result<(serde_json::Value, Option<serde_json::Value>)> {
    let near = line_of(&scene.pair.near, spoke)?;
    let reached = near["server_identity"] != "";
    let far = reached
        .then(|| line_of(&scene.pair.far, spoke))
        .transpose()?;
    Ok((near, far))
}

/// Returns the ledger's name of the server at a port.
fn name_of(port: u16) -> &'static str {
    match port {
        ECHO => "echo",
        GREETER => "greeter",
        SINK => "sink",
        _ => unreachable!("no port {port}"),
    }
}

/// Starts an app that sends first and then only reads.
fn listener(
    web: &mesh_tests::Pod,
    port: u16,
    greeting: &'static [u8],
    ledger: &Ledger,
) -> Result<InProcess> {
    let ledger = ledger.clone();
    InProcess::start(web, web.at(port), move |mut stream, from| {
        let entry = ledger.open(name_of(port), from);
        let _ = stream.write_all(greeting);
        let mut buffer = vec![0; 64 * 1024];
        let end = loop {
            match stream.read(&mut buffer) {
                Ok(0) => break "end".to_owned(),
                Ok(count) => ledger.add(entry, &buffer[..count]),
                Err(error) => break format!("{:?}", error.kind()),
            }
        };
        ledger.close(entry, end);
    })
}
