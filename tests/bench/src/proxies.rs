//! The proxies of a system: starts them, measures their usage, and verifies that they carried a load.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::peers::ztunnel::{ZtunnelOptions, named};
use mesh_tests::{Ca, CaOptions, Daemon, DaemonOptions, Mesh, TIMEOUT, Ztunnel, eventually_ok};

use super::counters::{Counters, Moved};
use super::envoy::{Authority, Server, Sidecar};
use super::system::{Role, System, Way};
use super::topology::{CLIENT, NEAR, NODE_A, NODE_B, PORTS, WEB};
use super::usage;
use super::ztunnel::counters_of;

/// The proxies of one mesh.
pub(super) enum Proxies {
    /// No proxies.
    None,
    /// By pod.
    Sidecars(BTreeMap<&'static str, Sidecar>),
    /// By node, and the CA of both.
    Ztunnels(BTreeMap<&'static str, Ztunnel>, Box<Ca>),
    /// By node, and the `path` in their access log of what they carry between nodes.
    Daemons(BTreeMap<&'static str, Daemon>, &'static str),
}

/// The proxies' counters at the start of a load.
pub(super) enum Mark {
    None,
    Counted { client: Counters, server: Counters },
    Daemons { client: u64, server: u64 },
}

impl Proxies {
    /// Starts what the system needs and waits until it is ready.
    pub(super) fn start(system: System, mesh: &Mesh) -> Result<Self> {
        match system {
            System::Direct => Ok(Self::None),
            System::Envoy => sidecars(mesh).map(Self::Sidecars),
            System::Ztunnel => ztunnels(mesh),
            System::Ours | System::Hbone | System::Unobserved => {
                let mut options = DaemonOptions::default();
                if system == System::Unobserved {
                    options = options.setting("observe", "nothing".into());
                }
                let daemons = mesh.start_daemons_with(&options)?.into_iter();
                let named = daemons.map(|daemon| {
                    let on_a = daemon.node() == NODE_A;
                    (if on_a { NODE_A } else { NODE_B }, daemon)
                });
                let path = match system {
                    System::Hbone => "hbone",
                    _ => "tunnel",
                };
                Ok(Self::Daemons(named.collect(), path))
            }
        }
    }

    /// CPU time that all proxies have used so far; `None` without proxies.
    pub(super) fn cpu(&self) -> Result<Option<Duration>> {
        let times: Vec<Duration> = self
            .processes()
            .into_iter()
            .map(usage::cpu)
            .collect::<Result<_>>()?;
        Ok((!times.is_empty()).then(|| times.iter().sum()))
    }

    /// The process that serves the client's side or, on the other node, the server's.
    pub(super) fn process(&self, role: Role) -> Option<u32> {
        match (self, role) {
            (Self::None, _) => None,
            (Self::Sidecars(sidecars), Role::Client) => sidecars.get(CLIENT).map(Sidecar::pid),
            (Self::Sidecars(sidecars), Role::Server) => sidecars.get(WEB).map(Sidecar::pid),
            (Self::Ztunnels(all, _), Role::Client) => all.get(NODE_A).map(Ztunnel::pid),
            (Self::Ztunnels(all, _), Role::Server) => all.get(NODE_B).map(Ztunnel::pid),
            (Self::Daemons(daemons, _), Role::Client) => daemons.get(NODE_A).map(Daemon::pid),
            (Self::Daemons(daemons, _), Role::Server) => daemons.get(NODE_B).map(Daemon::pid),
        }
    }

    /// The proxies' counters so far, for [`Proxies::check`].
    pub(super) fn mark(&self, way: Way) -> Result<Mark> {
        Ok(match self {
            Self::None => Mark::None,
            Self::Sidecars(_) | Self::Ztunnels(..) => Mark::Counted {
                client: self.counters(CLIENT)?,
                server: self.counters(server_pod(way))?,
            },
            Self::Daemons(..) => Mark::Daemons {
                client: self.daemon(NODE_A)?.log_position(),
                server: self.daemon(NODE_B)?.log_position(),
            },
        })
    }

    /// Verifies by the proxies' own counters that a load took the intended path: through the proxies, encrypted, with
    /// nothing bypassing them.
    pub(super) fn check(
        &self,
        since: &Mark,
        way: Way,
        server: SocketAddr,
        moved: Moved,
    ) -> Result<()> {
        match *since {
            Mark::None => Ok(()),
            Mark::Counted {
                client,
                server: before,
            } => eventually_ok(TIMEOUT, "the proxies' counters", || match way {
                Way::Outside => {
                    let passed = self.counters(CLIENT)?.passed - client.passed;
                    ensure!(
                        passed >= moved.connections,
                        "{} connections were made, but the client's proxy has passed on {passed}",
                        moved.connections
                    );
                    Ok(())
                }
                Way::Across | Way::OneNode => {
                    let now = self.counters(server_pod(way))?.inbound;
                    let seen = Moved {
                        connections: now.connections - before.inbound.connections,
                        bytes: now.bytes - before.inbound.bytes,
                    };
                    all_seen("the server's proxy", moved, seen)
                }
            }),
            Mark::Daemons {
                client,
                server: before,
            } => match way {
                Way::Across => eventually_ok(TIMEOUT, "the daemon's access log", || {
                    all_seen(
                        "the server's daemon",
                        moved,
                        tunnelled(self.daemon(NODE_B)?, self.path(), before, server)?,
                    )
                }),
                // The daemon may leave traffic between pods of its node to the kernel, so there is nothing to verify.
                Way::OneNode => Ok(()),
                Way::Outside => {
                    let log = self.daemon(NODE_A)?.access_log_after(client);
                    let to = server.to_string();
                    let touched = log.iter().filter(|line| line["destination"] == to).count();
                    ensure!(touched == 0, "the client's daemon has carried {touched}");
                    Ok(())
                }
            },
        }
    }

    /// The last lines of the proxies' logs, to explain a failure.
    pub(super) fn last_words(&self) -> String {
        let logs: Vec<(&str, String)> = match self {
            Self::None => Vec::new(),
            Self::Sidecars(all) => all.iter().map(|(pod, it)| (*pod, it.output())).collect(),
            Self::Ztunnels(all, ca) => {
                let ztunnels = all.iter().map(|(node, it)| (*node, it.output()));
                ztunnels.chain([("the CA", ca.log_text())]).collect()
            }
            Self::Daemons(all, _) => all
                .iter()
                .map(|(node, it)| {
                    let other = it.logs().into_iter();
                    let other = other.filter(|line| line["target"] != "access");
                    let lines: Vec<String> = other.map(|line| line.to_string()).collect();
                    (*node, lines.join("\n"))
                })
                .collect(),
        };
        logs.iter()
            .map(|(place, text)| {
                let lines: Vec<&str> = text.lines().collect();
                let last = &lines[lines.len().saturating_sub(LINES)..];
                format!("---- {place}\n{}\n", last.join("\n"))
            })
            .collect()
    }

    fn processes(&self) -> Vec<u32> {
        match self {
            Self::None => Vec::new(),
            Self::Sidecars(all) => all.values().map(Sidecar::pid).collect(),
            Self::Ztunnels(all, _) => all.values().map(Ztunnel::pid).collect(),
            Self::Daemons(all, _) => all.values().map(Daemon::pid).collect(),
        }
    }

    /// The counters of a pod's proxy.
    fn counters(&self, pod: &str) -> Result<Counters> {
        let counters = match self {
            Self::Sidecars(all) => all.get(pod).map(Sidecar::counters),
            Self::Ztunnels(all, _) => all.get(node_of(pod)).map(counters_of),
            Self::None | Self::Daemons(..) => None,
        };
        counters.with_context(|| format!("{pod} has no proxy that counts"))?
    }

    /// The `path` in the daemons' access log.
    fn path(&self) -> &'static str {
        match self {
            Self::Daemons(_, path) => path,
            _ => "",
        }
    }

    fn daemon(&self, node: &str) -> Result<&Daemon> {
        match self {
            Self::Daemons(all, _) => all.get(node),
            _ => None,
        }
        .with_context(|| format!("{node} has no daemon"))
    }
}

fn sidecars(mesh: &Mesh) -> Result<BTreeMap<&'static str, Sidecar>> {
    let authority = Authority::new()?;
    let servers: Vec<Server> = [WEB, NEAR]
        .map(|name| Server {
            name: name.to_owned(),
            address: mesh.pod(name).ipv4().into(),
            account: name.to_owned(),
        })
        .to_vec();
    let sidecar = |name: &'static str| {
        let pod = mesh.pod(name);
        let sidecar = Sidecar::start(&pod, name, &authority, &servers, &PORTS)?;
        anyhow::Ok((name, sidecar))
    };
    [CLIENT, WEB, NEAR].into_iter().map(sidecar).collect()
}

fn ztunnels(mesh: &Mesh) -> Result<Proxies> {
    let binary = named()?.context("ZTUNNEL names no binary")?;
    let ca = mesh.start_ca(&CaOptions::default())?;
    let options = ZtunnelOptions::default();
    let start = |name: &'static str| {
        let ztunnel = Ztunnel::start(&binary, mesh, mesh.node(name), &ca, &options)?;
        anyhow::Ok((name, ztunnel))
    };
    let all = [NODE_A, NODE_B].into_iter().map(start);
    Ok(Proxies::Ztunnels(all.collect::<Result<_>>()?, Box::new(ca)))
}

/// The node that a pod runs on.
fn node_of(pod: &str) -> &'static str {
    if pod == WEB { NODE_B } else { NODE_A }
}

/// Outside there is none; the name then stands for nothing that is looked at.
fn server_pod(way: Way) -> &'static str {
    match way {
        Way::Across | Way::Outside => WEB,
        Way::OneNode => NEAR,
    }
}

/// What a daemon has carried to a server by this path since a position in its log.
fn tunnelled(daemon: &Daemon, path: &str, since: u64, server: SocketAddr) -> Result<Moved> {
    let server = server.to_string();
    let mut moved = Moved::default();
    for line in daemon.access_log_after(since) {
        if line["destination"] != server {
            continue;
        }
        if line["path"] != path {
            bail!("a connection went past the tunnel: {line}");
        }
        if line["result"] == "refused" {
            continue;
        }
        moved.connections += 1;
        for bytes in ["bytes_to_server", "bytes_to_client"] {
            moved.bytes += line[bytes].as_u64().unwrap_or(0);
        }
    }
    Ok(moved)
}

fn all_seen(who: &str, moved: Moved, seen: Moved) -> Result<()> {
    ensure!(
        seen.connections >= moved.connections && seen.bytes >= moved.bytes,
        "{} connections with {} bytes were made, but {who} has seen {} with {}",
        moved.connections,
        moved.bytes,
        seen.connections,
        seen.bytes
    );
    Ok(())
}

/// Number of log lines that explain an error.
const LINES: usize = 8;
