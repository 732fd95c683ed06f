//! `auth-daemon run`: brings the parts together and runs until SIGTERM.

use std::{
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, atomic::AtomicUsize},
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
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

use crate::{
    admin::{self, Health},
    config::{self, CaSource, Config, Discovery, Log, LogFormat, NonTcp},
    discovery::{self, Sink, removal::Removal, taint::NodeTaint},
    federation::{self, Federated},
    issuer::{CaClient, Certificates, Issuer, Link},
    node::{Enrolment, Workers, redirection, remove_socket},
    observe::log_writer,
    proxy::{Node, lookups::Lookups},
};
use auth_ca::embedded::EmbeddedCa;
use auth_datapath::{Kernel, KernelError, PinLock, features, host, mounts, try_load, unload};
use auth_mesh::{Published, Registry, policy::Policies};
use auth_xds::{Caller, Mesh};

use super::{
    service_manager::ServiceManager,
    standby::{EarlyCertificates, stand_by},
};

/// Maximum time for the ending data path threads to release the lock on the pins.
const LAST_BREATH: Duration = Duration::from_secs(5);
/// How long what pods have asked for is known after its last use, with names on demand.
const IDLE: Duration = Duration::from_secs(10 * 60);
/// Interval at which to check whether the daemon serves its node.
const READY_POLL: Duration = Duration::from_millis(100);

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The configuration file.
    #[arg(long)]
    config: PathBuf,
    /// If another daemon serves this node, wait until it ends and take over, instead of failing.
    #[arg(long)]
    stand_by: bool,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = Config::load(&arguments.config)?;
    let (writer, _written_at_the_end) =
        log_writer::to_stderr().context("cannot start the log's thread")?;
    start_log(&config.log, writer)?;
    raise_file_limit();

    check_privileges(&config)?;
    mounts::ensure_sysctls()?;
    mounts::ensure_bpffs(&config.pins)?;
    let cgroup = mounts::cgroup_root(config.cgroup.as_deref())?;
    let lock = match PinLock::take(&config.pins) {
        Err(KernelError::Locked(_)) if arguments.stand_by => None,
        lock => Some(lock?),
    };
    let pins = config.pins.clone();
    let socket = config.workload_api.socket.clone();
    let patience = config.drain + LAST_BREATH;
    let service_manager = ServiceManager::of_environment();

    // Connections run on the workers' threads; discovery, certificates and admin share this one.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = Workers::start(cores).context("cannot start the data path's threads")?;
    let control = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the control runtime")?;
    let removed = control.block_on(async {
        // A daemon that releases the node holds its ports until its connections have ended.
        let listeners = match arguments.stand_by {
            false => Some(admin::bind().await?),
            true => None,
        };
        let certificates = Certificates::new(issuer(&config)?);
        let federated = Arc::new(Federated::new(certificates.trust().clone()));
        federated.apply(&config.federation);
        tokio::spawn(federation::follow(
            federated.clone(),
            arguments.config.clone(),
        ));
        let registry = Arc::new(Registry::new());
        let policies = Arc::new(Published::holding(Policies::compile(
            config.policy.clone(),
            [],
        )));
        let health = Arc::new(Health::new(workers.pulse(), registry.clone()));
        if arguments.stand_by {
            tokio::spawn(admin::serve_health(admin::bind_health()?, health.clone()));
        }
        let unconfirmed: Arc<AtomicUsize> = Arc::default();
        let lookups = config
            .discovery
            .is_on_demand()
            .then(|| Arc::new(Lookups::new(IDLE)));
        let sink = Sink {
            registry: registry.clone(),
            policies: Some(policies.clone()),
            lookups: lookups.clone(),
            unconfirmed: unconfirmed.clone(),
            ..Sink::default()
        };
        let remote = sink.remote.clone();
        let Followed {
            follow,
            removal,
            taint,
        } = follow(&config, sink).await?;
        tokio::spawn(follow);
        let (stop, stopped) = watch::channel(false);
        let stopping = service_manager.clone();
        tokio::spawn(async move {
            if let Err(error) = asked_to_stop().await {
                tracing::error!(%error, "cannot wait for signals");
            }
            stopping.stopping(patience);
            stop.send_replace(true);
        });
        let mut early = EarlyCertificates::default();
        let lock = match lock {
            Some(lock) => lock,
            None => {
                // Report ready only if the kernel accepts our programs: the running daemon exits as soon as we report
                // ready.
                if let Some(refused) = try_load().into_iter().next() {
                    return Err(with_causes(refused));
                }
                health.stand_by();
                let known = (&*registry, &certificates, config.node_name.as_str());
                match stand_by(&pins, known, &mut early, stopped.clone()).await? {
                    Some(lock) => lock,
                    // The running daemon leaves the removal to its successor.
                    None => return Ok(is_removed(removal.as_ref()).await.then_some(true)),
                }
            }
        };
        let non_tcp_denied = config.non_tcp == NonTcp::Deny;
        let kernel = Kernel::load(lock, &cgroup, non_tcp_denied).map_err(with_causes)?;
        tracing::info!(
            node = %config.node_name, trust_domain = %config.trust_domain, mode = ?config.mode,
            cgroup = %cgroup.display(), pins = %config.pins.display(), "daemon started"
        );
        let node = Node::new(
            config,
            registry,
            lookups,
            policies,
            unconfirmed,
            kernel,
            certificates,
        );
        let node = Arc::new(node.with_federation(federated).with_remote_clusters(remote));
        health.serve(node.clone());
        let ready = node.clone();
        tokio::spawn(async move {
            until_ready(&ready).await;
            service_manager.ready();
        });
        if matches!(node.config.discovery, Discovery::Istiod { .. }) {
            let client = auth_kubernetes::connect().await?;
            tokio::spawn(redirection::announce(client, node.clone()));
        }
        tokio::spawn(answer(node.clone(), health, listeners));
        tokio::spawn(early.hand_over(node.clone()));
        let enrolment = Enrolment::new(node.clone(), Arc::new(workers)).run(stopped.clone());
        let kept = async {
            if let Some(taint) = &taint {
                keep_taint(taint, &node, removal.as_ref(), stopped).await;
            }
        };
        tokio::join!(enrolment, kept);
        if node.kernel.is_released() {
            return Ok(None);
        }
        anyhow::Ok(Some(is_removed(removal.as_ref()).await))
    })?;
    let Some(removed) = removed else {
        tracing::info!("daemon stopped; another one serves this node");
        return Ok(());
    };
    if removed {
        drop(control);
        let pods = take_back(&pins, socket.as_deref(), patience)?;
        tracing::info!(
            pods,
            "daemon stopped and is being removed: nothing is left; pods now communicate in plaintext"
        );
    } else {
        tracing::info!(
            "daemon stopped; pods stay captured and are refused until the next one starts"
        );
    }
    Ok(())
}

/// Serves the admin endpoints. Another daemon may still hold their ports until its connections have ended.
async fn answer(node: Arc<Node>, health: Arc<Health>, listeners: Option<admin::Listeners>) {
    let listeners = match listeners {
        Some(listeners) => listeners,
        None => match admin::bind_after_another(node.config.drain + LAST_BREATH).await {
            Ok(listeners) => listeners,
            Err(error) => {
                tracing::error!(%error, "cannot serve status and metrics");
                return;
            }
        },
    };
    admin::serve(node, health, listeners).await;
}

/// Fails if a privilege that enrolment needs is missing. The error lists all that are missing.
fn check_privileges(config: &Config) -> anyhow::Result<()> {
    let mut errors = Vec::new();
    let capabilities = features::capabilities();
    if !capabilities.ok {
        errors.push(format!("capabilities: {}", capabilities.detail));
    }
    if config.discovery.own_namespace().is_some() && auth_kubernetes::is_pod() {
        let cgroup = mounts::cgroup_root(config.cgroup.as_deref())?;
        errors.extend(host::blind_spots(&cgroup));
    }
    if errors.is_empty() {
        return Ok(());
    }
    anyhow::bail!("this node's pods cannot be served: {}", errors.join("; "))
}

/// Removes everything from the kernel, and the workload API's socket. Returns the number of pods that were enrolled.
fn take_back(pins: &Path, socket: Option<&Path>, patience: Duration) -> anyhow::Result<usize> {
    let start = Instant::now();
    loop {
        match PinLock::take(pins) {
            // The data path's threads release the lock as they end; so does another daemon.
            Err(KernelError::Locked(_)) if start.elapsed() < patience => {
                thread::sleep(Duration::from_millis(10));
            }
            lock => {
                let lock = lock?;
                let socket_removed = remove_socket(socket);
                let pods = unload::unload(lock)?;
                return socket_removed.map(|()| pods);
            }
        }
    }
}

/// A task that never ends.
type Follow = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Whether this daemon is being removed from its cluster, not only stopped.
async fn is_removed(removal: Option<&Removal>) -> bool {
    match removal {
        Some(removal) => removal.is_under_way().await,
        None => false,
    }
}

async fn until_ready(node: &Node) {
    while !node.is_ready() {
        tokio::time::sleep(READY_POLL).await;
    }
}

/// Removes the node's taint once this daemon serves the node. Puts it back when this daemon stops, unless another one takes
/// over or the daemons are being removed.
async fn keep_taint(
    taint: &NodeTaint,
    node: &Node,
    removal: Option<&Removal>,
    mut stopped: watch::Receiver<bool>,
) {
    let keep_removed = async {
        until_ready(node).await;
        taint.keep_removed().await;
    };
    tokio::select! {
        () = keep_removed => {}
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
    let has_successor = node.kernel.is_awaited() || node.kernel.is_released();
    if !has_successor && !is_removed(removal).await {
        taint.put_back().await;
    }
}

/// What this daemon follows in its cluster, or in its folder of manifests.
struct Followed {
    /// Applies discovery updates to the registry.
    follow: Follow,
    /// In a cluster: whether the daemon is being removed.
    removal: Option<Removal>,
    /// In a cluster, if the configuration says so: the taint of the daemon's node.
    taint: Option<NodeTaint>,
}

async fn follow(config: &Config, sink: Sink) -> anyhow::Result<Followed> {
    let trust_domain = config.trust_domain.clone();
    Ok(match &config.discovery {
        Discovery::Files(folder) => {
            let follow = discovery::files::start(folder.clone(), trust_domain, sink)?;
            Followed {
                follow: Box::pin(follow),
                removal: None,
                taint: None,
            }
        }
        Discovery::Kubernetes {
            defaults,
            own_namespace,
            node_taint,
            remote,
        } => {
            let settings = discovery::kubernetes::Settings {
                trust_domain,
                defaults: defaults.clone(),
                services: true,
                daemons: Some(own_namespace.clone()),
                remote: remote.clone(),
            };
            let (synced, _) = watch::channel(false);
            let client = auth_kubernetes::connect().await?;
            let removal = Removal::watch(&client, own_namespace);
            let taint = (*node_taint == config::NodeTaint::Manage)
                .then(|| NodeTaint::watch(&client, &config.node_name));
            let follow = discovery::kubernetes::run(client, settings, sink, synced);
            Followed {
                follow: Box::pin(follow),
                removal: Some(removal),
                taint,
            }
        }
        Discovery::Istiod {
            server,
            network,
            own_namespace,
            on_demand: _,
        } => {
            let settings = discovery::istiod::Settings {
                mesh: Mesh {
                    trust_domain,
                    cluster: server.cluster_id.clone(),
                    network: network.clone(),
                    root_namespace: config.policy.root_namespace.clone(),
                },
                caller: Caller {
                    pod: std::env::var("POD_NAME").unwrap_or_else(|_| config.node_name.clone()),
                    namespace: own_namespace.clone(),
                    node: config.node_name.clone(),
                },
            };
            let (synced, _) = watch::channel(false);
            let client = auth_kubernetes::connect().await?;
            let removal = Removal::watch(&client, own_namespace);
            let link = Link::to_istiod(server.clone())?;
            let follow = discovery::istiod::run(client, link, settings, sink, synced);
            Followed {
                follow: Box::pin(follow),
                removal: Some(removal),
                taint: None,
            }
        }
    })
}

/// Creates the issuer of certificates. Must be called within the control runtime.
fn issuer(config: &Config) -> anyhow::Result<Arc<dyn Issuer>> {
    let (trust_domain, lifetime) = (&config.trust_domain, config.certificate_lifetime);
    Ok(match &config.ca {
        CaSource::Directory(folder) => Arc::new(EmbeddedCa::open(folder, trust_domain, lifetime)?),
        CaSource::Server(server) => {
            let issuer = CaClient::start(server.clone(), trust_domain.clone(), lifetime)?;
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

pub(super) fn start_log<W>(log: &Log, writer: W) -> anyhow::Result<()>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let mut filter = EnvFilter::try_new(&log.level).context("log.level")?;
    // These libraries log the whole of a response that they cannot parse, whatever it contains. The caller logs the
    // error.
    for library in ["kube_client", "kube_runtime"] {
        if !log.level.contains(library) {
            filter = filter.add_directive(format!("{library}=off").parse()?);
        }
    }
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer);
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

/// Raises the limit of open files to the maximum that the system allows. A connection takes two file descriptors.
pub(super) fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(soft, hard, %error, "cannot raise the limit of open files");
    }
}

/// Converts an error with all its causes, because aya keeps the kernel's message in them.
fn with_causes(error: impl std::error::Error + Send + Sync + 'static) -> anyhow::Error {
    let error = anyhow::Error::new(error);
    anyhow::anyhow!("{error:#}")
}
