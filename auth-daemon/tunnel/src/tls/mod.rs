//! TLS configuration: protocol version, cipher suites, certificates and peer verification.

pub mod crl;
pub mod svid;
pub mod trust;

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName,
    Error, InvalidMessage, OtherError, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption, Tls12Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use auth_mesh::TrustDomain;
use svid::Svid;
use trust::TrustStore;

/// The ALPN protocol of the project's own framing (docs/WIRE.md).
pub const ALPN: &[u8] = b"auth-daemon/1";

/// TLS configurations of one workload identity, for both ends of a tunnel.
#[derive(Debug)]
pub struct Configs {
    /// For outbound connections of the workload's pods.
    pub client: Arc<ClientConfig>,
    /// For inbound connections to the workload's pods.
    pub server: Arc<ServerConfig>,
}

/// Returns the cryptography provider. Prefers the TLS 1.3 cipher suite that is fastest on processors with AES-NI, and
/// post-quantum key exchange.
pub fn provider() -> CryptoProvider {
    use aws_lc_rs::{cipher_suite as suites, kx_group as groups};
    CryptoProvider {
        cipher_suites: vec![
            suites::TLS13_AES_128_GCM_SHA256,
            suites::TLS13_AES_256_GCM_SHA384,
            suites::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![groups::X25519MLKEM768, groups::X25519, groups::SECP256R1],
        ..aws_lc_rs::default_provider()
    }
}

/// Maximum number of certificates between a workload's certificate and the root. A client's chain is part of every
/// session ticket that it receives.
const MAX_INTERMEDIATES: usize = 8;

/// The chain has more than [`MAX_INTERMEDIATES`] intermediates.
#[derive(Debug, thiserror::Error)]
#[error(
    "its chain is too large: {0} certificates between it and the root, at most {MAX_INTERMEDIATES} are read"
)]
struct ChainTooLarge(usize);

/// Maximum number of servers for which an identity of this node keeps a session to resume.
const MAX_SESSIONS: usize = 1024;

impl Configs {
    /// Builds configurations that present `key` and verify peers against `trust`: its current roots, and its
    /// revocations at the time of each handshake.
    pub fn new(key: Arc<CertifiedKey>, trust: Arc<TrustStore>) -> Result<Self, Error> {
        let provider = Arc::new(provider());
        let verifier = Arc::new(Verifier::new(trust, provider.clone())?);
        let certificate = Arc::new(SingleCertAndKey::from(key));

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(certificate.clone() as Arc<dyn ResolvesClientCert>);
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.enable_sni = false;
        // Sessions are kept as long as this certificate is in use. A renewed certificate needs a full handshake with
        // each server.
        client.resumption = Resumption::in_memory_sessions(MAX_SESSIONS)
            .tls12_resumption(Tls12Resumption::Disabled);
        // The keys are extracted for our own record layer after the handshake.
        client.enable_secret_extraction = true;

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(certificate);
        server.alpn_protocols = vec![ALPN.to_vec()];
        // The server keeps no state for clients that may never return. The encrypted ticket holds the whole session.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.ticketer = aws_lc_rs::Ticketer::new()?;
        // More than one, so that a burst of new tunnels soon has enough tickets.
        server.send_tls13_tickets = 2;
        server.enable_secret_extraction = true;

        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }
}

/// Verifies workload certificates of one trust domain: the chain to one of its roots, and the SVID. The caller
/// authorizes the identity after the handshake.
#[derive(Debug)]
struct Verifier {
    trust: Arc<TrustStore>,
    trust_domain: TrustDomain,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(trust: Arc<TrustStore>, provider: Arc<CryptoProvider>) -> Result<Self, Error> {
        let bundle = &trust.current().bundle;
        let mut roots = RootCertStore::empty();
        for root in &bundle.roots {
            roots.add(root.clone())?;
        }
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(Self {
            trust_domain: bundle.trust_domain.clone(),
            trust,
            roots,
            clients,
            provider,
        })
    }

    fn check_svid(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), Error> {
        if intermediates.len() > MAX_INTERMEDIATES {
            let error = ChainTooLarge(intermediates.len());
            return Err(CertificateError::Other(OtherError(Arc::new(error))).into());
        }
        let svid = Svid::parse(leaf, self.trust_domain.as_str())
            .map_err(|error| CertificateError::Other(OtherError(Arc::new(error))))?;
        self.trust
            .current()
            .revoked
            .check(&svid)
            .map_err(|revoked| CertificateError::Other(OtherError(Arc::new(revoked))).into())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // Check the certificate's content first, because that gives a more specific error than an invalid chain.
        self.check_svid(end_entity, intermediates)?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )
        .map_err(chain_error)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.clients
            .verify_tls13_signature(message, certificate, signature)
            .map_err(|error| match error {
                Error::InvalidCertificate(CertificateError::BadSignature) => {
                    CertificateError::Other(OtherError(Arc::new(NotTheHolder))).into()
                }
                error => error,
            })
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client has only one certificate to present. Root names would only disclose information to unauthenticated
        // peers.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check_svid(end_entity, intermediates)?;
        self.clients
            .verify_client_cert(end_entity, intermediates, now)
            .map_err(chain_error)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

/// The peer presented a certificate without holding its private key.
#[derive(Debug, thiserror::Error)]
#[error("the peer does not hold the key of the certificate that it shows")]
struct NotTheHolder;

/// Maps webpki's own chain errors (a leaf that signs, a loop, too many certificates) to an unknown issuer, because each
/// of them means that the chain does not lead to a trusted root.
fn chain_error(error: Error) -> Error {
    match error {
        Error::InvalidCertificate(CertificateError::Other(_)) => {
            CertificateError::UnknownIssuer.into()
        }
        error => error,
    }
}

/// Explains a handshake error to an operator, with what to check next.
pub fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(why))) => {
            format!("the peer's certificate is refused: {why}")
        }
        Error::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => {
            format!(
                "the peer's certificate is not valid yet: it begins {} after this node's clock; \
                 compare the clocks (NTP) of both nodes",
                difference(*not_before, *time)
            )
        }
        Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => format!(
            "the peer's certificate has expired: it ended {} before this node's clock; \
             is its renewal failing, or are the clocks (NTP) of the nodes apart?",
            difference(*time, *not_after)
        ),
        // A root with the same name but another key shows as an invalid signature.
        Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "the peer's certificate is not issued by this trust domain's CA".into(),
        Error::InvalidCertificate(
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
        ) => "the peer's certificate lacks the extended key usage for its side: servers need serverAuth, clients \
              clientAuth"
            .into(),
        Error::PeerIncompatible(why) => {
            format!("the peer does not speak TLS 1.3 in a way that is accepted here: {why:?}")
        }
        Error::InvalidMessage(
            InvalidMessage::HandshakePayloadTooLarge | InvalidMessage::MessageTooLarge,
        ) => "the peer's handshake is too large".into(),
        Error::InvalidCertificate(why) => format!("the peer's certificate is refused: {why:?}"),
        Error::NoCertificatesPresented => "the peer presents no certificate".into(),
        Error::AlertReceived(alert) => explain_alert(*alert),
        other => other.to_string(),
    }
}

/// Checks by the local clock that a certificate with the expiry `not_after` has not expired. Session resumption does
/// not check it.
pub fn check_not_expired(not_after: SystemTime) -> Result<(), Error> {
    let now = SystemTime::now();
    if not_after > now {
        return Ok(());
    }
    let at = |time| UnixTime::since_unix_epoch(Duration::from_secs(unix_seconds(time)));
    Err(Error::InvalidCertificate(
        CertificateError::ExpiredContext {
            time: at(now),
            not_after: at(not_after),
        },
    ))
}

/// Explains an alert that the peer sent.
pub fn explain_alert(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateExpired => {
            "the peer refuses our certificate as expired or not valid yet: compare the clocks (NTP) of both nodes"
                .into()
        }
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            format!("the peer refuses our certificate ({alert:?}): is its node of another trust domain or CA?")
        }
        AlertDescription::CertificateUnknown | AlertDescription::CertificateRevoked => {
            "the peer does not take our certificate; is it revoked? Its node's log says why".into()
        }
        alert => format!("the peer refuses the handshake: {alert:?}"),
    }
}

fn difference(later: UnixTime, earlier: UnixTime) -> String {
    let seconds = later.as_secs().saturating_sub(earlier.as_secs());
    match seconds {
        0..120 => format!("{seconds} seconds"),
        120..7200 => format!("{} minutes", seconds / 60),
        _ => format!("{} hours", seconds / 3600),
    }
}

/// Formats `seconds` since the Unix epoch according to RFC 3339.
pub fn rfc3339(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("{seconds} s after 1970"))
}

/// Converts `time` to seconds since the Unix epoch.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs()
}
