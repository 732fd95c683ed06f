//! Servers that refuse early bytes: the same bytes are sent to another endpoint, or through another tunnel, complete and
//! once. Also, what waits for CONNECTED.

use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use crate::common::early::{Ledger, PATIENCE, Spoke, line_of, script, spoken};
use crate::common::hostile::{Faults, Peer};
use crate::common::two_endpoints::{TwoEndpoints, behind, hold, refuse, rst, serve_well};
use mesh_tests::{Result, eventually_ok};

/// Maximum number of bytes sent before CONNECTED.
const EARLY: usize = 8192;
const SOON: Duration = Duration::from_secs(3);

#[test]
fn refused_early_bytes_are_sent_to_another_endpoint() -> Result<()> {
    let scene = TwoEndpoints::start(&[("hostile", says_no)])?;
    let mut faults = Faults::default();
    for no in [
        "reset1", "reset2", "reset3", "reset4", "reset5", "reset6", "slow", "notify",
    ] {
        // A few at a time: a server that does not answer within three seconds has not refused.
        let mut apps = Vec::new();
        for size in [30, EARLY, EARLY + 1, 100_000] {
            let steps = format!("send:{size},end,rest");
            apps.push((scene.script(&format!("{no}-{size}"), &steps)?, size));
        }
        let steps = "pause:100,send:40,pause:100,send:40,end,rest";
        apps.push((scene.script(&format!("{no}-late"), steps)?, 80));
        for (app, size) in apps {
            for spoke in spoken(app)? {
                check_whole(&scene, &spoke, size, "honest", &mut faults)?;
            }
        }
    }
    faults.finish();
    Ok(())
}

#[test]
fn two_refusing_endpoints_are_skipped() -> Result<()> {
    let scene = TwoEndpoints::start(&[("one", says_no), ("two", says_no)])?;
    let mut faults = Faults::default();
    for number in 0..8 {
        let size = 100 + 5000 * number;
        let mut apps = Vec::new();
        for no in ["reset2", "reset3", "notify"] {
            let name = format!("{no}-{number}");
            apps.push(scene.script(&name, &format!("send:{size},end,rest"))?);
        }
        for app in apps {
            for spoke in spoken(app)? {
                check_whole(&scene, &spoke, size, "honest", &mut faults)?;
            }
        }
    }
    faults.finish();
    Ok(())
}

#[test]
fn app_gets_an_error_when_all_endpoints_refuse() -> Result<()> {
    let scene = TwoEndpoints::start(&[("one", says_no), ("two", says_no), ("three", says_no)])?;
    let mut faults = Faults::default();
    for no in ["reset2", "notify"] {
        for spoke in spoken(scene.script(&format!("{no}-x"), "send:100,end,rest")?)? {
            faults.check(spoke.was_reset(), || format!("{no}: {}", spoke.0));
            let takers = scene.ledger.takers(spoke.name());
            faults.check(takers.is_empty(), || format!("{no} went to {takers:?}"));
            let line = line_of(&scene.near, &spoke)?;
            faults.check(line["result"] == "refused", || format!("{line}"));
        }
    }
    faults.finish();
    Ok(())
}

/// If no early bytes were sent, any end of the tunnel counts as a refusal: the pooled tunnels were idle for too long, so
/// CONNECT is sent alone.
#[test]
fn tunnel_that_ends_before_answering_is_replaced() -> Result<()> {
    let scene = TwoEndpoints::start(&[("hostile", once_a_tunnel)])?;
    let (client, to) = (scene.mesh.pod("client"), scene.at("hostile"));
    let mut faults = Faults::default();
    // One after another, so that each gets the tunnel that the one before has left.
    for end in ["notify", "fin", "rst"] {
        for size in [30, EARLY + 1] {
            for name in [format!("{end}-a{size}"), format!("{end}-b{size}")] {
                let steps = format!("send:{size},end,rest");
                for spoke in spoken(script(&client, to, &name, &steps)?)? {
                    check_whole(&scene, &spoke, size, "hostile", &mut faults)?;
                }
                wait_until_idle(&scene)?;
            }
        }
    }
    // Soon after, with early bytes, only a close_notify says that the peer has not read them.
    for number in 0..10 {
        let steps = format!("send:50,end,rest,close,again:notify-d{number},send:50,end,rest");
        let app = script(&client, to, &format!("notify-c{number}"), &steps)?;
        for spoke in spoken(app)? {
            check_whole(&scene, &spoke, 50, "hostile", &mut faults)?;
        }
    }
    faults.finish();
    Ok(())
}

/// Bytes that an endpoint refused are sent on an idle tunnel.
#[test]
fn refused_bytes_are_sent_again_through_a_pooled_tunnel() -> Result<()> {
    let scene = TwoEndpoints::start(&[("hostile", says_no)])?;
    let (client, honest) = (scene.mesh.pod("client"), scene.at("honest"));
    let capture = scene.mesh.wire().capture_start_of_packets(0)?;
    let mut faults = Faults::default();
    for size in [30, EARLY, 20_000] {
        for no in ["reset2", "notify"] {
            let steps = format!("send:{size},end,rest");
            let first = script(&client, honest, &format!("first-{no}{size}"), &steps)?;
            let mut spokes = spoken(first)?;
            wait_until_idle(&scene)?;
            spokes.extend(spoken(scene.script(&format!("{no}-{size}"), &steps)?)?);
            for spoke in spokes {
                check_whole(&scene, &spoke, size, "honest", &mut faults)?;
            }
            wait_until_idle(&scene)?;
        }
    }
    let recording = capture.stop()?.syns();
    let dialled = recording.only(|packet| packet.destination == honest);
    let dialled = dialled.packets().len();
    faults.check(dialled <= 3, || {
        format!("{dialled} tunnels for six times two connections in turn")
    });
    faults.finish();
    Ok(())
}

#[test]
fn later_bytes_and_end_wait_for_connected() -> Result<()> {
    let scene = TwoEndpoints::start(&[("hostile", answers_late)])?;
    let to = scene.at("hostile");
    let mut faults = Faults::default();
    let scripts = [
        ("send:40,end,rest", 40),
        ("send:8192,end,rest", EARLY),
        ("send:8193,end,rest", EARLY + 1),
        ("send:100000,end,rest", 100_000),
        ("drip:600:1000,end,rest", 600),
        ("pause:100,drip:300:2000,end,rest", 300),
        ("pause:100,send:20000,send:20000,end,rest", 40_000),
        ("end,rest", 0),
    ];
    let mut apps = Vec::new();
    for (number, (steps, size)) in scripts.into_iter().enumerate() {
        let steps = format!("close,again:wait-{number}:{to},{steps}");
        apps.push((scene.script("none", &steps)?, size));
    }
    for (app, size) in apps {
        let spokes = spoken(app)?;
        for spoke in spokes.iter().filter(|spoke| spoke.name() != "none") {
            check_line(&scene, spoke, size, "hostile", &mut faults)?;
            if size > 0 {
                let takers = scene.ledger.takers(spoke.name());
                faults.check(takers == ["hostile"], || format!("{takers:?}"));
            }
        }
    }
    let breaches = BREACHES.lock().expect("no holder panics").clone();
    faults.check(breaches.is_empty(), || format!("{breaches:#?}"));
    faults.finish();
    Ok(())
}

/// Waits until the tunnel that the last connection has used is idle, and for too long to be sent early bytes: the daemon returns
/// it to the pool after the app has seen its end.
fn wait_until_idle(scene: &TwoEndpoints) -> Result<()> {
    eventually_ok(PATIENCE, "one idle tunnel", || {
        let idle = scene.near.status()?.pool.idle;
        anyhow::ensure!(idle == 1, "{idle} are idle");
        Ok(())
    })?;
    thread::sleep(Duration::from_millis(50));
    Ok(())
}

/// Checks that the expected server got all bytes once and echoed them, and that both logs have their number.
fn check_whole(
    scene: &TwoEndpoints,
    spoke: &Spoke,
    size: usize,
    by: &str,
    faults: &mut Faults,
) -> Result<()> {
    let name = spoke.name();
    let taken = scene.ledger.of(name);
    let whole = matches!(taken.as_slice(), [one] if one.who == by && one.is_true() && one.bytes.len() == size);
    faults.check(whole, || {
        let took: Vec<_> = taken.iter().map(|t| (&t.who, t.bytes.len())).collect();
        format!("{name} of {size} bytes went to {took:?}")
    });
    check_line(scene, spoke, size, by, faults)
}

fn check_line(
    scene: &TwoEndpoints,
    spoke: &Spoke,
    size: usize,
    by: &str,
    faults: &mut Faults,
) -> Result<()> {
    let name = spoke.name();
    faults.check(spoke.was_echoed(), || {
        format!("{name}: the app sees {}", spoke.0)
    });
    let mut lines = vec![line_of(&scene.near, spoke)?];
    if by == "honest" {
        lines.push(line_of(&scene.far, spoke)?);
    }
    for line in lines {
        let right = line["result"] == "ok"
            && line["bytes_to_server"] == size
            && line["bytes_to_client"] == size
            && line["endpoint"] == scene.at(by).to_string();
        faults.check(right, || format!("{name} of {size} bytes: {line}"));
    }
    Ok(())
}

/// Refuses in the way that the connection's name selects.
fn says_no(peer: &mut Peer, _: SocketAddr, _: usize, _: &Ledger) -> io::Result<bool> {
    let bytes = behind(peer, SOON)?.unwrap_or_default();
    let name = String::from_utf8_lossy(&bytes).into_owned();
    match name.split('-').next().unwrap_or_default() {
        "notify" => {
            peer.close_notify()?;
            peer.finish_tcp()?;
            hold(&peer.tcp)
        }
        "slow" => {
            thread::sleep(Duration::from_millis(500));
            refuse(peer, 2)
        }
        reset => refuse(peer, reset.trim_start_matches("reset").parse().unwrap_or(2)),
    }
}

/// Serves one connection, and ends the tunnel in answer to the next CONNECT, as the first one's name says.
fn once_a_tunnel(
    peer: &mut Peer,
    from: SocketAddr,
    number: usize,
    ledger: &Ledger,
) -> io::Result<bool> {
    if number > 1 {
        let mut first = ledger.all().into_iter();
        let first = first.find(|taken| taken.from == from);
        match first.map(|first| first.name()).unwrap_or_default() {
            name if name.starts_with("notify") => peer.close_notify()?,
            name if name.starts_with("rst") => return rst(&peer.tcp),
            _ => {}
        }
        peer.finish_tcp()?;
        return hold(&peer.tcp);
    }
    let bytes = behind(peer, SOON)?.unwrap_or_default();
    serve_noting(peer, from, &bytes, ledger)?;
    Ok(true)
}

static BREACHES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Sends CONNECTED after half a second, and records frames that come too early.
fn answers_late(peer: &mut Peer, from: SocketAddr, _: usize, ledger: &Ledger) -> io::Result<bool> {
    let breach = |what: String| BREACHES.lock().expect("no holder panics").push(what);
    let mut first = Vec::new();
    for _ in 0..2 {
        match behind(peer, Duration::from_millis(300)) {
            Ok(None) => {}
            // Once, though perhaps late.
            Ok(Some(bytes)) if first.is_empty() => first = bytes,
            Ok(Some(more)) => breach(format!("{} bytes behind {}", more.len(), first.len())),
            Err(error) => {
                breach(format!("{error}"));
                return Err(error);
            }
        }
    }
    if first.len() > EARLY {
        breach(format!("{} bytes before CONNECTED", first.len()));
    }
    serve_noting(peer, from, &first, ledger)?;
    Ok(true)
}

/// As [`serve_well`], and records what it received.
fn serve_noting(
    peer: &mut Peer,
    from: SocketAddr,
    first: &[u8],
    ledger: &Ledger,
) -> io::Result<()> {
    let entry = ledger.open("hostile", from);
    ledger.add(entry, first);
    serve_well(peer, first, |bytes| ledger.add(entry, bytes))
}
