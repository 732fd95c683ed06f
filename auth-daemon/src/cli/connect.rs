//! `auth-daemon connect`: reaches a service of the mesh from a machine outside it, as a service account. Unprivileged,
//! without eBPF, and without anything on the disk.

mod access;
mod command;
mod dial;
mod forward;
mod service;

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use tokio::{net::TcpListener, runtime};

use super::{
    manifests::DAEMON_NAMESPACE,
    run::{asked_to_stop, start_log},
};
use crate::issuer::{CaClient, Certificates, ServerNames};
use access::{CaAccess, Token, Way};
use auth_kubernetes::connect_as_user;
use auth_mesh::{Identity, ObjectName, TrustDomain};
use auth_support::log::{Log, LogFormat};
use dial::Dialer;
use forward::Forward;
use service::Services;

/// Lifetime that certificates are requested for. The CA's own limit for people is the same.
const LIFETIME: Duration = Duration::from_secs(15 * 60);
/// Port of the CA's pods.
const CA_PORT: u16 = 15012;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The service: NAMESPACE/NAME:PORT.
    #[arg(value_name = "SERVICE", value_parser = target)]
    target: Target,
    /// The service account to act as: NAMESPACE/NAME. Policies see this account. The default is `default` in the service's
    /// namespace.
    #[arg(long = "as", value_name = "ACCOUNT", value_parser = account)]
    account: Option<ObjectName>,
    /// Address and port to listen on. By default, any free port of 127.0.0.1, which is printed.
    #[arg(long, value_name = "ADDRESS:PORT", default_value_t = (Ipv4Addr::LOCALHOST, 0).into())]
    listen: SocketAddr,
    /// Allow --listen at an address that other machines can reach: whoever connects acts as you.
    #[arg(long)]
    share: bool,
    /// How to reach pods and the CA: `never` connects to their addresses, `always` goes through the API server, and `auto`
    /// goes through the API server where an address does not answer.
    #[arg(long, value_enum, default_value_t = PortForward::Auto)]
    port_forward: PortForward,
    /// The cluster. The default is $KUBECONFIG, else ~/.kube/config.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The context in the kubeconfig, if not the current one.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    #[command(flatten)]
    ca: CaArguments,
    /// Folder of manifests, or one file, with the service and its pods, instead of the API server.
    #[arg(long, value_name = "PATH")]
    files: Option<PathBuf>,
    /// The trust domain of the identities.
    #[arg(long, value_name = "NAME", default_value_t)]
    trust_domain: TrustDomain,
    /// A program to run with the connection, and its arguments. It finds the address in $AUTH_DAEMON_ADDRESS, and its parts
    /// in $AUTH_DAEMON_HOST and $AUTH_DAEMON_PORT. When it ends, so does this command, with the same exit code.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Which CA")]
struct CaArguments {
    /// The CA's host and port. By default, it is found through the API server.
    #[arg(long = "ca", value_name = "HOST:PORT")]
    address: Option<String>,
    /// The name in the CA's certificate. The default is the host of --ca, or auth-ca.NAMESPACE.svc.
    #[arg(long = "ca-name", value_name = "NAME")]
    name: Option<String>,
    /// Namespace of the CA's pods.
    #[arg(long = "ca-namespace", value_name = "NAMESPACE", default_value = DAEMON_NAMESPACE)]
    namespace: String,
    /// PEM file with the CA's roots. By default, they are those of --roots-config-map.
    #[arg(long, value_name = "FILE")]
    root_file: Option<PathBuf>,
    /// ConfigMap with the CA's roots, in the namespace of the service account.
    #[arg(long, value_name = "NAME", default_value = "auth-ca-root")]
    roots_config_map: String,
    /// File with a token that the CA accepts, such as an ID token of its OIDC issuer. Read again for each certificate. By
    /// default, the API server issues tokens of the service account.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Audience of the tokens that the API server issues.
    #[arg(long, value_name = "NAME", default_value = "auth-ca")]
    audience: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PortForward {
    Auto,
    Always,
    Never,
}

/// The service that is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    service: ObjectName,
    port: u16,
}

fn target(text: &str) -> Result<Target, String> {
    let wrong = || "is not NAMESPACE/NAME:PORT, such as default/web:80".to_owned();
    let (service, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let port = port
        .parse()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(wrong)?;
    let service = account(service).map_err(|_| wrong())?;
    Ok(Target { service, port })
}

/// `NAMESPACE/NAME`.
fn account(text: &str) -> Result<ObjectName, String> {
    let (namespace, name) = text.split_once('/').ok_or("is not NAMESPACE/NAME")?;
    TrustDomain::default()
        .identity(namespace, name)
        .map_err(|error| format!("is not NAMESPACE/NAME: {error}"))?;
    Ok(ObjectName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

pub(super) fn connect(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    // Errors of renewals. The key must not get into a core dump, nor to a debugger of the same user.
    let log = Log {
        format: LogFormat::Text,
        level: "error".into(),
    };
    start_log(&log, std::io::stderr)?;
    nix::sys::prctl::set_dumpable(false).context("core dumps cannot be disabled")?;
    runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(run(arguments))
}

async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    ensure!(
        arguments.share || arguments.listen.ip().is_loopback(),
        "--listen {}: other machines could reach this address and would act as you; use 127.0.0.1, or allow it with --share",
        arguments.listen
    );
    let Target { service, port } = &arguments.target;
    let account = arguments.account.clone().unwrap_or_else(|| ObjectName {
        namespace: service.namespace.clone(),
        name: "default".into(),
    });
    let trust_domain = arguments.trust_domain.clone();
    let identity = trust_domain
        .identity(&account.namespace, &account.name)
        .with_context(|| format!("--as {account}"))?;
    let cluster = match arguments.needs_cluster() {
        true => {
            let found = connect_as_user(
                arguments.kubeconfig.as_deref(),
                arguments.context.as_deref(),
            );
            Some(found.await.context(
                "without a cluster, --ca, --root-file, --token-file and --files are all needed",
            )?)
        }
        false => None,
    };
    let services = match (&arguments.files, &cluster) {
        (Some(path), _) => Services::Files(path.clone(), trust_domain.clone()),
        (None, Some(client)) => Services::Cluster(client.clone(), trust_domain.clone()),
        (None, None) => bail!("--files is missing"),
    };
    // First, because its errors need no certificate.
    let found = services.find(service, *port).await?;
    ensure!(
        !found.endpoints.is_empty(),
        "service {service} has no endpoint in the mesh"
    );

    let (names, access) = arguments.ca(cluster.as_ref(), &account).await?;
    let ca = CaClient::start_through(names, Arc::new(access), trust_domain.clone(), LIFETIME)?;
    let certificates = Certificates::new(Arc::new(ca));
    let certificate = certificates.request(&identity).await?;

    let listener = TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let address = listener.local_addr()?;
    let dialer = Dialer::new(
        trust_domain,
        certificate,
        cluster.filter(|_| arguments.port_forward != PortForward::Never),
        arguments.port_forward == PortForward::Always,
    );
    let forward = Arc::new(Forward::new(services, arguments.target.clone(), dialer));
    let serving = forward.clone().serve(listener);
    if let [program, rest @ ..] = &arguments.command[..] {
        let running = command::run(program, rest, address);
        let ended = tokio::select! {
            ended = running => ended,
            never = serving => match never {},
        };
        forward.finish().await;
        return ended;
    }
    announce(address, &arguments.target, &identity);
    tokio::select! {
        stopped = asked_to_stop() => stopped.context("cannot wait for signals")?,
        never = serving => match never {},
    }
    Ok(ExitCode::SUCCESS)
}

fn announce(address: SocketAddr, target: &Target, identity: &Identity) {
    // A command without standard output still forwards.
    let _ = writeln!(std::io::stdout(), "{address}");
    eprintln!(
        "auth-daemon: forwards connections to {}:{} as {identity} until it is stopped with Ctrl-C",
        target.service, target.port
    );
}

impl Arguments {
    /// Whether something has to be asked of the API server.
    fn needs_cluster(&self) -> bool {
        let ca = &self.ca;
        let all_given = ca.address.is_some()
            && ca.root_file.is_some()
            && ca.token_file.is_some()
            && self.files.is_some();
        !all_given || self.port_forward == PortForward::Always
    }

    /// What the CA is called, and how to reach it.
    async fn ca(
        &self,
        cluster: Option<&kube::Client>,
        account: &ObjectName,
    ) -> anyhow::Result<(ServerNames, CaAccess)> {
        let ca = &self.ca;
        let in_cluster = || cluster.context("there is no cluster");
        let way = match &ca.address {
            Some(address) => Way::Address(address.clone()),
            None => Way::Leader {
                client: in_cluster()?.clone(),
                namespace: ca.namespace.clone(),
            },
        };
        let service = format!("auth-ca.{}.svc", ca.namespace);
        let (host, address) = match &ca.address {
            Some(address) => {
                let (host, _) = address
                    .rsplit_once(':')
                    .with_context(|| format!("--ca {address}: is not HOST:PORT"))?;
                (host.trim_matches(['[', ']']).to_owned(), address.clone())
            }
            None => (service.clone(), format!("{service}:{CA_PORT}")),
        };
        let names = ServerNames {
            section: "--ca",
            address,
            server_name: ca.name.clone().unwrap_or(host),
            cluster_id: "Kubernetes".into(),
        };
        let roots = match &ca.root_file {
            Some(path) => access::Roots::File(path.clone()),
            None => {
                access::roots_of(in_cluster()?, &account.namespace, &ca.roots_config_map).await?
            }
        };
        let token = match &ca.token_file {
            Some(path) => Token::File(path.clone()),
            None => Token::of_account(in_cluster()?.clone(), account.clone(), &ca.audience),
        };
        Ok((names, CaAccess { roots, token, way }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_targets() {
        let read = target("default/web:80").unwrap();
        assert_eq!(
            (read.service.to_string(), read.port),
            ("default/web".into(), 80)
        );
        for wrong in [
            "web:80",
            "default/web",
            "default/web:0",
            "default/web:http",
            "default/:80",
            "default/we b:80",
            "a/b/c:80",
            "default/web:65536",
        ] {
            assert!(target(wrong).is_err(), "{wrong}");
        }
    }
}
