//! `auth-daemon ca`: runs the CA, or with a subcommand sends a request to the CA on this machine.

mod operator;

use std::{path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{runtime, sync::watch, time::timeout};

use super::run::{asked_to_stop, raise_file_limit, start_log};
use crate::discovery::{self, Sink};
use auth_ca::{
    attest::{
        Attestor,
        jwks::Jwks,
        kubernetes::{Settings as ReviewSettings, TokenReviewer},
        people::People,
        static_token::StaticTokens,
    },
    authority::Authority,
    bundle_endpoint::BundleServer,
    config::{CaConfig, KubernetesState, State},
    distribution::Distribution,
    leader::{Candidate, Term, election::Timing},
    quotas::Limits,
    roots::PublishedRoots,
    server::{EVENT_INTERVAL, Server},
    store::{directory::DirectoryStore, secret::SecretStore},
};
use auth_mesh::{MeshDefault, Registry};

/// How long a new leader waits for the list of pods before it leaves the Lease to others.
const SYNC_DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Arguments {
    /// The CA's configuration file.
    #[arg(long, required = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<operator::OperatorCommand>,
}

pub(super) fn ca(arguments: Arguments) -> anyhow::Result<()> {
    match arguments {
        Arguments {
            command: Some(command),
            ..
        } => operator::execute(command),
        Arguments { config, .. } => run(&config.context("--config is missing")?),
    }
}

fn run(file: &std::path::Path) -> anyhow::Result<()> {
    let config = CaConfig::load(file)?;
    start_log(&config.log, std::io::stderr)?;
    // The signing key must not get into a core dump, nor to a debugger of the same user.
    nix::sys::prctl::set_dumpable(false).context("core dumps cannot be disabled")?;
    raise_file_limit();
    // As many threads as cores, so that new connections do not wait for signatures.
    let runtime = runtime::Builder::new_multi_thread()
        .enable_all()
        .event_interval(EVENT_INTERVAL)
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(config))?;
    // Background tasks have nothing to finish.
    runtime.shutdown_background();
    Ok(())
}

async fn serve(config: CaConfig) -> anyhow::Result<()> {
    let registry = Arc::new(Registry::new());
    let in_cluster = config.attestation.kubernetes.is_some()
        || config.manifests.is_none()
        || matches!(config.state, State::Kubernetes(_));
    let cluster = if in_cluster {
        Some(auth_kubernetes::connect().await?)
    } else {
        None
    };
    let attestors = attestors(&config, &registry, cluster.as_ref())?;
    let (synced, is_synced) = watch::channel(false);
    let sink = Sink {
        registry: registry.clone(),
        ..Sink::default()
    };
    match (&config.manifests, &cluster) {
        (Some(folder), _) => {
            let follow =
                discovery::files::start(folder.clone(), config.trust_domain.clone(), sink)?;
            tokio::spawn(follow);
            synced.send_replace(true);
        }
        (None, Some(cluster)) => {
            tokio::spawn(discovery::kubernetes::run(
                cluster.clone(),
                discovery::kubernetes::Settings {
                    trust_domain: config.trust_domain.clone(),
                    defaults: MeshDefault::default(),
                    services: false,
                    daemons: None,
                    remote: None,
                },
                sink,
                synced,
            ));
        }
        (None, None) => anyhow::bail!("discovery.files: is missing"),
    }

    let (lead, leader) = watch::channel(None);
    let (resign, resigned) = watch::channel(false);
    let server = Server::bind(
        &config,
        attestors,
        registry,
        leader.clone(),
        Limits::default(),
    )
    .await?;
    if let Some(endpoint) = &config.bundle_endpoint {
        let server = BundleServer::bind(endpoint, &config.trust_domain, leader.clone()).await?;
        tokio::spawn(server.run());
    }
    let leading: Pin<Box<dyn Future<Output = ()>>> = match (&config.state, cluster) {
        (State::Directory(directory), _) => {
            let store = Arc::new(DirectoryStore::open(directory)?);
            let authority = Authority::open(store, config.settings()).await?;
            lead.send_replace(Some(authority.clone()));
            Box::pin(lead_alone(authority, lead, resigned))
        }
        (State::Kubernetes(state), Some(cluster)) => {
            if let Some(name) = &state.root_config_map {
                let roots = PublishedRoots {
                    client: cluster.clone(),
                    name: name.clone(),
                };
                tokio::spawn(roots.run(leader.clone()));
            }
            if !config.secret_namespaces.is_empty() {
                let distribution = Distribution {
                    client: cluster.clone(),
                    trust_domain: config.trust_domain.clone(),
                    namespaces: config.secret_namespaces.iter().cloned().collect(),
                    lifetime: config.certificate_lifetime,
                    state_namespace: state.namespace.clone(),
                    state_secret: state.state_secret.clone(),
                };
                tokio::spawn(distribution.run(leader));
            }
            Box::pin(campaign(
                cluster,
                state.clone(),
                config.clone(),
                is_synced,
                lead,
                resigned,
            ))
        }
        (State::Kubernetes(_), None) => anyhow::bail!("kubernetes: there is no cluster"),
    };
    tracing::info!(
        trust_domain = %config.trust_domain, address = %server.local_addr()?, names = ?config.server_names,
        "CA started"
    );

    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        if let Err(error) = asked_to_stop().await {
            tracing::error!(%error, "signals cannot be waited for");
        }
        stop.send_replace(true);
    });
    let serve = async {
        server.run(stopped).await;
        // After the server has stopped, because requests in progress need the authority.
        resign.send_replace(true);
    };
    tokio::join!(serve, leading);
    tracing::info!("CA stopped");
    Ok(())
}

fn attestors(
    config: &CaConfig,
    registry: &Arc<Registry>,
    cluster: Option<&kube::Client>,
) -> anyhow::Result<Vec<Arc<dyn Attestor>>> {
    let mut errors = Vec::new();
    let mut attestors: Vec<Arc<dyn Attestor>> = Vec::new();
    let attestation = &config.attestation;
    match StaticTokens::open(&attestation.tokens) {
        Ok(tokens) if !attestation.tokens.is_empty() => attestors.push(Arc::new(tokens)),
        Ok(_) => {}
        Err(tokens) => errors.extend(tokens),
    }
    if let Some(jwks) = &attestation.jwks {
        match Jwks::open(jwks.clone(), config.trust_domain.clone(), registry.clone()) {
            Ok(jwks) => attestors.push(Arc::new(jwks)),
            Err(error) => errors.push(error),
        }
    }
    if let Some(people) = &attestation.people {
        match People::open(people.clone(), config.trust_domain.clone()) {
            Ok(people) => attestors.push(Arc::new(people)),
            Err(error) => errors.push(error),
        }
    }
    if let (Some(reviews), Some(cluster)) = (&attestation.kubernetes, cluster) {
        let settings = ReviewSettings {
            trust_domain: config.trust_domain.clone(),
            audience: reviews.audience.clone(),
            node_service_account: reviews.node_service_account.clone(),
            people: reviews.people,
        };
        attestors.push(Arc::new(TokenReviewer::new(cluster.clone(), settings)));
    }
    anyhow::ensure!(
        errors.is_empty(),
        "the configuration cannot be used:\n  {}",
        errors.join("\n  ")
    );
    Ok(attestors)
}

/// With a directory of its own, this process is the leader for as long as it runs.
async fn lead_alone(
    authority: Arc<Authority>,
    lead: watch::Sender<Option<Arc<Authority>>>,
    mut resigned: watch::Receiver<bool>,
) {
    tokio::select! {
        () = authority.run() => {}
        _ = resigned.wait_for(|resigned| *resigned) => {}
    }
    lead.send_replace(None);
}

/// As one of several replicas, takes part in the leader election.
async fn campaign(
    cluster: kube::Client,
    state: KubernetesState,
    config: CaConfig,
    synced: watch::Receiver<bool>,
    lead: watch::Sender<Option<Arc<Authority>>>,
    resigned: watch::Receiver<bool>,
) {
    let candidate = Candidate {
        client: cluster.clone(),
        namespace: state.namespace.clone(),
        lease: state.lease.clone(),
        pod: std::env::var("POD_NAME")
            .ok()
            .filter(|name| !name.is_empty()),
        timing: Timing::default(),
    };
    let open = || async {
        let mut synced = synced.clone();
        let read = synced.wait_for(|synced| *synced);
        if !matches!(timeout(SYNC_DEADLINE, read).await, Ok(Ok(_))) {
            return Err(
                "the list of pods could not be read: no certificate could be issued".into(),
            );
        }
        let store = SecretStore::new(cluster.clone(), &state.namespace, &state.state_secret);
        let lost = store.lost();
        let authority = Authority::open(Arc::new(store), config.settings())
            .await
            .map_err(|error| error.to_string())?;
        let work = authority.clone();
        Ok(Term {
            value: authority,
            lost,
            work: Box::pin(async move { work.run().await }),
        })
    };
    candidate.run(open, lead, resigned).await;
}
