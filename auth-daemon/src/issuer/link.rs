//! The connection to the CA or istiod: TLS with roots that are looked up at each connection, and a token at each request.

use std::{io, path::Path, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    sign::SingleCertAndKey,
    version::TLS13,
};
use tokio::time::timeout;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Request, Status,
    codegen::http::Uri,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use super::{
    CaHealth, UnusableServer,
    access::{Access, Bearer, Stream},
};
use crate::config::CaServer;
use auth_mesh::TrustDomain;
use auth_support::files;
use auth_tunnel::tls::{
    explain, provider,
    trust::{Trust, TrustBundle, TrustStore},
};

/// From the name lookup to the end of the TLS handshake.
const CONNECT: Duration = Duration::from_secs(5);
/// Field of a request's metadata that names the cluster of the token. istiod requires it for impersonation.
const CLUSTER_ID: &str = "clusterid";
const MAX_TOKEN: u64 = 16 << 10;
const MAX_ROOT_FILE: u64 = 1 << 20;
const WINDOW: u32 = 1 << 20;

/// How to reach the CA or istiod, and the trust bundle that it sends.
#[derive(Debug)]
pub struct Link {
    names: ServerNames,
    pub(super) access: Arc<dyn Access>,
    pub(super) trust: Arc<TrustStore>,
    pub(super) health: Arc<CaHealth>,
}

/// What the CA or istiod is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerNames {
    /// What says so, for errors: a section of the configuration.
    pub section: &'static str,
    /// Host and port.
    pub address: String,
    /// The name in its certificate.
    pub server_name: String,
    /// The cluster that issues the token.
    pub cluster_id: String,
}

impl From<&CaServer> for ServerNames {
    fn from(server: &CaServer) -> Self {
        Self {
            section: server.section,
            address: server.address.clone(),
            server_name: server.server_name.clone(),
            cluster_id: server.cluster_id.clone(),
        }
    }
}

impl Link {
    /// Creates a link to istiod, which is verified against the roots in the file alone. Fails if its files cannot be read.
    pub fn to_istiod(server: CaServer) -> Result<Self, UnusableServer> {
        server.check().map_err(UnusableServer)?;
        let none = TrustBundle::of_roots(TrustDomain::default(), Vec::new());
        Ok(Self::new((&server).into(), Arc::new(server), none))
    }

    /// Creates a link whose trust bundle is `known` until the server has sent one.
    pub(super) fn new(names: ServerNames, access: Arc<dyn Access>, known: TrustBundle) -> Self {
        Self {
            names,
            access,
            trust: Arc::new(TrustStore::new(Trust::fixed(known))),
            health: Arc::default(),
        }
    }

    /// The server's host and port.
    pub(crate) fn address(&self) -> &str {
        &self.names.address
    }

    /// A channel that connects when it is used, and reconnects after its connection has ended.
    pub(crate) fn channel(
        self: &Arc<Self>,
        shape: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Channel, String> {
        let uri: Uri = format!("https://{}", self.names.address)
            .parse()
            .map_err(|error| format!("{}.address: {error}", self.names.section))?;
        let endpoint = Endpoint::from(uri)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .http2_max_header_list_size(64 << 10);
        let link = self.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let link = link.clone();
            async move {
                let stream = timeout(CONNECT, link.connect()).await.unwrap_or_else(|_| {
                    Err(io::Error::other(format!(
                        "no connection within {CONNECT:?}"
                    )))
                })?;
                io::Result::Ok(TokioIo::new(stream))
            }
        });
        Ok(shape(endpoint).connect_with_connector_lazy(connector))
    }

    async fn connect(&self) -> io::Result<TlsStream<Box<dyn Stream>>> {
        let stream = self.access.dial().await?;
        let config = self.tls().map_err(io::Error::other)?;
        let name =
            ServerName::try_from(self.names.server_name.clone()).map_err(io::Error::other)?;
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .map_err(|error| {
                let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
                match inner.map(explain) {
                    Some(why) => io::Error::other(why),
                    None => error,
                }
            })
    }

    /// Trusts the roots in the file, and those of the CA's trust bundle.
    fn tls(&self) -> Result<ClientConfig, String> {
        let mut store = RootCertStore::empty();
        match self.access.roots() {
            Ok(roots) => store.add_parsable_certificates(roots),
            Err(error) => {
                tracing::warn!(%error, "roots cannot be read; using those that the CA sent");
                (0, 0)
            }
        };
        store.add_parsable_certificates(self.trust.current().bundle.roots.iter().cloned());
        let config = ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| error.to_string())?
            .with_root_certificates(store);
        let mut config = match self.access.certificate() {
            Some(own) => config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own))),
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// `message` with the token that says who asks, unless the connection's certificate does, and the cluster that issued it.
    pub(crate) async fn request<T>(&self, message: T) -> Result<Request<T>, String> {
        let mut request = Request::new(message);
        let token = self.access.token().await?;
        let cluster = MetadataValue::try_from(&self.names.cluster_id)
            .map_err(|error| format!("{}.clusterId: {error}", self.names.section))?;
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", token);
        }
        request.metadata_mut().insert(CLUSTER_ID, cluster);
        Ok(request)
    }
}

/// The root certificates in the root file (PEM): at least one.
pub(super) fn read_roots(server: &CaServer) -> Result<Vec<CertificateDer<'static>>, String> {
    roots_in(&server.root_file).map_err(|why| format!("{}.rootFile: {why}", server.section))
}

/// The root certificates in the file at `path` (PEM): at least one.
pub(crate) fn roots_in(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let failed = |why: String| format!("{}: {why}", path.display());
    let pem = files::read(path, MAX_ROOT_FILE).map_err(|error| failed(error.to_string()))?;
    roots(&pem).map_err(failed)
}

/// The root certificates in `pem`: at least one.
pub(crate) fn roots(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let roots: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("is not PEM: {error}"))?;
    let (usable, _) = RootCertStore::empty().add_parsable_certificates(roots.iter().cloned());
    if usable == 0 || usable < roots.len() {
        return Err(format!(
            "{usable} of {} certificates can be used; all must, and there must be one",
            roots.len()
        ));
    }
    Ok(roots)
}

/// The value of `authorization` with the token in the file at `path`. Errors contain no part of the token.
pub(crate) fn token_in(path: &Path) -> Result<Bearer, String> {
    let failed = |why: String| format!("{}: {why}", path.display());
    let content = files::read(path, MAX_TOKEN).map_err(|error| failed(error.to_string()))?;
    bearer(&content).map_err(|why| failed(why.into()))
}

/// The value of `authorization` with `token`.
pub(crate) fn bearer(token: &[u8]) -> Result<Bearer, &'static str> {
    let token = token.trim_ascii();
    if token.is_empty() {
        return Err("is empty");
    }
    let value = [b"Bearer ", token].concat();
    let mut value = std::str::from_utf8(&value)
        .ok()
        .and_then(|value| MetadataValue::try_from(value).ok())
        .ok_or("contains characters that no token has")?;
    value.set_sensitive(true);
    Ok(value)
}

/// The text of a status, or the cause if the connection failed.
pub(crate) fn explain_status(status: &Status) -> String {
    let mut cause = std::error::Error::source(status);
    let mut last = None;
    while let Some(error) = cause {
        last = Some(error.to_string());
        cause = error.source();
    }
    match last {
        Some(why) => why,
        None => format!("{:?}: {}", status.code(), shorten(status.message())),
    }
}

/// Shortens a text from the other side.
fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(512).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::Proof;

    /// A server whose files are all `path`.
    fn server(path: &Path) -> CaServer {
        CaServer {
            section: "ca",
            address: "ca:15012".into(),
            server_name: "ca".into(),
            root_file: path.into(),
            proof: Proof::Token(path.into()),
            cluster_id: "Kubernetes".into(),
        }
    }

    #[test]
    fn reads_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let read = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            token_in(&path)
        };
        let good = read(b"secret\n").unwrap();
        assert_eq!(good.to_str().unwrap(), "Bearer secret");
        assert!(!format!("{good:?}").contains("secret"));
        for bad in [
            &b""[..],
            b" \n",
            b"sec\nret",
            b"sec\xffret",
            &[b'x'; 20_000],
        ] {
            let error = read(bad).unwrap_err();
            assert!(
                error.contains("token: ") && !error.contains("ret"),
                "{error}"
            );
        }
        assert!(token_in(folder.path()).is_err());
    }

    #[test]
    fn reads_root_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("roots");
        let key = rcgen::KeyPair::generate().unwrap();
        let root = rcgen::CertificateParams::default()
            .self_signed(&key)
            .unwrap();
        let (good, rubbish) = (root.pem(), auth_ca_api::pem::certificate(&[0x30, 0]));
        let read = |content: &str| {
            fs::write(&path, content).unwrap();
            read_roots(&server(&path))
        };
        assert_eq!(read(&format!("{good}{good}")).unwrap().len(), 2);
        for bad in ["", "x", &rubbish, &format!("{good}{rubbish}"), &good[..100]] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
