//! The client of bundle endpoints (SPIFFE Federation §5).

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use auth_mesh::{SpiffeId, TrustDomain};
use auth_support::https_client::{get, web_pki};
use auth_tunnel::tls::{self, explain, svid};
use axum::http::Uri;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
    version::TLS13,
};

use crate::{Bundle, MAX_BYTES};

/// From the connection to the last byte of the document.
const DEADLINE: Duration = Duration::from_secs(10);

/// Where a bundle is served, and how the server is authenticated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The URL.
    pub url: Url,
    /// How the server is authenticated.
    pub profile: Profile,
}

/// How the server of an endpoint is authenticated (SPIFFE Federation §5.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// `https_web`: by the name in the URL.
    Web {
        /// PEM file with roots that verify it. Read again for each connection. The system's if there is none.
        root_file: Option<PathBuf>,
    },
    /// `https_spiffe`: by its X.509-SVID, which the bundle of its trust domain verifies.
    Spiffe {
        /// Its SPIFFE ID.
        id: SpiffeId,
    },
}

/// The URL of a bundle endpoint: `https`, with a host and without user information (SPIFFE Federation §5.2.1.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url(Uri);

impl FromStr for Url {
    type Err = &'static str;

    fn from_str(url: &str) -> Result<Self, &'static str> {
        let uri: Uri = url.parse().map_err(|_| "is not a URL")?;
        if uri.scheme_str() != Some("https") {
            return Err("is not an https URL");
        }
        let Some(authority) = uri.authority() else {
            return Err("has no host");
        };
        if authority.as_str().contains('@') {
            return Err("names a user, which the URL of a bundle endpoint must not");
        }
        let host = authority.host().trim_matches(['[', ']']);
        ServerName::try_from(host).map_err(|_| "has neither a DNS name nor an IP address")?;
        Ok(Self(uri))
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Fetches the bundle. `roots` returns those of a trust domain, if it is trusted; only `https_spiffe` asks for them.
pub async fn fetch(
    endpoint: &Endpoint,
    roots: impl FnOnce(&TrustDomain) -> Option<Vec<CertificateDer<'static>>>,
) -> Result<Bundle, String> {
    let config = || match &endpoint.profile {
        Profile::Web { root_file } => web_pki(root_file.as_deref()),
        Profile::Spiffe { id } => {
            let domain = id.trust_domain();
            let roots = roots(domain).ok_or_else(|| {
                format!("there is no bundle of {domain} to verify the server with")
            })?;
            spiffe(id, roots).map_err(|error| error.to_string())
        }
    };
    let body = get(&endpoint.url.0, config, explain, MAX_BYTES, DEADLINE).await?;
    Bundle::parse(&body).map_err(|error| format!("the answer {error}"))
}

/// Verifies that the server is `id`.
fn spiffe(
    id: &SpiffeId,
    certificates: Vec<CertificateDer<'static>>,
) -> Result<ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate)?;
    }
    let provider = Arc::new(tls::provider());
    let verifier = IsServer {
        id: id.clone(),
        roots,
        provider: provider.clone(),
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    // Each fetch verifies the server with the latest bundle.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Accepts the X.509-SVID of one server.
#[derive(Debug)]
struct IsServer {
    id: SpiffeId,
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
}

/// The server is not the one that is expected.
#[derive(Debug, thiserror::Error)]
#[error("it is of {presented}, not of {expected}")]
struct OtherServer {
    presented: String,
    expected: String,
}

impl ServerCertVerifier for IsServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let presented = svid::spiffe_id(end_entity).map_err(tls::refused)?;
        if presented != self.id.as_str() {
            return Err(tls::refused(OtherServer {
                presented: presented.chars().take(256).collect(),
                expected: self.id.as_str().to_owned(),
            }));
        }
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not supported".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_bundle_endpoints() {
        for good in [
            "https://example.org/",
            "https://example.org:8443/bundle?x=1",
            "https://[fd00::1]:8443",
            "https://192.0.2.1/x",
        ] {
            assert_eq!(good.parse::<Url>().map(|_| ()), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("http://example.org/", "https"),
            ("example.org", "https"),
            ("/bundle", "https"),
            ("https:///bundle", "URL"),
            ("https://user@example.org/", "user"),
            ("https://user:pass@example.org/", "user"),
            ("https://a_b!/", "host"),
            ("spiffe://example.org/x", "https"),
            ("", "URL"),
        ] {
            let error = bad.parse::<Url>().unwrap_err();
            assert!(
                error.contains(why) || error.contains("DNS name"),
                "{bad}: {error}"
            );
        }
    }
}
