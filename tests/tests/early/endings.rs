//! Thousands of short connections that write and close at once: the last bytes and the end are sent together, and
//! nothing is lost or counted wrongly.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use crate::common::early::{Ledger, PATIENCE, echo, piece, script, spoken};
use crate::common::pair::Pair;
use mesh_tests::{Daemon, InProcess, Result, eventually_ok, vm::skipped_when_emulated};

const APPS: usize = 8;
const CONNECTIONS: usize = 625;
const ECHO: u16 = 7000;
const ANSWERER: u16 = 7001;
const SINK: u16 = 7002;
/// The server's answer to any request, after which it closes at once.
const ANSWER: usize = 3000;

/// A connection's parameters, derived from its number: destination, behaviour, and bytes in each direction.
fn manner(number: usize) -> (u16, String, usize, usize) {
    let size = match number % 7 {
        0 => 1 + number % 50,
        1 => 8192,
        2 => 8193,
        3 => 20_000 + number,
        _ => 10 + number * 13 % 9000,
    };
    // Room for its name.
    let size = size.max(12);
    match number % 5 {
        0 | 1 => (ECHO, format!("send:{size},end,rest,close"), size, size),
        2 => (ANSWERER, "send:100,rest,close".to_owned(), 100, ANSWER),
        3 => (ANSWERER, "send:100,end,rest,close".to_owned(), 100, ANSWER),
        _ => (SINK, format!("send:{size},close"), size, 0),
    }
}

#[test]
fn serves_thousands_of_clients_that_write_and_close() -> Result<()> {
    if skipped_when_emulated("serves_thousands_of_clients_that_write_and_close") {
        return Ok(());
    }
    let (pair, ledger) = (Pair::start()?, Ledger::default());
    let web = &pair.web;
    let _servers = [
        echo(web, web.at(ECHO), "echo", &ledger)?,
        InProcess::start(web, web.at(ANSWERER), {
            let ledger = ledger.clone();
            move |mut stream, from| {
                let entry = ledger.open("answerer", from);
                let mut request = [0; 100];
                let end = match stream.read_exact(&mut request) {
                    Ok(()) => "end".to_owned(),
                    Err(error) => format!("{:?}", error.kind()),
                };
                ledger.add(entry, &request);
                let _ = stream.write_all(&piece("answer", 0, ANSWER));
                drop(stream);
                ledger.close(entry, end);
            }
        })?,
        InProcess::start(web, web.at(SINK), {
            let ledger = ledger.clone();
            move |mut stream, from| {
                let entry = ledger.open("sink", from);
                let mut all = Vec::new();
                let end = match stream.read_to_end(&mut all) {
                    Ok(_) => "end".to_owned(),
                    Err(error) => format!("{:?}", error.kind()),
                };
                ledger.add(entry, &all);
                ledger.close(entry, end);
            }
        })?,
    ];
    let mut apps = Vec::new();
    for app in 0..APPS {
        let steps: String = (0..CONNECTIONS)
            .map(|number| {
                let (port, steps, ..) = manner(number);
                format!(",again:{app}x{number}:{},{steps}", web.at(port))
            })
            .collect();
        let nowhere = web.at(SINK);
        apps.push(script(
            &pair.client,
            nowhere,
            "none",
            &format!("send:5,close{steps}"),
        )?);
    }
    let mut faults = Vec::new();
    let mut expected = BTreeMap::new();
    for app in apps {
        for spoke in spoken(app)?.iter().filter(|spoke| spoke.name() != "none") {
            let number = spoke.name().split('x').nth(1).unwrap_or_default();
            let (port, _, sent, received) = manner(number.parse()?);
            expected.insert(spoke.name().to_owned(), (sent, received));
            let echoed = port != ECHO || spoke.was_echoed();
            if !spoke.0["errno"].is_null() || spoke.0["received"] != received || !echoed {
                faults.push(format!("the app sees {}", spoke.0));
            }
        }
    }
    assert_eq!(expected.len(), APPS * CONNECTIONS);
    eventually_ok(PATIENCE, "the apps' ends", || {
        let open = ledger
            .all()
            .iter()
            .filter(|taken| taken.end.is_none())
            .count();
        anyhow::ensure!(open == 0, "{open} are open");
        Ok(())
    })?;
    for taken in ledger.all() {
        let name = taken.name();
        if name == "none" {
            continue;
        }
        match expected.remove(&name) {
            Some((sent, _)) if taken.bytes == piece(&name, 0, sent) => {}
            Some((sent, _)) => {
                let got = taken.bytes.len();
                faults.push(format!("{name}: {got} of {sent} bytes, or others"));
            }
            None => faults.push(format!("{name} came twice, or never went")),
        }
        if taken.end.as_deref() != Some("end") {
            faults.push(format!("{name} ended with {:?}", taken.end));
        }
    }
    if !expected.is_empty() {
        faults.push(format!("never came: {:?}", expected.keys().take(20)));
    }
    for daemon in [&pair.near, &pair.far] {
        check_lines(daemon, &mut faults)?;
    }
    let count = faults.len();
    faults.truncate(20);
    assert!(
        faults.is_empty(),
        "{count} faults\n  {}",
        faults.join("\n  ")
    );
    Ok(())
}

/// Checks that each connection has a line, ended in order, and has the right number of bytes.
fn check_lines(daemon: &Daemon, faults: &mut Vec<String>) -> Result<()> {
    let total = APPS * (CONNECTIONS + 1);
    let lines = eventually_ok(PATIENCE, "the lines of all", || {
        let lines = daemon.access_log();
        anyhow::ensure!(lines.len() >= total, "{} of {total}", lines.len());
        Ok(lines)
    })?;
    if lines.len() != total {
        faults.push(format!("{} lines for {total} connections", lines.len()));
    }
    let not_ok = lines.iter().filter(|line| line["result"] != "ok");
    faults.extend(not_ok.map(|line| format!("{}: {line}", daemon.node())));
    let sum = |field: &str| {
        lines
            .iter()
            .filter_map(|line| line[field].as_u64())
            .sum::<u64>()
    };
    let manners = || (0..CONNECTIONS).map(manner);
    let sent: usize = manners().map(|(_, _, sent, _)| sent).sum::<usize>() + 5;
    let received: usize = manners().map(|(_, _, _, received)| received).sum();
    for (field, expected) in [("bytes_to_server", sent), ("bytes_to_client", received)] {
        let (sum, expected) = (sum(field), (expected * APPS) as u64);
        if sum != expected {
            faults.push(format!("{}: {field} {sum}, not {expected}", daemon.node()));
        }
    }
    Ok(())
}
