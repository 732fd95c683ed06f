//! HTTP(S) client for one GET request.

use std::{fmt, path::Path, sync::Arc, time::Duration};

use axum::http::Uri;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use crate::http_client;

/// Returns the body of `uri`, of at most `limit` bytes, within `deadline`. `tls` is for a URI with the scheme `https`; with any
/// other, there is no TLS. `explain` says why a TLS handshake failed. Redirects are not followed: they could lead anywhere,
/// and away from TLS.
pub async fn get(
    uri: &Uri,
    tls: impl FnOnce() -> Result<ClientConfig, String>,
    explain: fn(&rustls::Error) -> String,
    limit: usize,
    deadline: Duration,
) -> Result<Vec<u8>, String> {
    let answer = timeout(deadline, request(uri, tls, explain, limit)).await;
    let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {deadline:?}")));
    match answer? {
        (200, body) => Ok(body),
        (status, _) => Err(format!("the server answers {status}")),
    }
}

async fn request(
    uri: &Uri,
    tls: impl FnOnce() -> Result<ClientConfig, String>,
    explain: fn(&rustls::Error) -> String,
    limit: usize,
) -> Result<(u16, Vec<u8>), String> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let is_https = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if is_https { 443 } else { 80 });
    let tcp = TcpStream::connect((host, port)).await;
    let tcp = tcp.map_err(|error| error.to_string())?;
    if !is_https {
        return http_client::get(tcp, uri, limit).await;
    }
    let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
    let connector = TlsConnector::from(Arc::new(tls()?));
    let stream = connector.connect(name, tcp).await.map_err(|error| {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        inner.map_or_else(|| error.to_string(), explain)
    })?;
    http_client::get(stream, uri, limit).await
}

/// Returns a TLS configuration that verifies servers by their names, with the roots in `root_file` (PEM) or with the system's.
pub fn web_pki(root_file: Option<&Path>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match root_file {
        None => {
            let system = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(system.certs);
        }
        Some(file) => {
            let failed = |error: &dyn fmt::Display| format!("{}: {error}", file.display());
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
