//! ztunnel as the peer, where the environment variable ZTUNNEL names its binary: our daemon serves one node, ztunnel the
//! other, and both have certificates of the same CA.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::peers::ztunnel::{ZtunnelOptions, named, version};
use mesh_tests::{
    App, Ca, CaOptions, Daemon, DaemonOptions, Mesh, Pod, PodSpec, TIMEOUT, Ztunnel, eventually_ok,
};
use serde_json::{Value, json};

use crate::common::with_ca::wait_certified;
use crate::endings::half_close;

/// A port that both sides' policies deny.
const DENIED: u16 = 11;
const OURS: &str = "spiffe://cluster.local/ns/default/sa/ours";
const THEIRS: &str = "spiffe://cluster.local/ns/default/sa/theirs";
/// What ztunnel logs if a GOAWAY arrives just before it opens a stream: it does not try again on another connection.
const GOAWAY: &str = "h2 failed: connection error received: not a result of an error";
/// Limit for operations that take seconds on an idle machine.
const LONG: Duration = Duration::from_secs(180);

/// Fields are dropped in this order: the proxies, the CA, then the mesh.
struct Neighbours {
    daemon: Daemon,
    ztunnel: Ztunnel,
    ca: Ca,
    binary: PathBuf,
    /// A pod of the daemon's node.
    ours: Pod,
    /// A pod of ztunnel's node.
    theirs: Pod,
    daemon_options: DaemonOptions,
    mesh: Mesh,
}

/// The direction of a connection: whose pod connects to whose.
#[derive(Debug, Clone, Copy)]
enum Way {
    ToTheirs,
    ToOurs,
}

const BOTH: [Way; 2] = [Way::ToTheirs, Way::ToOurs];

impl Neighbours {
    /// Starts both. If `ZTUNNEL` is not set, reports `test` as skipped and returns `None`.
    fn start(test: &str, ca: &CaOptions) -> Result<Option<Self>> {
        let Some(binary) = named()? else {
            println!("SKIPPED {test}: set ZTUNNEL to the path of a ztunnel binary");
            return Ok(None);
        };
        println!("{}", version(&binary));
        let mesh = Mesh::builder()
            .node("a")
            .node("b")
            .pod(PodSpec::new("ours").on("a").service_account("ours"))
            .pod(
                PodSpec::new("theirs")
                    .on("b")
                    .service_account("theirs")
                    .annotation("ambient.istio.io/redirection", "enabled"),
            )
            .start()?;
        let ca = mesh.start_ca(ca)?;
        let daemon_options = DaemonOptions::default().ca(&ca);
        let node = mesh.node("a");
        let daemon = node.start_daemon_with(daemon_options.clone())?;
        daemon.wait_enrolled(&["default/ours"])?;
        wait_certified(&daemon)?;
        let ztunnel = Ztunnel::start(&binary, &mesh, mesh.node("b"), &ca, &options())?;
        Ok(Some(Self {
            daemon,
            ztunnel,
            ca,
            binary,
            ours: mesh.pod("ours"),
            theirs: mesh.pod("theirs"),
            daemon_options,
            mesh,
        }))
    }

    /// The client and the server of a way.
    fn pods(&self, way: Way) -> (&Pod, &Pod) {
        match way {
            Way::ToTheirs => (&self.ours, &self.theirs),
            Way::ToOurs => (&self.theirs, &self.ours),
        }
    }

    /// Waits for a line of our access log about a connection on a way: by HBONE, with both identities.
    fn wait_for_access(&self, way: Way, to: SocketAddr, result: &str) -> Result<Value> {
        let to = to.to_string();
        let what = format!("a connection to {to} that is {result}");
        let line = self
            .daemon
            .wait_for_access(&what, TIMEOUT, |line| {
                line["destination"] == to.as_str() && line["result"] == result
            })
            .with_context(|| self.daemon.log_text())?;
        let (client, server) = match way {
            Way::ToTheirs => (OURS, THEIRS),
            Way::ToOurs => (THEIRS, OURS),
        };
        ensure!(
            line["path"] == "hbone"
                && line["client_identity"] == client
                && line["server_identity"] == server,
            "{line}"
        );
        Ok(line)
    }

    /// Waits for a line of ztunnel's log about a connection on a way, which names our identity as the peer's.
    fn wait_for_line(&self, way: Way, to: SocketAddr, text: &str) -> Result<()> {
        let (ours, direction) = match way {
            Way::ToTheirs => (format!("src.identity=\"{OURS}\""), "inbound"),
            Way::ToOurs => (format!("dst.identity=\"{OURS}\""), "outbound"),
        };
        let wanted = [
            ours,
            format!("direction=\"{direction}\""),
            to.to_string(),
            text.to_owned(),
        ];
        eventually_ok(TIMEOUT, "a line in ztunnel's access log", || {
            let log = self.ztunnel.access_log();
            let found = log
                .iter()
                .any(|line| wanted.iter().all(|text| line.contains(text)));
            ensure!(found, "none has {wanted:?}: {log:#?}");
            Ok(())
        })
    }

    /// Starts an echo server on port 7 of both pods.
    fn echo(&self) -> Result<Vec<App>> {
        let pods = [&self.ours, &self.theirs].into_iter();
        pods.map(|pod| pod.app("echo-server --port 7 --quiet")?.listening())
            .collect()
    }

    /// Exchanges a few bytes on a new connection.
    fn exchange(&self, way: Way) -> Result<()> {
        let (client, server) = self.pods(way);
        let connect = format!(
            "connect --to {} --send hello --shutdown --read",
            server.at(7)
        );
        let done = client.app(&connect)?.finish(TIMEOUT)?.json_lines();
        let last = done.last().context("no event")?;
        ensure!(last["text"] == "hello", "{way:?}: {last}");
        Ok(())
    }
}

fn options() -> ZtunnelOptions {
    ZtunnelOptions {
        ipv6: true,
        denied_ports: vec![DENIED],
    }
}

#[test]
fn ztunnel_carries_bytes_both_ways_and_names_both_identities() -> Result<()> {
    let test = "ztunnel_carries_bytes_both_ways_and_names_both_identities";
    let Some(stage) = Neighbours::start(test, &CaOptions::default())? else {
        return Ok(());
    };
    let recording = stage.mesh.wire().capture()?;
    for way in BOTH {
        let (client, server) = stage.pods(way);
        let _server = server.app("bidi --port 14 --quiet")?.listening()?;
        let each = 64_u64 << 20;
        for to in [server.at(14), server.at6(14)] {
            let bidi = format!("bidi --to {to} --bytes {} --streams 4", each / 4);
            let done = client.app(&bidi)?.success(LONG)?;
            ensure!(
                (done["sent"].as_u64(), done["received"].as_u64()) == (Some(each), Some(each)),
                "{done}"
            );
            stage.wait_for_access(way, to, "ok")?;
            stage.wait_for_line(way, to, "connection complete")?;
        }
    }
    let connections = recording.stop()?.connections();
    let own: Vec<IpAddr> = [&stage.ours, &stage.theirs]
        .iter()
        .flat_map(|pod| pod.addresses().to_vec())
        .collect();
    let mut between = connections
        .iter()
        .filter(|(from, to)| own.contains(from) && own.contains(&to.ip()));
    ensure!(between.all(|(_, to)| to.port() == 15008), "{connections:?}");
    Ok(())
}

#[test]
fn ztunnel_passes_endings_on() -> Result<()> {
    let test = "ztunnel_passes_endings_on";
    let Some(stage) = Neighbours::start(test, &CaOptions::default())? else {
        return Ok(());
    };
    for way in BOTH {
        let (client, server) = stage.pods(way);
        half_close(client, server, 15, server.at(15)).with_context(|| format!("{way:?}"))?;

        let _reset = server
            .app("reset --port 10 --after 5 --quiet")?
            .listening()?;
        let connect = format!("connect --to {} --send 12345 --read", server.at(10));
        let ended = client.app(&connect)?.finish(TIMEOUT)?.json_lines();
        println!("{way:?}: the server resets: {:?}", ended.last());

        let mut echo = server.app("echo-server --port 8")?.listening()?;
        let reset = format!("reset --to {} --after 5", server.at(8));
        client.app(&reset)?.success(TIMEOUT)?;
        let served = echo.event("closed", TIMEOUT)?;
        println!("{way:?}: the client resets: {served}");
        // ztunnel ends a direction where it could reset both, so only we see a reset by the peer of our own pod.
        match way {
            Way::ToTheirs => stage.wait_for_access(way, server.at(8), "reset")?,
            Way::ToOurs => stage.wait_for_access(way, server.at(10), "reset")?,
        };
    }
    Ok(())
}

#[test]
fn ztunnel_refuses_and_is_refused() -> Result<()> {
    let test = "ztunnel_refuses_and_is_refused";
    let Some(stage) = Neighbours::start(test, &CaOptions::default())? else {
        return Ok(());
    };
    stage.mesh.manifests().apply(&json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "denied-ports", "namespace": "default"},
        "spec": {
            "action": "DENY",
            "rules": [{"to": [{"operation": {"ports": [DENIED.to_string()]}}]}],
        },
    }))?;
    for way in BOTH {
        let (client, server) = stage.pods(way);
        let _denied = server
            .app(&format!("echo-server --port {DENIED} --quiet"))?
            .listening()?;
        // Nothing listens on port 9.
        for (port, code) in [(DENIED, "401"), (9, "503")] {
            let to = server.at(port);
            // A connection that is open when the policy comes into force is reset, not refused: try until one is refused.
            eventually_ok(TIMEOUT, "the refusal", || {
                let connect = format!("connect --to {to} --send x --shutdown --read");
                client.app(&connect)?.failure(TIMEOUT)?;
                let log = stage.daemon.access_log();
                let mut refused = log.iter().filter(|line| line["result"] == "refused");
                let destination = to.to_string();
                let found = refused.any(|line| line["destination"] == destination.as_str());
                ensure!(found, "none is refused: {log:#?}");
                Ok(())
            })?;
            let line = stage.wait_for_access(way, to, "refused")?;
            let reason = line["reason"].as_str().unwrap_or_default();
            if matches!(way, Way::ToTheirs) {
                ensure!(reason.contains(code), "{line}");
            } else {
                stage.wait_for_line(way, to, code)?;
            }
        }
    }
    Ok(())
}

#[test]
fn ztunnel_and_we_have_a_thousand_streams_open() -> Result<()> {
    let test = "ztunnel_and_we_have_a_thousand_streams_open";
    let Some(stage) = Neighbours::start(test, &CaOptions::default())? else {
        return Ok(());
    };
    for way in BOTH {
        let (client, server) = stage.pods(way);
        let _echo = server.app("echo-server --port 7 --quiet")?.listening()?;
        let done = client.folder().join("seen");
        let many = format!(
            "many --to {} --connections 1000 --until {}",
            server.at(7),
            done.display()
        );
        let mut many = client.app(&many)?;
        let open = many.event("open", LONG)?;
        ensure!(open["failed"] == 0, "{way:?}: {open}");
        ensure!(stage.daemon.status()?.connections.len() == 1000, "{way:?}");
        let tunnels = client.endpoints()?;
        let tunnels = tunnels
            .iter()
            .filter(|socket| socket.remote.port() == 15008);
        println!("{way:?}: {} HBONE connections", tunnels.count());
        fs::write(done, "")?;
        ensure!(many.success(LONG)?["failed"] == 0, "{way:?}");
    }
    Ok(())
}

#[test]
fn ztunnel_or_we_restart() -> Result<()> {
    let test = "ztunnel_or_we_restart";
    let Some(mut stage) = Neighbours::start(test, &CaOptions::default())? else {
        return Ok(());
    };
    let _echoes = stage.echo()?;
    for way in BOTH {
        eventually_ok(TIMEOUT, "a first exchange", || stage.exchange(way))?;
    }
    let Neighbours {
        ztunnel, daemon, ..
    } = stage;
    // ztunnel drains: both ways fail until there is another.
    ztunnel.terminate(LONG)?;
    let node = stage.mesh.node("b");
    stage = Neighbours {
        ztunnel: Ztunnel::start(&stage.binary, &stage.mesh, node, &stage.ca, &options())?,
        daemon,
        ..stage
    };
    for way in BOTH {
        eventually_ok(TIMEOUT, "an exchange with the new ztunnel", || {
            stage.exchange(way)
        })?;
    }
    let Neighbours {
        ztunnel, daemon, ..
    } = stage;
    daemon.kill()?;
    let daemon = stage
        .mesh
        .node("a")
        .start_daemon_with(stage.daemon_options.clone())?;
    stage = Neighbours {
        ztunnel,
        daemon,
        ..stage
    };
    for way in BOTH {
        eventually_ok(TIMEOUT, "an exchange with the new daemon", || {
            stage.exchange(way)
        })?;
    }
    Ok(())
}

#[test]
fn ztunnel_and_we_follow_the_root() -> Result<()> {
    let test = "ztunnel_and_we_follow_the_root";
    let options = CaOptions::default()
        .setting("certificateLifetime", "10s".into())
        .setting("rotationSpread", "15s".into());
    let Some(stage) = Neighbours::start(test, &options)? else {
        return Ok(());
    };
    let _echoes = stage.echo()?;
    for way in BOTH {
        eventually_ok(TIMEOUT, "a first exchange", || stage.exchange(way))?;
    }
    let before = fs::read_to_string(stage.ca.roots())?;
    stage.ca.operate(&["rotate-root"])?.ok()?;
    let (mut exchanges, mut overtaken, mut seen) = (0, 0, before.clone());
    eventually_ok(LONG, "the new root to be the only one", || {
        for way in BOTH {
            exchanges += 1;
            if let Err(error) = stage.exchange(way) {
                let last = stage.ztunnel.access_log().pop().unwrap_or_default();
                if !last.contains(GOAWAY) {
                    // Not retried: no exchange may fail.
                    let evidence = format!("{last}\n{}", stage.ztunnel.output());
                    return Ok(Err(error.context(evidence)));
                }
                overtaken += 1;
            }
        }
        let roots = fs::read_to_string(stage.ca.roots())?;
        if roots != seen {
            stage.ztunnel.update_roots(&stage.ca)?;
            seen.clone_from(&roots);
        }
        let count = roots.matches("BEGIN CERTIFICATE").count();
        ensure!(count == 1 && roots != before, "{count} roots");
        Ok(Ok(()))
    })??;
    // We close a connection when its certificate is about to expire: each ten seconds.
    ensure!(overtaken < 10, "{overtaken} of {exchanges}");
    println!("{exchanges} exchanges during the rotation; a GOAWAY overtook {overtaken}");
    for way in BOTH {
        stage.exchange(way)?;
    }
    Ok(())
}
