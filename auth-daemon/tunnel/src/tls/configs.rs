//! TLS configurations of a workload identity.

use std::sync::Arc;

use rustls::{
    ClientConfig, Error, NoKeyLog, ServerConfig,
    client::{ResolvesClientCert, Resumption, Tls12Resumption},
    crypto::{CryptoProvider, aws_lc_rs},
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use super::{trust::TrustStore, verifier::Verifier};
use crate::{hbone, secrets::TakeSecrets};

/// The ALPN protocol of the project's own framing (docs/WIRE.md).
pub const ALPN: &[u8] = b"auth-daemon/1";

/// Maximum number of servers for which an identity of this node keeps a session to resume.
const MAX_SESSIONS: usize = 1024;

/// TLS configurations of one workload identity, for both ends of a tunnel.
#[derive(Debug)]
pub struct Configs {
    /// For outbound connections of the workload's pods.
    pub client: Arc<ClientConfig>,
    /// For inbound connections to the workload's pods.
    pub server: Arc<ServerConfig>,
    /// For outbound connections by HBONE.
    pub hbone_client: Arc<ClientConfig>,
    /// For inbound connections by HBONE.
    pub hbone_server: Arc<ServerConfig>,
}

impl Configs {
    /// Builds configurations that present `key` and verify peers against `trust`: its roots and its revocations at the time
    /// of each handshake. A resumed session is not verified again, so build others when the roots change.
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
        // For our own record layer after the handshake.
        client.enable_secret_extraction = true;
        client.key_log = Arc::new(TakeSecrets);

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
        server.key_log = Arc::new(TakeSecrets);

        let mut hbone_client = client.clone();
        hbone_client.alpn_protocols = vec![hbone::ALPN.to_vec()];
        // One connection carries many streams, so sessions are not worth their memory. rustls keeps the records.
        hbone_client.resumption = Resumption::disabled();
        hbone_client.enable_secret_extraction = false;
        hbone_client.key_log = Arc::new(NoKeyLog);
        let mut hbone_server = server.clone();
        hbone_server.alpn_protocols = vec![hbone::ALPN.to_vec()];
        hbone_server.send_tls13_tickets = 0;
        hbone_server.enable_secret_extraction = false;
        hbone_server.key_log = Arc::new(NoKeyLog);

        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            hbone_client: Arc::new(hbone_client),
            hbone_server: Arc::new(hbone_server),
        })
    }
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
