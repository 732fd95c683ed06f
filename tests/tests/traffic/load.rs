//! Load: nothing is lost, connections do not delay each other, and no resources leak.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::{Context, Daemon, Place, Result, Snapshot, TIMEOUT, eventually_ok, slowdown};

use crate::common::pair::Pair;

/// Limit for operations that take seconds on an idle machine.
const LONG: Duration = Duration::from_secs(180);

#[test]
fn relays_a_gibibyte_each_way_over_eight_streams() -> Result<()> {
    let pair = Pair::start()?;
    let _server = pair.web.app("bidi --port 14 --quiet")?.listening()?;
    let each = (1_u64 << 30) / 8;
    let done = pair
        .client
        .app(&format!(
            "bidi --to {} --bytes {each} --streams 8",
            pair.web.at(14)
        ))?
        .success(LONG)?;
    println!("{done}");
    // Each byte was compared with what was sent, at either end.
    assert_eq!(
        (done["sent"].as_u64(), done["received"].as_u64()),
        (Some(1 << 30), Some(1 << 30)),
        "{done}"
    );
    for daemon in [&pair.near, &pair.far] {
        let carried = eventually_ok(TIMEOUT, "eight lines in the access log", || {
            let log = daemon.access_log();
            (log.len() == 8).then_some(log).context("not eight")
        })?;
        for line in carried {
            assert_eq!(line["result"], "ok", "{line}");
            // The stream has a header and a trailer of its own.
            assert!(line["bytes_to_server"].as_u64() >= Some(each), "{line}");
            assert!(line["bytes_to_client"].as_u64() >= Some(each), "{line}");
        }
    }
    Ok(())
}

#[test]
fn serves_a_thousand_concurrent_connections() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 7 --quiet")?.listening()?;
    let counted = pair.client.folder().join("counted");
    let until = counted.display();
    for to in [pair.web.at(7), pair.web.at6(7)] {
        let mut many = pair.client.app(&format!(
            "many --to {to} --connections 1000 --until {until}"
        ))?;
        let open = many.event("open", LONG)?;
        println!("{open}");
        assert_eq!(open["failed"], 0, "{open}");
        for daemon in [&pair.near, &pair.far] {
            // Those of the other family may be ending.
            eventually_ok(TIMEOUT, "a thousand connections", || {
                let count = daemon.status()?.connections.len();
                fail_when(count != 1000, || format!("{count} on {}", daemon.node()))
            })?;
        }
        assert_eq!(pair.near.status()?.kernel.originals, 0);
        fs::write(&counted, "")?;
        assert_eq!(many.success(LONG)?["failed"], 0);
        fs::remove_file(&counted)?;
    }
    Ok(())
}

#[test]
fn ten_thousand_connections_leave_nothing_behind() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 7 --quiet")?.listening()?;
    let churn = |connections: u32| {
        pair.client
            .app(&format!(
                "churn --to {} --connections {connections} --concurrency 32",
                pair.web.at(7)
            ))?
            .success(LONG)
    };
    // Buffers, threads and idle tunnels stay once they exist.
    churn(2000)?;
    let (near, far) = (settled(&pair.near, &pair)?, settled(&pair.far, &pair)?);
    let done = churn(10_000)?;
    println!("{done}");
    assert_eq!(done["failed"], 0, "{done}");
    for (daemon, before) in [(&pair.near, near), (&pair.far, far)] {
        let grown = eventually_ok(TIMEOUT, "everything to be as before", || {
            let now = snapshot(daemon, &pair)?;
            let growth = now.growth_since(&before, MEMORY_KIB, IDLE_TUNNELS);
            fail_when(!growth.is_empty(), || growth.join(", "))?;
            Ok(now)
        })
        .with_context(|| format!("on {}, before: {before:?}", daemon.node()))?;
        println!("{}: {before:?}\n{grown:?}", daemon.node());
        assert_eq!((grown.connections, grown.kernel.originals), (0, 0));
    }
    Ok(())
}

#[test]
fn connections_that_fail_leave_nothing_behind() -> Result<()> {
    let pair = Pair::start()?;
    // One port refuses, one resets.
    let _reset = pair
        .web
        .app("reset --port 10 --after 0 --quiet")?
        .listening()?;
    let fail = |connections: u32| -> Result<()> {
        for port in [9, 10] {
            let to = pair.web.at(port);
            let command = format!("churn --to {to} --connections {connections} --concurrency 16");
            let failed = pair.client.app(&command)?.failure(LONG)?;
            assert_eq!(failed["failed"], connections, "{failed}");
        }
        Ok(())
    };
    fail(200)?;
    let (near, far) = (settled(&pair.near, &pair)?, settled(&pair.far, &pair)?);
    fail(1000)?;
    for (daemon, before) in [(&pair.near, near), (&pair.far, far)] {
        eventually_ok(TIMEOUT, "everything to be as before", || {
            let growth = snapshot(daemon, &pair)?.growth_since(&before, MEMORY_KIB, 8);
            fail_when(!growth.is_empty(), || growth.join(", "))
        })
        .with_context(|| format!("on {}, before: {before:?}", daemon.node()))?;
    }
    Ok(())
}

#[test]
fn stalled_readers_do_not_delay_other_connections() -> Result<()> {
    const STALLED: u64 = 16;
    let pair = Pair::start()?;
    let _source = pair
        .web
        .app("source --port 13 --bytes 200000000 --quiet")?
        .listening()?;
    let _echo = pair.web.app("echo-server --port 7 --quiet")?.listening()?;
    let before = [snapshot(&pair.near, &pair)?, snapshot(&pair.far, &pair)?];
    let mut stall = pair.client.app(&format!(
        "stall --to {} --seconds 600 --streams {STALLED}",
        pair.web.at(13)
    ))?;
    for _ in 0..STALLED {
        stall.event("stalled", TIMEOUT)?;
    }
    let chat = format!("chat --to {} --rounds 100 --interval 5", pair.web.at(7));
    let chat = pair.client.app(&chat)?.finish(TIMEOUT)?.ok()?.json_lines();
    let mut times: Vec<f64> = chat
        .iter()
        .filter_map(|event| event["milliseconds"].as_f64())
        .collect();
    times.sort_by(f64::total_cmp);
    assert_eq!(times.len(), 100);
    println!("median {} ms, worst {} ms", times[50], times[99]);
    let most = 20.0 * f64::from(slowdown());
    assert!(times[50] < most, "median of {} ms", times[50]);
    // Bytes that the stalled readers do not read stay with the senders, not in the daemons.
    for (daemon, before) in [&pair.near, &pair.far].into_iter().zip(&before) {
        let now = snapshot(daemon, &pair)?.resident_kib;
        let grown = now.saturating_sub(before.resident_kib);
        println!("{} grew by {grown} KiB", daemon.node());
        assert!(
            grown < STALLED * 512,
            "{} grew by {grown} KiB",
            daemon.node()
        );
    }
    drop(stall);
    Ok(())
}

#[test]
fn stalled_reader_receives_all_bytes_later() -> Result<()> {
    let pair = Pair::start()?;
    let _source = pair
        .web
        .app("source --port 13 --bytes 50000000")?
        .listening()?;
    let mut stall = pair
        .client
        .app(&format!("stall --to {} --seconds 2", pair.web.at(13)))?;
    stall.event("stalled", TIMEOUT)?;
    assert_eq!(stall.success(TIMEOUT)?["received"], 50_000_000);
    let _stall = pair.web.app("stall --port 12 --seconds 2")?.listening()?;
    let source = format!("source --to {} --bytes 50000000", pair.web.at(12));
    assert_eq!(
        pair.client.app(&source)?.success(TIMEOUT)?["sent"],
        50_000_000
    );
    Ok(())
}

#[test]
fn sockets_that_outlive_a_lost_peer_have_keepalive() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 7")?.listening()?;
    for (to, listener) in [
        (pair.web.at(7), "127.0.0.1:15001".parse()?),
        (pair.web.at6(7), "[::1]:15001".parse()?),
    ] {
        let mut chat = pair
            .client
            .app(&format!("chat --to {to} --interval 2000"))?;
        chat.event("round", TIMEOUT)?;
        let client = &chat.event("connected", TIMEOUT)?["local"];
        let client: SocketAddr = client.as_str().context("an address")?.parse()?;
        eventually_ok(TIMEOUT, "keep-alive on the legs", || {
            let (near, far) = (legs(&pair.client)?, legs(&pair.web)?);
            let tunnel = near.iter().find(|leg| leg.remote == to && leg.kept_alive);
            let source = tunnel
                .with_context(|| format!("the tunnel: {near:?}"))?
                .local;
            let kept = |legs: &[Leg], is: &dyn Fn(&Leg) -> bool| {
                legs.iter().any(|leg| leg.kept_alive && is(leg))
            };
            for (ok, what) in [
                (
                    // To the daemon, the app may come from the loopback.
                    kept(&near, &|leg| {
                        leg.local == listener && leg.remote.port() == client.port()
                    }),
                    "app to daemon",
                ),
                (
                    kept(&far, &|leg| leg.local == to && leg.remote == source),
                    "daemon to daemon",
                ),
            ] {
                fail_when(!ok, || format!("{what}: {near:?} {far:?}"))?;
            }
            Ok(())
        })?;
        // An idle connection stays open.
        let round = chat.event("round", TIMEOUT)?;
        assert_eq!(round["round"], 2, "{round}");
    }
    Ok(())
}

/// A TCP socket of a pod.
#[derive(Debug)]
struct Leg {
    local: SocketAddr,
    remote: SocketAddr,
    kept_alive: bool,
}

fn legs(place: &Place) -> Result<Vec<Leg>> {
    let listing = place.run("ss", ["-Htno"])?.ok()?.stdout;
    let address = |word: Option<&&str>| {
        // A socket that is bound to an interface shows it, as in 10.77.2.2%lo:7 or [fd77:2::2]%lo:7.
        let address: SocketAddr = word?.replace("%lo", "").parse().ok()?;
        // An IPv6 socket shows an IPv4 address as [::ffff:10.77.2.2].
        Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
    };
    let leg = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        Some(Leg {
            local: address(words.get(3))?,
            remote: address(words.get(4))?,
            kept_alive: line.contains("timer:(keepalive"),
        })
    };
    Ok(listing.lines().filter_map(leg).collect())
}

/// Tolerated difference in resident memory, in KiB.
const MEMORY_KIB: u64 = 8 * 1024;
/// Tolerated growth of the pool for one endpoint, in sockets.
const IDLE_TUNNELS: usize = 32;

fn snapshot(daemon: &Daemon, pair: &Pair) -> Result<Snapshot> {
    Snapshot::take(daemon, &[pair.client.place(), pair.web.place()])
}

/// Measures the daemon when it carries no connection any more.
fn settled(daemon: &Daemon, pair: &Pair) -> Result<Snapshot> {
    eventually_ok(TIMEOUT, "all connections to have ended", || {
        let now = snapshot(daemon, pair)?;
        fail_when(now.connections > 0, || format!("{} go on", now.connections))?;
        Ok(now)
    })
}

fn fail_when(wrong: bool, why: impl FnOnce() -> String) -> Result<()> {
    (!wrong).then_some(()).with_context(why)
}
