//! The operator's requests, on a Unix socket: whoever can open it is the operator.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use auth_ca_api::auth::{
    CreateJoinTokenRequest, CreateJoinTokenResponse, DeleteJoinTokenRequest,
    DeleteJoinTokenResponse, RevokeRequest, RevokeResponse, RotateRootRequest, RotateRootResponse,
    StatusRequest, StatusResponse, Target as TargetMessage, UnrevokeRequest, UnrevokeResponse,
    operator_server::{Operator, OperatorServer},
    target,
};
use auth_support::files;
use auth_tunnel::tls::trust::Reason;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::UdsConnectInfo},
};

use crate::{
    audit,
    authority::{Authority, Leader, Refusal, Target},
    counters::Counters,
    quotas::Quotas,
    service::NOT_THE_LEADER,
    status::CaStatus,
};

const DEADLINE: Duration = Duration::from_secs(30);
const MAX_REQUEST: usize = 64 << 10;

/// The bound socket.
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens at `path`, and creates its directory. Replaces a socket that nobody listens on.
    pub(crate) async fn bind(path: &Path) -> anyhow::Result<Self> {
        let failed = |what: &str, error: io::Error| {
            anyhow::anyhow!("operatorSocket: {}: {what}: {error}", path.display())
        };
        let folder = path.parent().unwrap_or(Path::new("/"));
        files::create_own_directory(folder)
            .map_err(|error| failed("its directory cannot be used", error))?;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed("cannot be read", error)),
            Ok(found) if !found.file_type().is_socket() => {
                anyhow::bail!(
                    "operatorSocket: {}: exists, and is not a socket",
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
        // Under another name until nobody else can open it. The rename then replaces a stale socket.
        let draft = folder.join(format!(".{:016x}", rand::random::<u64>()));
        let listener =
            UnixListener::bind(&draft).map_err(|error| failed("cannot listen", error))?;
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&draft, path))
            .inspect_err(|_| drop(fs::remove_file(&draft)))
            .map_err(|error| failed("cannot create the socket", error))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Answers until `stopped` is true, then removes the socket.
    pub(crate) async fn serve(
        self,
        leader: Leader,
        counters: Arc<Counters>,
        quotas: Arc<Quotas>,
        mut stopped: watch::Receiver<bool>,
    ) {
        let operator = OperatorServer::new(OperatorService {
            leader,
            counters,
            quotas,
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
            tracing::error!(%error, "operator socket ended");
        }
        let _ = fs::remove_file(&self.path);
    }
}

struct OperatorService {
    leader: Leader,
    counters: Arc<Counters>,
    quotas: Arc<Quotas>,
}

impl OperatorService {
    fn authority(&self) -> Result<Arc<Authority>, Status> {
        let leader = self.leader.borrow().clone();
        leader.ok_or_else(|| Status::unavailable(NOT_THE_LEADER))
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

/// The caller's user, for the log.
fn uid<T>(request: &Request<T>) -> Option<u32> {
    let info = request.extensions().get::<UdsConnectInfo>()?;
    info.peer_cred.map(|peer| peer.uid())
}

fn target(message: Option<TargetMessage>) -> Result<Target, Status> {
    let invalid = |field: &str, why: &dyn std::fmt::Display| {
        Status::invalid_argument(format!("{field}: {why}"))
    };
    match message.and_then(|message| message.target) {
        Some(target::Target::Serial(serial)) => serial
            .parse()
            .map(Target::Serial)
            .map_err(|error| invalid("serial", &error)),
        Some(target::Target::Identity(identity)) => identity
            .parse()
            .map(Target::Identity)
            .map_err(|error| invalid("identity", &error)),
        Some(target::Target::Node(node)) if !node.is_empty() => Ok(Target::Node(node)),
        _ => Err(Status::invalid_argument(
            "one of serial, identity and node is required",
        )),
    }
}

#[tonic::async_trait]
impl Operator for OperatorService {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let leader = self.leader.borrow().clone();
        let status = CaStatus {
            leader: leader.is_some(),
            authority: leader.map(|authority| authority.status()),
            server: self.counters.status(&self.quotas),
        };
        let json = serde_json::to_string(&status);
        let json = json.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(StatusResponse { json }))
    }

    async fn revoke(
        &self,
        request: Request<RevokeRequest>,
    ) -> Result<Response<RevokeResponse>, Status> {
        let uid = uid(&request);
        let request = request.into_inner();
        let target = target(request.target)?;
        let reason: Reason = match request.reason.as_str() {
            "" => Reason::default(),
            reason => reason
                .parse()
                .map_err(|why| Status::invalid_argument(format!("reason: {why}")))?,
        };
        let authority = self.authority()?;
        authority
            .revoke(target.clone(), reason)
            .await
            .map_err(refused)?;
        audit::operator("revoked", Some(&target), reason.as_str(), uid);
        Ok(Response::new(RevokeResponse {}))
    }

    async fn unrevoke(
        &self,
        request: Request<UnrevokeRequest>,
    ) -> Result<Response<UnrevokeResponse>, Status> {
        let uid = uid(&request);
        let target = target(request.into_inner().target)?;
        let authority = self.authority()?;
        authority.unrevoke(target.clone()).await.map_err(refused)?;
        audit::operator("unrevoked", Some(&target), "", uid);
        Ok(Response::new(UnrevokeResponse {}))
    }

    async fn rotate_root(
        &self,
        request: Request<RotateRootRequest>,
    ) -> Result<Response<RotateRootResponse>, Status> {
        let uid = uid(&request);
        let phase = self.authority()?.rotate_root().await.map_err(refused)?;
        audit::operator("rootRotation", None, &phase, uid);
        Ok(Response::new(RotateRootResponse { phase }))
    }

    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        let uid = uid(&request);
        let CreateJoinTokenRequest {
            node,
            lifetime_seconds,
            replace,
        } = request.into_inner();
        let lifetime = Duration::from_secs(lifetime_seconds);
        let authority = self.authority()?;
        let created = authority.create_join_token(&node, lifetime, replace, uid);
        let token = created.await.map_err(refused)?;
        audit::join_token("joinTokenCreated", &node, uid);
        Ok(Response::new(CreateJoinTokenResponse { token }))
    }

    async fn delete_join_token(
        &self,
        request: Request<DeleteJoinTokenRequest>,
    ) -> Result<Response<DeleteJoinTokenResponse>, Status> {
        let uid = uid(&request);
        let node = request.into_inner().node;
        let authority = self.authority()?;
        authority.delete_join_token(&node).await.map_err(refused)?;
        audit::join_token("joinTokenDeleted", &node, uid);
        Ok(Response::new(DeleteJoinTokenResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, chown};

    use super::*;

    #[tokio::test]
    async fn one_ca_has_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/operator.sock");
        let first = Socket::bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let parent = path.parent().unwrap();
        assert_eq!(fs::metadata(parent).unwrap().mode() & 0o777, 0o700);
        let error = Socket::bind(&path).await.err().unwrap().to_string();
        assert!(error.contains("another CA is running"), "{error}");
        // After a kill, the socket is still there.
        drop(first);
        Socket::bind(&path).await.unwrap();
        assert_eq!(fs::read_dir(parent).unwrap().count(), 1, "no drafts remain");

        let file = folder.path().join("run/file");
        fs::write(&file, "").unwrap();
        let error = Socket::bind(&file).await.err().unwrap().to_string();
        assert!(error.contains("not a socket"), "{error}");
        fs::set_permissions(parent, fs::Permissions::from_mode(0o777)).unwrap();
        let error = Socket::bind(&path).await.err().unwrap().to_string();
        assert!(error.contains("lets others write"), "{error}");
        if nix::unistd::geteuid().is_root() {
            fs::set_permissions(parent, fs::Permissions::from_mode(0o755)).unwrap();
            chown(parent, Some(12345), None).unwrap();
            let error = Socket::bind(&path).await.err().unwrap().to_string();
            assert!(error.contains("belongs to user 12345"), "{error}");
        } else {
            println!("SKIPPED a directory of another user: needs root");
        }
    }
}
