//! One HTTP GET, within limits.

use std::{path::Path, sync::Arc, time::Duration};

use auth_support::http_client;
use auth_tunnel::tls::explain;
use axum::http::Uri;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

const DEADLINE: Duration = Duration::from_secs(5);

/// The body of `url`, of at most `limit` bytes. `https` servers are verified with the roots in `root_file`, or with the
/// system's. Redirects are not followed: they could lead anywhere, and out of TLS.
pub(super) async fn fetch(
    url: &str,
    root_file: Option<&Path>,
    limit: usize,
) -> Result<Vec<u8>, String> {
    let answer = timeout(DEADLINE, get(url, root_file, limit)).await;
    answer.unwrap_or_else(|_| Err(format!("no answer within {DEADLINE:?}")))
}

async fn get(url: &str, root_file: Option<&Path>, limit: usize) -> Result<Vec<u8>, String> {
    let uri: Uri = url.parse().map_err(|_| "not a URL".to_owned())?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let tls = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let tcp = TcpStream::connect((host, port)).await;
    let tcp = tcp.map_err(|error| error.to_string())?;
    let (status, body) = if tls {
        let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
        let connector = TlsConnector::from(Arc::new(config(root_file)?));
        let stream = connector.connect(name, tcp).await.map_err(|error| {
            let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
            inner.map_or_else(|| error.to_string(), explain)
        })?;
        http_client::get(stream, &uri, limit).await?
    } else {
        http_client::get(tcp, &uri, limit).await?
    };
    match status {
        200 => Ok(body),
        status => Err(format!("the server answers {status}")),
    }
}

fn config(root_file: Option<&Path>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match root_file {
        None => {
            let system = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(system.certs);
        }
        Some(file) => {
            let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
            let certificates =
                CertificateDer::pem_file_iter(file).map_err(|error| failed(&error))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|error| failed(&error))?;
                roots.add(certificate).map_err(|error| failed(&error))?;
            }
        }
    }
    if roots.is_empty() {
        return Err("there are no root certificates to verify the server with".into());
    }
    Ok(
        ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth(),
    )
}
