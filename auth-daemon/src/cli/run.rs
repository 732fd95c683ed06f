//! `auth-daemon run`: brings the parts together and runs until SIGTERM.

use std::{
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing_subscriber::EnvFilter;

use crate::{
    admin,
    ca::{Issuer, client::GrpcIssuer, embedded::EmbeddedCa},
    certs::Certificates,
    config::{CaSource, Config, Discovery, Log, LogFormat},
    datapath::{Kernel, KernelError, PinLock, features, host, mounts, unload},
    discovery::{self, Sink},
    kubernetes,
    mesh::{Published, Registry},
    policy::Policies,
    proxy::{Enrolment, Node, Workers},
};

/// How long the threads that have ended may still hold what they had.
const LAST_BREATH: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The configuration file.
    #[arg(long)]
    config: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = Config::load(&arguments.config)?;
    start_log(&config.log)?;
    raise_file_limit();

    check_privileges(&config)?;
    mounts::ensure_sysctls()?;
    mounts::ensure_bpffs(&config.pins)?;
    let cgroup = mounts::cgroup_root(config.cgroup.as_deref())?;
    let lock = PinLock::take(&config.pins)?;
    let pins = config.pins.clone();

    // Connections have threads to themselves; discovery, certificates and admin share this one.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = Workers::start(cores).context("cannot start the data path's threads")?;
    let control = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the control runtime")?;
    let removed = control.block_on(async {
        let listeners = admin::bind().await?;
        let issuer = issuer(&config)?;
        let registry = Arc::new(Registry::new());
        let policies = Arc::new(Published::holding(Policies::compile(
            config.policy.clone(),
            [],
        )));
        let sink = Sink {
            registry: registry.clone(),
            policies: Some(policies.clone()),
        };
        let (follow, removed) = follow(&config, sink).await?;
        let kernel = Kernel::load(lock, &cgroup).map_err(with_causes)?;
        tracing::info!(
            node = %config.node_name, trust_domain = %config.trust_domain, mode = ?config.mode,
            cgroup = %cgroup.display(), pins = %config.pins.display(), "daemon started"
        );
        let certificates = Certificates::new(issuer);
        let node = Arc::new(Node::new(config, registry, policies, kernel, certificates));
        tokio::spawn(follow);
        tokio::spawn(admin::serve(node.clone(), listeners));
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(async move {
            if let Err(error) = asked_to_stop().await {
                tracing::error!(%error, "cannot wait for signals");
            }
            stop.send_replace(true);
        });
        Enrolment::new(node, Arc::new(workers)).run(stopped).await;
        anyhow::Ok(removed.is_some_and(|removed| *removed.borrow()))
    })?;
    if removed {
        drop(control);
        let pods = take_back(&pins)?;
        tracing::info!(
            pods,
            "daemon stopped; its namespace is being deleted, so nothing is left: pods talk plainly"
        );
    } else {
        tracing::info!(
            "daemon stopped; pods stay captured and are refused until the next one starts"
        );
    }
    Ok(())
}

/// Refuses to start where no pod could be enrolled, and says what is missing: all of it at once.
fn check_privileges(config: &Config) -> anyhow::Result<()> {
    let mut faults = Vec::new();
    let capabilities = features::capabilities();
    if !capabilities.ok {
        faults.push(format!("capabilities: {}", capabilities.detail));
    }
    if matches!(config.discovery, Discovery::Kubernetes { .. }) && kubernetes::is_pod() {
        let cgroup = mounts::cgroup_root(config.cgroup.as_deref())?;
        faults.extend(host::blind_spots(&cgroup));
    }
    if faults.is_empty() {
        return Ok(());
    }
    anyhow::bail!("this node's pods cannot be served: {}", faults.join("; "))
}

/// Takes everything out of the kernel. Returns how many pods were enrolled.
fn take_back(pins: &Path) -> anyhow::Result<usize> {
    let start = Instant::now();
    loop {
        match PinLock::take(pins) {
            // The data path's threads let go of it as they end.
            Err(KernelError::Locked(_)) if start.elapsed() < LAST_BREATH => {
                thread::sleep(Duration::from_millis(10));
            }
            lock => return unload::unload(lock?),
        }
    }
}

/// A task that never ends.
type Follow = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What keeps what is known true to what is discovered; and, in a cluster, whether the daemon is taken out of it.
async fn follow(
    config: &Config,
    sink: Sink,
) -> anyhow::Result<(Follow, Option<watch::Receiver<bool>>)> {
    let trust_domain = config.trust_domain.clone();
    Ok(match &config.discovery {
        Discovery::Files(folder) => {
            let follow = discovery::files::start(folder.clone(), trust_domain, sink)?;
            (Box::pin(follow), None)
        }
        Discovery::Kubernetes {
            defaults,
            own_namespace,
        } => {
            let settings = discovery::kubernetes::Settings {
                trust_domain,
                defaults: defaults.clone(),
                services: true,
                daemons: Some(own_namespace.clone()),
            };
            let (synced, _) = watch::channel(false);
            let client = kubernetes::connect().await?;
            let removed = discovery::removal::watch(client.clone(), own_namespace);
            let follow = discovery::kubernetes::run(client, settings, sink, synced);
            (Box::pin(follow), Some(removed))
        }
    })
}

/// Where certificates come from. Called within the control runtime.
fn issuer(config: &Config) -> anyhow::Result<Arc<dyn Issuer>> {
    let (trust_domain, lifetime) = (&config.trust_domain, config.certificate_lifetime);
    Ok(match &config.ca {
        CaSource::Directory(folder) => Arc::new(EmbeddedCa::open(folder, trust_domain, lifetime)?),
        CaSource::Server(server) => {
            let issuer = GrpcIssuer::start(server.clone(), trust_domain.clone(), lifetime)?;
            Arc::new(issuer)
        }
    })
}

pub(super) async fn asked_to_stop() -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

pub(super) fn start_log(log: &Log) -> anyhow::Result<()> {
    let mut filter = EnvFilter::try_new(&log.level).context("log.level")?;
    // They log the whole of an answer that they cannot read, whatever is in it. Who asked tells what went wrong.
    for library in ["kube_client", "kube_runtime"] {
        if !log.level.contains(library) {
            filter = filter.add_directive(format!("{library}=off").parse()?);
        }
    }
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => lines.with_ansi(false).init(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .init(),
    }
    Ok(())
}

/// A connection takes two file descriptors: take as many as the system lets us.
pub(super) fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(soft, hard, %error, "cannot raise the limit of open files");
    }
}

/// aya's errors keep the kernel's words in their causes.
fn with_causes(error: impl std::error::Error + Send + Sync + 'static) -> anyhow::Error {
    let error = anyhow::Error::new(error);
    anyhow::anyhow!("{error:#}")
}
