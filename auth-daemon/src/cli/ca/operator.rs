//! `auth-daemon ca status`, `revoke`, `unrevoke`, `rotate-root` and `token`: the operator's requests, over the CA's socket.

use std::{
    fmt,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow};
use auth_ca_api::auth::{
    CreateJoinTokenRequest, DeleteJoinTokenRequest, RevokeRequest, RotateRootRequest,
    StatusRequest, Target as TargetMessage, UnrevokeRequest, operator_client::OperatorClient,
    target,
};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, runtime};
use tonic::{
    Code, Status,
    codegen::http::Uri,
    transport::{Channel, Endpoint},
};

use auth_ca::{
    config::{CaConfig, DEFAULT_OPERATOR_SOCKET},
    join::LIFETIMES,
    status::CaStatus,
};
use auth_tunnel::tls::trust::Reason;

const DEADLINE: Duration = Duration::from_secs(30);
/// Largest answer: a status lists everything that is revoked.
const MAX_ANSWER: usize = 64 << 20;

#[derive(Debug, clap::Subcommand)]
pub(super) enum OperatorCommand {
    /// Show roots, the phase of a rotation, revocations, refused requests, and quotas.
    Status {
        #[command(flatten)]
        options: SocketOptions,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Revoke a certificate, an identity or a node, everywhere.
    Revoke {
        #[command(flatten)]
        options: SocketOptions,
        #[command(flatten)]
        target: Target,
        /// Why, by a name of RFC 5280 §5.3.1, such as keyCompromise.
        #[arg(long)]
        reason: Option<Reason>,
    },
    /// Withdraw a revocation.
    Unrevoke {
        #[command(flatten)]
        options: SocketOptions,
        #[command(flatten)]
        target: Target,
    },
    /// Replace the root without an outage.
    RotateRoot {
        #[command(flatten)]
        options: SocketOptions,
    },
    /// Create, list and delete one-time tokens by which machines outside Kubernetes join the trust domain.
    #[command(subcommand)]
    Token(TokenCommand),
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum TokenCommand {
    /// Print a token by which one machine can join. The CA keeps only its hash.
    Create {
        #[command(flatten)]
        options: SocketOptions,
        /// The name of the node: nodeName in its daemon's configuration.
        #[arg(long)]
        node: String,
        /// Until the token expires, from 1m to 1h.
        #[arg(long, default_value = "10m", value_parser = lifetime)]
        lifetime: Duration,
        /// Let the machine replace one that has joined under this name, whose certificate is refused from then on.
        #[arg(long)]
        replace: bool,
    },
    /// List the tokens that are not used yet.
    List {
        #[command(flatten)]
        options: SocketOptions,
    },
    /// Delete the token for a node, if it is not used yet.
    Delete {
        #[command(flatten)]
        options: SocketOptions,
        /// The name of the node.
        #[arg(long)]
        node: String,
    },
}

fn lifetime(text: &str) -> Result<Duration, String> {
    auth_support::config::duration(text, *LIFETIMES.start(), *LIFETIMES.end())
}

/// Where the CA's socket is.
#[derive(Debug, clap::Args)]
pub(super) struct SocketOptions {
    /// The CA's configuration file, which names the socket.
    #[arg(long, conflicts_with = "socket")]
    config: Option<PathBuf>,
    /// The socket itself. Without either, the default one.
    #[arg(long)]
    socket: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct Target {
    /// A certificate's serial number, in hexadecimal.
    #[arg(long, group = "what")]
    serial: Option<String>,
    /// A SPIFFE ID: refuses all of its certificates, and it gets no new ones.
    #[arg(long, group = "what")]
    identity: Option<String>,
    /// A node's name: refuses all certificates that it got and all of its pods, and it gets no new ones.
    #[arg(long, group = "what")]
    node: Option<String>,
}

pub(super) fn execute(command: OperatorCommand) -> anyhow::Result<()> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        match command {
            OperatorCommand::Status { options, json } => {
                let text = status(&options).await?;
                match json {
                    true => println!("{text}"),
                    false => print!("{}", parse(&text)?),
                }
            }
            OperatorCommand::Token(TokenCommand::Create {
                options,
                node,
                lifetime,
                replace,
            }) => {
                let request = CreateJoinTokenRequest {
                    node,
                    lifetime_seconds: lifetime.as_secs(),
                    replace,
                };
                let answer = connect(&options).await?.create_join_token(request).await;
                println!("{}", answer.map_err(explain)?.into_inner().token);
            }
            OperatorCommand::Token(TokenCommand::List { options }) => {
                let status = parse(&status(&options).await?)?;
                let authority = status
                    .authority
                    .context("standby: another replica is the leader, ask that one")?;
                for token in authority.join_tokens {
                    println!("{token}");
                }
            }
            OperatorCommand::Token(TokenCommand::Delete { options, node }) => {
                let mut operator = connect(&options).await?;
                let request = DeleteJoinTokenRequest { node: node.clone() };
                operator.delete_join_token(request).await.map_err(explain)?;
                println!("the token for node {node} is deleted");
            }
            OperatorCommand::Revoke {
                options,
                target,
                reason,
            } => {
                let named = target.to_string();
                let request = RevokeRequest {
                    target: target.message(),
                    reason: reason.unwrap_or_default().as_str().to_owned(),
                };
                let answer = connect(&options).await?.revoke(request).await;
                answer.map_err(explain)?;
                println!("{named} is revoked; daemons refuse it within two seconds");
            }
            OperatorCommand::Unrevoke { options, target } => {
                let request = UnrevokeRequest {
                    target: target.message(),
                };
                connect(&options)
                    .await?
                    .unrevoke(request)
                    .await
                    .map_err(explain)?;
                println!("the revocation is withdrawn");
            }
            OperatorCommand::RotateRoot { options } => {
                let answer = connect(&options)
                    .await?
                    .rotate_root(RotateRootRequest {})
                    .await;
                println!("{}", answer.map_err(explain)?.into_inner().phase);
            }
        }
        Ok(())
    })
}

/// The CA's status, JSON.
async fn status(options: &SocketOptions) -> anyhow::Result<String> {
    let answer = connect(options).await?.status(StatusRequest {}).await;
    Ok(answer.map_err(explain)?.into_inner().json)
}

fn parse(status: &str) -> anyhow::Result<CaStatus> {
    serde_json::from_str(status).context("the CA's answer is not a status")
}

impl Target {
    fn message(self) -> Option<TargetMessage> {
        let serial = self.serial.map(target::Target::Serial);
        let identity = self.identity.map(target::Target::Identity);
        let target = serial.or(identity).or(self.node.map(target::Target::Node));
        Some(TargetMessage { target })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.serial, &self.identity, &self.node) {
            (Some(serial), ..) => write!(f, "certificate {serial}"),
            (_, Some(identity), _) => write!(f, "{identity}"),
            (.., node) => write!(f, "node {}", node.as_deref().unwrap_or_default()),
        }
    }
}

async fn connect(options: &SocketOptions) -> anyhow::Result<OperatorClient<Channel>> {
    let path = match options {
        SocketOptions {
            socket: Some(socket),
            ..
        } => socket.clone(),
        SocketOptions {
            config: Some(config),
            ..
        } => CaConfig::load(config)?.operator_socket,
        _ => DEFAULT_OPERATOR_SOCKET.into(),
    };
    // Connected here, for a clear error.
    let stream = UnixStream::connect(&path)
        .await
        .map_err(|error| no_ca(&path, &error))?;
    let mut stream = Some(stream);
    let channel = Endpoint::from_static("http://operator")
        .timeout(DEADLINE)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let stream = stream.take().map(TokioIo::new);
            std::future::ready(stream.ok_or_else(|| std::io::Error::from(ErrorKind::BrokenPipe)))
        }))
        .await
        .with_context(|| format!("{}: the server there is not a CA", path.display()))?;
    Ok(OperatorClient::new(channel).max_decoding_message_size(MAX_ANSWER))
}

fn no_ca(path: &Path, error: &std::io::Error) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        ErrorKind::PermissionDenied => {
            anyhow!("{path}: {error}: run this as the CA's user, or as root")
        }
        _ => anyhow!(
            "no CA answers at {path} ({error}): is it running, on this machine and in this container? \
             --socket or --config names its operatorSocket"
        ),
    }
}

fn explain(status: Status) -> anyhow::Error {
    match status.code() {
        Code::Unavailable => anyhow!("the CA cannot do this now: {}", status.message()),
        Code::InvalidArgument => anyhow!("the CA does not accept this: {}", status.message()),
        _ => anyhow!("the CA refuses: {}", status.message()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_the_socket_without_a_ca() {
        let options = SocketOptions {
            config: None,
            socket: Some("/nonexistent/operator.sock".into()),
        };
        let error = connect(&options).await.unwrap_err().to_string();
        assert!(
            error.contains("no CA answers at /nonexistent/operator.sock"),
            "{error}"
        );
    }
}
