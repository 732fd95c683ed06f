//! How the CA is reached from outside the mesh: its roots, tokens for it, and connections to it.

use std::{
    fmt, io,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use futures_util::future::{BoxFuture, FutureExt, TryFutureExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use rustls::pki_types::CertificateDer;
use tokio::{net::TcpStream, sync::Mutex};

use super::CA_PORT;
use crate::issuer::{self, Access, Bearer, Stream};
use auth_ca::leader::LEADER_LABEL;
use auth_kubernetes::{
    ApiError, Objects, objects::Pod, port_forward, post_signing_request, request_token,
};
use auth_mesh::ObjectName;

/// Lifetime of tokens: the shortest that an API server issues.
const TOKEN_LIFETIME: Duration = Duration::from_secs(600);
/// How long a token is used.
const TOKEN_USE: Duration = Duration::from_secs(300);
/// Key of the roots in the ConfigMap, as in Istio's.
const ROOTS_KEY: &str = "root-cert.pem";

/// How the CA is reached.
#[derive(Debug)]
pub(super) struct CaAccess {
    pub(super) roots: Roots,
    pub(super) token: Token,
    pub(super) way: Way,
}

#[derive(Debug)]
pub(super) enum Roots {
    File(PathBuf),
    Known(Vec<CertificateDer<'static>>),
}

/// Where tokens come from.
pub(super) enum Token {
    File(PathBuf),
    Account(Box<AccountTokens>),
}

/// Tokens of a service account, which the API server issues.
pub(super) struct AccountTokens {
    client: Client,
    account: ObjectName,
    audience: String,
    /// The last token, and when it was requested.
    last: Mutex<Option<(Bearer, Instant)>>,
    /// Whether the user was warned that the name cannot be proved.
    is_warned: AtomicBool,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "Token({})", path.display()),
            Self::Account(tokens) => write!(f, "Token({})", tokens.account),
        }
    }
}

/// Where connections go.
pub(super) enum Way {
    Address(String),
    /// Through the API server to the pod of the CA's leader.
    Leader {
        client: Client,
        namespace: String,
    },
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "Way({address})"),
            Self::Leader { namespace, .. } => write!(f, "Way(leader in {namespace})"),
        }
    }
}

/// Reads the CA's roots from a ConfigMap.
pub(super) async fn roots_of(
    client: &Client,
    namespace: &str,
    name: &str,
) -> anyhow::Result<Roots> {
    let found = Objects::<ConfigMap>::of(client.clone(), namespace)
        .get(name)
        .await
        .map_err(|error| {
            let right = format!("get on configmaps (resourceNames: [{name}])");
            anyhow!(refused(error, &right, namespace))
        })?
        .with_context(|| {
            format!("there is no ConfigMap {namespace}/{name} with the CA's roots: name it with --roots-config-map")
        })?;
    let pem = found.data.unwrap_or_default().remove(ROOTS_KEY);
    let roots = issuer::roots(pem.unwrap_or_default().as_bytes());
    let roots = roots.map_err(|why| anyhow!("ConfigMap {namespace}/{name}: {ROOTS_KEY}: {why}"))?;
    Ok(Roots::Known(roots))
}

/// Explains a refusal by RBAC: what to ask for.
pub(super) fn refused(error: ApiError, right: &str, namespace: &str) -> String {
    match error {
        ApiError::Refused { code: 403, .. } => {
            format!("{error}; ask for a Role in namespace {namespace} that allows {right}")
        }
        error => error.to_string(),
    }
}

impl Token {
    /// Tokens of `account`, which the API server issues.
    pub(super) fn of_account(client: Client, account: ObjectName, audience: &str) -> Self {
        Self::Account(Box::new(AccountTokens {
            client,
            account,
            audience: audience.to_owned(),
            last: Mutex::default(),
            is_warned: AtomicBool::new(false),
        }))
    }

    async fn current(&self) -> Result<Bearer, String> {
        match self {
            Self::File(path) => issuer::token_in(path),
            Self::Account(tokens) => tokens.current().await,
        }
    }

    async fn prove(&self, csr: &str) {
        if let Self::Account(tokens) = self {
            tokens.prove(csr).await;
        }
    }
}

impl AccountTokens {
    /// Has the API server write the user's name into an object with the CSR, which the CA looks up.
    async fn prove(&self, csr: &str) {
        let Err(error) = post_signing_request(&self.client, csr).await else {
            return;
        };
        if !self.is_warned.swap(true, Ordering::Relaxed) {
            eprintln!(
                "auth-daemon: access logs name the token instead of you: {error}; with the right to create \
                 certificatesigningrequests (certificates.k8s.io) they name you"
            );
        }
    }

    async fn current(&self) -> Result<Bearer, String> {
        let mut last = self.last.lock().await;
        if let Some((token, at)) = &*last
            && at.elapsed() < TOKEN_USE
        {
            return Ok(token.clone());
        }
        let account = &self.account;
        let ObjectName { namespace, name } = account;
        let requested = Instant::now();
        let token = request_token(
            &self.client,
            namespace,
            name,
            &self.audience,
            TOKEN_LIFETIME,
        )
        .await
        .map_err(|error| {
            let right = format!("create on serviceaccounts/token (resourceNames: [{name}])");
            let why = refused(error, &right, namespace);
            format!("no token of service account {account}: {why}")
        })?;
        let token = issuer::bearer(token.as_bytes())
            .map_err(|why| format!("the token of service account {account} {why}"))?;
        *last = Some((token.clone(), requested));
        Ok(token)
    }
}

impl Way {
    async fn dial(&self) -> io::Result<Box<dyn Stream>> {
        let (client, namespace) = match self {
            Self::Address(address) => {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                return Ok(Box::new(tcp));
            }
            Self::Leader { client, namespace } => (client, namespace),
        };
        let failed =
            |error: ApiError, right: &str| io::Error::other(refused(error, right, namespace));
        let pods = Objects::<Pod>::of(client.clone(), namespace);
        let leaders = pods
            .list(&format!("{LEADER_LABEL}=true"))
            .await
            .map_err(|error| failed(error, "list on pods"))?;
        let leader = leaders
            .into_iter()
            .find_map(|pod| pod.metadata.name)
            .ok_or_else(|| {
                io::Error::other(format!(
                    "no pod in namespace {namespace} is the CA's leader; --ca-namespace names its namespace, --ca its address"
                ))
            })?;
        let forwarded = port_forward(client, namespace, &leader, CA_PORT)
            .await
            .map_err(|error| failed(error, "get and create on pods/portforward"))?;
        Ok(Box::new(forwarded))
    }
}

impl Access for CaAccess {
    fn roots(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        match &self.roots {
            Roots::File(path) => issuer::roots_in(path),
            Roots::Known(roots) => Ok(roots.clone()),
        }
    }

    fn token(&self) -> BoxFuture<'_, Result<Option<Bearer>, String>> {
        self.token.current().map_ok(Some).boxed()
    }

    fn prove<'a>(&'a self, csr: &'a str) -> BoxFuture<'a, ()> {
        self.token.prove(csr).boxed()
    }

    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        self.way.dial().boxed()
    }
}
