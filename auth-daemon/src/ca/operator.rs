//! What the CA's operator may do, on a socket in the file system: who can open it is the operator.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::json;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::UdsConnectInfo},
};

use super::{
    authority::{Authority, Refusal, Target},
    counters::Counters,
    proto::auth::{
        RevokeRequest, RevokeResponse, RotateRootRequest, RotateRootResponse, StatusRequest,
        StatusResponse, Target as TargetMessage, UnrevokeRequest, UnrevokeResponse,
        operator_server::{Operator, OperatorServer},
        target,
    },
    server::Leader,
};
use crate::tunnel::trust::Reason;

const DEADLINE: Duration = Duration::from_secs(30);
const MAX_REQUEST: usize = 64 << 10;

/// The operator's socket, listening. Removed when this goes.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens at `path`, in a folder that is made where there is none. A socket that nobody listens on is replaced.
    pub(super) async fn take(path: &Path) -> anyhow::Result<Self> {
        let failed = |what: &str, error: io::Error| {
            anyhow::anyhow!("operatorSocket: {}: {what}: {error}", path.display())
        };
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|error| failed("cannot make its folder", error))?;
        let mode = fs::metadata(folder)
            .map_err(|error| failed("cannot look at its folder", error))?
            .mode();
        if mode & 0o022 != 0 {
            anyhow::bail!(
                "operatorSocket: {}: mode {:03o} lets others write: they could put a socket of their own in its place. \
                 Run `chmod 700 {}`",
                folder.display(),
                mode & 0o777,
                folder.display()
            );
        }
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed("cannot be looked at", error)),
            Ok(found) if !found.file_type().is_socket() => {
                anyhow::bail!(
                    "operatorSocket: {}: is there, and not a socket",
                    path.display()
                );
            }
            Ok(_) => match UnixStream::connect(path).await {
                Ok(_) => anyhow::bail!(
                    "operatorSocket: {}: another CA is running and listens there",
                    path.display()
                ),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => {
                    return Err(failed(
                        "cannot tell whether another CA listens there",
                        error,
                    ));
                }
            },
        }
        // Under a name of its own until nobody else can open it; the rename then replaces one that is stale.
        let draft = folder.join(format!(".{:016x}", rand::random::<u64>()));
        let listener =
            UnixListener::bind(&draft).map_err(|error| failed("cannot listen", error))?;
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&draft, path))
            .inspect_err(|_| drop(fs::remove_file(&draft)))
            .map_err(|error| failed("cannot put the socket there", error))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Answers until `stopped` says so.
    pub(super) async fn serve(
        self,
        authority: Leader,
        counters: Arc<Counters>,
        mut stopped: watch::Receiver<bool>,
    ) {
        let operator = OperatorServer::new(Desk {
            authority,
            counters,
        })
        .max_decoding_message_size(MAX_REQUEST);
        let served = Server::builder()
            .timeout(DEADLINE)
            .add_service(operator)
            .serve_with_incoming_shutdown(UnixListenerStream::new(self.listener), async move {
                let _ = stopped.wait_for(|stopped| *stopped).await;
            })
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "operator's socket ended");
        }
        let _ = fs::remove_file(&self.path);
    }
}

struct Desk {
    authority: Leader,
    counters: Arc<Counters>,
}

impl Desk {
    fn leader(&self) -> Result<Arc<Authority>, Status> {
        let authority = self.authority.borrow().clone();
        authority.ok_or_else(|| Status::unavailable("this replica is not the leader"))
    }
}

fn refused(refusal: Refusal) -> Status {
    match refusal {
        Refusal::Request(why) => Status::invalid_argument(why),
        Refusal::Revoked(revoked) => Status::failed_precondition(revoked.to_string()),
        Refusal::Store(error) => Status::unavailable(error.to_string()),
        Refusal::State(why) => Status::failed_precondition(why),
    }
}

/// Who is at the other end, for the log.
fn uid<T>(request: &Request<T>) -> Option<u32> {
    let info = request.extensions().get::<UdsConnectInfo>()?;
    info.peer_cred.map(|peer| peer.uid())
}

fn target(message: Option<TargetMessage>) -> Result<Target, Status> {
    let invalid = |field: &str, why: &dyn std::fmt::Display| {
        Status::invalid_argument(format!("{field}: {why}"))
    };
    match message.and_then(|message| message.target) {
        Some(target::Target::Serial(serial)) => serial_number(&serial)
            .map(Target::Serial)
            .ok_or_else(|| invalid("serial", &"is not a serial number in hexadecimal")),
        Some(target::Target::Identity(identity)) => identity
            .parse()
            .map(Target::Identity)
            .map_err(|error| invalid("identity", &error)),
        Some(target::Target::Node(node)) if !node.is_empty() => Ok(Target::Node(node)),
        _ => Err(Status::invalid_argument(
            "none of serial, identity and node is named",
        )),
    }
}

fn describe(target: &Target) -> String {
    match target {
        Target::Serial(serial) => format!("serial {:032x}", u128::from_be_bytes(*serial)),
        Target::Identity(identity) => identity.to_string(),
        Target::Node(node) => format!("node {node}"),
    }
}

/// As people copy it: with colons, in any case, with or without leading zeros.
fn serial_number(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    if !digits.chars().all(|c| c.is_ascii_hexdigit()) {
        return None;
    }
    Some(u128::from_str_radix(&digits, 16).ok()?.to_be_bytes())
}

#[tonic::async_trait]
impl Operator for Desk {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let authority = self.authority.borrow().clone();
        let mut status = authority
            .as_ref()
            .map_or_else(|| json!({}), |authority| authority.status());
        status["leader"] = authority.is_some().into();
        status["server"] = self.counters.to_json();
        Ok(Response::new(StatusResponse {
            json: status.to_string(),
        }))
    }

    async fn revoke(
        &self,
        request: Request<RevokeRequest>,
    ) -> Result<Response<RevokeResponse>, Status> {
        let uid = uid(&request);
        let RevokeRequest {
            target: named,
            reason,
        } = request.into_inner();
        let named = target(named)?;
        let reason: Reason = match reason.as_str() {
            "" => Reason::default(),
            reason => reason
                .parse()
                .map_err(|why| Status::invalid_argument(format!("reason: {why}")))?,
        };
        let certificates = self
            .leader()?
            .revoke(named.clone(), reason)
            .await
            .map_err(refused)?;
        tracing::warn!(what = describe(&named), %reason, certificates, uid, "revoked");
        Ok(Response::new(RevokeResponse { certificates }))
    }

    async fn unrevoke(
        &self,
        request: Request<UnrevokeRequest>,
    ) -> Result<Response<UnrevokeResponse>, Status> {
        let uid = uid(&request);
        let named = target(request.into_inner().target)?;
        self.leader()?
            .unrevoke(named.clone())
            .await
            .map_err(refused)?;
        tracing::warn!(what = describe(&named), uid, "revocation taken back");
        Ok(Response::new(UnrevokeResponse {}))
    }

    async fn rotate_root(
        &self,
        request: Request<RotateRootRequest>,
    ) -> Result<Response<RotateRootResponse>, Status> {
        let uid = uid(&request);
        let phase = self.leader()?.rotate_root().await.map_err(refused)?;
        tracing::warn!(phase, uid, "rotation of the root asked for");
        Ok(Response::new(RotateRootResponse { phase }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let message = |target| {
            Some(TargetMessage {
                target: Some(target),
            })
        };
        let mut expected = [0; 16];
        expected[14..].copy_from_slice(&[0xab, 0x01]);
        for serial in ["ab01", "AB:01", "00ab01"] {
            let read = target(message(target::Target::Serial(serial.into()))).unwrap();
            assert_eq!(read, Target::Serial(expected), "{serial}");
            assert!(describe(&read).ends_with("0000ab01"));
        }
        for bad in [
            None,
            Some(TargetMessage { target: None }),
            message(target::Target::Serial(String::new())),
            message(target::Target::Serial("+1".into())),
            message(target::Target::Serial("1".repeat(33))),
            message(target::Target::Identity("web".into())),
            message(target::Target::Node(String::new())),
        ] {
            assert!(target(bad.clone()).is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn one_socket_for_one_ca() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/operator.sock");
        let first = Socket::take(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let parent = path.parent().unwrap();
        assert_eq!(fs::metadata(parent).unwrap().mode() & 0o777, 0o700);
        let error = Socket::take(&path).await.unwrap_err().to_string();
        assert!(error.contains("another CA is running"), "{error}");
        // As after a kill: the socket stays.
        drop(first);
        Socket::take(&path).await.unwrap();
        assert_eq!(
            fs::read_dir(parent).unwrap().count(),
            1,
            "no drafts are left"
        );

        let file = folder.path().join("run/file");
        fs::write(&file, "").unwrap();
        let error = Socket::take(&file).await.unwrap_err().to_string();
        assert!(error.contains("not a socket"), "{error}");
        fs::set_permissions(parent, fs::Permissions::from_mode(0o777)).unwrap();
        let error = Socket::take(&path).await.unwrap_err().to_string();
        assert!(error.contains("lets others write"), "{error}");
    }
}
