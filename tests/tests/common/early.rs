//! The first bytes that applications send, and their recipients: scripted clients, servers that record what they
//! receive, and a server outside of the mesh.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mesh_tests::{App, Daemon, InProcess, Place, Result, eventually, eventually_ok};
use serde_json::Value;

/// Time limit for a script.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The bytes that one server received on one connection.
#[derive(Debug, Clone)]
pub(crate) struct Taken {
    pub(crate) who: String,
    pub(crate) from: SocketAddr,
    pub(crate) bytes: Vec<u8>,
    /// `end`, or the error; `None` while the connection is open.
    pub(crate) end: Option<String>,
}

impl Taken {
    /// The name that the script gave the connection.
    pub(crate) fn name(&self) -> String {
        name_of(&self.bytes)
    }

    /// Whether the bytes are the connection's first ones, in order.
    pub(crate) fn is_true(&self) -> bool {
        self.bytes == piece(&self.name(), 0, self.bytes.len())
    }
}

/// Everything that any server received.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger(Arc<Mutex<Vec<Taken>>>);

impl Ledger {
    /// Adds an entry and returns its index.
    pub(crate) fn open(&self, who: &str, from: SocketAddr) -> usize {
        let mut entries = self.lock();
        entries.push(Taken {
            who: who.to_owned(),
            from,
            bytes: Vec::new(),
            end: None,
        });
        entries.len() - 1
    }

    pub(crate) fn add(&self, entry: usize, bytes: &[u8]) {
        self.lock()[entry].bytes.extend_from_slice(bytes);
    }

    pub(crate) fn close(&self, entry: usize, end: impl Into<String>) {
        self.lock()[entry].end = Some(end.into());
    }

    pub(crate) fn all(&self) -> Vec<Taken> {
        self.lock().clone()
    }

    /// The entries of the connection of this name.
    pub(crate) fn of(&self, name: &str) -> Vec<Taken> {
        let entries = self.all().into_iter();
        entries.filter(|taken| taken.name() == name).collect()
    }

    /// The servers that received bytes of the connection of this name.
    pub(crate) fn takers(&self, name: &str) -> Vec<String> {
        self.of(name).into_iter().map(|taken| taken.who).collect()
    }

    /// The entry of a connection from this address to this server, once it is closed.
    pub(crate) fn ended(&self, who: &str, from: SocketAddr) -> Result<Taken> {
        let is = |taken: &Taken| taken.who == who && taken.from == from && taken.end.is_some();
        eventually(PATIENCE, &format!("the end of {from} at {who}"), || {
            self.all().into_iter().find(is)
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Taken>> {
        self.0.lock().expect("no holder panics")
    }
}

/// A server that records what it receives, echoes it, and shuts down after its client has.
pub(crate) fn echo(place: &Place, on: SocketAddr, who: &str, ledger: &Ledger) -> Result<InProcess> {
    let (who, ledger) = (who.to_owned(), ledger.clone());
    InProcess::start(place, on, move |mut stream, from| {
        let entry = ledger.open(&who, from);
        let mut buffer = vec![0; 64 * 1024];
        let end = loop {
            match stream.read(&mut buffer) {
                Ok(0) => break "end".to_owned(),
                Ok(count) => {
                    ledger.add(entry, &buffer[..count]);
                    if let Err(error) = stream.write_all(&buffer[..count]) {
                        break format!("{:?}", error.kind());
                    }
                }
                Err(error) => break format!("{:?}", error.kind()),
            }
        };
        drop(stream);
        ledger.close(entry, end);
    })
}

/// Starts a script in a pod.
pub(crate) fn script(pod: &Place, to: SocketAddr, name: &str, steps: &str) -> Result<App> {
    pod.app(&format!("script --to {to} --name {name} --steps {steps}"))
}

/// Waits until a script has finished and returns the outcome of each connection.
pub(crate) fn spoken(app: App) -> Result<Vec<Spoke>> {
    let finished = app.finish(PATIENCE)?.ok()?;
    let events = finished.json_lines().into_iter();
    Ok(events
        .filter(|event| event["event"] == "spoke")
        .map(Spoke)
        .collect())
}

/// A script's report of one of its connections.
#[derive(Debug, Clone)]
pub(crate) struct Spoke(pub(crate) Value);

impl Spoke {
    pub(crate) fn name(&self) -> &str {
        self.0["name"].as_str().unwrap_or_default()
    }

    /// Its own address. Connections to different servers may share it.
    pub(crate) fn local(&self) -> SocketAddr {
        self.address("local")
    }

    /// The address that it connected to.
    pub(crate) fn to(&self) -> SocketAddr {
        self.address("to")
    }

    fn address(&self, field: &str) -> SocketAddr {
        let address = self.0[field].as_str().unwrap_or_default();
        address
            .parse()
            .unwrap_or_else(|_| panic!("no address {field}: {}", self.0))
    }

    /// The error of the connection, if any.
    pub(crate) fn was_reset(&self) -> bool {
        matches!(self.0["errno"].as_str(), Some("ECONNRESET" | "EPIPE"))
    }

    /// Whether the script was completed without error, everything sent was echoed, and the stream ended after that.
    pub(crate) fn was_echoed(&self) -> bool {
        self.0["errno"].is_null()
            && self.0["echoed"] == true
            && self.0["ended"] == true
            && self.0["received"] == self.0["sent"]
    }
}

/// The line of the connection in the access log. Exactly one must exist.
pub(crate) fn line_of(daemon: &Daemon, spoke: &Spoke) -> Result<Value> {
    let (client, destination) = (spoke.local().to_string(), spoke.to().to_string());
    let what = format!("one line of {client} to {destination}");
    eventually_ok(PATIENCE, &what, || {
        let mut lines = daemon.access_log();
        lines.retain(|line| line["client"] == *client && line["destination"] == *destination);
        anyhow::ensure!(lines.len() == 1, "{lines:#?}");
        Ok(lines.remove(0))
    })
}

/// What the connection of this name sends from byte `start` on, as `pod-app script` generates it.
pub(crate) fn piece(name: &str, start: usize, count: usize) -> Vec<u8> {
    let head = name.as_bytes();
    let byte = |place: usize| match place.checked_sub(head.len()) {
        None => head[place],
        Some(0) => b'|',
        Some(_) => b'a' + ((place ^ (place >> 8)) * 31 % 26) as u8,
    };
    (start..start + count).map(byte).collect()
}

fn name_of(bytes: &[u8]) -> String {
    let head = bytes.split(|byte| *byte == b'|').next();
    String::from_utf8_lossy(head.unwrap_or_default()).into_owned()
}
