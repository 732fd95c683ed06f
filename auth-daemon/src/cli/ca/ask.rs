//! `auth-daemon ca status`, `revoke`, `unrevoke`, `rotate-root`: what an operator asks the CA, over its socket.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::UnixStream, runtime};
use tonic::{
    Code, Status,
    codegen::http::Uri,
    transport::{Channel, Endpoint},
};

use crate::{
    ca::proto::auth::{
        RevokeRequest, RotateRootRequest, StatusRequest, Target as TargetMessage, UnrevokeRequest,
        operator_client::OperatorClient, target,
    },
    config::{CaConfig, DEFAULT_OPERATOR_SOCKET},
    tunnel::trust::Reason,
};

const DEADLINE: std::time::Duration = std::time::Duration::from_secs(30);
/// A status with all that is revoked in it.
const MAX_ANSWER: usize = 64 << 20;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Question {
    /// Show roots, the phase of a rotation, what is revoked, and what was refused.
    Status {
        #[command(flatten)]
        place: Place,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Believe a certificate, an identity or a node no more, everywhere.
    Revoke {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        target: Target,
        /// Why, by a name of RFC 5280 §5.3.1, such as keyCompromise.
        #[arg(long)]
        reason: Option<Reason>,
    },
    /// Take a revocation back.
    Unrevoke {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        target: Target,
    },
    /// Replace the root by a new one, without an outage.
    RotateRoot {
        #[command(flatten)]
        place: Place,
    },
}

/// Where the CA's socket is.
#[derive(Debug, clap::Args)]
pub(super) struct Place {
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
    /// A SPIFFE ID: all certificates that it has, and it gets no more.
    #[arg(long, group = "what")]
    identity: Option<String>,
    /// A node's name: all certificates that it got, whatever its pods show, and it gets no more.
    #[arg(long, group = "what")]
    node: Option<String>,
}

pub(super) fn ask(question: Question) -> anyhow::Result<()> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        match question {
            Question::Status { place, json } => {
                let answer = connect(&place).await?.status(StatusRequest {}).await;
                let text = answer.map_err(explain)?.into_inner().json;
                if json {
                    println!("{text}");
                } else {
                    let status =
                        serde_json::from_str(&text).context("the CA's answer is not JSON")?;
                    print!("{}", table(&status));
                }
            }
            Question::Revoke {
                place,
                target,
                reason,
            } => {
                let request = RevokeRequest {
                    target: target.message(),
                    reason: reason.unwrap_or_default().as_str().to_owned(),
                };
                let answer = connect(&place).await?.revoke(request).await;
                let touched = answer.map_err(explain)?.into_inner().certificates;
                println!(
                    "revoked; {touched} certificates that are still valid are believed no more"
                );
            }
            Question::Unrevoke { place, target } => {
                let request = UnrevokeRequest {
                    target: target.message(),
                };
                connect(&place)
                    .await?
                    .unrevoke(request)
                    .await
                    .map_err(explain)?;
                println!("the revocation is taken back");
            }
            Question::RotateRoot { place } => {
                let answer = connect(&place)
                    .await?
                    .rotate_root(RotateRootRequest {})
                    .await;
                println!("{}", answer.map_err(explain)?.into_inner().phase);
            }
        }
        Ok(())
    })
}

impl Target {
    fn message(self) -> Option<TargetMessage> {
        let serial = self.serial.map(target::Target::Serial);
        let identity = self.identity.map(target::Target::Identity);
        let target = serial.or(identity).or(self.node.map(target::Target::Node));
        Some(TargetMessage { target })
    }
}

async fn connect(place: &Place) -> anyhow::Result<OperatorClient<Channel>> {
    let path = match place {
        Place {
            socket: Some(socket),
            ..
        } => socket.clone(),
        Place {
            config: Some(config),
            ..
        } => CaConfig::load(config)?.operator_socket,
        _ => DEFAULT_OPERATOR_SOCKET.into(),
    };
    // Tried once by itself, for an error in plain words.
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
        .with_context(|| format!("{}: does not speak as a CA does", path.display()))?;
    Ok(OperatorClient::new(channel).max_decoding_message_size(MAX_ANSWER))
}

fn no_ca(path: &Path, error: &std::io::Error) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        ErrorKind::PermissionDenied => {
            anyhow!("{path}: {error}: run this as the CA's user, or as root")
        }
        _ => anyhow!(
            "no CA answers at {path} ({error}): does it run, on this machine and in this container? \
             --socket or --config says where its operatorSocket is"
        ),
    }
}

fn explain(status: Status) -> anyhow::Error {
    match status.code() {
        Code::Unavailable => anyhow!("the CA cannot do this now: {}", status.message()),
        Code::InvalidArgument => anyhow!("the CA does not take this: {}", status.message()),
        _ => anyhow!("the CA refuses: {}", status.message()),
    }
}

fn table(status: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let mut out = String::new();
    if status["leader"] != true {
        out.push_str("standing by: another replica leads, ask that one for more\n");
    } else {
        out.push_str(&format!(
            "trust domain {}  phase {}  certificates {}  algorithm {}\n",
            text(&status["trustDomain"]),
            text(&status["phase"]),
            text(&status["issued"]),
            text(&status["algorithm"]),
        ));
        let list = |field: &Value| field.as_array().cloned().unwrap_or_default();
        let roots = list(&status["roots"]);
        out.push_str(&format!("\nROOTS ({})\n", roots.len()));
        for root in roots {
            let signs = if root["signs"] == true { "signs" } else { "" };
            let line = format!(
                "  {}  until {}  sha256 {}  {signs}",
                text(&root["serial"]),
                text(&root["notAfter"]),
                text(&root["sha256"]),
            );
            out.push_str(line.trim_end());
            out.push('\n');
        }
        for (title, field) in [
            ("SERIALS", "serials"),
            ("IDENTITIES", "identities"),
            ("NODES", "nodes"),
        ] {
            let revoked = list(&status["revoked"][field]);
            out.push_str(&format!("\nREVOKED {title} ({})\n", revoked.len()));
            for entry in revoked {
                out.push_str(&format!(
                    "  {}  {}\n",
                    text(&entry["name"]),
                    text(&entry["reason"])
                ));
            }
        }
    }
    let server = &status["server"];
    out.push_str(&format!(
        "\nSINCE ITS START\n  issued {}\n",
        text(&server["issued"])
    ));
    for (kind, count) in server["refused"].as_object().into_iter().flatten() {
        out.push_str(&format!("  refused as {kind} {}\n", text(count)));
    }
    out.push_str(&format!(
        "  failed handshakes {}\n  refused connections {}\n",
        text(&server["failedHandshakes"]),
        text(&server["refusedConnections"]),
    ));
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_for_people() {
        let table = table(&json!({
            "leader": true, "trustDomain": "cluster.local", "phase": "spreading", "issued": 3, "algorithm": "P-256",
            "roots": [{"serial": "01", "notAfter": "2036", "sha256": "ab", "signs": true}, {"serial": "02"}],
            "revoked": {"serials": [], "identities": [], "nodes": [{"name": "a", "reason": "keyCompromise"}]},
            "server": {"issued": 5, "refused": {"denied": 2}, "failedHandshakes": 1, "refusedConnections": 0},
        }));
        for expected in [
            "trust domain cluster.local  phase spreading  certificates 3",
            "ROOTS (2)\n  01  until 2036  sha256 ab  signs\n  02",
            "REVOKED NODES (1)\n  a  keyCompromise\n",
            "refused as denied 2\n",
        ] {
            assert!(table.contains(expected), "{expected:?} is not in:\n{table}");
        }
    }

    #[tokio::test]
    async fn says_where_no_ca_is() {
        let place = Place {
            config: None,
            socket: Some("/nonexistent/operator.sock".into()),
        };
        let error = connect(&place).await.unwrap_err().to_string();
        assert!(
            error.contains("no CA answers at /nonexistent/operator.sock"),
            "{error}"
        );
    }
}
