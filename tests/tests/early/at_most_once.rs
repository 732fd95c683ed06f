//! Early bytes are sent with CONNECT. If the server then ends the tunnel without refusing them, the app gets
//! an error, and no endpoint receives the bytes a second time.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::common::early::{Ledger, Spoke, Taken, line_of, spoken};
use crate::common::hostile::{
    CONNECT, CONNECTED, DATA, END, Faults, Peer, RESET, frame, frame_of_length,
};
use crate::common::two_endpoints::{TwoEndpoints, behind, hold, refuse, rst, serve_well};
use mesh_tests::Result;

/// How the hostile endpoint ends the tunnel after it has read the early bytes. The connection's name selects it.
const BREAKS: [&str; 14] = [
    "fin",
    "close",
    "rst",
    "silent",
    "noise",
    "unknown",
    "data",
    "end",
    "connect",
    "length",
    "halfreset",
    "halfnotify",
    "connectedfin",
    "connectedrst",
];

#[test]
fn early_bytes_accepted_by_a_new_tunnel_are_not_sent_again() -> Result<()> {
    let scene = TwoEndpoints::start(&[("hostile", breaks_off)])?;
    let mut faults = Faults::default();
    let mut accepted = BTreeSet::new();
    for broken in BREAKS {
        let mut apps = Vec::new();
        // The second is longer than the early bytes can be.
        for (number, size) in [100, 100_000].into_iter().enumerate() {
            let steps = format!("send:{size},end,rest");
            apps.push(scene.script(&format!("{broken}-{number}"), &steps)?);
        }
        // Sent long after CONNECT and before its answer.
        apps.push(scene.script(&format!("{broken}-late"), "pause:150,send:100,end,rest")?);
        for app in apps {
            for spoke in spoken(app)? {
                if check_once(&scene, &spoke, &mut faults)? {
                    accepted.insert(broken);
                }
            }
        }
    }
    faults.check(accepted.len() == BREAKS.len(), || {
        format!("the hostile endpoint has only accepted {accepted:?}")
    });
    faults.finish();
    Ok(())
}

#[test]
fn early_bytes_accepted_by_a_pooled_tunnel_are_not_sent_again() -> Result<()> {
    let scene = TwoEndpoints::start(&[("hostile", breaks_off)])?;
    let mut faults = Faults::default();
    let mut pooled = 0;
    for broken in BREAKS {
        for attempt in 0..15 {
            let before = POOLED.load(Ordering::Relaxed);
            let (first, second) = (
                format!("ok-{broken}{attempt}"),
                format!("{broken}-{attempt}"),
            );
            let steps = format!("send:50,read:50,end,rest,close,again:{second},send:100,end,rest");
            let spokes = spoken(scene.script(&first, &steps)?)?;
            let [ok, spoke] = spokes.as_slice() else {
                anyhow::bail!("not two connections: {spokes:?}");
            };
            faults.check(ok.was_echoed(), || format!("{first}: {}", ok.0));
            // On a tunnel that was idle for longer, CONNECT is sent without early bytes, and is refused.
            check_once(&scene, spoke, &mut faults)?;
            if POOLED.load(Ordering::Relaxed) > before {
                pooled += 1;
                break;
            }
        }
    }
    println!("{pooled} of {} on tunnels from the pool", BREAKS.len());
    faults.check(pooled > 0, || "no tunnel of the pool was fresh".to_owned());
    faults.finish();
    Ok(())
}

/// The app starts to send at about the moment when the server ends the tunnel or refuses.
#[test]
fn race_of_early_bytes_and_end_is_decided_once() -> Result<()> {
    let scene = TwoEndpoints::start(&[("hostile", races)])?;
    let mut faults = Faults::default();
    let mut apps = Vec::new();
    for app in 0..4 {
        let steps: String = (0..60)
            .map(|number| {
                let pause = number % 12;
                format!("again:{app}-{number},pause:{pause},send:9000,end,rest,close,")
            })
            .collect();
        apps.push(scene.script("none", &format!("close,{}", steps.trim_end_matches(',')))?);
    }
    let (mut whole, mut failed, mut taken_by_hostile) = (0, 0, 0);
    for app in apps {
        let spokes = spoken(app)?;
        for spoke in spokes.iter().filter(|spoke| spoke.name() != "none") {
            let name = spoke.name();
            let taken = scene.ledger.of(name);
            let takers: Vec<_> = taken.iter().map(|taken| taken.who.as_str()).collect();
            let holds = match takers[..] {
                [] => spoke.was_reset(),
                ["hostile"] => {
                    taken_by_hostile += 1;
                    spoke.was_reset()
                }
                ["honest"] => spoke.was_echoed() && taken[0].bytes.len() == 9000,
                _ => false,
            };
            faults.check(holds && taken.iter().all(Taken::is_true), || {
                format!("{name} went to {takers:?}, and the app sees {}", spoke.0)
            });
            *if spoke.was_reset() {
                &mut failed
            } else {
                &mut whole
            } += 1;
        }
    }
    println!("{whole} went to the other endpoint, {failed} failed: {taken_by_hostile} were taken");
    faults.check(whole > 0 && failed > 0, || {
        format!("no race: {whole} whole, {failed} failed")
    });
    faults.finish();
    Ok(())
}

/// Checks that one endpoint alone has the bytes, and that the app got an error if it is the hostile one. Returns whether it is:
/// if the bytes come late, on a busy machine or to a tunnel that was idle, it has refused, and the honest one serves.
fn check_once(scene: &TwoEndpoints, spoke: &Spoke, faults: &mut Faults) -> Result<bool> {
    let name = spoke.name();
    let honest = scene.ledger.takers(name) == ["honest"];
    if honest {
        faults.check(spoke.was_echoed(), || format!("{name}: {}", spoke.0));
    } else {
        check_broken(scene, spoke, faults)?;
    }
    Ok(!honest)
}

/// Checks that only the hostile endpoint has the bytes, and that the app got an error.
fn check_broken(scene: &TwoEndpoints, spoke: &Spoke, faults: &mut Faults) -> Result<()> {
    let name = spoke.name();
    faults.check(spoke.was_reset(), || {
        format!("{name}: the app sees {}", spoke.0)
    });
    let takers = scene.ledger.takers(name);
    faults.check(takers == ["hostile"], || {
        format!("{name} went to {takers:?}")
    });
    let line = line_of(&scene.near, spoke)?;
    println!("{name}: {} {}", line["result"], line["reason"]);
    // Unless its answer came too late, on a busy machine.
    let late = line["reason"]
        .as_str()
        .is_some_and(|reason| reason.contains("does not answer"));
    let stood = name.starts_with("connected") && !late;
    let result = if stood { "reset" } else { "refused" };
    faults.check(line["result"] == result, || format!("{name}: {line}"));
    let endpoint = scene.at("hostile").to_string();
    faults.check(line["endpoint"] == endpoint.as_str(), || {
        format!("{name}: not of the endpoint in doubt: {line}")
    });
    let (local, to) = (spoke.local().to_string(), spoke.to().to_string());
    let elsewhere = scene.far.access_log();
    let elsewhere = elsewhere
        .iter()
        .find(|line| line["client"] == *local && line["destination"] == *to);
    faults.check(elsewhere.is_none(), || {
        format!("{name} reached the honest node: {elsewhere:?}")
    });
    Ok(())
}

/// Returns early bytes that came with CONNECT on a reused tunnel.
static POOLED: AtomicUsize = AtomicUsize::new(0);

fn breaks_off(
    peer: &mut Peer,
    from: SocketAddr,
    number: usize,
    ledger: &Ledger,
) -> io::Result<bool> {
    let patience = Duration::from_millis(if number == 1 { 3000 } else { 300 });
    let Some(bytes) = behind(peer, patience)? else {
        return refuse(peer, 2);
    };
    ledger.add(ledger.open("hostile", from), &bytes);
    if number > 1 {
        POOLED.fetch_add(1, Ordering::Relaxed);
    }
    let name = String::from_utf8_lossy(&bytes).into_owned();
    let connected = frame(CONNECTED, b"");
    match name.split(['-', '|']).next().unwrap_or_default() {
        "ok" => return serve_well(peer, &bytes, |_| {}).map(|()| true),
        "fin" => peer.finish_tcp()?,
        "close" => return Ok(false),
        "rst" => return rst(&peer.tcp),
        "noise" => peer.send_raw(&[0xa5; 100])?,
        "unknown" => peer.send(&[0x99; 10])?,
        "data" => peer.send(&frame(DATA, b"x"))?,
        "end" => peer.send(&frame(END, b""))?,
        "connect" => peer.send(&frame(CONNECT, b"\x01xx"))?,
        "length" => peer.send(&frame_of_length(CONNECTED, u32::MAX, b""))?,
        "halfreset" => {
            peer.send(&frame_of_length(RESET, 10, b"\x02ab"))?;
            peer.finish_tcp()?;
        }
        "halfnotify" => {
            peer.send(&frame_of_length(RESET, 10, b"\x02ab"))?;
            peer.close_notify()?;
        }
        "connectedfin" => {
            peer.send(&connected)?;
            peer.finish_tcp()?;
        }
        "connectedrst" => {
            peer.send(&connected)?;
            // It must arrive before the tunnel ends. The app's other bytes and its end wait for it.
            peer.frame()?;
            return rst(&peer.tcp);
        }
        _ => {}
    }
    hold(&peer.tcp)
}

/// Ends the tunnel or refuses within milliseconds of CONNECT. Does not record bytes that it refuses.
fn races(peer: &mut Peer, from: SocketAddr, _: usize, ledger: &Ledger) -> io::Result<bool> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let bytes = behind(peer, Duration::from_millis(1 + number as u64 / 4 % 5))?;
    let take = || {
        if let Some(bytes) = &bytes {
            ledger.add(ledger.open("hostile", from), bytes);
        }
    };
    match number % 4 {
        0 => {
            take();
            peer.finish_tcp()?;
            hold(&peer.tcp)
        }
        1 => {
            take();
            rst(&peer.tcp)
        }
        2 => {
            peer.close_notify()?;
            peer.finish_tcp()?;
            hold(&peer.tcp)
        }
        _ => refuse(peer, 2),
    }
}
