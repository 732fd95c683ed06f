//! `cargo xtask demo`: pods of two nodes talk mutual TLS, and each check shows what it saw.
//!
//! The checks run on a thread of their own and tell what they see as they see it. This thread prints that, ends a check
//! that hangs, and cleans up after Ctrl-C.

mod addresses;
mod bulk;
mod ca;
mod failure;
mod identity;
mod outside;
mod policy;
mod report;
mod same_node;
mod server_hello;
mod stage;
mod wire;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use mesh_tests::{MeshId, remove_own, traces};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::step::root;
use crate::{build, setup};

use report::Report;
use stage::Stage;

/// Options of the demo.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print one JSON object on stdout, and everything else on stderr
    #[arg(long)]
    json: bool,
    /// Show what is built already
    #[arg(long)]
    no_build: bool,
}

/// Installs and builds what is needed, then shows each check.
///
/// # Errors
/// When not root, when something does not build, or when a check fails.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut report = Report::new(arguments.json);
    let shown = prepare(arguments).and_then(|()| show(&mut report));
    let failed = report.finish(shown.as_ref().err());
    shown?;
    if !failed.is_empty() {
        bail!("these checks failed: {}", failed.join(", "));
    }
    Ok(())
}

/// One thing that the demo shows.
struct Check {
    name: &'static str,
    /// What is claimed, in a few words.
    claim: &'static str,
    run: fn(&mut Stage, &Evidence) -> Result<()>,
}

const BEFORE: [Check; 1] = [Check {
    name: "plaintext-before",
    claim: "without the daemon, request and answer are readable between the nodes",
    run: wire::plaintext_before,
}];

const AFTER: [Check; 20] = [
    Check {
        name: "ca-issued",
        claim: "the certificates of both nodes come from one CA, on a third host",
        run: ca::ca_issued,
    },
    Check {
        name: "mtls-on-wire",
        claim: "with it, the same request crosses in TLS 1.3 records and nothing else",
        run: wire::mtls_on_wire,
    },
    Check {
        name: "peer-address-kept",
        claim: "nginx logs the client pod's address, and curl sees the server's",
        run: addresses::peer_address_kept,
    },
    Check {
        name: "port-kept",
        claim: "firewalls between the nodes see the app's own port",
        run: addresses::port_kept,
    },
    Check {
        name: "service-address",
        claim: "a service's address leads to all its endpoints",
        run: addresses::service_address,
    },
    Check {
        name: "identity-in-log",
        claim: "both daemons log who called whom",
        run: identity::identity_in_log,
    },
    Check {
        name: "same-node",
        claim: "two pods of one node talk in its kernel, and the log says who",
        run: same_node::same_node,
    },
    Check {
        name: "secure-naming",
        claim: "a server of another account is refused before it gets a byte",
        run: identity::secure_naming,
    },
    Check {
        name: "plaintext-refused",
        claim: "a caller without a certificate does not reach the app (STRICT)",
        run: outside::plaintext_refused,
    },
    Check {
        name: "non-mesh-untouched",
        claim: "a connection to a host outside of the mesh passes no daemon",
        run: outside::non_mesh_untouched,
    },
    Check {
        name: "ipv6",
        claim: "all of that over IPv6",
        run: addresses::ipv6,
    },
    Check {
        name: "bulk-transfer",
        claim: "iperf3 streams both ways through the tunnel",
        run: bulk::bulk_transfer,
    },
    Check {
        name: "rotation-live",
        claim: "certificates are renewed under load, and no request fails",
        run: ca::rotation_live,
    },
    Check {
        name: "root-rotation",
        claim: "the CA's root is replaced under load, and no request fails",
        run: ca::root_rotation,
    },
    Check {
        name: "revoked",
        claim: "a revoked identity's open connection ends within two seconds, and no new one opens",
        run: ca::revoked,
    },
    Check {
        name: "policy-deny",
        claim: "a policy refuses one account and no other, and says which it was",
        run: policy::policy_deny,
    },
    Check {
        name: "policy-live",
        claim: "a policy that comes into force ends what it denies within a second, and nothing else",
        run: policy::policy_live,
    },
    Check {
        name: "strict-refuses-plaintext",
        claim: "whether plaintext is taken is as PeerAuthentication says",
        run: policy::strict_refuses_plaintext,
    },
    Check {
        name: "fail-closed",
        claim: "a killed daemon means refused connections, never plaintext; a new one takes over",
        run: failure::fail_closed,
    },
    Check {
        name: "unload",
        claim: "unloading leaves nothing behind, and the pods talk plainly again",
        run: failure::unload,
    },
];

/// What happens on the thread that runs the checks.
enum Event {
    /// Something begins: a check or, without a name, a part of the set-up.
    Begins(Option<&'static str>, &'static str),
    Saw(String),
    Ends(Result<()>),
}

/// Where a check tells what it sees.
struct Evidence(Sender<Event>);

impl Evidence {
    fn saw(&self, what: impl Into<String>) {
        // Nobody listens any more after Ctrl-C.
        let _ = self.0.send(Event::Saw(what.into()));
    }
}

fn prepare(arguments: &Arguments) -> Result<()> {
    if !root() {
        bail!(
            "the demo makes network namespaces and loads eBPF programs: run it as root (sudo -E cargo xtask demo)"
        );
    }
    if arguments.no_build {
        return Ok(());
    }
    setup::run()?;
    build::programs()
}

/// Runs the checks and reports them. An error is one of the demo itself, with the cause of all that was not run.
fn show(report: &mut Report) -> Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("cannot wait for signals")?;
    }
    let (sender, events) = channel();
    let stop = Arc::new(AtomicBool::new(false));
    thread::Builder::new()
        .name("checks".to_owned())
        .spawn({
            let stop = Arc::clone(&stop);
            move || perform(&Evidence(sender), &stop)
        })
        .context("cannot start a thread")?;
    let result = follow(&events, report, &interrupted);
    if result.is_err() {
        stop.store(true, Ordering::Relaxed);
        eprintln!("cleaning up");
        // What the running check waits for ends with this, and so does the check.
        let _ = remove_own();
        let end = Instant::now() + CLEAN_UP;
        while events
            .recv_timeout(end.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        remove_own().context("cannot clean up")?;
    }
    result
}

fn follow(events: &Receiver<Event>, report: &mut Report, interrupted: &AtomicBool) -> Result<()> {
    let mut current = "";
    let mut deadline = Instant::now() + LONGEST;
    loop {
        match events.recv_timeout(POLL) {
            Ok(Event::Begins(name, claim)) => {
                current = name.unwrap_or(claim);
                deadline = Instant::now() + LONGEST;
                report.begins(name, claim);
            }
            Ok(Event::Saw(what)) => report.saw(what),
            Ok(Event::Ends(result)) => report.ends(result)?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if interrupted.load(Ordering::Relaxed) {
            bail!("interrupted during {current}");
        }
        if Instant::now() > deadline {
            bail!("{current} did not end within {LONGEST:?}");
        }
    }
}

/// Sets the stage, runs the checks on it and takes it down.
fn perform(evidence: &Evidence, stop: &AtomicBool) {
    let Some(mut stage) = step(evidence, None, "two nodes with a pod network", || {
        Stage::set(evidence)
    }) else {
        return;
    };
    let id = stage.mesh.id();
    let ready = checks(&BEFORE, &mut stage, evidence, stop)
        && step(
            evidence,
            None,
            "auth-daemon ca outside, auth-daemon on both nodes",
            || stage.start_daemons(evidence),
        )
        .is_some();
    if ready {
        checks(&AFTER, &mut stage, evidence, stop);
    }
    step(evidence, None, "cleaning up", || {
        drop(stage);
        nothing_left(id)
    });
}

/// Runs checks until told to stop; whether it came to the end.
fn checks(checks: &[Check], stage: &mut Stage, evidence: &Evidence, stop: &AtomicBool) -> bool {
    for check in checks {
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        step(evidence, Some(check.name), check.claim, || {
            let result = (check.run)(stage, evidence);
            if result.is_err() && !stop.load(Ordering::Relaxed) {
                stage.print_logs();
            }
            result
        });
    }
    true
}

fn step<T>(
    evidence: &Evidence,
    name: Option<&'static str>,
    claim: &'static str,
    work: impl FnOnce() -> Result<T>,
) -> Option<T> {
    let _ = evidence.0.send(Event::Begins(name, claim));
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = panic.downcast_ref::<String>().map(String::as_str);
        let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(anyhow!("it panicked: {}", message.unwrap_or("?")))
    });
    let (value, outcome) = match result {
        Ok(value) => (Some(value), Ok(())),
        Err(error) => (None, Err(error)),
    };
    let _ = evidence.0.send(Event::Ends(outcome));
    value
}

fn nothing_left(id: MeshId) -> Result<()> {
    let left = traces(id)?;
    if !left.is_empty() {
        bail!("the demo leaves behind: {left:?}");
    }
    Ok(())
}

/// How long a check may take.
const LONGEST: Duration = Duration::from_secs(60);
/// How long a check that was ended may take to notice it.
const CLEAN_UP: Duration = Duration::from_secs(10);
/// How soon Ctrl-C is noticed.
const POLL: Duration = Duration::from_millis(100);
